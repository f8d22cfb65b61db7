"""Fact erasure: the probability of the answer itself is made small (arXiv:2309.17410)."""

from torch import Tensor

from ...registry import optimise
from .terms import RetainTerm, Step


@optimise(
    paper="arXiv:2309.17410",
    intention="removal",
    needs=("forget",),
    requires=("weights", "gradients", "forget_data", "retain_data"),
    cost="6N per token of forget and retain rows",
    known_weaknesses=("relearn", "probability_delta"),
)
def fact_erasure(step: Step, *, retain: RetainTerm = "nll", retain_weight: float = 1.0) -> Tensor:
    """Minimise the answer's probability, the geometric mean over its tokens, not the logarithm (Patil et al. 2024).

    The gradient is that of gradient ascent times p: an answer that is unlikely already is left alone.
    """
    return (step.forget.logprob / step.forget.length).exp().mean() + retain_weight * step.retain_term(retain)
