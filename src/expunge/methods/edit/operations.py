"""One, batch, sequence: the three ways of making several edits, each leaving deltas over a base that never changes.

one        every edit by itself over the base: as many results as edits, as benchmarks ask for
batch      all edits in one change
sequence   each edit over the result of those before it

What comes back says which edit made which change: any step of a sequence can be undone, and with none left the model is
the base itself, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ...deltas import Delta, compose
from ...edits import EditRow
from ...errors import DeltaError, ParameterError, suggest
from ...registry import Part
from ...subjects.language import LanguageModel
from .case import EditCase

Mode = Literal["one", "batch", "sequence"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Step:
    """One change and the edits it makes."""

    edits: tuple[EditRow, ...]
    delta: Delta
    """Over the base; of a sequence it is added to those before it."""
    summary: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Edited:
    """A base and the changes made over it, in order."""

    base: LanguageModel
    steps: tuple[Step, ...] = ()

    @property
    def edits(self) -> list[EditRow]:
        return [edit for step in self.steps for edit in step.edits]

    @property
    def delta(self) -> Delta | None:
        """All changes as one; None without any."""
        return compose([step.delta for step in self.steps]) if self.steps else None

    def model(self) -> LanguageModel:
        """The base with all changes; the base itself where there are none."""
        delta = self.delta
        return self.base if delta is None else delta.apply(self.base)

    def undo(self, name: str | None = None) -> Edited:
        """Without the last step, or without the one that made an edit; the others stay as they were made.

        Raises:
            DeltaError: there is nothing to undo, no such edit, or it was made together with others.
        """
        if not self.steps:
            raise DeltaError(f"{self.base.name} carries no edit to undo")
        if name is None:
            return replace(self, steps=self.steps[:-1])
        known = [edit.id for edit in self.edits]
        if name not in known:
            raise DeltaError(f"no edit is called {name!r}. {suggest(name, known)}")
        found = next(step for step in self.steps if name in [edit.id for edit in step.edits])
        if len(found.edits) > 1:
            raise DeltaError(
                f"edit {name!r} was made in one batch with {len(found.edits) - 1} others; undo the batch, or make it "
                "again without this edit"
            )
        return replace(self, steps=tuple(step for step in self.steps if step is not found))


def carry_out(
    part: Part, case: EditCase, settings: dict[str, Any], mode: Mode, progress: Progress | None = None
) -> list[Edited]:
    """Make a case's edits: of `one` as many results as edits, else one.

    Raises:
        ParameterError: the method is no editor, or the mode unknown.
        ExpungeError: what the method raises.
    """
    if part.card.kind != "edit":
        raise ParameterError(f"{part.name} is of kind {part.card.kind}, expected an editor such as rome or ft_m")
    chosen = part.resolve(settings)
    edits = case.facts()
    case.memory.setdefault("edits", edits)  # what is worked out once is about all of them
    if mode == "batch":
        return [Edited(case.base, (_step(part, case, chosen, edits, case.subject, {}),))]
    if mode not in ("one", "sequence"):
        raise ParameterError(f"mode is {mode!r}. {suggest(mode, ('one', 'batch', 'sequence'))}")
    found: list[Edited] = []
    current, earlier = Edited(case.base), dict[int, Any]()
    for number, edit in enumerate(edits, start=1):
        if mode == "one":
            found.append(Edited(case.base, (_step(part, case, chosen, [edit], case.base, {}),)))
        else:
            step = _step(part, case, chosen, [edit], current.model(), earlier)
            current = replace(current, steps=(*current.steps, step))
        if progress:
            progress(number, len(edits))
    return found if mode == "one" else [current]


def _step(
    part: Part,
    case: EditCase,
    settings: dict[str, Any],
    edits: list[EditRow],
    subject: LanguageModel,
    earlier: dict[int, Any],
) -> Step:
    own = replace(case, subject=subject, origin=case.base, edits=edits, earlier=earlier, summary={}, warnings=[])
    delta = part.function(own, **settings)
    return Step(tuple(edits), replace(delta, base=case.base.fingerprint), own.summary, tuple(own.warnings))
