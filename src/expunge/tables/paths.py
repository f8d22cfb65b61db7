"""`Paths`: what a model writes, greedily, after every beginning of a text; `Continuations`: the paths of many texts.

f(x_<t), the continuation of x_<t, has T - t tokens. Where the model's choice after x_<t is x_t itself (a hit), it is
x_t and then f(x_<t+1), so that only what follows misses is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .scores import Key


@dataclass(frozen=True)
class Paths:
    """The greedy continuations of the prefixes of one text."""

    ids: np.ndarray
    """(T,) the text."""
    hit: np.ndarray
    """(T,) whether the model's choice after x_<t is x_t; the first entry is False and means nothing."""
    written: dict[int, np.ndarray]
    """f(x_<t), (T - t,), of the misses t that were asked for."""
    start: int = 1
    """The first t that was asked for: where the answer of a question begins."""

    def next_miss(self, t: int) -> int:
        """The first miss at or after t; T where there is none."""
        wrong = np.flatnonzero(~self.hit[t:])
        return t + int(wrong[0]) if len(wrong) else len(self.ids)

    def after(self, t: int) -> np.ndarray:
        """f(x_<t), (T - t,): what the text says up to the next miss, then what the model wrote there."""
        miss = self.next_miss(t)
        return np.concatenate([self.ids[t:miss], self.written[miss]]) if miss < len(self.ids) else self.ids[t:]

    def overlaps(self, n: int) -> np.ndarray:
        """(T - n - start + 1,) the share of n-grams of f(x_<t) that occur in x_>=t, t = start ... T - n.

        An n-gram occurs in x_>=t if the last place where it occurs in x is t or later.
        """
        last = {gram: place for place, gram in enumerate(_grams(self.ids, n))}
        found: list[float] = []
        while self.start + len(found) <= len(self.ids) - n:
            # Up to the next miss, continuations are the ends of this one.
            first = self.start + len(found)
            places = np.array([last.get(gram, -1) for gram in _grams(self.after(first), n)])
            for t in range(first, min(self.next_miss(first), len(self.ids) - n) + 1):
                found.append(float((places[t - first :] >= t).mean()))
        return np.array(found)


def _grams(ids: np.ndarray, n: int) -> list[bytes]:
    return [ids[i : i + n].tobytes() for i in range(len(ids) - n + 1)]


@dataclass(frozen=True)
class Continuations:
    """Paths of several texts."""

    keys: list[Key]
    """(row id, `text`)"""
    paths: list[Paths]
    metadata: dict[str, Any] = field(default_factory=dict)
    """`shortest`: continuations of fewer tokens were not asked for."""

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, indices: Sequence[int], keys: list[Key]) -> Continuations:
        """The texts at these positions, in this order, under new keys."""
        return Continuations(keys, [self.paths[i] for i in indices], self.metadata)

    def save(self, path: Path) -> None:
        """Write an arrow file; it appears under its name only when complete."""
        import pyarrow as pa

        from .store import write_arrow

        misses = [sorted(one.written) for one in self.paths]
        written = [np.concatenate([[], *(one.written[t] for t in at)]) for one, at in zip(self.paths, misses)]
        integers = pa.list_(pa.int32())
        columns: dict[str, Any] = {
            "row": pa.array([key[0] for key in self.keys], pa.string()),
            "variant": pa.array([key[1] for key in self.keys], pa.string()),
            "start": pa.array([one.start for one in self.paths], pa.int32()),
            "ids": pa.array([one.ids.tolist() for one in self.paths], integers),
            "hit": pa.array([one.hit.tolist() for one in self.paths], pa.list_(pa.bool_())),
            "miss": pa.array(misses, integers),
            "written": pa.array([tokens.astype(int).tolist() for tokens in written], integers),
        }
        write_arrow(pa.table(columns), path, self.metadata)

    @staticmethod
    def load(path: Path) -> Continuations:
        from .store import read_arrow

        table, metadata = read_arrow(path)
        paths = []
        for row in table.to_pylist():
            ids = np.array(row["ids"])
            lengths = [len(ids) - t for t in row["miss"]]
            parts = np.split(np.array(row["written"], ids.dtype), np.cumsum(lengths)[:-1]) if lengths else []
            paths.append(Paths(ids, np.array(row["hit"]), dict(zip(row["miss"], parts)), row["start"]))
        return Continuations(list(zip(table["row"].to_pylist(), table["variant"].to_pylist())), paths, metadata)
