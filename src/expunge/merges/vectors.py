"""What merges do with single numbers of deltas: keep the largest, and those whose sign the others share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..deltas import Delta, aligned


def trimmed(delta: Delta, density: float) -> Delta:
    """The delta with all but the largest `density` of its numbers, by size over all its tensors together, set to 0.

    Equal sizes at the border are all kept. Low-rank entries are multiplied out first; of entries of places only the
    stored numbers count.
    """
    plain = {name: aligned(name, [entry]) for name, entry in delta.entries.items()}
    if not plain:
        return delta
    sizes = torch.cat([values[0].abs().flatten() for values, _ in plain.values()])
    kept = max(1, round(density * len(sizes)))
    border = sizes.kthvalue(len(sizes) - kept + 1).values
    entries = {name: put(values[0] * (values[0].abs() >= border)) for name, (values, put) in plain.items()}
    return Delta(delta.base, entries, delta.lineage)


def elected(values: Sequence[Tensor]) -> list[Tensor]:
    """Changes of one tensor, each 0 where its sign is not that of their sum; all are where the sum is 0."""
    sign = torch.stack(list(values)).sum(0).sign()
    return [value * (value.sign() == sign) for value in values]
