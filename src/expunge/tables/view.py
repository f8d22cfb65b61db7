"""`View`: everything one model said about every row set, which is all that a metric may read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ..errors import TableError
from ..rows import Row
from .distances import Distances
from .generations import Generations
from .gradients import Gradients
from .patched import Patched
from .paths import Continuations
from .scores import Scores


class NotApplicable(TableError):
    """What a metric reads was never asked for: no such row set, no candidate of that kind, no gold model.

    An audit lists the metric with this sentence; every other `TableError` says that a table is broken and stops it.
    """


def candidates(row: Row) -> dict[str, str]:
    """Every answer of the row that metrics score, by candidate name: `answer`, `paraphrase`, `perturbed/0` ..."""
    found = {"answer": row.answer}
    if row.paraphrased_answer:
        found["paraphrase"] = row.paraphrased_answer
    found.update({f"perturbed/{i}": text for i, text in enumerate(row.perturbed_answers)})
    return found


@dataclass(frozen=True)
class View:
    """Tables of one model, by name of the row set (`forget`, `retain`, `neighbour`, `holdout`, `general` ...)."""

    rows: Mapping[str, list[Row]]
    scores: Mapping[str, Scores] = field(default_factory=dict)
    """Candidates as `candidates(row)` names them."""
    generations: Mapping[str, Generations] = field(default_factory=dict)
    """Variant `question`, greedy."""
    samples: Mapping[str, Generations] = field(default_factory=dict)
    """Variant `question`, several sampled at temperature 1."""
    gradients: Mapping[str, Gradients] = field(default_factory=dict)
    patched: Mapping[str, Patched] = field(default_factory=dict)
    """What the model before says with this model's states in it."""
    continuations: Mapping[str, Continuations] = field(default_factory=dict)
    divergences: Mapping[str, Distances] = field(default_factory=dict)
    """From an untrained network of the model's kind."""
    distances: Mapping[str, Mapping[str, Distances]] = field(default_factory=dict)
    """From gold models, by their names: tables by row set."""
    golds: Sequence[View] = ()
    """The same tables of models that never saw the forget rows, one per training seed."""
    name: str = "model"
    """Who speaks, for error messages."""
    modality: str = "language"
    """Of the model that spoke."""
    _cache: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def of(self, rows: str) -> list[Row]:
        """The rows of a set.

        Raises:
            NotApplicable: there is no such set, or it is empty.
        """
        found = self.rows.get(rows)
        if not found:
            raise NotApplicable(
                f"there are no {rows} rows (sets with rows: {_listed([s for s in self.rows if self.rows[s]])})"
            )
        return found

    def candidate(self, rows: str, name: str = "answer", ids: Sequence[str] | None = None) -> Scores:
        """Token scores of one candidate of every row (or of the rows `ids`), in row order.

        Raises:
            NotApplicable: the set was not scored, or the table holds means instead of tokens.
            TableError: rows without this candidate; a score that cannot be.
        """
        key = (rows, name, None if ids is None else tuple(ids))
        if key not in self._cache:
            table = self._table(rows)
            if table.metadata.get("means_only"):
                raise NotApplicable(f"the {rows} scores of {self.name} are means over answers, not scores of tokens")
            self._cache[key] = table.take(self.positions(rows, name, ids).tolist())
        return self._cache[key]

    def mean_logprob(self, rows: str, name: str = "answer", ids: Sequence[str] | None = None) -> np.ndarray:
        """(rows,) mean log-probability in nats per token of one candidate, end token included.

        Raises:
            NotApplicable, TableError: as `candidate`.
        """
        if ("means", rows) not in self._cache:
            table = self._table(rows)
            lengths = np.diff(table.offsets)
            sums = np.add.reduceat(table.logprob, table.offsets[:-1], dtype=np.float64)
            self._cache["means", rows] = sums / lengths
        return self._cache["means", rows][self.positions(rows, name, ids)]

    def positions(self, rows: str, name: str = "answer", ids: Sequence[str] | None = None) -> np.ndarray:
        """(rows,) where each row's candidate stands in the scores table of its set; errors as `candidate`."""
        key = ("at", rows, name, None if ids is None else tuple(ids))
        if key not in self._cache:
            wanted = [row.id for row in self.of(rows)] if ids is None else list(ids)
            at = self._index(("scores", rows), self._table(rows).keys)
            self._cache[key] = np.array(self._find(at, rows, name, wanted, "scores"), dtype=np.int64)
        return self._cache[key]

    def outputs(self, rows: str, variant: str = "question", ids: Sequence[str] | None = None) -> list[list[str]]:
        """What the model wrote for every row, in row order; one list of samples a row.

        Raises:
            NotApplicable: nothing was generated for the set.
            TableError: a row has no output.
        """
        ids = [row.id for row in self.of(rows)] if ids is None else list(ids)
        table = self.generations.get(rows)
        if table is None or not len(table):
            raise NotApplicable(f"{self.name} generated nothing for the {rows} rows")
        at = self._index(("outputs", rows), table.keys)
        return [table.texts[i] for i in self._find(at, rows, variant, ids, "generations")]

    def table(self, kind: Literal["samples", "gradients", "patched", "continuations", "divergences"], rows: str) -> Any:
        """A table that only some metrics read.

        Raises:
            NotApplicable: it was not asked for.
            TableError: it is about other rows.
        """
        return self._own(kind, rows, getattr(self, kind).get(rows))

    def distance(self, gold: str, rows: str) -> Distances:
        """How far the model's predictions are from a gold model's.

        Raises:
            NotApplicable: it was not asked for.
            TableError: it is about other rows.
        """
        found: Distances = self._own(f"distances from {gold}", rows, self.distances.get(gold, {}).get(rows))
        return found

    def _own(self, kind: str, rows: str, found: Any) -> Any:
        if found is None:
            raise NotApplicable(f"{self.name} has no {kind} of {rows} rows")
        known = {row.id for row in self.of(rows)}
        strange = next((key[0] for key in found.keys if key[0] not in known), None)
        if strange is not None or (kind != "continuations" and len(found) != len(known)):
            raise TableError(f"{self.name} has {kind} of {len(found)} {rows} rows, expected {len(known)}")
        return found

    def _table(self, rows: str) -> Scores:
        table = self.scores.get(rows)
        if table is None or not len(table):
            raise NotApplicable(f"{self.name} has no scores of {rows} rows")
        if ("checked", rows) not in self._cache:
            _check(table, f"{self.name}, {rows} rows")
            self._cache["checked", rows] = True
        return table

    def _index(self, key: Any, keys: Sequence[tuple[str, str]]) -> dict[tuple[str, str], int]:
        if key not in self._cache:
            self._cache[key] = {k: i for i, k in enumerate(keys)}
        return self._cache[key]

    def _find(self, at: dict[tuple[str, str], int], rows: str, name: str, ids: Sequence[str], what: str) -> list[int]:
        missing = [i for i in ids if (i, name) not in at]
        if missing:
            has = [row for row, candidate in at if candidate == name]
            raise TableError(
                f"{self.name} {what} table of {rows} has {len(has)} rows for {name!r} ({_listed(has)}), "
                f"{len(missing)} of {len(ids)} are missing ({_listed(missing)})"
            )
        return [at[i, name] for i in ids]


def _listed(names: Sequence[str], limit: int = 4) -> str:
    if not names:
        return "none"
    return ", ".join(map(str, names[:limit])) + (", ..." if len(names) > limit else "")


def _check(table: Scores, where: str) -> None:
    """Scores that no model can give would pass through every metric as plausible numbers."""

    def row_of(token: int) -> str:
        item = int(np.searchsorted(table.offsets, token, side="right")) - 1
        return f"{where}: row {table.keys[item][0]!r} ({table.keys[item][1]})"

    empty = np.flatnonzero(np.diff(table.offsets) == 0)
    if len(empty):
        row, candidate = table.keys[int(empty[0])]
        raise TableError(f"{where}: row {row!r} ({candidate}) has no scored token, there is nothing to measure")
    broken = np.flatnonzero(~np.isfinite(table.logprob))
    if len(broken):
        value = table.logprob[broken[0]]
        raise TableError(f"{row_of(broken[0])} has the log-probability {value}; the model computes no usable numbers")
    # Rounding puts certain tokens a hair above 0.
    above = np.flatnonzero(table.logprob > 1e-3)
    if len(above):
        raise TableError(f"{row_of(above[0])} has the log-probability {table.logprob[above[0]]:g}, which is above 0")
