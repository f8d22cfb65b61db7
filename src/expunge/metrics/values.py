"""`Values`: what a metric found on one model, before it is one number."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..rows import Row

Aggregate = Callable[[np.ndarray], np.ndarray]
"""Weights (draws, rows) to values (draws,): how rows become one number, for many resamples at once."""


@dataclass(frozen=True)
class Units:
    """The rows a metric read, in one order: set, id and entity of each."""

    sets: tuple[str, ...]
    ids: tuple[str, ...]
    entities: tuple[str, ...]
    """The unit that a bootstrap draws; a row without an entity stands for itself."""

    def __len__(self) -> int:
        return len(self.ids)

    @staticmethod
    def of(*groups: tuple[str, Iterable[Any]]) -> Units:
        """Units of `(set name, rows)` pairs; rows of any kind that have an id and an entity."""
        found = [(name, row.id, row.entity or row.id) for name, rows in groups for row in rows]
        sets, ids, entities = zip(*found) if found else ((), (), ())
        return Units(tuple(sets), tuple(ids), tuple(entities))


@dataclass(frozen=True)
class Values:
    """Per-row values and the rule that makes one number of them."""

    units: Units
    aggregate: Aggregate
    each: np.ndarray | None = None
    """(rows,) values whose meaning the metric's docstring gives; None where the number belongs to no single row."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further numbers, plain JSON values."""
    flag: str = ""
    """A sentence where the value cannot be, or is too good to be believed."""

    @property
    def value(self) -> float:
        return float(self.aggregate(np.ones((1, len(self.units))))[0])


def mean_of(each: np.ndarray) -> Aggregate:
    """The weighted mean of per-row values."""
    return lambda weights: weights @ each / weights.sum(axis=1)


def median_of(each: np.ndarray) -> Aggregate:
    """The weighted median; between two middle values their mean, as for plain medians."""
    order = np.argsort(each, kind="stable")
    ordered = each[order]

    def aggregate(weights: np.ndarray) -> np.ndarray:
        below = np.cumsum(weights[:, order], axis=1)
        half = below[:, -1:] / 2
        return (ordered[(below >= half).argmax(axis=1)] + ordered[(below > half).argmax(axis=1)]) / 2

    return aggregate


def averages(rows: str, kept: Iterable[Row], each: np.ndarray, *, flag: str = "", **extra: Any) -> Values:
    """Values whose aggregate is the mean over the rows of one set."""
    return Values(Units.of((rows, kept)), mean_of(each), each, extra, flag)
