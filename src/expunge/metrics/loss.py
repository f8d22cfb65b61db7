"""Mean negative log-likelihood of the answer, in nats per token, end token included."""

from __future__ import annotations

from ..registry import metric
from ..tables.view import View
from .values import Values, averages


@metric(
    paper="",
    sentence="How surprised the model is by the right answer; the higher, the less familiar the answer is.",
    direction="closest_to_gold",
    ideal="the value of a model that never saw the rows",
    range=(0.0, None),
    needs=("scores.answer",),
    modality=("image", "language"),
)
def loss(view: View, *, rows: str = "forget") -> Values:
    """Mean negative log-likelihood per answer token, averaged over rows."""
    return averages(rows, view.of(rows), -view.mean_logprob(rows))
