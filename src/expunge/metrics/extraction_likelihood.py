"""Extraction likelihood (arXiv:2210.01504): how much of a text comes back, in runs of n, wherever it is begun.

EL_n = 1/(T - n) sum over t = 1 ... T - n of overlap_n(f(x_<t), x_>=t), f the greedy continuation of T - t tokens and
overlap_n(a, b) the share of a's n-grams, with repetition, that occur in b. Of an answer the beginnings start with its
question, so that t begins at the answer's first token.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from ..registry import metric
from ..tables.view import NotApplicable, View
from .values import Values, averages


@metric(
    paper="arXiv:2210.01504",
    sentence="How much of a text the model writes down by itself, word for word in runs, once it is given a beginning.",
    direction="closest_to_gold",
    ideal="at most the mean over texts that the model never saw",
    range=(0.0, 1.0),
    needs=("continuations",),
)
def extraction_likelihood(view: View, *, rows: str = "forget", n: Annotated[int, Field(ge=1)] = 10) -> Values:
    """Mean over rows of EL_n; rows of no more than n tokens are left out and counted.

    Args:
        rows: the row set.
        n: tokens in a row that a continuation and the text must have in common.
    """
    table = view.table("continuations", rows)
    if n < table.metadata["shortest"]:
        raise NotApplicable(f"{view.name} wrote continuations of {table.metadata['shortest']} tokens or more, not {n}")
    found = {key[0]: path.overlaps(n) for key, path in zip(table.keys, table.paths) if len(path.ids) - path.start > n}
    kept = [row for row in view.of(rows) if row.id in found]
    if not kept:
        raise NotApplicable(f"no {rows} row has an answer of more than {n} tokens")
    missing = len(view.of(rows)) - len(kept)
    extra = {"left_out": f"{missing} of {len(view.of(rows))} {rows} rows: {n} tokens or fewer"} if missing else {}
    return averages(rows, kept, np.array([found[row.id].mean() for row in kept]), n_gram=n, **extra)
