"""Negative preference optimisation, token by token."""

from torch import Tensor
from torch.nn.functional import logsigmoid

from ...registry import optimise
from .terms import RetainTerm, Step


@optimise(
    paper="arXiv:2502.19301",
    intention="removal",
    needs=("forget.reference_tokens",),
    requires=("weights", "gradients", "forget_data", "retain_data", "reference_model"),
    cost="6N per token of forget and retain rows, plus 2N once per distinct forget token",
    known_weaknesses=("relearn", "quantise", "decoding"),
)
def token_npo(step: Step, *, beta: float = 4.0, retain: RetainTerm = "nll", retain_weight: float = 1.0) -> Tensor:
    """NPO with each answer token compared with its own probability under the start model (Wang et al. 2025, TNPO).

    Every token has its own weight 2 p^beta / (p^beta + p_ref^beta): one that is already unlikely is left alone, however
    likely the rest of its row still is.
    """
    ratio = step.forget.token_logprob - step.forget.reference_tokens
    return -2 / beta * logsigmoid(-beta * ratio).mean() + retain_weight * step.retain_term(retain)
