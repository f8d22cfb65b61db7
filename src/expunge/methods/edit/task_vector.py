"""Task-vector negation: what training on the forget rows adds is taken away."""

from __future__ import annotations

from typing import Literal

import numpy as np

from ...deltas import Delta
from ...errors import RequestError
from ...registry import edit
from .case import Edit, EditCase, knows

GRID = tuple(float(alpha) for alpha in np.geomspace(0.1, 10, 12))
"""Scales that `alpha: search` tries."""
MEMORISED = 0.05
"""Nats per answer token below which further training on a row moves weights by little but noise."""


@edit(
    paper="arXiv:2212.04089",
    intention="removal",
    requires=("weights", "gradients", "forget_data"),
    cost="6N per token of the forget rows, then one pass over the weights",
    known_weaknesses=("direct", "relearn"),
)
def task_vector(
    case: EditCase,
    *,
    alpha: float | Literal["search"] = 5.0,
    epochs: float = 10.0,
    learning_rate: float = 1e-5,
    floor: float = 0.95,
) -> Edit:
    """Train on the forget rows, then go the other way: theta - alpha (theta_r - theta) (Ilharco et al. 2023, eq. 1).

    `alpha` 5 and the training are MUSE's (arXiv:2407.06460). "search" takes the largest of 12 scales from 0.1 to 10
    that leaves at least `floor` of the start model's token accuracy on retain rows. All moved tensors are part of the
    vector, norms and biases too; differences are taken in fp32.
    """
    reinforced = case.unlearn(
        "reinforce", phase="reinforce", epochs=epochs, steps=None, learning_rate=learning_rate, guard=None
    )
    vector = reinforced.delta
    if not vector.entries:
        raise RequestError("task_vector: training on the forget rows changed no weight; raise learning_rate or epochs")
    start = reinforced.summary["log"]["loss"][0]
    if start < MEMORISED:
        case.warnings.append(
            f"the start model's loss on forget rows is {start:.3f} nats per token: they are memorised already, so the "
            "vector is mostly the optimiser's noise"
        )
    scale = alpha
    if scale == "search":
        scale = _largest(case, vector, floor)
    elif scale <= 0:
        raise RequestError(f"task_vector: alpha is {scale}, expected more than 0 or search")
    case.summary["task_vector"] = {"alpha": scale, "reinforced_loss": reinforced.summary["log"]["loss"][-1]}
    return vector.scaled(-scale)


def _largest(case: EditCase, vector: Delta, floor: float) -> float:
    retain = case.data.get("retain", [])
    if not retain:
        raise RequestError("request.data.retain: 0 rows, but task_vector(alpha='search') needs them to know its limit")
    start = knows(case.subject, retain).accuracy
    tried = {alpha: knows(vector.apply(case.subject, -alpha), retain).accuracy / max(start, 1e-9) for alpha in GRID}
    case.summary["search"] = {f"{alpha:.3g}": round(kept, 4) for alpha, kept in tried.items()}
    kept = [alpha for alpha, share in tried.items() if share >= floor]
    if not kept:
        case.warnings.append(f"no scale keeps {floor:.0%} of the retain accuracy; the smallest was taken")
    return max(kept, default=GRID[0])
