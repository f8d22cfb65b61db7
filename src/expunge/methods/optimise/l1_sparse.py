"""Sparsity: what an unlearning objective trains on, with a penalty on the size of every weight that moves."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ...registry import optimise
from .loop import Turn
from .terms import Objective


@optimise(
    paper="arXiv:2304.04934",
    modality=("image", "language"),
    intention="removal",
    requires=("weights", "gradients", "retain_data"),
    cost="the objective's",
    known_weaknesses=("direct", "relearn"),
)
def l1_sparse(
    turn: Turn,
    *,
    objective: Objective = "fine_tune",
    strength: Annotated[float, Field(ge=0)] = 1e-4,
    plain: Annotated[float, Field(ge=0, lt=1)] = 0.0,
) -> Tensor:
    """Add g_t |theta|_1 to an objective, with g_t = strength (1 - t / (1 - plain)) at the share t of the steps (Jia et
    al. 2023).

    The penalty is 0 in the last `plain` share of the steps. It is part of the gradient that the optimiser sees: AdamW
    moves a weight that the objective does not pull at by the full learning rate, however small `strength` is. The log's
    loss is the objective's.
    """
    loss = turn.backward()
    g = strength * max(0.0, 1 - turn.index / turn.total / (1 - plain))
    if g:
        with torch.no_grad():
            for parameter in turn.parameters:
                pull = g * parameter.sign()
                parameter.grad = pull if parameter.grad is None else parameter.grad + pull
    return loss
