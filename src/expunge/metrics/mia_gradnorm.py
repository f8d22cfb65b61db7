"""Gradient-norm attack (arXiv:2402.17012): rows a model was trained on pull less at its weights."""

from __future__ import annotations

from ..registry import metric
from ..tables.view import View
from .membership import gradnorm, membership
from .values import Values


@metric(
    paper="arXiv:2402.17012",
    sentence=(
        "Whether the model would change less to fit forget rows than to fit rows it never saw: 0.5 is no difference, "
        "1 always."
    ),
    direction="closest_to_gold",
    ideal="0.5, more exactly the value of a model that never saw the rows",
    range=(0.0, 1.0),
    needs=("gradients", "holdout"),
)
def mia_gradnorm(view: View, *, rows: str = "forget", holdout: str = "holdout") -> Values:
    """AUC of the mean over parameter tensors of the 2-norm of the gradient of the answer's loss; no end tokens.

    The mean weighs every tensor alike, a norm's 256 weights as much as the embedding (as OpenUnlearning does).
    """
    return membership(view, rows, holdout, gradnorm)
