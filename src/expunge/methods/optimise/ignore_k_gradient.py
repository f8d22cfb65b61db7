"""Ignore-k step by step: of every gradient the largest k % of each tensor is left out before the optimiser's step.

What `ignore_k` does to a finished change (arXiv:2504.09522), done to each step. Adam makes steps of one size of
gradients of all sizes, so this is another and a weaker thing: an entry left out of one step moves in the next.
"""

from __future__ import annotations

from torch import Tensor

from ...errors import ParameterError
from ...registry import optimise
from .loop import Turn
from .magnitude import without_largest
from .shards import cut, whole
from .terms import Objective


@optimise(
    paper="arXiv:2504.09522",
    intention="removal",
    requires=("weights", "gradients", "forget_data", "retain_data"),
    cost="the objective's, and two passes over each gradient",
    known_weaknesses=("relearn",),
)
def ignore_k_gradient(turn: Turn, *, objective: Objective = "npo", k: float = 8.0) -> Tensor:
    """Train with any plain objective, leaving the largest k % of each tensor's gradient out of every step."""
    if not 0 <= k < 100:
        raise ParameterError(f"ignore_k_gradient: k is {k}, expected within 0 and below 100")
    loss = turn.backward()
    for p in turn.parameters:
        if p.grad is not None:
            p.grad = cut(p, without_largest(whole(p.grad), k))
    return loss
