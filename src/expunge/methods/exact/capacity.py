"""How many deletions an ensemble serves before it must be trained again: theory, and simulation without any model.

A request hits one of the m L slices of m shards, all equally likely, slices that were hit before included. An order is
dead when its first slice is hit, a shard when all of its orders are. With B' different first slices in a shard, the
ensemble dies when m B' slices were hit: a coupon collector, whose mean is

    m L H(m B')        H(k) = 1 + 1/2 + ... + 1/k

(arXiv:2406.16257, theorem 1 gives its leading term, m L ln(m B')). The first shard is out after

    m L sum over k = 1 ... m of (-1)^(k + 1) C(m, k) H(k B')

requests: each of m shards outlives t with 1 - (1 - exp(-t))^B', where slices are hit at rate 1. SISA is B' = 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from ...errors import ParameterError
from .orders import Order, cyclic, prefixes


def harmonic(count: int) -> Fraction:
    """H(count)"""
    return sum((Fraction(1, i) for i in range(1, count + 1)), Fraction(0))


def until_all_out(shards: int, slices: int, firsts: int) -> float:
    """Mean number of requests until no shard answers any more; `firsts` different first slices in a shard."""
    return float(shards * slices * harmonic(shards * firsts))


def until_one_out(shards: int, slices: int, firsts: int) -> float:
    """Mean number of requests until a shard must be trained again."""
    return float(
        shards
        * slices
        * sum((-1) ** (k + 1) * math.comb(shards, k) * harmonic(k * firsts) for k in range(1, shards + 1))
    )


def leading_term(shards: int, slices: int, firsts: int) -> float:
    """The paper's m L ln(m B')."""
    return shards * slices * math.log(shards * firsts)


def retraining_share(slices: int) -> float:
    """Row passes of SISA's retraining after one deletion, over those of training a shard anew: 2/3 + 1/(3 L).

    A hit in slice r repeats the stages r ... L, of which stage i sees i slices.
    """
    return 2 / 3 + 1 / (3 * slices)


@dataclass(frozen=True)
class Simulated:
    """What became of many ensembles."""

    all_out: np.ndarray
    """(trials,) requests until no shard answers."""
    one_out: np.ndarray
    """(trials,) requests until the first shard does not."""
    usable: np.ndarray
    """(K + 1,) after k requests: mean over trials and shards of the longest live prefix as a share of all slices."""


def simulate(
    orders: Sequence[Order],
    shards: int,
    *,
    trials: int = 4000,
    requests: int = 20,
    rows: int | None = None,
    seed: int = 0,
) -> Simulated:
    """Random requests against `shards` shards that all learnt these orders.

    Args:
        requests: K, how far `usable` goes.
        rows: of a slice, each of them deleted at most once; None: requests are for slices, again and again.

    Raises:
        ParameterError: no orders, or numbers that are not positive.
    """
    if not orders or min(shards, trials, requests, 1 if rows is None else rows) < 1:
        raise ParameterError(
            f"{len(orders)} orders, {shards} shards, {trials} trials, {requests} requests, {rows} rows; expected at "
            "least 1 of each"
        )
    slices = len(orders[0])
    rng = np.random.default_rng(seed)
    hit = _first_hits(rng, trials, shards * slices, rows).reshape(trials, shards, slices)
    # Until when some order of a shard is alive up to a length.
    until = np.zeros_like(hit)
    for order in orders:
        np.maximum(until, np.minimum.accumulate(hit[:, :, list(order)], axis=2), out=until)
    ends = until[:, :, 0]
    usable = [float((until > k).mean()) for k in range(requests + 1)]
    return Simulated(ends.max(1), ends.min(1), np.array(usable))


def _first_hits(rng: np.random.Generator, trials: int, slices: int, rows: int | None) -> np.ndarray:
    """(trials, slices) number of the first request that hits each slice, from 1."""
    if rows is not None:
        places = np.tile(np.arange(1, slices * rows + 1, dtype=np.int32), (trials, 1))
        return rng.permuted(places, axis=1).reshape(trials, slices, rows).min(2)
    never = np.iinfo(np.int32).max
    hit = np.full((trials, slices), never, dtype=np.int32)
    line, request = np.arange(trials), 0
    while (hit == never).any():
        for drawn in rng.integers(slices, size=(slices, trials)):
            request += 1
            hit[line, drawn] = np.minimum(hit[line, drawn], request)
    return hit


def compared(
    shards: int, slices: int, budgets: Sequence[int], *, requests: Sequence[int], trials: int = 4000, seed: int = 0
) -> list[dict[str, Any]]:
    """Theory beside simulation for rotated orders, budget by budget, as plain JSON values.

    `passes` are those over all rows that an epoch of training takes.
    """
    found = []
    for budget in budgets:
        orders = cyclic(slices, budget) if 1 <= budget <= math.factorial(slices) else []
        if not orders:
            raise ParameterError(f"budget is {budget}; {slices} slices have {math.factorial(slices)} orders")
        seen = simulate(orders, shards, trials=trials, requests=max(requests), seed=seed)
        firsts = min(budget, slices)
        found.append(
            {
                "budget": budget,
                "one_out": float(seen.one_out.mean()),
                "one_out_error": float(seen.one_out.std(ddof=1) / trials**0.5),
                "one_out_theory": until_one_out(shards, slices, firsts),
                "all_out": float(seen.all_out.mean()),
                "all_out_error": float(seen.all_out.std(ddof=1) / trials**0.5),
                "all_out_theory": until_all_out(shards, slices, firsts),
                "leading_term": leading_term(shards, slices, firsts),
                **{f"usable_{k}": float(seen.usable[k]) for k in requests},
                "passes": sum(map(len, prefixes(orders))) / slices,
            }
        )
    return found
