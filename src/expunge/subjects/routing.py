"""Routing in mixtures of experts: where a block says which experts its tokens take, and how logits become scores.

Families choose in their own ways: softmax or sigmoid scores, selection biases, groups of experts, weights that are
divided by their sum or scaled. In transformers nearly all (not Llama 4, not JetMoE) end in one call, experts(states,
chosen experts, their weights). What is read there is what the model did; how it scored follows from the weights.
"""

from __future__ import annotations

import inspect
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import SubjectError
from .anatomy import Block

Scoring = Literal["softmax", "sigmoid"]

TOLERANCE = 0.02
"""Relative difference between weights and scores that rounding to 16 bits may make."""


def takes_choices(kind: type[nn.Module]) -> bool:
    """Whether modules of this class are called with (states, chosen experts, their weights)."""
    parameters = list(inspect.signature(kind.forward).parameters)[1:4]
    return len(parameters) == 3 and "ind" in parameters[1] and "weights" in parameters[2]


def caller(model: nn.Module, block: Block) -> str | None:
    """Name of the module that gets the chosen experts; None in dense blocks and where they are called otherwise."""
    owners = dict.fromkeys(name.rpartition(".")[0] for name in block.experts)
    return next((owner for owner in owners if takes_choices(type(model.get_submodule(owner)))), None)


def scoring(logits: Tensor, chosen: Tensor, weights: Tensor) -> Scoring:
    """How a router turns logits into scores, from the weights that it gave: they are scores up to a factor per token.

    Args:
        logits: (P, E) of the router.
        chosen: (P, K) experts.
        weights: (P, K) their weights.

    Raises:
        SubjectError: weights are neither softmax nor sigmoid scores.
    """
    single = weights.shape[1] == 1
    if single and bool((weights == weights[0]).all()):
        return "softmax"  # one expert per token at full weight says nothing
    each: dict[Scoring, Tensor] = {"softmax": logits.float().softmax(-1), "sigmoid": logits.float().sigmoid()}
    found: dict[Scoring, float] = {}
    for kind, values in each.items():
        ratio = (weights.float() / values.gather(1, chosen).clamp_min(1e-30)).detach()
        # One weight per token cannot be compared within the token: then the factor must be the same for all of them.
        found[kind] = float((ratio / ratio.mean(0 if single else 1, keepdim=True) - 1).abs().median())
    best = min(found, key=lambda kind: found[kind])
    if found[best] > TOLERANCE:
        raise SubjectError(
            f"router weights are neither softmax nor sigmoid scores of the router's logits (median difference "
            f"{found[best]:.0%}); mixtures that score in another way are not supported"
        )
    return best


def scores(logits: Tensor, kind: Scoring) -> Tensor:
    """(P, E) fp32 scores that sum to 1 over all experts; sigmoid ones are divided by their sum."""
    if kind == "softmax":
        return logits.float().softmax(-1)
    each = logits.float().sigmoid()
    return each / each.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
