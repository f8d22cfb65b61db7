"""What an `edit` method sees: the subject, the rows, and the training it may call on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ... import registry
from ...deltas import Delta
from ...errors import ParameterError
from ...rows import Row
from ...subjects.language import LanguageModel
from ..optimise.loop import Training
from ..optimise.reinforce import REINFORCE
from ..optimise.terms import Objective
from ..optimise.unlearn import Outcome, unlearn

Edit = Delta
"""What an edit method returns: a delta from the subject to the changed model."""


@dataclass
class EditCase:
    """One request as an edit method sees it. The subject is never changed."""

    subject: LanguageModel
    data: Mapping[str, list[Row]]
    training: Training = field(default_factory=Training)
    """The request's training settings; methods that train more than once change a copy of them."""
    scope: str | Mapping[str, Any] | None = None
    folder: Path | None = None
    """Where phases find their checkpoints again."""
    progress: Callable[[str, int, int], None] | None = None
    """(phase, done, total)"""
    summary: dict[str, Any] = field(default_factory=dict)
    """Plain values for the report, phase by phase."""
    warnings: list[str] = field(default_factory=list)

    @property
    def seed(self) -> int:
        return self.training.seed

    def unlearn(
        self,
        objective: Objective,
        *,
        phase: str,
        subject: LanguageModel | None = None,
        data: Mapping[str, list[Row]] | None = None,
        scope: str | Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> Outcome:
        """Run an objective of the `optimise` room as one phase of this method, resumable on its own.

        `reinforce`, further training on the forget rows, is known here only: by itself it is no forgetting at all.

        Args:
            phase: its name in progress, checkpoints and report.
            subject, data, scope: other ones than the case's.
            changes: fields of `Training` with other values.

        Raises:
            ParameterError: there is no such objective.
        """
        name, settings = (objective, {}) if isinstance(objective, str) else next(iter(objective.items()))
        part = REINFORCE if name == "reinforce" else registry.get("methods", name)
        if part.card.kind != "optimise":
            raise ParameterError(f"{name!r} is of kind {part.card.kind}, expected a gradient objective such as npo")
        tell = self.progress
        outcome = unlearn(
            subject or self.subject,
            part,
            settings,
            scope=scope if scope is not None else self.scope,
            data=self.data if data is None else data,
            training=replace(self.training, **changes),
            folder=None if self.folder is None else self.folder / phase,
            progress=None if tell is None else lambda done, total: tell(phase, done, total),
        )
        self.summary[phase] = {key: outcome.summary[key] for key in ("name", "settings", "steps", "tokens", "log")}
        self.warnings += [f"{phase}: {text}" for text in outcome.summary["warnings"]]
        return outcome


class Known(NamedTuple):
    """How well a model knows rows."""

    probability: float
    """Mean over rows of exp(mean log-probability of the answer's tokens)."""
    accuracy: float
    """Share of answer tokens that are the model's first choice."""


def knows(subject: LanguageModel, rows: Sequence[Row]) -> Known:
    """One teacher-forced pass over the answers."""
    table = subject.score([((row.id, "answer"), subject.encode(row)) for row in rows])
    means = np.add.reduceat(table.logprob, table.offsets[:-1], dtype=np.float64) / np.diff(table.offsets)
    return Known(float(np.exp(means).mean()), float(table.hit.mean()))
