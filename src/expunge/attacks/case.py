"""What an attack gets and what it gives back.

An attack is one generator function. It yields asks and is sent their answers; the audit runs the asks of all attacks
together. What it returns is `Found`:

    @attack(group="black_box", access="text", paper="...")
    def paraphrase(case: Case, *, wordings: int = 3) -> Attack:
        outputs = yield Generate(...)
        return Found(items=[...], budget={"queries": len(outputs)})
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from .. import registry
from ..cards import AttackCard
from ..edits import EditRow
from ..errors import CardError
from ..evidence import Item, ProbeRun
from ..files import write_text
from ..metrics.matching import chosen, recovered
from ..rows import Row
from ..subjects.differences import Moved, Weights
from ..subjects.protocol import innermost
from ..subjects.soft import SoftPrompt
from ..tables.passes import Ask, Generate, Progress, Store, run
from ..tables.store import content_key
from .written import Written

CODE = 4
"""Raised when an attack would find something else on the same model."""
RETAIN_ROWS = 48
"""Retained questions that show what an attack does to a copy of the model."""
BROKEN = 0.3
"""A copy that loses so much of them shows nothing."""


@dataclass(frozen=True)
class Case:
    """A model under attack."""

    subject: Any
    """A LanguageModel, or a guard around one."""
    rows: dict[str, list[Row]]
    """Row sets by name; `forget` is what should be gone."""
    seed: int = 0
    max_new_tokens: int = 16
    written: Written = field(default_factory=Written)
    """What agents wrote; one for all models, so that all are asked the same."""

    @property
    def forget(self) -> list[Row]:
        return self.rows["forget"]

    @cached_property
    def weights(self) -> Weights:
        """Of the model inside all guards, for changed copies to be compared with."""
        return Weights(innermost(self.subject).model)

    def ask(self, subject: Any, *asks: Ask) -> list[Any]:
        """Answers of a changed copy of the subject; they are not kept."""
        return run(subject, asks)

    def teach(
        self,
        subject: Any,
        rows: Sequence[Row],
        *,
        steps: int,
        batch_size: int,
        learning_rate: float,
        evaluate_at: Sequence[int] = (),
        evaluate: Callable[[int], None] | None = None,
    ) -> None:
        """Train a copy of the subject, or the model inside its guard, on the answers of rows."""
        from ..methods.optimise.loop import fit

        fit(
            innermost(subject),
            [self.subject.encode(row) for row in rows],
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=self.seed,
            evaluate_at=evaluate_at,
            evaluate=evaluate,
        )

    def teach_prompt(self, subject: Any, rows: Sequence[Row], prompt: SoftPrompt, **training: Any) -> None:
        """Train a soft prompt of a copy of the subject on the answers of rows; training as `SoftPrompt.learn`."""
        prompt.learn(innermost(subject), [subject.encode(row) for row in rows], seed=self.seed, **training)

    def edit(
        self,
        edits: Sequence[EditRow],
        editor: registry.Part,
        settings: dict[str, Any],
        mode: Literal["batch", "sequence"],
        *,
        done: Sequence[Any] = (),
        memory: dict[str, Any] | None = None,
    ) -> tuple[Any, tuple[Any, ...], Moved]:
        """A copy of the subject with facts edited into the model inside its guards, and what its weights show of that.

        Args:
            done: of a sequence the steps that are made, as an earlier call gave them back.
            memory: what the editor works out once for several calls.

        Returns:
            (the copy, the steps of a sequence, what moved)
        """
        from ..methods.edit.case import EditCase
        from ..methods.edit.operations import carry_out as make
        from ..methods.optimise.loop import Training

        inner = innermost(self.subject)
        kept = {name: rows for name, rows in self.rows.items() if name != "forget"}
        case = EditCase(inner, kept, Training(seed=self.seed), edits=edits, memory={} if memory is None else memory)
        (edited,) = make(editor, case, settings, mode, done=done)
        model = edited.model()
        copy = model
        if self.subject is not inner:
            copy = self.subject.copy()
            innermost(copy).model = model.model
            innermost(copy).__dict__.pop("fingerprint", None)
        return copy, edited.steps if mode == "sequence" else (), self.weights.moved(model.model)

    def questions(self, rows: Sequence[Row], **settings: Any) -> Generate:
        """Every row's own question."""
        prompts = tuple(((row.id, "question"), row, None) for row in rows)
        return Generate(prompts, self.max_new_tokens, **settings)


