"""Cross-entropy unlearning."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...registry import optimise
from .terms import RetainTerm, Side, Step, towards


@optimise(
    paper="arXiv:2503.01224",
    intention="removal",
    needs=("forget",),
    requires=("weights", "gradients", "forget_data", "retain_data"),
    cost="6N per token of forget and retain rows",
    known_weaknesses=("relearn", "quantise", "decoding"),
)
def ceu(step: Step, *, skip: int = 1, retain: RetainTerm = "nll", retain_weight: float = 1.0) -> Tensor:
    """Distil the model into itself with the forgotten token taken out of its predictions (Yang 2025, CE-U).

    The gradient in the logits is p_t at the token, -p_v p_t / (1 - p_t) elsewhere: full strength where the model is
    certain, none where the token is forgotten. The first `skip` tokens of an answer are left alone, but never all of
    them.
    """
    side = step.forget

    def without_target(p: Tensor, at: Tensor) -> Tensor:
        # Normalised by its own sum: 1 - p_t would be 0 in fp32 for a token that is certain.
        return normalize(p.scatter(1, side.target[at, None], 0.0), p=1.0, dim=-1, eps=1e-37)

    return towards(side, without_target, later(side, skip)).mean() + retain_weight * step.retain_term(retain)


def later(side: Side, skip: int) -> Tensor:
    """Places of the answer tokens after the first `skip` of their row; the last one of a row always is among them."""
    first = side.length.cumsum(0) - side.length + side.length.sub(1).clamp_max(skip)
    return (torch.arange(len(side.row), device=side.row.device) >= first[side.row]).nonzero()[:, 0]
