"""Privacy as one number (OpenUnlearning, arXiv:2506.12618): four membership attacks, each against gold.

s = clip(1 - |AUC - AUC_gold| / AUC_gold, 0, 1) for LOSS, zlib, Min-K% and Min-K%++; the score is their harmonic mean.
"""

from __future__ import annotations

import numpy as np

from ..registry import metric
from ..tables.view import View
from .means import harmonic_mean
from .membership import Share, TableAttack, against_gold, attack, privacy
from .values import Values

ATTACKS: tuple[TableAttack, ...] = ("loss", "zlib", "min_k", "min_k_plus_plus")


@metric(
    paper="arXiv:2506.12618",
    sentence="How alike the model and one that never saw the rows are to four membership attacks; 1 is exactly.",
    direction="higher",
    ideal="1; what two models reach that both never saw the rows",
    range=(0.0, 1.0),
    needs=("scores.answer", "holdout", "gold"),
)
def privacy_score(view: View, *, rows: str = "forget", holdout: str = "holdout", k: Share = 0.4) -> Values:
    """Harmonic mean of s over four attacks; each s in `extra["parts"]`.

    Args:
        rows: the row set.
        holdout: rows of the same kind that no model saw.
        k: share of tokens of the min_k attacks.
    """
    units, pairs = against_gold(view, rows, holdout, [attack(name, view, k) for name in ATTACKS])

    def parts(weights: np.ndarray) -> np.ndarray:
        return np.stack([privacy(*both(weights)) for both in pairs], axis=-1)

    found = parts(np.ones((1, len(units))))[0]
    extra = {"parts": {name: float(part) for name, part in zip(ATTACKS, found)}}
    return Values(units, lambda weights: harmonic_mean(parts(weights)), None, extra)
