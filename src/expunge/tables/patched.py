"""`Patched`: what a model still says of facts when another model's states are put into one block after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .scores import Key


@dataclass(frozen=True)
class Patched:
    """Mean log-probability of each row's fact under the host (subjects/patching.py)."""

    keys: list[Key]
    """(row id, `fact`)"""
    whole: np.ndarray
    """(rows,) the host as it is."""
    by_block: np.ndarray
    """(rows, blocks) the host with the donor's output of one block, at the tokens that predict the fact."""
    metadata: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, indices: Sequence[int], keys: list[Key]) -> Patched:
        """The rows at these positions, in this order, under new keys."""
        return Patched(keys, self.whole[list(indices)], self.by_block[list(indices)], self.metadata)

    @property
    def drop(self) -> np.ndarray:
        """(rows, blocks) nats per token that the donor's states cost."""
        return self.whole[:, None] - self.by_block

    def save(self, path: Path) -> None:
        """Write an arrow file; it appears under its name only when complete."""
        import pyarrow as pa

        from .store import write_arrow

        columns: dict[str, Any] = {
            "row": pa.array([key[0] for key in self.keys], pa.string()),
            "variant": pa.array([key[1] for key in self.keys], pa.string()),
            "whole": pa.array(self.whole),
            "by_block": pa.array(list(self.by_block), pa.list_(pa.float32())),
        }
        write_arrow(pa.table(columns), path, {**self.metadata, "blocks": self.by_block.shape[1]})

    @staticmethod
    def load(path: Path) -> Patched:
        from .store import read_arrow

        table, metadata = read_arrow(path)
        by_block = np.array(table["by_block"].to_pylist(), np.float32).reshape(-1, metadata.pop("blocks"))
        keys = list(zip(table["row"].to_pylist(), table["variant"].to_pylist()))
        return Patched(keys, table["whole"].to_numpy(), by_block, metadata)
