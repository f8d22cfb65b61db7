"""Gradient restriction: training that leaves no row with a large gradient (IAU, arXiv:2507.23257)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import LaunchError
from .curvature import smooth_cross_entropy, twice
from .loop import Turn


def restricted(turn: Turn, weight: float) -> Tensor:
    """L + weight times the sum over weight tensors of |d L / d tensor|_2, L the mean cross-entropy of the step's rows.

    The paper's text takes one norm over all weights, its code sums the norms of tensors; so does this. The gradient of
    a gradient runs backward twice: a step costs two to three times a plain one, and all its rows are held at once.

    Raises:
        LaunchError: the weights lie in parts over several processes.
        SubjectError: an operation of the model has no second derivative.
    """
    if turn.subject.sharded:
        raise LaunchError("gradient restriction needs whole weights, and these lie in parts over several processes")
    with twice(turn.subject):
        loss = smooth_cross_entropy(turn.subject, turn.rows(turn.recipe.sides))
        gradients = torch.autograd.grad(loss, turn.parameters, create_graph=True, allow_unused=True)
        norms = torch.stack([torch.linalg.vector_norm(g.float()) for g in gradients if g is not None])
        (loss + weight * norms.sum()).backward()  # type: ignore[no-untyped-call]
    return loss.detach()
