"""Gradient ascent on what is to be forgotten, alone or with a retain term."""

from torch import Tensor

from ...registry import optimise
from .terms import RetainTerm, Step


@optimise(
    paper="arXiv:2210.01504",
    modality=("image", "language"),
    intention="removal",
    needs=("forget",),
    requires=("weights", "gradients", "forget_data"),
    cost="6N per token of forget (and retain) rows",
    known_weaknesses=("relearn", "quantise", "paraphrase"),
    aliases={"grad_diff": {"retain": "nll"}, "kl_minimisation": {"retain": "kl"}},
)
def gradient_ascent(step: Step, *, retain: RetainTerm = "none", retain_weight: float = 1.0) -> Tensor:
    """Raise the loss on forget answers: minimise mean log-probability (Jang et al. 2023).

    `grad_diff` (GradDiff, GA_GDR) adds the likelihood of retain answers, `kl_minimisation` (GA_KLR) the divergence from
    the start model on them (TOFU, arXiv:2401.06121). Unbounded: without a retain term the model is destroyed.
    """
    return step.forget.token_logprob.mean() + retain_weight * step.retain_term(retain)
