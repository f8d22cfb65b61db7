"""zlib attack (arXiv:2012.07805): loss by the answer's compressed length, so that simple texts do not look known."""

from __future__ import annotations

from ..registry import metric
from ..tables.view import View
from .membership import compressed, membership
from .values import Values


@metric(
    paper="arXiv:2012.07805",
    sentence=(
        "Whether forget rows still surprise the model less than rows it never saw, given how simple each text is: 0.5 "
        "is no difference, 1 always."
    ),
    direction="closest_to_gold",
    ideal="0.5, more exactly the value of a model that never saw the rows",
    range=(0.0, 1.0),
    needs=("scores.answer", "holdout"),
)
def mia_zlib(view: View, *, rows: str = "forget", holdout: str = "holdout") -> Values:
    """AUC of loss / bytes of the zlib-compressed answer, forget against holdout rows."""
    return membership(view, rows, holdout, compressed)
