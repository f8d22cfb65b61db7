"""Causal tracing from the outside: facts and a model in, where the model keeps these facts out.

Averages are over facts that the model states: of others there is nothing to trace. A cell is the mean indirect effect,
with its interval over subjects; divided by the mean total effect it is the share of the answer that the state carries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .edits import read_edits
from .environment import environment
from .errors import ParameterError, RowError
from .evidence import Interval, _finite
from .rows import Source

if TYPE_CHECKING:
    from .subjects.language import LanguageModel
    from .subjects.restoring import Traced

Progress = Callable[[str, int, int], None]
KINDS = ("block", "mlp", "attention")


@dataclass(frozen=True)
class Averaged:
    """Effects of restoring one kind of state at one place of the prompt."""

    kind: str
    place: str
    facts: int
    """That have such a token."""
    effects: list[Interval]
    """By layer: mean indirect effect."""
    total: float
    """Mean total effect of the same facts."""

    @property
    def shares(self) -> list[float]:
        """By layer: how much of the total effect comes back."""
        return [effect.value / self.total if self.total else float("nan") for effect in self.effects]


@dataclass(frozen=True)
class TraceReport:
    """What tracing found."""

    model: str
    averages: list[Averaged]
    traced: list[Traced]
    left_out: list[str]
    """Ids of facts that the model does not state."""
    clean: float
    low: float
    settings: dict[str, Any]
    tokens: list[list[str]]
    """Of each traced fact, from its subject's first one on."""
    environment: dict[str, Any] = field(default_factory=dict)

    def best(self, kind: str = "mlp", place: str = "last subject token") -> int:
        """The layer of the largest mean effect.

        Raises:
            ParameterError: that was not traced.
        """
        for one in self.averages:
            if (one.kind, one.place) == (kind, place):
                return int(np.argmax([effect.value for effect in one.effects]))
        raise ParameterError(f"no {kind} was restored at a {place}")

    def document(self) -> dict[str, Any]:
        """Plain values, for trace.json."""
        facts = [
            {
                "id": one.fact.edit.id,
                "prompt": one.fact.edit.prompt,
                "subject": one.fact.edit.subject,
                "tokens": tokens,
                "clean": one.clean,
                "corrupted": one.low,
                "effects": {kind: found.tolist() for kind, found in one.effects.items()},
            }
            for one, tokens in zip(self.traced, self.tokens)
        ]
        averages = [{**asdict(one), "shares": one.shares} for one in self.averages]
        document = {
            "model": self.model,
            "clean": self.clean,
            "corrupted": self.low,
            "averages": averages,
            "left_out": self.left_out,
            "settings": self.settings,
            "environment": self.environment,
            "facts": facts,
        }
        return _finite(document)  # type: ignore[no-any-return]


def trace(
    model: str | Path | LanguageModel,
    facts: str | Path | Source,
    *,
    kinds: Sequence[str] = KINDS,
    noise: float = 3.0,
    draws: int = 10,
    width: int | None = None,
    limit: int = 0,
    seed: int = 0,
    bootstrap: int = 1000,
    device: str | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> TraceReport:
    """Trace facts; `report.traced.write` makes files of the result.

    Args:
        facts: rows with prompt, subject and ground_truth (docs/editing.md), or a request's rows.
        limit: of so many facts, the first; 0 takes all.

    Raises:
        RowError: rows that cannot be read, that name no subject, or of which the model states none.
    """
    from .metrics.bootstrap import Bootstrap
    from .subjects.language import LanguageModel
    from .subjects.restoring import causal_trace, locate

    if limit < 0:
        raise ParameterError(f"limit is {limit}, expected at least 0")
    source = facts if isinstance(facts, Source) else Source(str(facts))
    edits = read_edits(source, "facts", targets=False)
    edits = edits[:limit] if limit else edits
    subject = model if isinstance(model, LanguageModel) else LanguageModel.load(model, device=device, dtype=dtype)
    settings = {"kinds": list(kinds), "noise": noise, "draws": draws, "width": width, "seed": seed}
    found = causal_trace(
        subject,
        [locate(subject, edit) for edit in edits],
        kinds=kinds,  # type: ignore[arg-type]
        noise=noise,
        draws=draws,
        width=width,
        seed=seed,
        progress=None if progress is None else lambda done, total: progress("trace", done, total),
    )
    kept = [one for one in found if one.chosen]
    if not kept:
        raise RowError(
            f"{source.path}: {subject.name} states none of {len(found)} facts (its likeliest next token is never the "
            "answer's first); there is nothing to trace. Do prompts and answers have the form that it was trained on?"
        )
    return TraceReport(
        model=subject.name,
        averages=averaged(kept, Bootstrap(bootstrap, seed)),
        traced=kept,
        left_out=[one.fact.edit.id for one in found if not one.chosen],
        clean=float(np.mean([one.clean for one in kept])),
        low=float(np.mean([one.low for one in kept])),
        settings={**settings, "facts": source.path, "limit": limit},
        tokens=[[subject.tokenizer.decode([i]) for i in one.fact.ids[one.fact.first :]] for one in kept],
        environment=environment(str(subject.device), str(subject.dtype)),
    )


def averaged(found: Sequence[Traced], draws: Any) -> list[Averaged]:
    """Mean effects by kind, place and layer, with intervals over subjects.

    Args:
        draws: a `metrics.bootstrap.Bootstrap`.
    """
    from .metrics.bootstrap import interval
    from .metrics.values import Units, Values, mean_of
    from .subjects.restoring import PLACES

    averages = []
    for kind in found[0].effects:
        by_place = [one.by_place(kind) for one in found]
        for place in PLACES:
            having = [i for i, rows in enumerate(by_place) if place in rows]
            if not having:
                continue
            units = Units.of(("facts", [found[i].fact.edit.row() for i in having]))
            effects = []
            for layer in np.array([by_place[i][place] for i in having]).T:
                values = Values(units, mean_of(layer), layer)
                effects.append(interval(values.value, draws.distribution(values)))
            total = float(np.mean([found[i].total for i in having]))
            averages.append(Averaged(kind, place, len(having), effects, total))
    return averages
