"""Min-K% attack (arXiv:2310.16789): a known row has no very unlikely tokens."""

from __future__ import annotations

from ..registry import metric
from ..tables.view import View
from .membership import Share, attack, membership
from .values import Values


@metric(
    paper="arXiv:2310.16789",
    sentence=(
        "Whether even the hardest word pieces of forget rows surprise the model less than those of rows it never saw: "
        "0.5 is no difference, 1 always."
    ),
    direction="closest_to_gold",
    ideal="0.5, more exactly the value of a model that never saw the rows",
    range=(0.0, 1.0),
    needs=("scores.answer", "holdout"),
)
def mia_min_k(view: View, *, rows: str = "forget", holdout: str = "holdout", k: Share = 0.4) -> Values:
    """AUC of minus the mean of the K smallest token log-probabilities, K = max(1, floor(k n)); end tokens do not count.

    Args:
        rows: the row set.
        holdout: rows of the same kind that no model saw.
        k: 0.4 as in MUSE and OpenUnlearning, 0.2 in the paper.
    """
    return membership(view, rows, holdout, attack("min_k", view, k))
