"""Memorisation as one number (OpenUnlearning, arXiv:2506.12618): four ways in which a row can still be known.

Harmonic mean of 1 - extraction strength, 1 - exact memorisation, 1 - probability of the paraphrased answer, and
1 - S, where S = p / (p + wrong answers' geometric mean) is the probability form of the truth ratio.
"""

from __future__ import annotations

import numpy as np

from ..registry import metric
from ..tables.view import View
from .means import harmonic_mean
from .quantities import counted, hit_suffix, left_out, log_paraphrase, log_truth_ratio, row_means, with_wrong_answers
from .values import Units, Values

PARTS = ("extraction_strength", "exact_memorization", "paraphrase_probability", "truth_probability")


@metric(
    paper="arXiv:2506.12618",
    sentence="How little of the rows the model still knows, whichever of four ways one looks; 0 where one shows all.",
    direction="closest_to_gold",
    ideal="the value of a model that never saw the rows",
    range=(0.0, 1.0),
    needs=("scores.answer", "scores.paraphrase", "scores.perturbed"),
)
def memorization_score(view: View, *, rows: str = "forget") -> Values:
    """Harmonic mean of four numbers, 1 for nothing memorised; the four in `extra["parts"]`."""
    kept = with_wrong_answers(view, rows)
    table = view.candidate(rows, ids=[row.id for row in kept])
    keep, offsets = counted(table)
    each = np.stack(
        [
            hit_suffix(table.hit[keep], offsets) / np.diff(offsets),
            row_means(table.hit[keep], offsets),
            np.exp(log_paraphrase(view, rows, kept)),
            np.exp(-np.logaddexp(0.0, log_truth_ratio(view, rows, kept))),
        ],
        axis=1,
    )

    def parts(weights: np.ndarray) -> np.ndarray:
        # Rounding can put a mean of ones above 1.
        return np.clip(1 - weights @ each / weights.sum(axis=1, keepdims=True), 0, 1)

    units = Units.of((rows, kept))
    found = parts(np.ones((1, len(units))))[0]
    extra = {"parts": {name: float(part) for name, part in zip(PARTS, found)}}
    return Values(
        units,
        lambda weights: harmonic_mean(parts(weights)),
        None,
        extra | left_out(view, rows, kept, "no perturbed answers"),
    )
