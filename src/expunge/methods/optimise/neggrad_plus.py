"""NegGrad+: descent on what is kept and ascent on what is forgotten, weighed against one another."""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from ...registry import optimise
from .terms import Step, negative_log_likelihood


@optimise(
    paper="arXiv:2302.09880",
    modality=("image", "language"),
    intention="removal",
    needs=("forget", "retain"),
    requires=("weights", "gradients", "forget_data", "retain_data"),
    cost="6N per token of forget and retain rows",
    known_weaknesses=("relearn",),
)
def neggrad_plus(step: Step, *, weight: Annotated[float, Field(ge=0, le=1)] = 0.95) -> Tensor:
    """w CE(retain) - (1 - w) CE(forget), the strongest naive baseline of image tables (Kurmanji et al. 2023).

    w = 1 is `fine_tune`, w = 0 `gradient_ascent`. Published weights lie between 0.95 and 0.9999.
    """
    return weight * negative_log_likelihood(step.retain) - (1 - weight) * negative_log_likelihood(step.forget)
