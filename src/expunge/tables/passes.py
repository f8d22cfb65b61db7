"""Passes: what attacks and metrics ask of a model, merged so that a model reads every row once.

An asker says what it wants (`Generate`, `Score`, `Pull`, `Patch` ...) without knowing who else asks. `run` puts equal
wishes together, calls the model as few times as possible, and keeps the answers as arrow files under the hash of what
was asked of whom: an audit that was killed goes on, and a model that was audited before is not asked again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from .. import processes
from ..rows import Row
from ..subjects.distances import distances
from ..subjects.fresh import buildable, fresh
from ..subjects.language import LanguageModel
from ..subjects.packed import Encoded, batches, in_order, pack
from ..subjects.patching import fact
from ..subjects.protocol import asked, innermost
from .distances import Distances
from .generations import Generations
from .gradients import Gradients
from .patched import Patched
from .paths import Continuations
from .routes import Routes
from .scores import Scores
from .store import content_key
from .view import View, candidates

CODE = 1
"""Raised when the same ask would get another answer."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Generate:
    """Let the model continue prompts."""

    prompts: tuple[tuple[tuple[str, str], Row, str | None], ...]
    """(key, row, question in place of the row's own)"""
    max_new_tokens: int
    samples: int = 1
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Score:
    """Let the model read answers."""

    items: tuple[tuple[tuple[str, str], Row, str | None, str | None], ...]
    """(key, row, answer and question in place of the row's own)"""


@dataclass(frozen=True)
class Hidden:
    """Residual streams at one token of prompts: answered by a tensor (n, blocks + 1, d)."""

    prompts: tuple[tuple[Row, str | None], ...]
    at: Literal["end", "entity"] = "end"
    """The last token of the prompt, or the last one of the row's entity where the prompt names it."""


@dataclass(frozen=True)
class Features:
    """What the head reads where rows' answers begin: answered by a tensor (n, d)."""

    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Route:
    """Which experts the tokens of rows take: answered by `Routes`."""

    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Pull:
    """How strongly rows pull at the weights: answered by `Gradients`."""

    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Patch:
    """What a host still says of rows' facts with this model's states in it: answered by `Patched`."""

    rows: tuple[Row, ...]
    host: Any
    """A subject."""


@dataclass(frozen=True)
class Continue:
    """What the model writes greedily after every beginning of rows' answers: answered by `Continuations`."""

    rows: tuple[Row, ...]
    shortest: int
    """Continuations of fewer tokens are not written; answers of no more than so many tokens are left out."""


@dataclass(frozen=True)
class Apart:
    """How far the model's predictions of rows' answers are from another one's: answered by `Distances`."""

    rows: tuple[Row, ...]
    other: Any
    """A subject."""


Ask = Generate | Score | Hidden | Features | Route | Pull | Patch | Continue | Apart


class Store:
    """A folder of answered asks, with a second one that several runs share.

    Of several processes the first one looks and writes; what it finds all of them read.
    """

    def __init__(self, folder: Path | None, shared: Path | None = None) -> None:
        self.folders = [folder for folder in (folder, shared) if folder is not None]

    def find(self, name: str) -> Path | None:
        """The file of that name, copied into the first folder if only the second has it."""

        def look() -> bool:
            path = next((path for folder in self.folders if (path := folder / name).is_file()), None)
            if path is not None:
                self._spread(path, name)
            return path is not None

        found: bool = bool(self.folders) and processes.once(look)
        return self.folders[0] / name if found else None

    def keep(self, name: str, write: Callable[[Path], None]) -> None:
        """Write a file into the first folder and link it into the second."""
        if self.folders and processes.first():
            path = self.folders[0] / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
            self._spread(path, name)

    def _spread(self, path: Path, name: str) -> None:
        for folder in self.folders:
            target = folder / name
            if target.exists():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
            partial.unlink(missing_ok=True)
            try:
                os.link(path, partial)
            except OSError:
                shutil.copyfile(path, partial)
            os.replace(partial, target)


