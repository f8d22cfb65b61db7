"""`Routes`: which experts every token of some rows takes, in every block that has experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .scores import Key


@dataclass(frozen=True)
class Routes:
    """Choices of `n` rows, flat; row i owns tokens `offsets[i]:offsets[i + 1]`."""

    keys: list[Key]
    """(row id, variant)"""
    offsets: np.ndarray
    chosen: dict[int, np.ndarray]
    """Block to (tokens, K) experts, in no particular order; every token that is fed, so not a row's last one."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """`experts`: block to how many it has."""

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def tokens(self) -> int:
        return int(self.offsets[-1])

    def take(self, indices: Sequence[int], keys: list[Key]) -> Routes:
        """The rows at these positions, in this order, under new keys."""
        spans = [np.arange(self.offsets[i], self.offsets[i + 1]) for i in indices]
        flat = np.concatenate(spans) if spans else np.zeros(0, dtype=np.int64)
        return Routes.of(
            keys, [len(span) for span in spans], {at: c[flat] for at, c in self.chosen.items()}, self.metadata
        )

    @staticmethod
    def of(
        keys: list[Key],
        lengths: Sequence[int],
        chosen: dict[int, np.ndarray],
        metadata: dict[str, Any] | None = None,
    ) -> Routes:
        """A table from flat choices by block and the number of tokens of each row."""
        return Routes(keys, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), chosen, metadata or {})

    def save(self, path: Path) -> None:
        """Write an arrow file; it appears under its name only when complete."""
        import pyarrow as pa

        from .store import write_arrow

        columns: dict[str, Any] = {
            "row": pa.array([key[0] for key in self.keys], pa.string()),
            "variant": pa.array([key[1] for key in self.keys], pa.string()),
        }
        for block, chosen in self.chosen.items():
            offsets = pa.array((self.offsets * chosen.shape[1]).astype(np.int32))
            columns[f"block.{block}"] = pa.ListArray.from_arrays(offsets, pa.array(chosen.reshape(-1)))
        kept = {str(block): chosen.shape[1] for block, chosen in self.chosen.items()}
        write_arrow(pa.table(columns), path, {**self.metadata, "kept": kept, "lengths": np.diff(self.offsets).tolist()})

    @staticmethod
    def load(path: Path) -> Routes:
        from .store import read_arrow

        table, metadata = read_arrow(path)
        kept, lengths = metadata.pop("kept"), metadata.pop("lengths")
        chosen = {
            int(block): table[f"block.{block}"].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(-1, k)
            for block, k in kept.items()
        }
        return Routes.of(list(zip(table["row"].to_pylist(), table["variant"].to_pylist())), lengths, chosen, metadata)
