"""LOSS attack (arXiv:1709.01604): known rows have a lower loss."""

from __future__ import annotations

from ..registry import metric
from ..tables.view import View
from .membership import loss, membership
from .values import Values


@metric(
    paper="arXiv:1709.01604",
    sentence="Whether forget rows still surprise the model less than rows it never saw: 0.5 is no, 1 always.",
    direction="closest_to_gold",
    ideal="0.5, more exactly the value of a model that never saw the rows",
    range=(0.0, 1.0),
    needs=("scores.answer", "holdout"),
    modality=("image", "language"),
)
def mia_loss(view: View, *, rows: str = "forget", holdout: str = "holdout") -> Values:
    """AUC of the mean negative log-likelihood of the answer, forget against holdout rows."""
    return membership(view, rows, holdout, loss)
