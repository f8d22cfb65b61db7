"""Two models on the same rows, answer by answer: what one answers and the other does not, and whether chance does that.

The models read the same questions, so that only rows on which they differ tell them apart. With b rows that the first
alone answers and c that the second alone does, the exact test of McNemar (1947) asks how often b + c fair coins fall
as unevenly as that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from ..errors import TableError
from ..evidence import Interval
from .bootstrap import Bootstrap, interval
from .values import Units, Values, mean_of


@dataclass(frozen=True)
class Paired:
    """Rows by who answers them; `first` and `second` are those that one alone answers."""

    both: int
    first: int
    second: int
    neither: int
    p: float
    """Two-sided, exact; 1 where the models differ on no row."""
    difference: Interval
    """Share of rows that the first answers minus that of the second, from resamples that draw rows for both."""


def paired(
    first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray, units: Units, draws: Bootstrap
) -> Paired:
    """Compare two models by their answers to the same rows.

    Args:
        first: (rows,) 1 for an answer that counts, 0 for another.
        second: the same of the other model.
        units: the rows; the bootstrap draws their entities.

    Raises:
        TableError: the numbers are not one 0 or 1 a row on both sides.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != (len(units),) or b.shape != a.shape or not np.isin([a, b], (0, 1)).all():
        raise TableError(
            f"pairs need one 0 or 1 for each of {len(units)} rows of both models, found shapes {a.shape} and {b.shape}"
        )
    one, other = int((a > b).sum()), int((b > a).sum())
    difference = Values(units, mean_of(a - b))
    return Paired(
        both=int((a * b).sum()),
        first=one,
        second=other,
        neither=int(((1 - a) * (1 - b)).sum()),
        p=sign_test(one, other),
        difference=interval(difference.value, draws.distribution(difference)),
    )


def sign_test(first: int, second: int) -> float:
    """Two-sided p of `first` heads and `second` tails from fair coins."""
    n = first + second
    return min(1.0, 2 * sum(comb(n, i) for i in range(min(first, second) + 1)) / 2**n)
