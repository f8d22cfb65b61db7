"""TIES: trim each delta, elect a sign for every number, take the mean of those that have it."""

from typing import Annotated

import torch
from pydantic import Field

from ..deltas import Delta, aligned
from ..registry import merge
from .case import Entries, Merging
from .vectors import elected, trimmed


@merge(paper="arXiv:2306.01708", cost="one pass over the weights; a sort of each delta's numbers")
def ties(case: Merging, *, density: Annotated[float, Field(gt=0, le=1)] = 0.2, coefficient: float = 1.0) -> Entries:
    """Trim, elect sign, disjoint mean (Yadav et al. 2023, algorithm 1).

    Of each delta the `density` of its numbers that are largest are kept; a number's sign is that of the sum of what is
    left; the mean is over the deltas that agree with it and are not 0. Where the sum is exactly 0 nothing is kept.
    """
    kept = Merging([trimmed(delta, density) for delta in case.deltas])
    entries: Entries = {}
    for name in kept.names:
        values, put = aligned(name, kept.parts(name))
        agreeing = torch.stack(elected(values))
        entries[name] = put(coefficient * agreeing.sum(0) / (agreeing != 0).sum(0).clamp_min(1))
    return Delta("", entries).sparsified().entries
