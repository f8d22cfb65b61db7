"""Which entries of a change are its largest: what `ignore_k` leaves out, tensor by tensor or over all of them.

The threshold is exact and nothing is sorted whole: magnitudes are counted by the upper half of their bits (positive
floats stand in the order of their bits), and only the bin that holds the wanted one is looked into. Of equal magnitudes
the first come first.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from ...deltas import Delta
from ...errors import ParameterError

Granularity = Literal["tensor", "row", "global"]
BINS = 1 << 16


def ignored(
    delta: Delta,
    k: float,
    *,
    granularity: Granularity = "tensor",
    band: tuple[float, float] | None = None,
    complement: bool = False,
    count_zeros: bool = False,
    exclude: str = "",
    random: int | None = None,
) -> tuple[Delta, float]:
    """A delta without its largest k % of entries, and the share of the entries that count which was left out.

    Args:
        band: percentages from the largest on, in place of (0, k).
        complement: keep these and leave out all others.
        count_zeros: entries that did not change count in the percentages.
        exclude: pattern of names whose change stays whole.
        random: a seed; entries are drawn, not chosen by size (a control).

    Raises:
        ParameterError: percentages that cannot be, or a pattern that is none.
    """
    low, high = band or (0.0, k)
    if not 0 <= low <= high <= 100 or (band is None and high == 100):
        raise ParameterError(f"the changes to be ignored are {low} to {high} %, expected within 0 and below 100")
    try:
        spared = re.compile(exclude) if exclude else None
    except re.error as error:
        raise ParameterError(f"exclude is {exclude!r}, which is no pattern: {error}") from None
    names = [name for name in delta.entries if not (spared and spared.search(name))]
    values = [_values(delta, name) for name in names]
    sizes = [value.abs().float() for value in values]
    counted = [torch.ones_like(size, dtype=torch.bool) if count_zeros else size > 0 for size in sizes]
    if random is not None:
        generator = torch.Generator().manual_seed(random)
        sizes = [torch.rand(size.shape, generator=generator) for size in sizes]
    groups = [list(range(len(names)))] if granularity == "global" else [[i] for i in range(len(names))]
    chosen: list[Tensor] = [torch.zeros_like(mask) for mask in counted]
    for group in groups:
        parts, masks = [sizes[i] for i in group], [counted[i] for i in group]
        if granularity == "row" and parts[0].dim() > 1:
            found = [_by_row(parts[0], masks[0], high) & ~_by_row(parts[0], masks[0], low)]
        else:
            total = sum(int(mask.sum()) for mask in masks)
            upper, lower = (_largest(parts, masks, round(total * share / 100)) for share in (high, low))
            found = [a & ~b for a, b in zip(upper, lower)]
        for i, mask in zip(group, found):
            chosen[i] = mask
    left_out = [mask & ~one if complement else one for mask, one in zip(counted, chosen)]
    entries = dict(delta.entries)
    for name, value, mask in zip(names, values, left_out):
        entries[name] = _put(delta, name, value.masked_fill(mask, 0))
    counted_all = sum(int(mask.sum()) for mask in counted)
    share = sum(int(mask.sum()) for mask in left_out) / counted_all if counted_all else 0.0
    return replace(delta, entries=entries, result=""), share


def without_largest(tensor: Tensor, k: float) -> Tensor:
    """A tensor whose largest k % of non-zero entries are 0."""
    size = tensor.abs().float()
    counted = size > 0
    (mask,) = _largest([size], [counted], round(int(counted.sum()) * k / 100))
    return tensor.masked_fill(mask, 0)


def _values(delta: Delta, name: str) -> Tensor:
    """The numbers of an entry: a low-rank one is multiplied out."""
    entry = delta.entries[name]
    if "index" in entry:
        return entry["value"]
    return entry["difference"] if "slice" in entry else delta.difference(name)


def _put(delta: Delta, name: str, value: Tensor) -> dict[str, Tensor]:
    entry = delta.entries[name]
    if "index" in entry:
        return {**entry, "value": value}
    return {**entry, "difference": value} if "slice" in entry else {"difference": value}


def _largest(sizes: Sequence[Tensor], counted: Sequence[Tensor], count: int) -> list[Tensor]:
    """Masks of the `count` largest of all tensors together, among those that count."""
    masks = [torch.zeros_like(mask) for mask in counted]
    if count == 0:
        return masks
    bits = [size.view(torch.int32) >> 15 for size in sizes]  # the sign is 0: 16 bits are left
    bins = sum(torch.bincount(bit[mask].flatten(), minlength=BINS) for bit, mask in zip(bits, counted))
    above = torch.as_tensor(bins).flip(0).cumsum(0)
    place = int((above >= count).nonzero()[0])
    bin_ = BINS - 1 - place
    rest = count - (int(above[place - 1]) if place else 0)
    inside = torch.cat([size[mask & (bit == bin_)] for size, bit, mask in zip(sizes, bits, counted)])
    threshold = inside.sort(descending=True).values[rest - 1]
    equal = rest - int((inside > threshold).sum())
    for i, (size, mask) in enumerate(zip(sizes, counted)):
        masks[i] = mask & (size > threshold)
        ties = (mask & (size == threshold)).flatten().nonzero()[:equal, 0]
        masks[i].view(-1)[ties] = True
        equal -= len(ties)
    return masks


def _by_row(size: Tensor, counted: Tensor, share: float) -> Tensor:
    """The largest `share` % of every row (the last axis)."""
    ordered = size.masked_fill(~counted, -1).sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(ordered).scatter_(-1, ordered, torch.arange(size.shape[-1]).expand_as(ordered))
    count = (counted.sum(-1, keepdim=True) * share / 100).round()
    return (rank < count) & counted
