"""Reference attack (arXiv:2012.07805): known rows are easier for the model than for one that never saw them."""

from __future__ import annotations

from ..registry import metric
from ..tables.view import View
from .golds import golds_of
from .membership import against_reference, membership
from .values import Values


@metric(
    paper="arXiv:2012.07805",
    sentence=(
        "Whether forget rows surprise the model less than they surprise one that never saw them, compared with rows "
        "that neither saw: 0.5 is no difference, 1 always."
    ),
    direction="closest_to_gold",
    ideal="0.5, more exactly the value of a model that never saw the rows",
    range=(0.0, 1.0),
    needs=("scores.answer", "holdout", "gold"),
    modality=("image", "language"),
)
def mia_reference(view: View, *, rows: str = "forget", holdout: str = "holdout") -> Values:
    """AUC of the loss minus the reference's loss; the reference is gold, of several golds their mean.

    A gold that is compared with has the other golds as its reference; one that is alone has itself, and AUC 0.5.
    """
    golds_of(view)
    return membership(view, rows, holdout, against_reference(view))