@dataclass
class Found:
    """What an attack brought back."""

    items: list[Item] = field(default_factory=list)
    budget: Mapping[str, float] = field(default_factory=dict)
    curve: list[tuple[float, float]] = field(default_factory=list)
    curve_label: str = ""
    note: str = ""
    status: str = "scored"
    """scored, `skipped: why`, or `uninformative: why` where the model was broken by the attack itself."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """Further figures that a reader of the run needs, e.g. how well a probe tells what it is to tell."""
    kept: list[Item] = field(default_factory=list)
    """What was asked in the same way of what must be kept: no part of the score."""


Attack = Generator[Ask, Any, Found]


class Variant(NamedTuple):
    """One way in which a forget row is asked."""

    row: Row
    name: str
    asked: Row
    options: tuple[str, ...] = ()
    """What the question lets the model choose from."""
    echo: bool = False
    """Repeating what the context says counts too, repeating the question does not."""

    def recovered(self, text: str) -> float:
        if self.options:
            return float(chosen(text, self.asked.value or self.asked.answer, self.options, self.asked.prompt))
        return recovered(self.asked, text, ("" if self.echo else self.asked.preface) + self.asked.prompt)


def fits(case: Case, row: Row) -> bool:
    """Whether a prompt and an answer fit the model's context."""
    prompt = innermost(case.subject).prompt_ids(case.subject.prompt_text(row), (row.id, "attack"))
    return bool(len(prompt) + case.max_new_tokens <= case.subject.context_length)


def attempts(case: Case, variants: Sequence[Variant], nothing: str) -> Attack:
    """Ask forget rows in other ways, greedily.

    Items: one for each variant, called `ROW#NAME`. Curve: the share of rows that one of their first k variants brought
    back. Variants that are too long for the model's context are not asked; the note counts them.

    Args:
        nothing: why there may be no variant.
    """
    asked = len(variants)
    variants = [variant for variant in variants if fits(case, variant.asked)]
    note = f"{asked - len(variants)} of {asked} prompts do not fit the context" if len(variants) < asked else ""
    nothing = nothing if not asked else f"no prompt fits the context of {case.subject.context_length} tokens"
    if not variants:
        return Found(status=f"skipped: {nothing}")
    prompts = tuple(((variant.row.id, variant.name), variant.asked, None) for variant in variants)
    outputs = yield Generate(prompts, case.max_new_tokens)
    items, told = [], dict[str, list[float]]()
    for variant, texts in zip(variants, outputs.texts):
        row, found = variant.row, variant.recovered(texts[0])
        items.append(Item(row.entity or row.id, f"{row.id}#{variant.name}", found, texts[0]))
        told.setdefault(row.id, []).append(found)
    budget = {"queries": len(variants), "samples": 1, "queries per row": max(map(len, told.values()))}
    return Found(items, budget, tries(list(told.values())), "queries per row", note)


