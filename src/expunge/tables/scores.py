"""`Scores`: what a model thinks of every answer token, from one teacher-forced pass.

For target token y_t with next-token distribution p_t the table holds (specs: metrics 3.1)

- `logprob`  l_t  = log p_t(y_t), natural logarithm
- `hit`      h_t  = the token is the argmax; ties go to the smallest id
- `mean`     mu_t = sum_v p_t(v) log p_t(v), minus the entropy
- `variance` v_t  = sum_v p_t(v) log^2 p_t(v) - mu_t^2
- both moments are NaN for candidates other than `answer`: nothing reads them there, and they cost as much as the rest
- `end`           = the token closes the answer (end of sequence, end of turn) and is not part of its text

Full logits are never stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import TableError

Key = tuple[str, str]
"""(row id, candidate): `answer`, `paraphrase`, `perturbed/0` ..., or another name the asker chose."""


@dataclass(frozen=True)
class Scores:
    """Token scores of `n` items, flat; item i owns tokens `offsets[i]:offsets[i + 1]`."""

    keys: list[Key]
    offsets: np.ndarray
    token: np.ndarray
    logprob: np.ndarray
    hit: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    end: np.ndarray
    texts: list[str]
    """Text of each scored answer (zlib's denominator comes from here, not from decoding)."""
    metadata: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)

    def tokens(self, index: int) -> slice:
        return slice(int(self.offsets[index]), int(self.offsets[index + 1]))

    def take(self, indices: Sequence[int], keys: list[Key] | None = None) -> Scores:
        """The items at these positions, in this order, under new keys where given."""
        spans = [np.arange(self.offsets[i], self.offsets[i + 1]) for i in indices]
        flat = np.concatenate(spans) if spans else np.zeros(0, dtype=np.int64)
        lengths = [len(span) for span in spans]
        columns = {name: getattr(self, name)[flat] for name in COLUMNS}
        keys = [self.keys[i] for i in indices] if keys is None else keys
        return Scores.of(keys, lengths, columns, [self.texts[i] for i in indices], self.metadata)

    @staticmethod
    def of(
        keys: list[Key],
        lengths: Sequence[int] | np.ndarray,
        columns: dict[str, np.ndarray],
        texts: list[str],
        metadata: dict[str, Any] | None = None,
    ) -> Scores:
        """A table from flat columns by name and the number of tokens of each item."""
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return Scores(keys=keys, offsets=offsets, texts=texts, metadata=metadata or {}, **columns)

    def candidate(self, name: str, ids: Sequence[str] | None = None) -> Scores:
        """The items with this candidate name, in the order of `ids` where given.

        Raises:
            TableError: an id has no such candidate.
        """
        at = {key[0]: i for i, key in enumerate(self.keys) if key[1] == name}
        if ids is None:
            return self.take(list(at.values()))
        missing = [i for i in ids if i not in at]
        if missing:
            raise TableError(f"row {missing[0]!r} has no scores for {name!r} ({len(missing)} rows lack it)")
        return self.take([at[i] for i in ids])

    @staticmethod
    def concatenate(tables: Sequence[Scores]) -> Scores:
        lengths = np.concatenate([np.diff(table.offsets) for table in tables]) if tables else np.zeros(0, np.int64)
        columns = {name: np.concatenate([getattr(table, name) for table in tables]) for name in COLUMNS}
        keys, texts = (
            [key for table in tables for key in table.keys],
            [text for table in tables for text in table.texts],
        )
        return Scores.of(keys, lengths, columns, texts, tables[0].metadata if tables else {})

    def save(self, path: Path) -> None:
        """Write an arrow file; it appears under its name only when complete."""
        import pyarrow as pa

        from .store import write_arrow

        columns: dict[str, Any] = {
            "row": pa.array([key[0] for key in self.keys], pa.string()),
            "candidate": pa.array([key[1] for key in self.keys], pa.string()),
            "text": pa.array(self.texts, pa.string()),
        }
        offsets = pa.array(self.offsets.astype(np.int32))
        for name in COLUMNS:
            columns[name] = pa.ListArray.from_arrays(offsets, pa.array(getattr(self, name)))
        write_arrow(pa.table(columns), path, self.metadata)

    @staticmethod
    def load(path: Path) -> Scores:
        from .store import read_arrow

        table, metadata = read_arrow(path)
        lists = {name: table[name].combine_chunks() for name in COLUMNS}
        first = lists["token"]
        lengths = first.value_lengths().to_numpy(zero_copy_only=False) if len(first) else np.zeros(0, np.int64)
        columns = {name: lists[name].flatten().to_numpy(zero_copy_only=False) for name in COLUMNS}
        keys = list(zip(table["row"].to_pylist(), table["candidate"].to_pylist()))
        return Scores.of(keys, lengths, columns, table["text"].to_pylist(), metadata)


COLUMNS = ("token", "logprob", "hit", "mean", "variance", "end")
