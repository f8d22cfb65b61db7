"""MUSE's last two criteria (arXiv:2407.06460): utility after larger requests, and after one request after another.

| criterion | requests |
|---|---|
| C5 scalability | each of scal/forget_1 ... forget_4, which hold one another, from the model under test |
| C6 sustainability | sust/forget_1 ... forget_4, which share nothing, each from what the one before left |

The model under test is the target, which knows all texts. The first request decides how many epochs are enough: with a
gold model the first at which knowmem_f is at most the gold model's, else all. Every request takes as many, with an
optimiser and a reference of its own. After each one the four scores of `muse` are taken again, and how much of every
earlier request's texts the model still says word for word: the paper does not look back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from ..errors import ParameterError
from ..evidence import Measured, Scorecard, Table
from ..metrics.measure import values as measured_on
from ..metrics.texts import RougeDialect, overlap
from ..registry import benchmark, get
from ..rows import Row
from ..tables.passes import Generate, Score, run
from ..tables.view import View
from .case import Bench
from .muse_data import ELSEWHERE, HEADLINE, cut, few_shot, folds, read, windows
from .muse_mini import mini
from .served import Way, kept, per_epoch, way

Kind = Literal["scal", "sust"]
WINDOW = 2048
SPARE = 8
"""Tokens of the context that windows leave: special ones, and those that cutting a text may add."""
PUBLISHED = {"epochs": 10, "batch_size": 32, "learning_rate": 1e-5}
SMALL = {"epochs": 10, "batch_size": 2, "learning_rate": 1e-3}
"""Training on published data, and of the mini version's small models."""
CRITERIA: dict[Kind, str] = {"scal": "scalability", "sust": "sustainability"}
SENTENCES: dict[Kind, str] = {
    "scal": "What the largest request costs answers about texts to keep, beyond what the smallest one costs.",
    "sust": "What answers about texts to keep lose from the first request in turn to the last.",
}


@benchmark(paper="arXiv:2407.06460", data="muse-bench/MUSE-News")
def muse_requests(
    bench: Bench,
    *,
    method: str | dict[str, Any] = "grad_diff",
    scope: str = "",
    training: dict[str, Any] | None = None,
    kinds: tuple[Kind, ...] = ("scal", "sust"),
    window: Annotated[int, Field(ge=0)] | None = None,
    answer: Annotated[int, Field(ge=1)] = 32,
    shots: Annotated[int, Field(ge=0)] = 10,
    dialect: RougeDialect = "rouge_score_unstemmed",
    retrained: Annotated[float, Field(ge=0, le=1)] = 0.0,
) -> Scorecard:
    """MUSE's scalability and sustainability: what larger requests, and requests one after another, cost a model.

    Requests that an earlier command served are not served again.

    Args:
        method: how to forget, by name or {npo: {beta: 0.1}}; any that changes weights.
        training: as in a request file, without a guard unless asked for; published: 10 epochs at most, batch 32,
            learning rate 1e-5 (mini version: 2, 1e-3).
        kinds: scal, sust or both.
        window: tokens of a training text, into which texts are joined and cut; 0 leaves them as they are. By default
            2048 as published, or what the model's context holds; 0 on the mini version.
        answer, shots, dialect, retrained: as for `muse`.
    """
    if not kinds:
        raise ParameterError(f"muse_requests: kinds is empty, expected {' or '.join(CRITERIA)}")
    name, settings = (method, {}) if isinstance(method, str) else _named(method)
    given = PUBLISHED if bench.data else SMALL
    how = way("muse_requests", "language", name, settings, scope, {**given, "seed": bench.seed, **(training or {})})
    place = bench.source(mini)
    size = (WINDOW if bench.data else 0) if window is None else window
    size = min(size, bench.subject.context_length - SPARE)
    asking: dict[str, Any] = {"answer": answer, "shots": shots, "retrained": retrained, "dialect": dialect}
    requests = {kind: [_texts(bench, fold, size) for fold in folds(place, kind)] for kind in kinds}
    retain = _texts(bench, read(place, "raw", "retain1"), size)
    target = replace(bench, original=None)
    start = _muse(target, asking)
    until = Until(start, place, answer, shots, dialect)
    found = {kind: _serve(target, kind, requests[kind], retain, how, until, asking) for kind in kinds}
    asked = read(place, "knowmem", "retain_qa")
    return bench.scorecard(
        [_cost(bench, kind, several, asked) for kind, several in found.items()] + _last(found),
        headline=[CRITERIA[kind] for kind in kinds],
        tables=[_requests(start, found), *_again(found), *until.table],
        rows={f"{kind}/forget_{i}": len(rows) for kind in kinds for i, rows in enumerate(requests[kind], start=1)},
        notes=[*until.notes, *(note for note in start.notes if note != ELSEWHERE)],
    )


