"""A step's pass in two halves: on a CPU two threads take half of the rows each, forward and back.

Threads that share out one operator after another wait for each other at the end of each, and most of a block's
operators are small. What the halves hand out is put together before the objective sees it, and its gradient is cut
again, so a step is what it is in one pass. There are two of them, whatever the number of threads: sums of two do not
depend on which half is done first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import TypeVar

from ... import processes
from ...subjects.language import LanguageModel
from ...subjects.packed import Encoded
from ...subjects.side_by_side import Twins, at_once

R = TypeVar("R")

TWICE = 0.1
"""Of a step's tokens at most, that rows of both halves begin with and both compute."""
LONGER = 0.75
"""Of a step's tokens at most, that the longer half has."""
PRODUCTS = 1 << 26
"""Multiplications of a half's forward pass from which two threads are worth their while."""


class Halves:
    """Two twins of the model in training."""

    def __init__(self, twins: Twins, weights: int) -> None:
        self.twins = twins
        self.weights = weights
        """Of the blocks."""

    def of(self, rows: Sequence[Encoded]) -> list[list[int]]:
        """Places of the rows of either half, rows that begin alike next to one another; nothing where one pass is
        better."""
        order = sorted(range(len(rows)), key=lambda i: rows[i].ids)
        alike = [0, *(_common(rows[i].ids, rows[j].ids) for i, j in pairwise(order))]
        before = [0, *accumulate(len(rows[i].ids) - same for i, same in zip(order, alike))]
        total = before[-1]
        cuts = [cut for cut in range(1, len(rows)) if alike[cut] <= TWICE * total]
        longer = {cut: max(before[cut], total - before[cut] + alike[cut]) for cut in cuts}
        cut = min(cuts, key=lambda cut: longer[cut], default=0)
        if not cut or longer[cut] > LONGER * total or self.weights * total < 2 * PRODUCTS:
            return []
        return [sorted(order[:cut]), sorted(order[cut:])]

    def run(self, do: Callable[[LanguageModel, int], R]) -> list[R]:
        """What `do` gives for a twin and the number of either half."""
        return list(self.twins.pool.map(self.twins.each(do), range(2)))


@contextmanager
def halves(subject: LanguageModel) -> Iterator[Halves | None]:
    """Within the block steps of a subject may run in halves; None where they cannot."""
    if processes.count() > 1 or at_once(subject) < 2:
        yield None
        return
    subject.settle()
    names = tuple(block.name + "." for block in subject.blocks)
    weights = sum(p.numel() for name, p in subject.model.named_parameters() if name.startswith(names))
    with Twins(subject, 2) as twins:
        yield Halves(twins, weights)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
