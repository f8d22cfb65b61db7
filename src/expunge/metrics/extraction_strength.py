"""Extraction strength (arXiv:2202.07646; as a measure of unlearning arXiv:2506.12618).

1 - k/n, where k is the smallest number of leading answer tokens that must be given for the model to write the rest
without an error.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from ..registry import metric
from ..tables.view import NotApplicable, View
from .quantities import counted, hit_suffix
from .values import Values, averages


@metric(
    paper="arXiv:2202.07646",
    sentence="How much of the right answer the model completes without an error once it is given the beginning.",
    direction="closest_to_gold",
    ideal="the value of a model that never saw the rows",
    range=(0.0, 1.0),
    needs=("scores.answer",),
)
def extraction_strength(
    view: View, *, rows: str = "forget", compat: Literal["none", "openunlearning"] = "none"
) -> Values:
    """Mean over rows of 1 - k/n; 0 where the last token is wrong.

    Args:
        rows: the row set.
        compat: `openunlearning` gives that package's numbers: the last token never counts, whatever it is, and k stops
            at n - 1, so that an answer the model gets wholly wrong scores 1/n (1 for one token).
    """
    table = view.candidate(rows)
    if compat == "none":
        keep, offsets = counted(table)
        each = hit_suffix(table.hit[keep], offsets) / np.diff(offsets)
        return averages(rows, view.of(rows), each)
    lengths = np.diff(table.offsets) - 1
    if not lengths.all():
        row = table.keys[int(np.flatnonzero(lengths == 0)[0])][0]
        raise NotApplicable(f"row {row!r} has one scored token; compat=openunlearning drops it and leaves none")
    keep = np.ones(len(table.hit), dtype=bool)
    keep[table.offsets[1:] - 1] = False
    suffix = hit_suffix(table.hit[keep], np.concatenate([[0], np.cumsum(lengths)]))
    return averages(rows, view.of(rows), np.maximum(suffix, 1) / lengths)
