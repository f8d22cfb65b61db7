"""One, batch, sequence: the three ways of making several edits, each leaving deltas over a base that never changes.

one        every edit by itself over the base: as many results as edits, as benchmarks ask for
batch      all edits in one change
sequence   each edit over the result of those before it

What comes back says which edit made which change: any step of a sequence can be undone, and with none left the model is
the base itself, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ...deltas import Delta, compose
from ...edits import EditRow, edit_row
from ...errors import DeltaError, ParameterError, suggest
from ...registry import Part, get
from ...rows import Row
from ...subjects.language import LanguageModel
from ..guard.case import GuardCase
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
    keys: Mapping[int, Tensor] = field(default_factory=dict)
    """By layer what later edits are to know of these: keys (n, f) to be spared, or statistics."""


@dataclass(frozen=True)
class Edited:
    """A base and the changes made over it, in order."""

    base: LanguageModel
    steps: tuple[Step, ...] = ()

    @property
    def edits(self) -> list[EditRow]:
        return [edit for step in self.steps for edit in step.edits]

    @property
    def keys(self) -> dict[int, list[Tensor]]:
        """By layer what later edits are to know, step by step."""
        found: dict[int, list[Tensor]] = {}
        for step in self.steps:
            for layer, keys in step.keys.items():
                found.setdefault(layer, []).append(keys)
        return found

    @property
    def delta(self) -> Delta | None:
        """All changes as one; None without any."""
        return compose([step.delta for step in self.steps]) if self.steps else None

    def model(self) -> Any:
        """The base with all changes; the base itself where there are none."""
        delta = self.delta
        return self.base if delta is None else changed(delta, self.base)

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


def changed(delta: Delta, base: LanguageModel, rows: Mapping[str, list[Row]] | None = None) -> Any:
    """The subject a delta leads to: other weights, a memory beside them, or a guard around the same ones.

    Args:
        rows: what a guard is told that carries no facts of its own.
    """
    if delta.config is None or (rows is None and "edits" not in delta.config):
        return delta.apply(base)
    told = (
        [edit_row(one, f"{name} of the delta", fallback="") for one in delta.config.get(name, [])]
        for name in ("edits", "demonstrations")
    )
    part = get("methods", delta.config["name"])
    return part.function(GuardCase(base, dict(rows or {}), *told), **delta.config["settings"])


def carry_out(
    part: Part,
    case: EditCase,
    settings: dict[str, Any],
    mode: Mode,
    progress: Progress | None = None,
    *,
    done: Sequence[Step] = (),
    keep: Callable[[Step], None] | None = None,
) -> list[Edited]:
    """Make a case's edits: of `one` as many results as edits, else one.

    Args:
        done: steps that an earlier call kept; it goes on behind them.
        keep: called with every step as soon as it is made.

    Raises:
        ParameterError: the method is no editor, or the mode unknown.
        ExpungeError: what the method raises.
    """
    if not part.makes_edits:
        raise ParameterError(f"{part.name} is of kind {part.card.kind}, expected an editor such as rome or ft_m")
    chosen = part.resolve(settings)
    facts = case.facts()
    case.memory.setdefault("edits", facts)  # what is worked out once is about all of them
    guards = part.card.kind == "guard"
    shown = [one.record() for one in case.demonstrations] if guards else []
    if guards:  # what cannot be told is said before anything is kept
        changed(_telling(part, case, chosen, facts, shown).delta, case.base)
    if mode == "batch":
        step = done[0] if done else _step(part, case, chosen, facts, case.subject, {}, shown)
        if keep and not done:
            keep(step)
        return [Edited(case.base, (step,))]
    if mode not in ("one", "sequence"):
        raise ParameterError(f"mode is {mode!r}. {suggest(mode, ('one', 'batch', 'sequence'))}")
    made = Edited(case.base, tuple(done))
    follows = mode == "sequence" and not guards  # a guard is told facts, and is asked about none
    if follows:
        case.base.settle()  # what a pass finds out about a model holds for all that are made over it
    so_far, subject = (made.delta, made.model()) if follows else (None, case.base)
    for number, edit in enumerate(facts[len(done) :], start=len(done) + 1):
        step = _step(part, case, chosen, [edit], subject, made.keys if follows else {}, shown)
        made = replace(made, steps=(*made.steps, step))
        if keep:
            keep(step)
        if progress:
            progress(number, len(facts))
        if follows and number < len(facts):
            so_far = step.delta if so_far is None else replace(compose([so_far, step.delta]), lineage={})
            subject = _on(subject, case.base, so_far, step.delta)
    return [Edited(case.base, (step,)) for step in made.steps] if mode == "one" else [made]


def _on(before: Any, base: LanguageModel, so_far: Delta, newest: Delta) -> Any:
    """The base with all changes so far, at the cost of the newest; `before` is the model without that.

    Weights are the base's with the sum of all changes, so that rounding does not add up. A memory learns what is new.
    """
    if len(so_far.memories) < len(so_far.entries) or not so_far.entries:
        return so_far.apply(base)
    made = newest.apply(before, check=False)
    made.base = base  # the models on the way there need not be kept
    return made


def _step(
    part: Part,
    case: EditCase,
    settings: dict[str, Any],
    edits: list[EditRow],
    subject: LanguageModel,
    earlier: dict[int, Any],
    shown: list[dict[str, Any]],
) -> Step:
    if part.card.kind == "guard":
        return _telling(part, case, settings, edits, shown)
    own = replace(case, subject=subject, origin=case.base, edits=edits, earlier=earlier, summary={}, warnings=[])
    spared = {layer: len(several) for layer, several in earlier.items()}
    delta = part.function(own, **settings)
    added = {layer: several[spared.get(layer, 0) :] for layer, several in own.earlier.items()}
    keys = {layer: torch.cat(several) for layer, several in added.items() if several}
    return Step(tuple(edits), replace(delta, base=case.base.fingerprint), own.summary, tuple(own.warnings), keys)


def _telling(
    part: Part, case: EditCase, settings: dict[str, Any], edits: Sequence[EditRow], shown: list[dict[str, Any]]
) -> Step:
    """A guard that tells these facts. `shown`: records of the demonstrations, the same ones in all steps."""
    told = {"edits": [one.record() for one in edits], "demonstrations": shown}
    return Step(tuple(edits), Delta(case.base.fingerprint, config={"name": part.name, "settings": settings, **told}))
