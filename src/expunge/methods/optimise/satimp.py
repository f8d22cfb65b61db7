"""Gradient ascent weighted by saturation and importance."""

from torch import Tensor, expm1

from ...registry import optimise
from .terms import RetainTerm, Step, weighted_likelihood


@optimise(
    paper="arXiv:2505.11953",
    intention="removal",
    needs=("forget",),
    requires=("weights", "gradients", "forget_data", "retain_data"),
    cost="6N per token of forget and retain rows",
    known_weaknesses=("relearn", "quantise", "decoding", "direct"),
)
def satimp(
    step: Step,
    *,
    beta1: float = 5.0,
    beta2: float = 1.0,
    retain: RetainTerm = "nll",
    retain_weight: float = 0.1,
) -> Tensor:
    """Gradient ascent with each token weighted by p^beta1 (1 - p)^beta2 (Yang et al. 2025, SatImp).

    The first factor lets go of unlikely tokens, the second passes over those that are certain anyway. It starts slowly:
    at p = 0.99 the weight is about 0.01.
    """
    logprob = step.forget.token_logprob.detach()
    # 1 - p without cancellation; rounding may put a log-probability just above 0.
    weight = (beta1 * logprob).exp() * (-expm1(logprob)).clamp_min(0) ** beta2
    return weighted_likelihood(step.forget, weight) + retain_weight * step.retain_term(retain)
