"""TOFU's probability (arXiv:2401.06121): exp of the mean log-probability per answer token, end token included."""

from __future__ import annotations

import numpy as np

from ..registry import metric
from ..tables.view import View
from .quantities import left_out, option_probability, with_wrong_answers
from .values import Values, averages


@metric(
    paper="arXiv:2401.06121",
    sentence="How sure the model is of the right answer, word piece by word piece; 1 is certain, 0 is never.",
    direction="closest_to_gold",
    ideal="the value of a model that never saw the rows",
    range=(0.0, 1.0),
    needs=("scores.answer",),
    modality=("image", "language"),
)
def answer_probability(view: View, *, rows: str = "forget", among_options: bool = False) -> Values:
    """Length-normalised probability of the right answer.

    Args:
        rows: the row set.
        among_options: divide by the sum over the right and the perturbed answers (TOFU does so for facts whose short
            answers have obvious rivals).
    """
    if among_options:
        kept = with_wrong_answers(view, rows)
        return averages(
            rows, kept, option_probability(view, rows, kept), **left_out(view, rows, kept, "no perturbed answers")
        )
    return averages(rows, view.of(rows), np.exp(view.mean_logprob(rows)))
