"""Inverted hinge loss."""

import torch
from torch import Tensor

from ...registry import optimise
from .terms import RetainTerm, Step, of_logits
from .unlearn import Preparation


def _prepare(case: Preparation) -> None:
    """LoKU's adapters, unless the user names a scope."""
    if case.settings["adapters"] and case.scope is None:
        case.scope = "lora(r=16, alpha=32, init=fila)"


@optimise(
    paper="arXiv:2408.06621",
    intention="removal",
    needs=("forget",),
    requires=("weights", "gradients", "forget_data", "retain_data"),
    cost="6N per token of forget and retain rows",
    known_weaknesses=("relearn", "quantise", "decoding"),
    prepare=_prepare,
    aliases={"loku": {"adapters": True}},
)
def ihl(
    step: Step,
    *,
    floor: bool = False,
    adapters: bool = False,
    retain: RetainTerm = "nll",
    retain_weight: float = 1.0,
) -> Tensor:
    """1 + p_t - p_m, with m the most likely token but t: the runner-up takes the forgotten token's place (LoKU).

    Within [0, 2]. At p_t = 0 it still sharpens the runner-up, so it ends in a confident wrong answer; `floor` (ours)
    drops tokens with p_t < p_m / 10 from the mean. `adapters` moves LoRA adapters that start in Fisher-weighted
    principal directions (FILA), if the request names no scope: with them it is LoKU, here at rank 16 and alpha 32.
    """
    side = step.forget

    def hinge(z: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        p, t = z.softmax(-1), side.target[at, None]
        own = p.gather(1, t)
        other, m = p.scatter_(1, t, -1.0).max(-1, keepdim=True)
        p.scatter_(1, t, own)
        values = 1 + own - other
        # d/dz_v = p_v (p_m - p_t), plus p_t at t and -p_m at m.
        gradient = p.mul_(other - own).scatter_add_(1, torch.cat([t, m], 1), torch.cat([own, -other], 1))
        if floor:
            values, gradient = (x.masked_fill_(own < 0.1 * other, 0.0) for x in (values, gradient))
        return values[:, 0], gradient

    values = of_logits(side, hinge)
    # A token that counts is never at 0: there p_m would be 1.
    counted = (values.detach() > 0).sum().clamp_min(1) if floor else len(values)
    return values.sum() / counted + retain_weight * step.retain_term(retain)
