"""Truth ratio (arXiv:2401.06121, eq. 1): wrong answers of the right one's form against the right answer, paraphrased.

R = (how likely the wrong answers are) / (how likely the paraphrased right answer is), likelihoods normalised by length.
The published tables average wrong answers geometrically (`form`); the paper's formula is arithmetic. Which one is used
moves model utility by 0.04, more than most methods differ.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from ..registry import metric
from ..tables.view import View
from .quantities import Form, left_out, log_truth_ratio, with_wrong_answers
from .values import Values, averages

Reading = Literal["by_set", "closer_to_1_better", "true_better", "prob_mean"]


@metric(
    paper="arXiv:2401.06121",
    sentence=(
        "Whether the model prefers the truth to false answers of the same form. On forgotten rows both should look "
        "alike (1); on all others the truth should win (1)."
    ),
    direction="closest_to_gold",
    ideal="the value of a model that never saw the rows",
    range=(0.0, 1.0),
    needs=("scores.answer", "scores.paraphrase", "scores.perturbed"),
)
def truth_ratio(view: View, *, rows: str = "forget", form: Form = "geometric", aggregate: Reading = "by_set") -> Values:
    """Mean over rows of the truth ratio, read as `aggregate` says; per-row values are what is averaged.

    Args:
        rows: the row set.
        form: how wrong answers are averaged.
        aggregate: closer_to_1_better min(R, 1/R); true_better max(0, 1 - R); prob_mean 1 / (1 + R); by_set takes the
            first on the forget rows and the second elsewhere, as TOFU does.
    """
    kept = with_wrong_answers(view, rows)
    log_ratio = log_truth_ratio(view, rows, kept, form)
    if aggregate == "by_set":
        aggregate = "closer_to_1_better" if rows == "forget" else "true_better"
    if aggregate == "closer_to_1_better":
        each = np.exp(-np.abs(log_ratio))
    elif aggregate == "true_better":
        each = 1 - np.exp(np.minimum(log_ratio, 0.0))
    else:
        each = np.exp(-np.logaddexp(0.0, log_ratio))
    return averages(
        rows,
        kept,
        each,
        median_ratio=float(np.exp(min(np.median(log_ratio), 700.0))),
        aggregate=aggregate,
        own_answer=sum(not row.paraphrased_answer for row in kept),
        **left_out(view, rows, kept, "no perturbed answers"),
    )