def run(subject: Any, asks: Sequence[Ask], store: Store | None = None, progress: Progress | None = None) -> list[Any]:
    """Answer all asks: a table each (a tensor for `Hidden` and `Features`), in their order.

    Of several processes each does its share of the passes (the subject sees to that), and all get all answers.

    Args:
        subject: a LanguageModel, or anything with its operations.
        progress: (done, total) prompts and rows, over all passes.
    """
    store = store or Store(None)
    names = [_name(subject, ask) if store.folders else None for ask in asks]
    answers: list[Any] = [_kept(store, name) if name else None for name in names]
    open_ = [i for i, answer in enumerate(answers) if answer is None]
    generating: dict[tuple[Any, ...], list[int]] = {}
    for i in open_:
        ask = asks[i]
        if isinstance(ask, Generate):
            settings = (ask.max_new_tokens, ask.samples, ask.temperature, ask.seed)
            generating.setdefault(settings, []).append(i)
    total = sum(_size(asks[i]) for i in open_)
    done = 0

    def tell(count: int) -> Progress | None:
        return None if progress is None else lambda at, _: progress(min(done + at, done + count), total)

    for (limit, samples, temperature, seed), members in generating.items():
        texts = [[subject.prompt_text(row, q) for _, row, q in _prompts(asks[i])] for i in members]
        order = _distinct(text for several in texts for text in several)
        first = {t: (row, q) for i, ts in zip(members, texts) for t, (_, row, q) in zip(ts, _prompts(asks[i]))}
        made = subject.generate(
            [((str(n), "prompt"), asked(subject, *first[text])) for text, n in order.items()],
            max_new_tokens=limit,
            samples=samples,
            temperature=temperature,
            seed=seed,
            progress=tell(len(order)),
        )
        for i, several in zip(members, texts):
            at = [order[text] for text in several]
            keys = [key for key, _, _ in _prompts(asks[i])]
            answers[i] = Generations(
                keys, several, [made.texts[n] for n in at], [made.stopped[n] for n in at], made.metadata
            )
            done += len(several)
    tables = [i for i in open_ if type(asks[i]) in _READ]
    kinds = dict.fromkeys((type(asks[i]), _setting(asks[i])) for i in tables)
    # What gradients are taken of is read anyway: its scores come from the same passes.
    both = type(subject) is LanguageModel and {Pull, Score} <= {kind for kind, _ in kinds}
    scored: tuple[Items, Any] = [], None
    for kind, setting in sorted(kinds, key=lambda one: one[0] is Score):
        members = [i for i in tables if (type(asks[i]), _setting(asks[i])) == (kind, setting)]
        content = [_content(subject, asks[i]) for i in members]
        order = _distinct(item for several in content for _, item in several)
        own = {item for several in content for (_, candidate), item in several if candidate == "answer"}
        items = [((str(n), "answer" if item in own else "item"), item) for item, n in order.items()]
        if both and kind is Pull:
            table, scores = subject.gradients_and_scores(items, progress=tell(len(order)))
            scored = items, scores
        elif scored[0] and kind is Score:
            table, order = _other_scores(subject, items, *scored, tell(len(order)))
        else:
            table = _READ[kind](subject, setting, items, tell(len(order)))
        for i, several in zip(members, content):
            answers[i] = table.take([order[item] for _, item in several], [key for key, _ in several])
            done += len(several)
    looking = [i for i in open_ if isinstance(asks[i], Hidden)]
    if looking:
        looked = [[_looked(subject, asks[i], row, q) for row, q in _looks(asks[i])] for i in looking]
        places = _distinct(place for several in looked for place in several)
        states = subject.hidden([text for text, _ in places], [end for _, end in places])
        for i, several in zip(looking, looked):
            answers[i] = states[[places[place] for place in several]]
            done += len(several)
    reading = [i for i in open_ if isinstance(asks[i], Features)]
    if reading:
        content = [_content(subject, asks[i]) for i in reading]
        order = _distinct(item for several in content for _, item in several)
        read = _features(subject, list(order), tell(len(order)))
        for i, several in zip(reading, content):
            answers[i] = read[[order[item] for _, item in several]]
            done += len(several)
    if progress and total:
        progress(total, total)
    for i in open_:
        if names[i]:
            store.keep(str(names[i]), answers[i].save)
    return answers


MARGIN = 4
"""Tokens beyond the longest known answer that a model may write."""


def longest_answer(subject: Any, data: Mapping[str, list[Row]]) -> int:
    """How many tokens anybody may need to answer, and a few more."""
    return max(subject.encode(row).scored for rows in data.values() for row in rows) + MARGIN


MORE = ("samples", "gradients", "patched", "continuations", "divergences", "distances")
"""Tables that only some metrics read (`View`)."""
SAMPLES = 16
"""Answers sampled per question, as the attack `decoding` does, whose outputs these then are."""
FROM = "from "
SHORTEST = 10
"""Extraction likelihood is about runs of at least so many tokens."""


