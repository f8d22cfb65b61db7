"""Exact memorisation (arXiv:2506.12618): the share of answer tokens that the model would have chosen itself."""

from __future__ import annotations

from ..registry import metric
from ..tables.view import View
from .quantities import counted, row_means
from .values import Values, averages


@metric(
    paper="arXiv:2506.12618",
    sentence="The share of the right answer's word pieces that the model would have written itself, one at a time.",
    direction="closest_to_gold",
    ideal="the value of a model that never saw the rows",
    range=(0.0, 1.0),
    needs=("scores.answer",),
    aliases={"memorization_accuracy": {}},
)
def exact_memorization(view: View, *, rows: str = "forget") -> Values:
    """Mean over rows of the share of answer tokens that are the model's first choice; end tokens do not count.

    Of running text from its second token on it is `memorization_accuracy` (Jang et al., arXiv:2210.01504).
    """
    table = view.candidate(rows)
    keep, offsets = counted(table)
    return averages(rows, view.of(rows), row_means(table.hit[keep], offsets))
