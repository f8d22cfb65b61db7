"""Zero retrain forgetting: how nearly a model answers as one that never learnt anything (arXiv:2205.08096)."""

from __future__ import annotations

from ..registry import metric
from ..tables.view import View
from .values import Values, averages


@metric(
    paper="arXiv:2205.08096",
    sentence=(
        "How nearly the model answers as an untrained network of its kind would: 1 is no difference. A model that "
        "never saw the rows does not reach 1 either, since it guesses from what they look like."
    ),
    direction="closest_to_gold",
    ideal="the value of a model that never saw the rows",
    range=(0.0, 1.0),
    needs=("divergences",),
    modality=("image",),
)
def zrf(view: View, *, rows: str = "forget") -> Values:
    """1 - JS(model || untrained network), JS in bits, mean over rows (of answers of several tokens, over their tokens).

    The authors' code takes natural logarithms and divides by the number of classes as well, so that its scores stand
    close to 1: they cannot be compared with these.
    """
    return averages(rows, view.of(rows), 1 - view.table("divergences", rows).jensen_shannon.astype(float))
