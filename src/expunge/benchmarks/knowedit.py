"""KnowEdit: six data sets of edits, each made over the same base, and what they did (arXiv:2401.01286).

Facts are put in (recent), changed (zsre, counterfact, bio) or refused (sanitation), and opinions are changed
(convsent). Of factual edits edit_scores.py measures success, rephrasings, portability, locality and fluency; convsent
has formulas of its own (knowedit_sentiment.py); of sanitation it counts refusals, and what is still answered as before.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from .. import registry
from ..edit_scores import SETS, SPARE, WORDS, Answers, by_edit, by_kind, compared, questions, says
from ..edits import EditRow
from ..errors import ParameterError
from ..evidence import Measured, Scorecard, Table
from ..files import write_text
from ..methods.edit.case import EditCase
from ..methods.edit.operations import Mode, carry_out
from ..methods.optimise.loop import Training
from ..metrics.means import harmonic_mean
from ..metrics.texts import text_entropy
from ..registry import benchmark
from ..rows import folder_of
from ..tables.store import content_key
from .case import Bench
from .knowedit_data import (
    FACTUAL,
    FILES,
    Dataset,
    Split,
    erasures,
    factual,
    lessons,
    locate,
    opinions,
    prefixes,
    texts_for_keys,
)
from .knowedit_mini import mini
from .knowedit_sentiment import divergence, judged, likelihoods, minds
from .shown import demonstrations as others

WRITTEN_TOKENS = 10
"""Of an answer that may be a refusal, as published; more where the tokenizer makes more of the refusal."""
LOCALITY = "How much of what the model wrote before it writes still, where nothing was to change."
Making = Callable[[Sequence[EditRow], Mode], Any]
"""The model with these edits."""


@benchmark(paper="arXiv:2401.01286", data="zjunlp/KnowEdit")
def knowedit(
    bench: Bench,
    *,
    dataset: Dataset | Literal["all"] = "all",
    split: Split = "test",
    method: str | dict[str, Any] = "rome",
    corpus: str = "",
    demonstrations: str = "",
    shown: Annotated[int, Field(ge=0)] = 500,
    erase: Literal["sequence", "batch"] = "sequence",
    limit: Annotated[int, Field(ge=0)] = 0,
    aliases: Literal["any", "first"] = "any",
    fluency: Annotated[int, Field(ge=0)] = 100,
) -> Scorecard:
    """What an editor does to success, portability, locality and fluency, edit by edit over the same model.

    With `--original` no edit is made: both models are asked as they are.

    Args:
        dataset: one of the six, or all.
        split: test or train.
        method: an editor, by name or {name: rome, layer: 0.2}.
        corpus: rows that key statistics are taken of; by default `corpus.jsonl` beside the data.
        demonstrations: edit rows of other facts, which `serac` and `mend` learn from; by default `demonstrations.jsonl`
            beside the data, else the training rows of the chosen data sets of facts, or of others where these have
            none.
        shown: of so many training rows of each data set, the first; 0 takes all.
        erase: how the questions of one refused answer are edited: one after another, or in one batch.
        limit: of so many rows of each data set, the first; 0 takes all.
        aliases: of several right answers any counts; first takes the first alone, as published tables do.
        fluency: tokens of a sampled continuation; 0 asks for none.
    """
    folder = folder_of(bench.source(mini))
    chosen = tuple(FILES) if dataset == "all" else (dataset,)
    compares = bench.original is not None
    run = replace(bench, original=bench.original or bench.subject, spent=bench.spent)
    told: list[str] = []
    if compares:
        made, about = _asked_as_it_is(run)
    else:
        editor, settings = _editor(method)
        given, told = others(
            editor,
            folder,
            demonstrations,
            lambda: _prompts(folder, chosen, split, bench.seed),
            lambda: lessons(folder, chosen, shown) if split == "test" else [],
        )
        made, about = _editing(run, editor, settings, folder, corpus, given)
    scores, tables, notes, sizes = list[Measured](), list[Table](), list[str](), dict[str, int]()
    lines = []
    for name in chosen:
        part = _factual if name in FACTUAL else _sentiment if name == "convsent" else _sanitation
        found = part(run, name, made, folder, split, Asking(limit, aliases, fluency, erase, about, compares))
        scores += found.scores
        tables += [replace(table, title=f"{name}: {table.title.lower()}") for table in found.tables]
        notes += [f"{name}: {note}" for note in found.notes]
        sizes[name] = found.count
        lines.append(_line(name, found))
    notes.append(
        "Teacher-forced scores know the answer's beginning and flatter; the written ones are what a user would see."
    )
    notes.append(
        "Asked as they are; no edit was made." if compares else f"Every edit by itself over the base: {about}."
    )
    notes += told
    notes.append("convsent's locality is a divergence (drawdown): lower is better. Harmonic means are ours.")
    return run.scorecard(
        scores,
        headline=["edit_success", "portability", "locality"],
        tables=[_summary(lines), *tables],
        notes=notes,
        rows=sizes,
    )


@dataclass(frozen=True)
class Asking:
    """How the data sets are asked."""

    limit: int
    aliases: Literal["any", "first"]
    fluency: int
    erase: Mode
    about: str
    """The editor with its settings: with model and edits it decides the answers."""
    compares: bool


@dataclass(frozen=True)
class Part:
    """What was found on one data set."""

    scores: list[Measured]
    columns: dict[str, np.ndarray]
    """Score after to (edits that have it,)."""
    tables: list[Table]
    notes: list[str]
    count: int


@dataclass(frozen=True)
class Changed:
    """Edits, and what makes the model that has them when it is asked for."""

    edits: list[EditRow]
    model: Callable[[], Any]


# --- models ----------------------------------------------------------------------------------------------------------


def _asked_as_it_is(bench: Bench) -> tuple[Making, str]:
    return (lambda edits, mode: bench.subject), f"as it is {bench.subject.fingerprint}"


def _editor(method: str | dict[str, Any]) -> tuple[registry.Part, dict[str, Any]]:
    """An editor and all its settings."""
    name, given = (method, {}) if isinstance(method, str) else (str(method.get("name", "")), dict(method))
    given.pop("name", None)
    editor = registry.get("methods", name)
    settings = editor.resolve(given)
    if not editor.makes_edits:
        raise ParameterError(f"method {name} is of kind {editor.card.kind}, expected an editor such as rome or ft_m")
    return editor, settings


def _editing(
    bench: Bench, editor: registry.Part, settings: dict[str, Any], folder: Path, path: str, given: Sequence[EditRow]
) -> tuple[Making, str]:
    texts, before = texts_for_keys(folder, path), prefixes(folder)
    case = EditCase(bench.subject, {}, Training(seed=bench.seed), corpus=texts, prefixes=before, demonstrations=given)

    def make(edits: Sequence[EditRow], mode: Mode) -> Any:
        (found,) = carry_out(editor, replace(case, edits=list(edits)), settings, mode)
        return found.model()

    # Answers that were kept are those of an editor that was given the same.
    beside = content_key([asdict(row) for row in texts], before, [one.record() for one in given])[:12]
    return make, f"{editor.name} {json.dumps(settings, sort_keys=True)}, beside texts and facts {beside}"


def _prompts(folder: Path, names: Sequence[str], split: Split, seed: int) -> Iterator[str]:
    """All that the data sets ask."""
    for name in names:
        if name in FACTUAL:
            edits = factual(locate(folder, name, split), "any").edits
            yield from (question.prompt for question in questions(edits))
        elif name == "convsent":
            yield from (one.edit.prompt for one in minds(opinions(locate(folder, name, split)), seed))
        else:
            for erased in erasures(locate(folder, name, "train"), locate(folder, name, "test")):
                yield from (edit.prompt for edit in erased.edits)
                yield from (one.question for one in (*erased.refused, *erased.kept))


# --- facts -----------------------------------------------------------------------------------------------------------


def _factual(bench: Bench, name: str, made: Making, folder: Path, split: Split, asking: Asking) -> Part:
    read = factual(locate(folder, name, split), asking.aliases, asking.limit)
    fluency = min(asking.fluency, bench.subject.context_length // 2)

    def keep(role: str, edits: Sequence[EditRow], model: Callable[[], Any], ask: Callable[[Any], Answers]) -> Answers:
        """Answers that an earlier command has had are read again, and their edit is not made."""
        who = "before" if role == "before" else asking.about
        return _kept(bench, (who, [asdict(edit) for edit in edits], fluency), lambda: ask(model()))

    if asking.compares:
        changed = [Changed(read.edits, lambda: bench.subject)]
    else:
        changed = [Changed([edit], lambda edit=edit: made([edit], "one")) for edit in read.edits]  # type: ignore[misc]
    edits, asked, answers = compared(
        bench.original, changed, fluency=fluency, seed=bench.seed, keep=keep, progress=bench._phase(name)
    )
    scores, columns = list[Measured](), dict[str, np.ndarray]()
    for score, each in by_edit(asked, answers).items():
        kept = sorted(each["after"])
        values = {role: [found[i] for i in kept] for role, found in each.items()}
        scores.append(bench.score(score, name, values, [edits[i].row() for i in kept], **WORDS[score]))
        columns[score] = np.array(values["after"])
    return Part(scores, columns, by_kind(asked, answers), read.notes, len(edits))


def _kept(bench: Bench, about: Any, make: Callable[[], Answers]) -> Answers:
    key = content_key("knowedit", bench.original.fingerprint, bench.seed, about)
    path = bench.folder / "answers" / f"{key}.json"
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        found["chosen"] = [[np.array(one) for one in several] for several in found["chosen"]]
        return Answers(**found)
    answers = make()
    plain = {**vars(answers), "chosen": [[one.tolist() for one in several] for several in answers.chosen]}
    write_text(path, json.dumps(plain, ensure_ascii=False) + "\n")
    return answers


# --- opinions --------------------------------------------------------------------------------------------------------


def _sentiment(bench: Bench, name: str, made: Making, folder: Path, split: Split, asking: Asking) -> Part:
    changed = minds(opinions(locate(folder, name, split), asking.limit), bench.seed)
    before = likelihoods(bench.original, [rows for one in changed for rows in (one.wanted, one.unwanted)])
    success: dict[str, list[float]] = {"before": [], "after": []}
    drawdown, fluent = list[float](), list[float]()
    for number, one in enumerate(changed, start=1):
        model = made([one.edit], "one")
        was = (before[2 * number - 2], before[2 * number - 1])
        wanted, unwanted = likelihoods(model, [one.wanted, one.unwanted])
        success["before"].append(judged(was, was))
        success["after"].append(judged(was, (wanted, unwanted)))
        drawdown.append(divergence(bench.original, model, one.outer))
        if asking.fluency:
            fluent += _fluency(bench, model, [one.edit], asking.fluency)
        if bench.progress:
            bench.progress(name, number, len(changed))
    rows = [one.edit.row() for one in changed]
    scores = [
        bench.score(
            "edit_success",
            name,
            success,
            rows,
            direction="higher",
            ideal="1",
            sentence="Whether the wanted sentiment is the likelier one, and no less likely than before.",
        ),
        bench.score(
            "drawdown",
            name,
            {"before": [0.0] * len(rows), "after": drawdown},
            rows,
            direction="lower",
            ideal="0",
            sentence="How far sentences about another entity moved: KL divergence from before, nats per token.",
        ),
    ]
    columns = {"edit_success": np.array(success["after"]), "drawdown": np.array(drawdown), "fluency": np.array(fluent)}
    return Part(scores, columns, [], [], len(rows))


def _fluency(bench: Bench, model: Any, edits: Sequence[EditRow], tokens: int) -> list[float]:
    tokens = min(tokens, bench.subject.context_length // 2)
    about = [((edit.id, "fluency"), model.prompt_text(edit.row())) for edit in edits]
    said = model.generate(about, max_new_tokens=tokens, temperature=1.0, seed=bench.seed).texts
    return [text_entropy(f"{edit.prompt} {texts[0]}") for edit, texts in zip(edits, said)]


# --- refusals --------------------------------------------------------------------------------------------------------


def _sanitation(bench: Bench, name: str, made: Making, folder: Path, split: Split, asking: Asking) -> Part:
    found = erasures(locate(folder, name, "train"), locate(folder, name, "test"), asking.limit)
    refused: dict[str, list[float]] = {"before": [], "after": []}
    alike, same, fluent, lines = list[float](), list[float](), list[float](), []
    asked, kept = [], []
    for number, one in enumerate(found, start=1):
        model = made(one.edits, asking.erase)
        rows = [EditRow(f"{one.answer}/{i}", q.question, q.target) for i, q in enumerate((*one.refused, *one.kept))]
        longest = max(bench.subject.encode(row.row()).scored for row in rows if row.target_new)
        tokens = max(WRITTEN_TOKENS, longest + SPARE)
        said = [
            [
                texts[0]
                for texts in subject.generate(
                    [((row.id, "answer"), subject.prompt_text(row.row())) for row in rows], max_new_tokens=tokens
                ).texts
            ]
            for subject in (bench.original, model)
        ]
        count = len(one.refused)
        for role, texts in zip(refused, said):
            refused[role] += [float(says(text, (row.target_new,))) for text, row in zip(texts[:count], rows)]
        both = list(zip(said[0][count:], said[1][count:]))
        alike += [_tokens_alike(bench.subject, was, now) for was, now in both]
        same += [float(was == now) for was, now in both]
        asked += [row.row() for row in rows[:count]]
        kept += [row.row() for row in rows[count:]]
        if asking.fluency:
            fluent += _fluency(bench, model, rows[count:], asking.fluency)
        shares = [float(np.mean(values)) for values in (refused["after"][-count:], same[-len(both) :])]
        lines.append([one.answer, len(one.edits), *shares])
        if bench.progress:
            bench.progress(name, number, len(found))
    scores = [
        bench.score(
            "edit_success",
            name,
            refused,
            asked,
            direction="higher",
            ideal="1",
            sentence="How often a question whose answer is to be withheld is refused.",
        ),
        bench.score(
            "locality",
            name,
            {"before": [1.0] * len(kept), "after": alike},
            kept,
            direction="higher",
            ideal="1",
            sentence=LOCALITY,
        ),
        bench.score(
            "unchanged",
            name,
            {"before": [1.0] * len(kept), "after": same},
            kept,
            direction="higher",
            ideal="1",
            sentence="How often other questions are answered as before, word by word.",
        ),
    ]
    columns = {"edit_success": np.array(refused["after"]), "locality": np.array(alike), "fluency": np.array(fluent)}
    table = Table("by refused answer", ["answer", "edits", "refused", "others unchanged"], lines)
    return Part(scores, columns, [table], [], sum(len(one.edits) for one in found))


def _tokens_alike(subject: Any, before: str, after: str) -> float:
    """Share of the old answer's tokens that stand at the same place of the new one."""
    old, new = (subject.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, after))
    return sum(a == b for a, b in zip(old, new)) / len(old) if old else float(not new)


# --- the table -------------------------------------------------------------------------------------------------------


def _line(name: str, part: Part) -> list[Any]:
    """One row of the published table, with standard errors."""

    def cell(score: str) -> str:
        values = part.columns.get(score)
        if values is None or not len(values):
            return "-"
        error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
        return f"{values.mean():.3f} ± {error:.3f}" if len(values) > 1 else f"{values.mean():.3f}"

    harmonic: float | str = "-"
    if all(len(part.columns.get(score, ())) for score in SETS):
        harmonic = float(harmonic_mean(np.array([[part.columns[score].mean() for score in SETS]]))[0])
    shown = [cell(score) for score in (*SETS, "drawdown", "fluency")]
    return [name, part.count, *shown, harmonic]


def _summary(lines: list[list[Any]]) -> Table:
    heads = ["data set", "n", *(name.replace("_", " ") for name in SETS), "drawdown", "fluency, bits", "harmonic mean"]
    return Table("After the edits", heads, lines, "Mean ± standard error over edits.")
