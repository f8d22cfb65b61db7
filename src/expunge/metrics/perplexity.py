"""Perplexity: exp of the mean negative log-likelihood per token; the median over texts, and of all tokens together."""

from __future__ import annotations

import numpy as np

from ..registry import metric
from ..tables.view import View
from .values import Units, Values, median_of


@metric(
    paper="",
    sentence="Among how many word pieces the model hesitates at each step of the right text; 1 is never.",
    direction="closest_to_gold",
    ideal="the value of a model that never saw the forget rows",
    range=(1.0, None),
    needs=("scores.answer",),
)
def perplexity(view: View, *, rows: str = "retain") -> Values:
    """Median over rows of exp(loss); `extra["corpus"]` is exp of all tokens' mean loss, where long rows weigh more."""
    means = view.mean_logprob(rows)
    each = np.exp(np.minimum(-means, 700.0))
    lengths = np.diff(view.scores[rows].offsets)[view.positions(rows)]
    corpus = float(np.exp(min(-np.average(means, weights=lengths), 700.0)))
    return Values(Units.of((rows, view.of(rows))), median_of(each), each, {"corpus": corpus})
