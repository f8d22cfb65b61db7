"""In which orders a shard's slices are learnt (S3T, arXiv:2406.16257, section 3.3), and what an order is still worth.

An order is a permutation of the slices 0 ... L-1. What was learnt from a slice, and all that came after it, is lost
when the slice is hit; what stands before it, the live prefix, stays whole. Orders that begin with different slices die
of different deletions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from typing import Literal, get_args

import numpy as np

from ...errors import ParameterError

Order = tuple[int, ...]
Family = Literal["cyclic", "matching", "random", "all"]
TIES = 1e-9
"""Share of the largest score below which two assignments count as equal."""


def orders(
    family: Family,
    slices: int,
    budget: int,
    *,
    probabilities: Sequence[float] = (),
    requests: int | None = None,
    seed: int = 0,
) -> list[Order]:
    """`budget` orders of a family; `all` knows no budget.

    Args:
        probabilities: (L,) chance of each slice to be hit by a request, for `matching`.
        requests: how many of them `matching` looks ahead; by default as many as hit every slice once, on average.
        seed: of `random`.

    Raises:
        ParameterError: a budget that there are not enough orders for, or probabilities that are none.
    """
    if slices < 1 or not 1 <= budget <= math.factorial(slices):
        most = math.factorial(max(1, slices))
        raise ParameterError(f"budget is {budget} for {slices} slices; expected 1 to {most}, the number of orders")
    if family == "cyclic":
        return cyclic(slices, budget)
    if family == "matching":
        return matching(_chances(probabilities, slices), budget, requests)
    if family == "random":
        return _random(slices, budget, seed)
    if family == "all":
        return list(itertools.permutations(range(slices)))
    raise ParameterError(f"there are no orders called {family!r}; expected {', '.join(get_args(Family))}")


def cyclic(slices: int, budget: int) -> list[Order]:
    """Rotations of (0, 1 ... L-1). Beyond L of them each rotation keeps its first slice and rotates the rest, and so
    on, the budget spread evenly; distinct for every budget up to L!.

    With budget = L every slice stands at every position once.
    """
    rotations = [tuple((first + step) % slices for step in range(slices)) for first in range(slices)]
    if budget <= slices:
        return rotations[:budget]
    each, more = divmod(budget, slices)
    return [
        (first, *(rest[i] for i in inner))
        for number, (first, *rest) in enumerate(rotations)
        for inner in cyclic(slices - 1, each + (number < more))
    ]


def matching(chances: Sequence[float], budget: int, requests: int | None = None) -> list[Order]:
    """Orders for slices that are hit with different chances (bipartite matching of orders and slices).

    All L orders grow by one slice a round: the assignment of slices to orders with the largest sum of scores of the
    longer prefixes. So every round is a bijection, and first slices are all different. Of the L the `budget` with the
    highest scores are given.

    Raises:
        ParameterError: a budget above L.
    """
    from scipy.optimize import linear_sum_assignment

    count = len(chances)
    if budget > count:
        raise ParameterError(f"budget is {budget}, but matching gives {count} orders, one for each slice")
    ahead = requests if requests is not None else round(until_all([p for p in chances if p > 0]))
    found: list[Order] = [() for _ in chances]
    for _ in range(count):
        gains = np.array([[score((*begun, s), chances, ahead) for s in range(count)] for begun in found])
        used = np.array([[s in begun for s in range(count)] for begun in found])
        # Of equal assignments the one that gives earlier orders lower slices.
        ties = TIES * gains.max() * np.outer(1 / (1 + np.arange(count)), np.arange(count)) / count
        cost = np.where(used, np.inf, ties - gains)
        found = [(*found[order], int(s)) for order, s in zip(*linear_sum_assignment(cost))]
    best = sorted(range(count), key=lambda i: -score(found[i], chances, ahead))[:budget]
    return [found[i] for i in sorted(best)]


def score(prefix: Sequence[int], chances: Sequence[float], requests: int) -> float:
    """sum over l of l (1 - q_1 - ... - q_l)^t: the mean of n (n + 1) / 2, n the live length after t requests.

    The reference's score; the mean of n itself would be the same sum without the factor l.
    """
    gone = np.minimum(np.cumsum([chances[s] for s in prefix]), 1.0)
    return float(np.arange(1, len(prefix) + 1) @ (1 - gone) ** requests)


def until_all(chances: Sequence[float]) -> float:
    """Mean number of draws until each of some things was drawn, one at most a draw: a coupon collector's.

    The integral of 1 - prod(1 - exp(-p t)) over t; n H(k) for k of n equally likely things.
    """
    from scipy.integrate import quad

    rates = np.array(chances, dtype=np.float64)

    # Over u = 1 - exp(-p t) of the rarest, which leaves a smooth function on (0, 1).
    def left(u: float) -> float:
        t = -np.log1p(-u) / rates.min()
        return float((1 - np.prod(-np.expm1(-rates * t))) / (rates.min() * (1 - u)))

    return float(quad(left, 0, 1, limit=200)[0])


def _chances(probabilities: Sequence[float], slices: int) -> list[float]:
    chances = [float(p) for p in probabilities]
    if len(chances) != slices or min(chances) < 0 or not 0 < sum(chances) <= 1 + 1e-9:
        raise ParameterError(
            f"probabilities are {chances}; matching needs one for each of the {slices} slices, none below 0, at most 1 "
            "together"
        )
    return chances


def _random(slices: int, budget: int, seed: int) -> list[Order]:
    """Distinct permutations drawn by the seed."""
    rng = np.random.default_rng(seed)
    found: dict[Order, None] = {}
    while len(found) < budget:
        found[tuple(rng.permutation(slices).tolist())] = None
    return list(found)


def live(order: Sequence[int], hit: Collection[int]) -> int:
    """Length of the longest prefix without a slice that was hit."""
    return next((length for length, s in enumerate(order) if s in hit), len(order))


def prefixes(many: Sequence[Order]) -> list[Order]:
    """Every beginning of every order once, shorter ones first: what must be trained."""
    found = dict.fromkeys(order[:length] for order in many for length in range(1, len(order) + 1))
    return sorted(found, key=lambda prefix: (len(prefix), prefix))
