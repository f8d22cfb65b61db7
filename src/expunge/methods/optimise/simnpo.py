"""Simple negative preference optimisation, without a reference."""

from torch import Tensor
from torch.nn.functional import logsigmoid

from ...registry import optimise
from .terms import RetainTerm, Step


@optimise(
    paper="arXiv:2410.07163",
    intention="removal",
    needs=("forget",),
    requires=("weights", "gradients", "forget_data", "retain_data"),
    cost="6N per token of forget and retain rows",
    known_weaknesses=("relearn", "quantise", "decoding"),
)
def simnpo(
    step: Step,
    *,
    beta: float = 4.5,
    margin: float = 0.0,
    forget_weight: float = 1.0,
    retain: RetainTerm = "nll",
    retain_weight: float = 1.0,
) -> Tensor:
    """NPO with the length-normalised log-probability in place of the ratio to a reference (Fan et al. 2024, eq. 4).

    The effort goes to rows that are still likely. The paper's gamma is beta * margin. The authors use beta 4.5 and
    forget_weight 0.125 on TOFU forget10, 2.5 and 0.1375 on forget05.
    """
    mean = step.forget.logprob / step.forget.length
    forget = -2 / beta * logsigmoid(-beta * (mean + margin)).mean()
    return forget_weight * forget + retain_weight * step.retain_term(retain)
