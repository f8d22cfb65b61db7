"""`Distances`: how far what a model says at every answer token lies from what another one says there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from .scores import Key


@dataclass(frozen=True)
class Distances:
    """Between the next-token distributions p of a model and q of another one, means over each answer's tokens, end
    token included (subjects/distances.py)."""

    keys: list[Key]
    """(row id, `answer`)"""
    total_variation: np.ndarray
    """(rows,) half the sum of |p - q|, 0 to 1."""
    jensen_shannon: np.ndarray
    """(rows,) bits, 0 to 1."""
    kl: np.ndarray
    """(rows,) KL(q || p) in nats."""
    disagreement: np.ndarray
    """(rows,) share of tokens whose likeliest candidate differs."""
    metadata: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, indices: Sequence[int], keys: list[Key]) -> Distances:
        """The rows at these positions, in this order, under new keys."""
        at = list(indices)
        taken: dict[str, Any] = {name: getattr(self, name)[at] for name in NUMBERS}
        return Distances(keys, **taken, metadata=self.metadata)

    def save(self, path: Path) -> None:
        """Write an arrow file; it appears under its name only when complete."""
        import pyarrow as pa

        from .store import write_arrow

        columns: dict[str, Any] = {
            "row": pa.array([key[0] for key in self.keys], pa.string()),
            "candidate": pa.array([key[1] for key in self.keys], pa.string()),
            **{name: pa.array(getattr(self, name), pa.float32()) for name in NUMBERS},
        }
        write_arrow(pa.table(columns), path, self.metadata)

    @staticmethod
    def load(path: Path) -> Distances:
        from .store import read_arrow

        table, metadata = read_arrow(path)
        keys = list(zip(table["row"].to_pylist(), table["candidate"].to_pylist()))
        numbers: dict[str, Any] = {name: table[name].to_numpy() for name in NUMBERS}
        return Distances(keys, **numbers, metadata=metadata)


NUMBERS = tuple(one.name for one in fields(Distances))[1:-1]
