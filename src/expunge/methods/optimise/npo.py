"""Negative preference optimisation."""

from torch import Tensor
from torch.nn.functional import logsigmoid

from ...registry import optimise
from .terms import RetainTerm, Step


@optimise(
    paper="arXiv:2404.05868",
    modality=("image", "language"),
    intention="removal",
    needs=("forget.reference",),
    requires=("weights", "gradients", "forget_data", "retain_data", "reference_model"),
    cost="6N per token of forget and retain rows, plus 2N once per distinct forget token",
    known_weaknesses=("relearn", "quantise", "decoding"),
)
def npo(step: Step, *, beta: float = 0.1, retain: RetainTerm = "nll", retain_weight: float = 1.0) -> Tensor:
    """Push each forget answer below its probability under the start model, ever more softly (Zhang et al. 2024, eq. 3).

    The gradient of a row is gradient ascent's, weighted by 2 P^beta / (P^beta + P_ref^beta): 1 at the start, 0 once the
    answer is far less likely than it was.
    """
    ratio = step.forget.logprob - step.forget.reference
    return -2 / beta * logsigmoid(-beta * ratio).mean() + retain_weight * step.retain_term(retain)
