"""Min-K%++ attack (arXiv:2404.02936): Min-K% on log-probabilities standardised by what the model expects there."""

from __future__ import annotations

from ..registry import metric
from ..tables.view import View
from .membership import Share, attack, membership
from .values import Values


@metric(
    paper="arXiv:2404.02936",
    sentence=(
        "Whether forget rows still look more familiar than rows the model never saw, each word piece judged against "
        "its rivals: 0.5 is no difference, 1 always."
    ),
    direction="closest_to_gold",
    ideal="0.5, more exactly the value of a model that never saw the rows",
    range=(0.0, 1.0),
    needs=("scores.answer", "holdout"),
)
def mia_min_k_plus_plus(view: View, *, rows: str = "forget", holdout: str = "holdout", k: Share = 0.4) -> Values:
    """AUC of minus the mean of the K smallest (l - mean) / sqrt(variance), K = max(1, floor(k n)).

    l is a token's log-probability, mean and variance those of the log-probabilities under the model's own distribution.

    Args:
        rows: the row set.
        holdout: rows of the same kind that no model saw.
        k: 0.4 as in MUSE and OpenUnlearning, 0.2 in the paper.
    """
    return membership(view, rows, holdout, attack("min_k_plus_plus", view, k))
