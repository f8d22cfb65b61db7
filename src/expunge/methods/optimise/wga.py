"""Gradient ascent weighted by confidence."""

from torch import Tensor

from ...registry import optimise
from .terms import RetainTerm, Step, weighted_likelihood


@optimise(
    paper="arXiv:2502.19301",
    intention="removal",
    needs=("forget",),
    requires=("weights", "gradients", "forget_data", "retain_data"),
    cost="6N per token of forget and retain rows",
    known_weaknesses=("relearn", "quantise", "decoding"),
)
def wga(step: Step, *, beta: float = 1.0, retain: RetainTerm = "nll", retain_weight: float = 1.0) -> Tensor:
    """Gradient ascent with each token weighted by p^beta, so that unlikely tokens are let go (Wang et al. 2025, WGA).

    beta 0 is gradient ascent. The authors' own script falls back to 5; 1 is what others run.
    """
    weight = (beta * step.forget.token_logprob.detach()).exp()
    return weighted_likelihood(step.forget, weight) + retain_weight * step.retain_term(retain)
