"""SCRUB: away from the start model on forget rows, near to it on retain rows."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...registry import optimise
from .terms import Side, Step, chunked, negative_log_likelihood


@optimise(
    paper="arXiv:2302.09880",
    modality=("image", "language"),
    intention="removal",
    needs=("forget.reference_hidden", "retain.reference_hidden"),
    requires=("weights", "gradients", "forget_data", "retain_data", "reference_model"),
    cost="6N per token of forget and retain rows, plus 2N once per distinct one",
    known_weaknesses=("relearn",),
)
def scrub(
    step: Step,
    *,
    alpha: Annotated[float, Field(ge=0)] = 0.5,
    gamma: Annotated[float, Field(ge=0)] = 1.0,
    temperature: Annotated[float, Field(gt=0)] = 4.0,
    ascent_epochs: Annotated[int, Field(ge=0)] = 3,
    ascent: Literal["kl", "ce+kl"] = "kl",
) -> Tensor:
    """gamma CE + alpha KL_T on retain rows, minus KL_T on forget rows in the first epochs (Kurmanji et al. 2023).

    KL_T(start model || model) is taken at temperature T and multiplied by T^2. The paper passes over forget rows first
    and then over retain rows; here a step holds as many of both. `ce+kl` ascends on the forget rows' cross-entropy too,
    as the corrective benchmark's copy does (arXiv:2402.14015). `scrub_r` rewinds it.
    """
    loss = gamma * negative_log_likelihood(step.retain)
    if alpha:
        loss = loss + alpha * softened(step.retain, temperature)
    if step.epoch < ascent_epochs:
        loss = loss - softened(step.forget, temperature)
        if ascent == "ce+kl":
            loss = loss - negative_log_likelihood(step.forget)
    return loss


def softened(side: Side, temperature: float) -> Tensor:
    """T^2 times the mean over answer tokens of KL(start model || model), both with logits over T."""

    def tokens(hidden: Tensor, reference: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = (side.frozen_head(reference).float() / temperature).log_softmax(-1)
        said = (side.head(hidden).float() / temperature).log_softmax(-1)
        return (wanted.exp() * (wanted - said)).sum(-1)

    return temperature**2 * chunked(tokens, side.hidden, side.reference_hidden, side.vocabulary).mean()
