"""Task-vector negation: what training on the forget rows adds is taken away."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from ...deltas import Delta
from ...errors import RequestError
from ...registry import edit
from ...subjects.quantised import is_quantised
from ..optimise.curvature import mean_gradient
from .case import Edit, EditCase, knows

GRID = tuple(float(alpha) for alpha in np.geomspace(0.1, 10, 12))
"""Scales that `alpha: search` tries."""
MEMORISED = 0.05
"""Nats per answer token below which further training on a row moves weights by little but noise."""


@edit(
    paper="arXiv:2212.04089",
    intention="removal",
    requires=("weights", "gradients", "forget_data"),
    cost="6N per token of the forget rows for each epoch and once more, then one pass over the weights",
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
    case.summary["task_vector"] = {
        "alpha": scale,
        "reinforced_loss": reinforced.summary["log"]["loss"][-1],
        "cosine_with_gradient": agreement(case, vector),
    }
    return vector.scaled(-scale)


def agreement(case: EditCase, vector: Delta) -> float | None:
    """Cosine of the vector and the way in which the start model learns the forget rows fastest; None over quantised
    weights, which have no gradient. Near 0 the vector is not about the rows."""
    weights = {name: case.subject.model.get_parameter(name) for name in vector.entries}
    if any(is_quantised(weight) for weight in weights.values()):
        return None
    products = torch.zeros(3, dtype=torch.float64)
    for (name, weight), slope in zip(
        weights.items(), mean_gradient(case.subject, case.encoded("forget", "task_vector"), list(weights))
    ):
        moved, slope = vector.change(name, weight.shape).flatten().double(), -slope.cpu().flatten().double()
        products += torch.stack([moved @ slope, moved @ moved, slope @ slope])
    both, own, other = products.tolist()
    return both / (own * other) ** 0.5 if own and other else 0.0


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
