"""`Divergences`: how differently two models answer rows, over the whole vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .scores import Key


@dataclass(frozen=True)
class Divergences:
    """Jensen-Shannon divergence between the answers of a model and another one (subjects/divergence.py)."""

    keys: list[Key]
    """(row id, `answer`)"""
    value: np.ndarray
    """(rows,) bits, 0 to 1, mean over the answer's tokens."""
    metadata: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, indices: Sequence[int], keys: list[Key]) -> Divergences:
        """The rows at these positions, in this order, under new keys."""
        return Divergences(keys, self.value[list(indices)], self.metadata)

    def save(self, path: Path) -> None:
        """Write an arrow file; it appears under its name only when complete."""
        import pyarrow as pa

        from .store import write_arrow

        columns: dict[str, Any] = {
            "row": pa.array([key[0] for key in self.keys], pa.string()),
            "candidate": pa.array([key[1] for key in self.keys], pa.string()),
            "value": pa.array(self.value, pa.float32()),
        }
        write_arrow(pa.table(columns), path, self.metadata)

    @staticmethod
    def load(path: Path) -> Divergences:
        from .store import read_arrow

        table, metadata = read_arrow(path)
        keys = list(zip(table["row"].to_pylist(), table["candidate"].to_pylist()))
        return Divergences(keys, table["value"].to_numpy(), metadata)
