"""A step's pass in two halves: on a CPU two threads take half of the rows each, forward and back.

Threads that share out one operator after another wait for each other at the end of each, and most of a block's
operators are small. What the halves hand out is put together before the objective sees it, and its gradient is cut
again, so a step is what it is in one pass. There are two of them, whatever the number of threads: sums of two do not
depend on which half is done first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TypeVar

from ... import processes
from ...subjects.language import LanguageModel
from ...subjects.packed import Encoded, same_start
from ...subjects.side_by_side import Twins, at_once

R = TypeVar("R")

TWICE = 0.1
"""Of a step's tokens at most, that rows of both halves begin with and both compute."""
LONGER = 0.75
"""Of a step's tokens at most, that the longer half has."""
PRODUCTS = 1 << 26
"""Multiplications of a half's forward pass from which two threads are worth their while."""


class Halves:
    """Two twins of the model in training, made when a step first needs them."""

    def __init__(self, subject: LanguageModel, weights: int) -> None:
        self.subject = subject
        self.weights = weights
        """Of the blocks."""

    @cached_property
    def twins(self) -> Twins:
        self.subject.settle()
        return Twins(self.subject, 2)

    def of(self, rows: Sequence[Encoded]) -> list[list[int]]:
        """Places of the rows of either half, rows that begin alike next to one another; nothing where one pass is
        better."""
        order = sorted(range(len(rows)), key=lambda i: rows[i].ids)
        shared = [0, *(same_start(rows[i].ids, rows[j].ids) for i, j in pairwise(order))]
        before = [0, *accumulate(len(rows[i].ids) - same for i, same in zip(order, shared))]
        total = before[-1]
        cuts = [cut for cut in range(1, len(rows)) if shared[cut] <= TWICE * total]
        longer = {cut: max(before[cut], total - before[cut] + shared[cut]) for cut in cuts}
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
    names = tuple(block.name + "." for block in subject.blocks)
    weights = sum(p.numel() for name, p in subject.model.named_parameters() if name.startswith(names))
    made = Halves(subject, weights)
    try:
        yield made
    finally:
        if "twins" in vars(made):
            made.twins.pool.shutdown()