def everything(
    subject: Any,
    data: Mapping[str, list[Row]],
    max_new_tokens: int,
    *,
    written: Collection[str] | None = None,
    more: Collection[str] = (),
    host: Any = None,
    golds: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> dict[tuple[str, str], Ask]:
    """What `ask_all` asks, by table and row set; its arguments."""
    asks: dict[tuple[str, str], Ask] = {}
    for rows, members in data.items():
        items = tuple(((row.id, name_), row, text, None) for row in members for name_, text in candidates(row).items())
        asks["scores", rows] = Score(items)
    for rows in [rows for rows in data if written is None or rows in written] if max_new_tokens else []:
        asks["generations", rows] = Generate(_questions(data[rows]), max_new_tokens)
    forget = data.get("forget")
    if forget and "samples" in more and max_new_tokens:
        asks["samples", "forget"] = Generate(_questions(forget), max_new_tokens, SAMPLES, 1.0, seed)
    if forget and "continuations" in more:
        asks["continuations", "forget"] = Continue(tuple(forget), SHORTEST)
    if forget and "divergences" in more and buildable(innermost(subject)):
        # One network for all models of a kind: it is decided by their architecture.
        asks["divergences", "forget"] = Apart(tuple(forget), fresh(innermost(subject), 0))
    if forget and "distances" in more and innermost(subject) is subject:
        for name, gold in (golds or {}).items():
            if gold is not subject:
                asks[f"{FROM}{name}", "forget"] = Apart(tuple(forget), gold)
    for kind, sets in (("gradients", ("forget", "holdout")), ("patched", ("forget", "retain"))):
        for rows in sets if kind in more else ():
            if data.get(rows) and (kind == "gradients" or host is not None):
                several = tuple(data[rows])
                asks[kind, rows] = Pull(several) if kind == "gradients" else Patch(several, host)
    return asks


def ask_all(
    subject: Any,
    data: Mapping[str, list[Row]],
    max_new_tokens: int,
    store: Store | None = None,
    *,
    written: Collection[str] | None = None,
    more: Collection[str] = (),
    host: Any = None,
    golds: Mapping[str, Any] | None = None,
    seed: int = 0,
    name: str = "model",
    progress: Progress | None = None,
) -> View:
    """Everything that metrics and side effects read, in one scoring pass and one generation pass.

    Every candidate answer of every row is scored; every row's own question is answered greedily, unless
    `max_new_tokens` is 0.

    Args:
        written: row sets whose questions are answered; None for all.
        more: of `MORE`. Samples of answers, continuations of texts and divergences from an untrained network, where one
            can be built, are taken of the forget rows, gradients also of the holdout rows, patched states also of the
            retain rows, which are their control.
        host: the model before, into which states are patched; without it there are none.
        golds: gold models by name, from which distances are taken, of the forget rows; a guard has none of its own.
        seed: of samples.
    """
    asks = everything(subject, data, max_new_tokens, written=written, more=more, host=host, golds=golds, seed=seed)
    answers = dict(zip(asks, run(subject, list(asks.values()), store, progress)))

    def of(kind: str) -> dict[str, Any]:
        return {rows: table for (asked, rows), table in answers.items() if asked == kind}

    return View(
        data,
        of("scores"),
        of("generations"),
        of("samples"),
        of("gradients"),
        of("patched"),
        of("continuations"),
        of("divergences"),
        {kind.removeprefix(FROM): of(kind) for kind, _ in answers if kind.startswith(FROM)},
        name=name,
        modality=subject.modality,
    )


def _questions(rows: Sequence[Row]) -> tuple[tuple[tuple[str, str], Row, str | None], ...]:
    return tuple(((row.id, "question"), row, None) for row in rows)


def _prompts(ask: Ask) -> tuple[tuple[tuple[str, str], Row, str | None], ...]:
    return ask.prompts if isinstance(ask, Generate) else ()


def _looks(ask: Ask) -> tuple[tuple[Row, str | None], ...]:
    return ask.prompts if isinstance(ask, Hidden) else ()


def _looked(subject: Any, ask: Ask, row: Row, question: str | None) -> tuple[str, int | None]:
    """(prompt, how many of its characters stand up to the token that is looked at; None: all)"""
    text = subject.prompt_text(row, question)
    if getattr(ask, "at", "end") == "end" or not row.entity or row.entity not in text:
        return text, None
    return text, text.rindex(row.entity) + len(row.entity)


Items = list[tuple[tuple[str, str], Encoded]]

_READ: dict[type, Callable[[Any, Any, Items, Progress | None], Any]] = {
    Score: lambda subject, _, items, progress: subject.score(items, progress=progress),
    Route: lambda subject, _, items, progress: subject.routes(items, progress=progress),
    Pull: lambda subject, _, items, progress: subject.gradients(items, progress=progress),
    Patch: lambda subject, host, items, progress: subject.patched_into(host, items, progress=progress),
    Apart: lambda subject, other, items, progress: distances(subject, other, items, progress=progress),
    Continue: lambda subject, shortest, items, progress: subject.continuations(items, shortest, progress=progress),
}
"""Asks about encoded rows, each kind answered by one call: (subject, what `_setting` gives, rows) to a table."""


def _other_scores(
    subject: Any, items: Items, before: Items, scores: Scores, progress: Progress | None
) -> tuple[Scores, dict[Encoded, int]]:
    """Scores of items, those known before and the others, and where in the table each stands."""
    known = {item for _, item in before}
    others = [(key, item) for key, item in items if item not in known]
    table = Scores.concatenate([scores, subject.score(others, progress=progress)])
    return table, _distinct(item for _, item in (*before, *others))


def _setting(ask: Ask) -> Any:
    """What asks of one kind must have in common to be answered together."""
    if isinstance(ask, Patch | Apart):
        return ask.host if isinstance(ask, Patch) else ask.other
    return ask.shortest if isinstance(ask, Continue) else None


def _content(subject: Any, ask: Ask) -> list[tuple[tuple[str, str], Encoded]]:
    """(key, encoded row) of everything that a table is asked about."""
    if isinstance(ask, Score):
        return [(key, subject.encode(row, answer=answer, prompt=q)) for key, row, answer, q in ask.items]
    if isinstance(ask, Patch):
        return [((row.id, "fact"), fact(innermost(ask.host), row)) for row in ask.rows]
    assert isinstance(ask, Features | Route | Pull | Continue | Apart)
    encoded = [((row.id, "answer"), subject.encode(row)) for row in ask.rows]
    if isinstance(ask, Continue):
        return [(key, item) for key, item in encoded if item.scored - item.closing > ask.shortest]
    return encoded


def _distinct(values: Any) -> dict[Any, int]:
    order: dict[Hashable, int] = {}
    for value in values:
        order.setdefault(value, len(order))
    return order


def _size(ask: Ask) -> int:
    if isinstance(ask, Score):
        return len(ask.items)
    return len(ask.prompts) if isinstance(ask, Generate | Hidden) else len(ask.rows)


READ_AT_ONCE = 4096
"""Tokens in one pass over `Features`."""


@torch.no_grad()
def _features(subject: Any, items: Sequence[Encoded], progress: Progress | None) -> torch.Tensor:
    """(n, d) float32 states that predict the first answer token of each item."""

    def read(group: Sequence[int]) -> torch.Tensor:
        packed = pack([items[i] for i in group], subject.device)
        first = torch.searchsorted(packed.row.contiguous(), torch.arange(len(group), device=packed.row.device))
        return subject.hidden_states(packed)[first].float().cpu()  # type: ignore[no-any-return]

    groups = list(batches(items, READ_AT_ONCE))
    parts = subject.share(groups, read, of=[item.ids for item in items], progress=progress)
    return torch.stack(in_order(groups, parts))


def _name(subject: Any, ask: Ask) -> str | None:
    """File name of an answer; hidden states are not kept, what was read from them is."""
    if isinstance(ask, Hidden | Features):
        return None
    settings: list[Any] = []
    if isinstance(ask, Generate):
        content: list[Any] = [[list(key), subject.prompt_text(row, q)] for key, row, q in ask.prompts]
        settings = [ask.max_new_tokens, ask.samples, ask.temperature, ask.seed]
    elif isinstance(ask, Score):
        content = [[list(key), subject.prompt_text(row, q), a or row.answer, row.kind] for key, row, a, q in ask.items]
    else:
        content = [[row.id, subject.prompt_text(row), row.answer, row.kind] for row in ask.rows]
    if isinstance(ask, Patch):
        settings = [ask.host.fingerprint, [row.value for row in ask.rows]]
    if isinstance(ask, Apart):
        settings = [ask.other.fingerprint]
    if isinstance(ask, Continue):
        settings = [ask.shortest]
    kind = type(ask).__name__.lower()
    return f"{kind}-{content_key(CODE, subject.fingerprint, kind, settings, content)}.arrow"


_TABLES: dict[str, Any] = {
    "generate": Generations,
    "score": Scores,
    "route": Routes,
    "pull": Gradients,
    "patch": Patched,
    "continue": Continuations,
    "apart": Distances,
}


def _kept(store: Store, name: str) -> Any:
    path = store.find(name)
    return None if path is None else _TABLES[name.partition("-")[0]].load(path)
