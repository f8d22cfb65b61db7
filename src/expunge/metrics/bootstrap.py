"""Bootstrap over entities: the questions about one person are not independent, so persons are drawn, not questions.

Each row set is drawn on its own (an AUC resamples both sides). What is drawn depends on the seed, the set's name and
its entities alone, so that all models and metrics see the same draws and their differences are paired.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np

from ..errors import ParameterError
from ..evidence import Interval
from .values import Units, Values

BLOCK = 1 << 20
"""Weights held at once (8 MiB)."""


class Bootstrap:
    """`draws` resamples of any units; the same units always give the same resamples."""

    def __init__(self, draws: int = 1000, seed: int = 0) -> None:
        if draws < 0:
            raise ParameterError(f"bootstrap = {draws}: expected the number of resamples, 0 for none")
        self.draws = draws
        self.seed = seed
        self._counts: dict[Units, np.ndarray] = {}

    def weights(self, units: Units) -> Iterator[np.ndarray]:
        """Blocks (some draws, rows): how often each row occurs in each resample."""
        if units not in self._counts:
            self._counts[units] = self._draw(units)
        counts = self._counts[units]
        step = max(1, BLOCK // max(1, len(units)))
        for first in range(0, self.draws, step):
            yield counts[first : first + step].astype(np.float64)

    def _draw(self, units: Units) -> np.ndarray:
        sets, entities = np.array(units.sets), np.array(units.entities)
        counts = np.zeros((self.draws, len(units)), dtype=np.uint16)
        for name in np.unique(sets):
            at = np.flatnonzero(sets == name)
            # Sorted entities: the order of the rows does not change what is drawn.
            distinct, index = np.unique(entities[at], return_inverse=True)
            generator = np.random.default_rng([self.seed, zlib.crc32(str(name).encode())])
            drawn = generator.integers(0, len(distinct), (self.draws, len(distinct)))
            flat = drawn + np.arange(self.draws)[:, None] * len(distinct)
            per_entity = np.bincount(flat.ravel(), minlength=self.draws * len(distinct))
            counts[:, at] = per_entity.reshape(self.draws, len(distinct))[:, index]
        return counts

    def distribution(self, values: Values) -> np.ndarray:
        """(draws,) the metric's value on every resample."""
        blocks = [values.aggregate(block) for block in self.weights(values.units)]
        return np.concatenate(blocks) if blocks else np.zeros(0)


def interval(value: float, distribution: np.ndarray) -> Interval:
    """The 95 % percentile interval, widened where needed to hold the value itself; no draws, no bounds.

    Resampled distances between distributions are larger than the distance itself (draws repeat rows), so a distance
    near 0 can lie below all of them.
    """
    if not len(distribution):
        return Interval(np.nan, value, np.nan)
    low, high = np.quantile(distribution, (0.025, 0.975))
    return Interval(min(float(low), value), value, max(float(high), value))