def tries(told: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """(k, mean over rows of the most that the first k tries brought back); rows with fewer stay where they are."""
    most = max(map(len, told), default=0)
    return [(float(k), sum(max(row[:k]) for row in told) / len(told)) for k in range(1, most + 1)]


def judged(rows: Sequence[Row], answers: Any) -> list[Item]:
    """Items of greedy outputs, one for each row."""
    return [
        Item(row.entity or row.id, row.id, recovered(row, texts[0], row.prompt), texts[0])
        for row, texts in zip(rows, answers.texts)
    ]


def halves(case: Case) -> list[tuple[list[Row], list[Row]]]:
    """(rows to learn from, rows to ask about): the forget rows of either half of the entities; none with one entity."""
    entities = sorted({row.entity or row.id for row in case.forget})
    if len(entities) < 2:
        return []
    random.Random(case.seed).shuffle(entities)
    half = set(entities[: len(entities) // 2])
    first = [row for row in case.forget if (row.entity or row.id) in half]
    second = [row for row in case.forget if (row.entity or row.id) not in half]
    return [(first, second), (second, first)]


def mean(items: Sequence[Item]) -> float:
    return sum(item.recovered for item in items) / len(items) if items else 0.0


def carry_out(
    case: Case,
    attacks: Sequence[tuple[str, dict[str, Any]]],
    store: Store | None = None,
    progress: Progress | None = None,
) -> list[ProbeRun]:
    """Run attacks side by side on one model: their asks are merged, and runs that were finished before are kept.

    Raises:
        UnknownNameError, ParameterError: no such attack or setting.
    """
    store = store or Store(None)
    runs: dict[int, ProbeRun] = {}
    going: dict[int, tuple[Attack, Ask, float]] = {}
    cards: dict[int, tuple[AttackCard, dict[str, Any], str]] = {}
    for number, (name, settings) in enumerate(attacks):
        part = registry.get("attacks", name)
        chosen = part.resolve(settings)
        assert isinstance(part.card, AttackCard)
        key = f"probe-{content_key(CODE, name, chosen, case.subject.fingerprint, _content(case))}.json"
        cards[number] = (part.card, chosen, key)
        path = store.find(key)
        if path is not None:
            runs[number] = _read(path)
            continue
        began = time.monotonic()
        attack = part.function(case, **chosen)
        if not isinstance(attack, Generator):
            raise CardError(f"attack {name} is not a generator: it must yield what it asks and return Found")
        _step(number, attack, None, began, going, runs, cards, store)
        if progress:
            progress(len(runs), len(attacks))
    while going:
        numbers = list(going)
        began = time.monotonic()
        answers = run(case.subject, [going[n][1] for n in numbers], store)
        spent = (time.monotonic() - began) / len(numbers)
        for number, answer in zip(numbers, answers):
            attack, _, before = going.pop(number)
            _step(number, attack, answer, before + spent, going, runs, cards, store, spent=True)
            if progress:
                progress(len(runs), len(attacks))
    return [runs[number] for number in range(len(attacks))]


def _step(
    number: int,
    attack: Attack,
    answer: Any,
    seconds: float,
    going: dict[int, tuple[Attack, Ask, float]],
    runs: dict[int, ProbeRun],
    cards: dict[int, tuple[AttackCard, dict[str, Any], str]],
    store: Store,
    *,
    spent: bool = False,
) -> None:
    """Let an attack go on until it asks again or is done."""
    began = time.monotonic()
    already = seconds if spent else 0.0
    try:
        ask = next(attack) if answer is None else attack.send(answer)
    except StopIteration as end:
        found: Found = end.value
        card, settings, key = cards[number]
        took = already + time.monotonic() - began
        runs[number] = ProbeRun(
            card.name,
            card.group,
            found.items,
            settings,
            {**found.budget, "seconds": round(took, 3)},
            found.curve,
            found.curve_label,
            found.note,
            found.status,
            dict(found.numbers),
            found.kept,
        )
        text = json.dumps(asdict(runs[number]), ensure_ascii=False)
        store.keep(key, lambda path: write_text(path, text))
    else:
        going[number] = (attack, ask, already + time.monotonic() - began)


def _content(case: Case) -> list[Any]:
    """What a probe run depends on beside its settings and the model."""
    rows = {name: [row.content() for row in rows] for name, rows in case.rows.items()}
    return [case.seed, case.max_new_tokens, rows]


def _read(path: Path) -> ProbeRun:
    data = json.loads(path.read_text(encoding="utf-8"))
    for name in ("items", "kept"):
        data[name] = [Item(**item) for item in data[name]]
    data["curve"] = [tuple(point) for point in data["curve"]]
    return ProbeRun(**data)
