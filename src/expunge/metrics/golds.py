"""What metrics that compare with gold models share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..tables.view import NotApplicable, View
from .values import Aggregate


def golds_of(view: View) -> list[View]:
    """The gold models.

    Raises:
        NotApplicable: there is none.
    """
    if not view.golds:
        raise NotApplicable(
            f"{view.name} has no other model to be compared with that was trained without the forget rows (gold)"
        )
    return list(view.golds)


def mean_over(aggregates: Sequence[Aggregate]) -> Aggregate:
    """The mean of several aggregates, e.g. one per gold model."""
    return lambda weights: np.mean([aggregate(weights) for aggregate in aggregates], axis=0)
