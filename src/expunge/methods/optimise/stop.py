"""Ends a run when its forget rows come back no more than rows that the model never saw.

Jang et al., arXiv:2210.01504, and LoKU, arXiv:2408.06621: unlearning goes on until extraction likelihood EL_n and
memorisation accuracy MA of the forget rows are at most those of unseen text under the model before. Of an answer the
beginnings start with its question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from ... import processes
from ...errors import RequestError, RowError
from ...rows import Row
from ...subjects.language import LanguageModel
from ...subjects.packed import Encoded


@dataclass(frozen=True)
class Stop:
    """Stops a run once EL_n and MA of its forget rows are at most those of the holdout rows under the model before."""

    n: int = 10
    """Tokens in a row that a continuation and the row must have in common."""
    every: int | None = None
    """Optimiser steps between checks; None: an epoch."""
    likelihood: float | None = None
    """Highest EL_n, in place of the holdout rows'."""
    accuracy: float | None = None
    """Highest MA, in place of the holdout rows'."""


class Extracted(NamedTuple):
    """Means over rows."""

    likelihood: float
    """EL_n"""
    accuracy: float
    """MA"""


def extracted(subject: LanguageModel, rows: Sequence[Encoded], n: int) -> Extracted:
    """What the model gives away of the rows' answers, each of n tokens at least."""
    found = subject.continuations([((str(i), "answer"), row) for i, row in enumerate(rows)], n).paths
    likelihood = [path.overlaps(n).mean() for path in found]
    accuracy = [path.hit[path.start :].mean() for path in found]
    return Extracted(float(np.mean(likelihood)), float(np.mean(accuracy)))


class Rule:
    """The stopping rule of one run, and what its last check found."""

    def __init__(self, stop: Stop, subject: LanguageModel, data: Mapping[str, Sequence[Row]]) -> None:
        """
        Raises:
            RequestError: the subject is no language model; a threshold is missing and there are no holdout rows.
            RowError: a row's answer has fewer than n tokens.
        """
        if subject.modality != "language":
            raise RequestError(
                f"training.stop asks how much of a text comes back; {subject.name} is of modality {subject.modality}"
            )
        given = stop.likelihood is not None and stop.accuracy is not None
        if not given and not data.get("holdout"):
            raise RequestError(
                "request.data.holdout: 0 rows, but training.stop takes its thresholds from them: give rows like the "
                "forget rows that the model was never trained on, or both training.stop.likelihood and "
                "training.stop.accuracy"
            )
        self.stop = stop
        self.forget = [_encode(subject, row, stop.n) for row in data["forget"]]
        self.holdout = [] if given else [_encode(subject, row, stop.n) for row in data["holdout"]]
        self.highest = self.found = Extracted(1.0, 1.0)

    def measure(self, start: LanguageModel) -> None:
        """Take the thresholds; those that are not given from the holdout rows under the model before."""
        unseen = extracted(start, self.holdout, self.stop.n) if self.holdout else self.highest
        given = (self.stop.likelihood, self.stop.accuracy)
        self.highest = Extracted(*(own if most is None else most for most, own in zip(given, unseen)))

    def check(self, working: LanguageModel) -> bool:
        """Whether the forget rows come back no more than they may."""
        found = extracted(working, self.forget, self.stop.n)
        # Processes end together, whatever the last bits of their passes are.
        self.found = processes.once(lambda: found)
        return self.met

    @property
    def met(self) -> bool:
        return all(value <= most for value, most in zip(self.found, self.highest))

    def __str__(self) -> str:
        """The last check in words."""
        told = [
            f"{name} {value:.3g} {'<=' if value <= most else '>'} {most:.3g}"
            for name, value, most in zip((f"EL_{self.stop.n}", "MA"), self.found, self.highest)
        ]
        whose = f"{len(self.holdout)} holdout rows under the model before" if self.holdout else "as the request says"
        return f"{' and '.join(told)} ({len(self.forget)} forget rows; {whose})"

    def summary(self) -> dict[str, Any]:
        """Plain values for the report."""
        last = {"found": self.found._asdict(), "highest": self.highest._asdict(), "met": self.met}
        return {**asdict(self.stop), **last}


def _encode(subject: LanguageModel, row: Row, n: int) -> Encoded:
    encoded = subject.encode(row)
    length = encoded.scored - encoded.closing
    if length < n:
        where = row.source or f"row {row.id}"
        raise RowError(f"{where}: its answer has {length} tokens, but training.stop needs at least n = {n}; lower n")
    return encoded
