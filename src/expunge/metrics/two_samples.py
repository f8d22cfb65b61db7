"""Two samples over the same rows: the Kolmogorov-Smirnov distance, its p-value, and the Wasserstein distance."""

from __future__ import annotations

from functools import cache

import numpy as np

from .values import Aggregate


def _gap(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, Aggregate]:
    """(all values in order, function from weights to F_first - F_second after each of them, (draws, 2 rows))."""
    both = np.concatenate([first, second])
    order = np.argsort(both, kind="stable")
    sign, row = np.where(order < len(first), 1.0, -1.0), order % len(first)

    def gap(weights: np.ndarray) -> np.ndarray:
        return np.cumsum(weights[:, row] * sign, axis=1) / weights.sum(axis=1, keepdims=True)

    return both[order], gap


def ks_distance(first: np.ndarray, second: np.ndarray) -> Aggregate:
    """The largest distance D between the distributions of two samples whose rows are drawn together."""
    values, gap = _gap(first, second)
    # Equal values are one step of the distribution.
    ends = np.append(np.diff(values) != 0, True)
    return lambda weights: np.abs(gap(weights)).max(axis=1, where=ends, initial=0.0)


def wasserstein(first: np.ndarray, second: np.ndarray) -> Aggregate:
    """The area between the distributions of two samples whose rows are drawn together."""
    values, gap = _gap(first, second)
    return lambda weights: np.abs(gap(weights)[:, :-1]) @ np.diff(values)


@cache
def _log10_p(n: int) -> np.ndarray:
    """log10 p of the exact two-sided test for two samples of n, by h = n D.

    P(n D >= h) = 2 sum_k (-1)^(k-1) C(2n, n - k h) / C(2n, n), summed in logarithms so that nothing underflows
    (published tables hold p-values of 1e-239).
    """
    factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, 2 * n + 1)))])
    found = np.zeros(n + 1)
    for h in range(1, n + 1):
        k = np.arange(1, n // h + 1)
        log_terms = 2 * factorial[n] - factorial[n - k * h] - factorial[n + k * h]
        series = np.sum((-1.0) ** (k - 1) * np.exp(log_terms - log_terms[0]))
        found[h] = min(0.0, (np.log(2 * series) + log_terms[0]) / np.log(10))
    return found


def ks_log10_p(distance: np.ndarray | float, n: int) -> np.ndarray:
    """log10 of the p-value of the exact two-sided KS test with `n` rows on both sides."""
    return _log10_p(n)[np.rint(np.asarray(distance) * n).astype(np.int64)]
