"""Membership inference: does what was forgotten still look like something the model was trained on?"""

from typing import Literal

import numpy as np

from ..evidence import Item
from ..registry import attack
from ..tables.passes import Score
from ..tables.scores import Scores
from .case import Attack, Case, Found


@attack(
    group="latent",
    access="logits",
    modality=("image",),
    paper="arXiv:1709.01604",
    caveat="Finds what a model learnt by heart; of a class that it learnt as a kind, unseen pictures look as familiar "
    "as forgotten ones, and the attack shows nothing.",
    aliases={"membership_entropy": {"by": "entropy"}},
)
def membership(case: Case, *, by: Literal["loss", "entropy"] = "loss") -> Attack:
    """Compare every forget row with the holdout rows, which no model saw: is it less surprising than they are?

    A row's score is 2 x (share of holdout rows that surprise the model more, ties half) - 1, so that the mean over rows
    is 2 AUC - 1: 0 where nothing tells them apart, 1 where all forget rows stand out, below 0 where they look stranger
    than rows never seen.

    Args:
        by: loss: minus the log-probability of the right class; entropy: of the answer, whatever it is.
    """
    holdout = case.rows.get("holdout", [])
    if not holdout:
        return Found(status="skipped: membership is told by holdout rows, of the forget rows' kind and in no training")
    # As the audit itself asks, so that it is answered once.
    asks = [
        Score(tuple(((row.id, "answer"), row, row.answer, None) for row in rows)) for rows in (case.forget, holdout)
    ]
    mine = _surprise((yield asks[0]), by)
    theirs = np.sort(_surprise((yield asks[1]), by))
    above = len(theirs) - (np.searchsorted(theirs, mine, "left") + np.searchsorted(theirs, mine, "right")) / 2
    values = 2 * above / len(theirs) - 1
    items = [Item(row.entity or row.id, row.id, float(value)) for row, value in zip(case.forget, values)]
    note = f"AUC {(values.mean() + 1) / 2:.3f} of {by}, against {len(holdout)} holdout rows"
    return Found(items, {"queries": len(case.forget) + len(holdout), "samples": 1}, note=note)


def _surprise(table: Scores, by: str) -> np.ndarray:
    return -(table.logprob if by == "loss" else table.mean).astype(np.float64)
