"""`Gradients`: how strongly rows pull at the weights, from one pass with gradients (subjects/gradients.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .scores import Key


@dataclass(frozen=True)
class Gradients:
    """Norms of the gradient of each row's mean loss over the tokens of its answer, one by parameter tensor."""

    keys: list[Key]
    """(row id, candidate)"""
    tensors: list[str]
    """Names of the parameter tensors; tied ones stand once."""
    norm: np.ndarray
    """(rows, tensors) 2-norms; NaN where a row does not use a tensor."""
    metadata: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, indices: Sequence[int], keys: list[Key]) -> Gradients:
        """The rows at these positions, in this order, under new keys."""
        return Gradients(keys, self.tensors, self.norm[list(indices)], self.metadata)

    def save(self, path: Path) -> None:
        """Write an arrow file; it appears under its name only when complete."""
        import pyarrow as pa

        from .store import write_arrow

        columns: dict[str, Any] = {
            "row": pa.array([key[0] for key in self.keys], pa.string()),
            "candidate": pa.array([key[1] for key in self.keys], pa.string()),
            "norm": pa.array(list(self.norm), pa.list_(pa.float32())),
        }
        write_arrow(pa.table(columns), path, {**self.metadata, "tensors": self.tensors})

    @staticmethod
    def load(path: Path) -> Gradients:
        from .store import read_arrow

        table, metadata = read_arrow(path)
        tensors = metadata.pop("tensors")
        norm = np.array(table["norm"].to_pylist(), np.float32).reshape(-1, len(tensors))
        return Gradients(list(zip(table["row"].to_pylist(), table["candidate"].to_pylist())), tensors, norm, metadata)