def _named(method: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    if len(method) != 1:
        raise ParameterError(f"muse_requests: method is {dict(method)!r}, expected a name, or one name with settings")
    ((name, settings),) = method.items()
    return name, dict(settings or {})


def _texts(bench: Bench, rows: Sequence[Row], size: int) -> list[Row]:
    """What is trained on; texts of the same request are called the same, whatever it is part of."""
    if size:
        return windows(bench.subject.tokenizer, rows, size)
    return [replace(row, id=f"text/{number}") for number, row in enumerate(rows, start=1)]


# --- requests ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Served:
    """What `muse` says of a model, and how much it still says of the requests so far."""

    card: Scorecard
    """`after` is the model."""
    texts: int = 0
    said: Sequence[float] = ()
    """Share of tokens of each request's texts that are the model's first choice."""


def _muse(bench: Bench, asking: Mapping[str, Any]) -> Scorecard:
    part = get("benchmarks", "muse")
    card: Scorecard = part.function(bench, **part.resolve(asking))
    return card


def _said(bench: Bench, subject: Any, requests: Sequence[list[Row]]) -> list[float]:
    asks = [Score(tuple(((row.id, "answer"), row, None, None) for row in rows)) for rows in requests]
    found = []
    for rows, table in zip(requests, run(subject, asks, bench.store)):
        view = View({"texts": rows}, {"texts": table})
        found.append(measured_on("exact_memorization", view, {"rows": "texts"}).value)
    return found


class Until:
    """When the first request is served: at the first epoch whose knowmem_f is at most the gold models'."""

    def __init__(self, start: Scorecard, place: str, answer: int, shots: int, dialect: RougeDialect) -> None:
        self.bar = _score(start, "knowmem_f", "gold")
        self.curve: list[list[float]] = []
        self.rows: dict[str, list[Row]] = {}
        self.answer, self.dialect = answer, dialect
        for split in ("forget_qa", "retain_qa"):
            examples = read(place, "knowmem", f"{split}_icl")[:shots] if shots else []
            self.rows[split] = few_shot(read(place, "knowmem", split), examples)

    def __call__(self, subject: Any, epoch: int) -> str | None:
        """Nothing is kept of a model in training."""
        asks = [
            Generate(tuple(((r.id, "question"), r, None) for r in rows), self.answer) for rows in self.rows.values()
        ]
        known = [
            fmean(overlap(r.answer, cut(t), "rougeL", "fmeasure", self.dialect) for r, (t,) in zip(rows, table.texts))
            for rows, table in zip(self.rows.values(), run(subject, asks))
        ]
        self.curve.append([epoch, *known])
        assert self.bar is not None
        enough = known[0] <= self.bar
        return f"epoch {epoch}: knowmem_f is {known[0]:.3f}, a gold model's {self.bar:.3f}" if enough else None

    @property
    def table(self) -> list[Table]:
        lines: list[list[Any]] = [[int(epoch), *scores] for epoch, *scores in self.curve]
        return [Table("The first request, epoch by epoch", ["epoch", "knowmem_f", "knowmem_r"], lines)] if lines else []

    @property
    def notes(self) -> list[str]:
        if self.bar is None:
            return ["Without a gold model (--gold) nothing says when enough is forgotten: all epochs are taken."]
        return []


def _serve(
    bench: Bench,
    kind: Kind,
    requests: Sequence[list[Row]],
    retain: list[Row],
    how: Way,
    until: Until,
    asking: Mapping[str, Any],
) -> list[Served]:
    """What every request leaves."""
    subject = bench.subject
    looks = until.bar is not None and how.part.card.kind == "optimise"  # type: ignore[union-attr]
    found: list[Served] = []
    for number, texts in enumerate(requests, start=1):
        data = {"forget": texts, "retain": retain}
        base = bench.subject if kind == "scal" else subject
        if looks and number == 1:
            noted = {"curve": until.curve}
            delta = kept(bench, base, data, how, f"{kind} 1", until, f"knowmem_f {until.bar}", noted)
            until.curve = delta.lineage["task"]["curve"]
            how = replace(how, training=replace(how.training, epochs=_epochs(until, how, data), steps=None))
        else:
            delta = kept(bench, base, data, how, f"{kind} {number}")
        subject = delta.apply(base)
        so_far = requests[:number] if kind == "sust" else [texts]
        card = _muse(replace(bench, subject=subject), asking)
        found.append(Served(card, len(texts), _said(bench, subject, so_far)))
    return found


def _epochs(until: Until, how: Way, data: Mapping[str, Sequence[Row]]) -> float:
    """How many the first request took."""
    if until.curve and until.bar is not None and until.curve[-1][1] <= until.bar:
        return until.curve[-1][0]
    if how.training.steps is not None:
        return how.training.steps / per_epoch(data, how.training)
    return how.training.epochs


# --- what is made of it -----------------------------------------------------------------------------------------------


def _measured(card: Scorecard, name: str) -> Measured | None:
    return next((one for one in card.measured if one.metric == name), None)


def _score(card: Scorecard, name: str, role: str = "after") -> float | None:
    value = getattr(_measured(card, name), role, None)
    return None if value is None else float(value.value)


def _cost(bench: Bench, kind: Kind, found: Sequence[Served], asked: Sequence[Row]) -> Measured:
    """knowmem_r after the last request less that after the first, question by question."""
    each = []
    for served in (found[0], found[-1]):
        about = _measured(served.card, "knowmem_r")
        assert about is not None
        each.append(np.array(about.extra["each"]["after"]))
    return bench.score(
        CRITERIA[kind],
        "retain_qa",
        {"after": each[1] - each[0]},
        asked,
        direction="higher",
        ideal="0, or more",
        sentence=SENTENCES[kind],
    )


def _last(found: Mapping[Kind, Sequence[Served]]) -> list[Measured]:
    """The four scores after the last request."""
    return [
        replace(one, metric=f"{one.metric} after {kind}")
        for kind, several in found.items()
        for one in several[-1].card.measured
        if one.metric in HEADLINE
    ]


def _requests(start: Scorecard, found: Mapping[Kind, Sequence[Served]]) -> Table:
    lines: list[list[Any]] = [["", 0, 0, *(_score(start, name) for name in HEADLINE)]]
    for kind, several in found.items():
        for number, served in enumerate(several, start=1):
            lines.append([kind, number, served.texts, *(_score(served.card, name) for name in HEADLINE)])
    gold = [_score(start, name, "gold") for name in HEADLINE]
    if any(value is not None for value in gold):
        lines.append(["gold", "", "", *gold])
    return Table(
        "After every request",
        ["requests", "number", "texts", *HEADLINE],
        lines,
        "Scores are about the first request's texts. scal: each from the model under test; sust: one after the other.",
    )


def _again(found: Mapping[Kind, Sequence[Served]]) -> list[Table]:
    """Whether what earlier requests took comes back."""
    several = found.get("sust")
    if not several:
        return []
    lines: list[list[Any]] = [
        [i, *served.said, *[""] * (len(several) - i)] for i, served in enumerate(several, start=1)
    ]
    columns = ["after request", *(f"texts of {i}" for i in range(1, len(several) + 1))]
    return [
        Table("Texts of earlier requests", columns, lines, "Share of tokens that are the model's first choice (sust).")
    ]
