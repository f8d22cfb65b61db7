"""Averaging: the mean of the models, which is the base and the mean of the deltas."""

from ..registry import merge
from .case import Entries, Merging


@merge(paper="arXiv:2203.05482", cost="one pass over the weights")
def average(case: Merging) -> Entries:
    """The mean of all deltas (a uniform soup, Wortsman et al. 2022): each counts 1 / k, also where it moves nothing."""
    return case.combined([1 / len(case.deltas)] * len(case.deltas))
