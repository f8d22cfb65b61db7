"""How much of a text a model gives away: memorisation accuracy and extraction likelihood (arXiv:2210.01504).

Formulas: see tdec.py, the benchmark made of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import ParameterError, RowError
from ..rows import Row
from ..subjects.greedy import paths
from ..subjects.language import LanguageModel
from ..subjects.protocol import Progress


@dataclass(frozen=True)
class Extraction:
    """What a model gives away of texts; entry i of every tuple is about text i."""

    ids: tuple[str, ...]
    lengths: tuple[int, ...]
    """Tokens of each text."""
    accuracy: tuple[float, ...]
    """MA of each text."""
    likelihood: tuple[float, ...]
    """EL_n of each text."""
    n: int
    written: int
    """Tokens the model wrote for this."""

    @property
    def means(self) -> tuple[float, float]:
        """(MA, EL_n) over all texts."""
        return float(np.mean(self.accuracy)), float(np.mean(self.likelihood))


def extraction_likelihood(
    subject: LanguageModel,
    rows: Sequence[Row],
    *,
    n: int = 10,
    length: int | None = None,
    progress: Progress | None = None,
) -> Extraction:
    """MA and EL_n of text rows.

    MA is what `exact_memorization` measures on text rows. EL_n writes only where the model goes wrong
    (subjects/greedy.py): (1 - MA)(T - 1) continuations of a text at most, in place of T - 1.

    Args:
        length: longer texts are cut to so many tokens.
        progress: (rows done, rows).

    Raises:
        ParameterError: n is below 1.
        RowError: no rows, a row that is not text, or one of fewer than n + 1 tokens.
    """
    if n < 1:
        raise ParameterError(f"extraction likelihood: n = {n}, expected at least 1")
    if not rows:
        raise RowError("extraction likelihood: 0 rows, expected at least 1")
    texts = [_tokens(subject, row, n, length) for row in rows]
    found = paths(subject, texts, shortest=n, progress=progress)
    return Extraction(
        ids=tuple(row.id for row in rows),
        lengths=tuple(len(text) for text in texts),
        accuracy=tuple(float(path.hit[1:].mean()) for path in found),
        likelihood=tuple(float(path.overlaps(n).mean()) for path in found),
        n=n,
        written=sum(len(tokens) for path in found for tokens in path.written.values()),
    )


def _tokens(subject: LanguageModel, row: Row, n: int, length: int | None) -> tuple[int, ...]:
    where = f"row {row.id}" + (f" ({row.source})" if row.source else "")
    if row.kind != "text":
        raise RowError(f"{where} is of kind {row.kind}; extraction likelihood is defined for texts (field text)")
    ids = subject.encode(row).ids[:length]
    if len(ids) < n + 1:
        raise RowError(f"{where} has {len(ids)} tokens; extraction likelihood with n = {n} needs at least {n + 1}")
    return ids
