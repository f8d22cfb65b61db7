"""n-gram entropy (arXiv:2202.05262, arXiv:2406.10890): how varied the outputs are; low means they repeat themselves.

(2/3 H2 + 4/3 H3) / 2 with H_n = -sum f log2 f over the frequencies f of the n-grams of one output.
"""

from __future__ import annotations

import numpy as np

from ..registry import metric
from ..tables.view import View
from .texts import empty_outputs, text_entropy
from .values import Values, averages


@metric(
    paper="arXiv:2202.05262",
    sentence="How varied the model's sentences are; a low value means that it repeats itself.",
    direction="closest_to_gold",
    ideal="the value of a model that never saw the forget rows",
    range=(0.0, None),
    needs=("generations",),
)
def ngram_entropy(view: View, *, rows: str = "forget") -> Values:
    """Mean over outputs of the weighted 2- and 3-gram entropy in bits; short answers have little whatever the model."""
    each = np.array([np.mean([text_entropy(text) for text in texts]) for texts in view.outputs(rows)])
    return averages(rows, view.of(rows), each, flag=empty_outputs(view, rows))
