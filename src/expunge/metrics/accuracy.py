"""Top-1 accuracy: how often the likeliest class is the right one."""

from __future__ import annotations

import numpy as np

from ..registry import metric
from ..tables.view import View
from .matching import recovered
from .values import Values, averages


@metric(
    paper="arXiv:2308.07707",
    sentence="How often the model gives a picture its class.",
    direction="closest_to_gold",
    ideal="the value of a model that never saw the rows",
    range=(0.0, 1.0),
    needs=("generations",),
    modality=("image",),
)
def accuracy(view: View, *, rows: str = "forget") -> Values:
    """Share of rows whose first answer is right; a guard's answer counts, not that of the model inside."""
    kept = view.of(rows)
    each = [recovered(row, texts[0]) for row, texts in zip(kept, view.outputs(rows))]
    return averages(rows, kept, np.array(each))
