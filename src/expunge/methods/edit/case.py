"""What an `edit` method sees: the subject, the rows, and the training it may call on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ... import registry
from ...deltas import Delta
from ...edits import KINDS, EditRow
from ...errors import ParameterError, RequestError, RowError, ScopeError
from ...rows import Row
from ...subjects.language import LanguageModel
from ...subjects.moments import Moment, encoded, moments
from ...subjects.packed import Encoded
from ..optimise.loop import Training
from ..optimise.reinforce import REINFORCE
from ..optimise.scope import Resolved, resolve
from ..optimise.terms import Objective
from ..optimise.unlearn import Outcome, refusals, unlearn

if TYPE_CHECKING:
    from .values import Goal

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
    edits: Sequence[EditRow] = ()
    """The facts to be edited; where there are none, the forget rows are facts to be deleted."""
    origin: LanguageModel | None = None
    """The untouched base, where earlier edits of a sequence are part of the subject: statistics are taken of it."""
    corpus: Sequence[Row] = ()
    """Texts that key statistics are taken of; by default general, else retain rows."""
    prefixes: Sequence[str] | None = None
    """Texts put before a prompt while a fact's value is worked out; None: the model writes its own."""
    goal: Goal | None = None
    """What the values of facts are optimised for, in place of the published loss (values.py)."""
    memory: dict[str, Any] = field(default_factory=dict)
    """What is worked out once for all edits over one base: statistics, prefixes."""
    demonstrations: Sequence[EditRow] = ()
    """Other facts: to be shown in the context (ike), or trained on (serac, mend)."""
    earlier: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    """By layer what earlier edits of a sequence left to later ones: keys (n, f) to be spared, or statistics."""

    @property
    def seed(self) -> int:
        return self.training.seed

    @property
    def base(self) -> LanguageModel:
        """What deltas are made over."""
        return self.origin or self.subject

    def tensors(self, method: str) -> Resolved:
        """The scope, by default everything, of a method that changes whole tensors.

        Raises:
            ScopeError: it is made of adapters, experts or columns.
        """
        scope = resolve("all" if self.scope is None else self.scope, self.subject.model)
        if scope.lora is not None or scope.slices or scope.columns:
            raise ScopeError(f"{method}: scope {scope.form!r} is not made of whole tensors, expected e.g. role:mlp_out")
        return scope

    def encoded(self, rows: str, method: str, why: str = "at least 1") -> list[Encoded]:
        """A row set as tokens.

        Raises:
            RequestError: it is empty; `why` says what the method needs.
            RowError: a row does not fit the model.
        """
        if not self.data.get(rows):
            raise RequestError(f"request.data.{rows}: 0 rows, but {method} needs {why}")
        return [self.subject.encode(row) for row in self.data[rows]]

    def facts(self) -> list[EditRow]:
        """What `targeted` makes of edits and forget rows.

        Raises:
            RequestError: there are neither.
            RowError: a forget row is a conversation or running text.
        """
        edits = targeted(self.edits, self.data.get("forget", []), self.seed)
        if not edits:
            raise RequestError("there is nothing to edit: 0 edits and 0 forget rows, expected at least 1")
        return edits

    def moments(self, layers: Sequence[int], max_tokens: int) -> dict[int, Moment]:
        """Second moments of the base's keys, worked out once for all edits.

        Raises:
            RequestError: there is no corpus.
        """
        known: dict[int, Moment] = self.memory.setdefault("moments", {})
        missing = [layer for layer in layers if layer not in known]
        if missing:
            rows = list(self.corpus) or self.data.get("general") or self.data.get("retain") or []
            if not rows:
                raise RequestError(
                    "key statistics need texts, and the request names none: give a corpus (or general or retain rows), "
                    "or set covariance=false, which costs neighbouring facts"
                )
            tell = self.progress
            known |= moments(
                self.base,
                encoded(self.base, rows),
                missing,
                max_tokens=max_tokens,
                progress=None if tell is None else lambda done, total: tell("key statistics", done, total),
            )
            for layer in missing:
                self.summary[f"keys of layer {layer}"] = {
                    "statistics_tokens": known[layer].tokens,
                    "change_over_last_doubling": known[layer].change,
                }
        return {layer: known[layer] for layer in layers}

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


def targeted(edits: Sequence[EditRow], forget: Sequence[Row], seed: int) -> list[EditRow]:
    """The edits, or else the forget rows as facts to be deleted; what has no new target gets a refusal, by the seed.

    Raises:
        RowError: a forget row is a conversation or running text.
    """
    edits = list(edits) or [_deletion(row) for row in forget]
    lines = refusals()
    generator = torch.Generator().manual_seed(seed)
    drawn = [lines[int(torch.randint(len(lines), (1,), generator=generator))] for _ in edits]
    return [edit if edit.target_new else replace(edit, target_new=line) for edit, line in zip(edits, drawn)]


def _deletion(row: Row) -> EditRow:
    where = row.source or f"row {row.id}"
    if row.kind not in KINDS:
        raise RowError(f"{where}: a {row.kind} row is no fact with a prompt; expected {', '.join(KINDS)} rows")
    named = row.entity if row.entity in row.prompt else ""
    return EditRow(row.id, row.prompt, "", named, (row.answer,), row.paraphrased_prompts, kind=row.kind, source=where)  # type: ignore[arg-type]


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
