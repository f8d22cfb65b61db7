"""What a merge gets and what it gives back.

A merge is one function from several deltas over one base to the entries of one delta:

    @merge(paper="arXiv:2212.04089")
    def task_arithmetic(case: Merging, *, coefficient: float = 1.0) -> Entries:
        return case.combined([coefficient] * len(case.deltas))

Deltas may be of any form, of language models or of classifiers; what they do not touch they leave at 0. A merge that
needs to look at the model or at rows finds them in the case.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..deltas import Delta, summed
from ..errors import DeltaError, MismatchError, RequestError
from ..registry import get

Entries = dict[str, dict[str, Tensor]]


@dataclass
class Merging:
    """Deltas of one base, and where they were given the base and rows without answers."""

    deltas: Sequence[Delta]
    subject: Any = None
    """The base."""
    rows: Sequence[Sequence[Any]] = ()
    """Row sets, one for each thing that the merged model is to do well."""
    about: dict[str, Any] = field(default_factory=dict)
    """Plain values for the lineage of the result."""

    @property
    def names(self) -> list[str]:
        """Tensors that any of the deltas moves."""
        return list(dict.fromkeys(name for delta in self.deltas for name in delta.entries))

    def parts(self, name: str) -> list[dict[str, Tensor]]:
        """The entries of one tensor, of the deltas that move it."""
        return [delta.entries[name] for delta in self.deltas if name in delta.entries]

    def combined(self, coefficients: Sequence[float] | Mapping[str, Sequence[float]]) -> Entries:
        """sum_k c_k delta_k; coefficients (deltas,) for all tensors, or by tensor. Low rank and places stay such."""
        made: Entries = {}
        for name in self.names:
            own = coefficients[name] if isinstance(coefficients, Mapping) else coefficients
            pairs = [(c, delta) for c, delta in zip(own, self.deltas, strict=True) if name in delta.entries]
            scaled = [Delta("", {name: delta.entries[name]}).scaled(c).entries[name] for c, delta in pairs]
            made[name] = scaled[0] if len(scaled) == 1 else summed(name, scaled)
        return made

    def model(self, how: str) -> Any:
        """The base and at least one row, for merges that look at them.

        Raises:
            RequestError: one of them was not given.
        """
        if self.subject is None or not self.rows or not all(self.rows):
            raise RequestError(
                f"{how} looks at what the model says: give the base model and at least one row (no answers)"
            )
        return self.subject


def merge(
    deltas: Sequence[Delta],
    how: str = "task_arithmetic",
    settings: Mapping[str, Any] | None = None,
    *,
    subject: Any = None,
    rows: Sequence[Sequence[Any]] = (),
) -> Delta:
    """One delta for several that were made on one base, side by side.

    Args:
        how: a merge of the registry; `settings` are its parameters.
        subject, rows: the base and row sets, for merges that look at them.

    Raises:
        UnknownNameError, ParameterError: no such merge or setting.
        MismatchError: deltas of different bases, or a base that is not theirs.
        DeltaError: fewer than two, a guard's, or entries that have no common form.
    """
    part = get("merges", how)
    chosen = part.resolve(settings)
    if len(deltas) < 2:
        raise DeltaError(f"{len(deltas)} deltas to merge, expected at least 2")
    for number, delta in enumerate(deltas, start=1):
        if delta.config is not None:
            raise DeltaError(f"delta {number} is a guard's ({delta.config.get('name')}), which changes no weights")
        if delta.memories:
            raise DeltaError(f"delta {number} holds a memory at {delta.memories[0]}, which is no change of weights")
        if delta.base != deltas[0].base:
            raise MismatchError(
                f"delta {number} was made on base {delta.base[:12]}, delta 1 on {deltas[0].base[:12]}; only changes of "
                "one base can be merged (deltas made one on top of the other are stacked: `expunge delta stack`)"
            )
    if subject is not None and subject.fingerprint != deltas[0].base:
        raise MismatchError(
            f"the deltas were made on base {deltas[0].base[:12]}, {subject.name} has {subject.fingerprint[:12]}"
        )
    case = Merging(deltas, subject, rows)
    entries = part.function(case, **chosen)
    lineage = {"merge": part.name, "settings": chosen, **case.about, "of": [delta.lineage for delta in deltas]}
    return Delta(deltas[0].base, entries, lineage)
