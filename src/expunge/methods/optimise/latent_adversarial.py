"""Latent adversarial training: forget while an adversary inside the model tries to bring the answer back."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from ...errors import ParameterError
from ...registry import optimise
from ...subjects.anatomy import anatomy
from ...subjects.protocol import Taps
from .loop import Turn, activations
from .terms import Objective, negative_log_likelihood
from .unlearn import Preparation

MEASURED = 64
"""Rows whose activations are compared with the radius."""


def _prepare(case: Preparation) -> None:
    """Choose the block, let passes run up to the head, which the adversary reads, and measure what the radius is of."""
    settings, inner = case.settings, case.taps
    depth = len(anatomy(case.subject.model).blocks)
    if settings["radius"] < 0:
        raise ParameterError(f"latent_adversarial: radius is {settings['radius']}, expected 0 or more")
    read = () if inner.final else (*inner.layers, *inner.routers)
    layer = settings["layer"]
    if layer is None:
        layer = min(read) - 1 if read else round(0.22 * depth)
    elif not -depth <= layer < depth:
        raise ParameterError(f"latent_adversarial: layer {layer} is not within 0-{depth - 1}")
    else:
        layer %= depth
    if read and not 0 <= layer < max(read):
        raise ParameterError(
            f"latent_adversarial: the objective inside reads block {max(read)} and sees nothing of a shift after block "
            f"{layer}; expected a layer below {max(read)}"
        )
    case.taps = replace(inner, final=True)
    case.given["attacked"] = layer
    case.repeats, case.adversary = 1, (layer, settings["inner_steps"] if settings["radius"] else 0)
    if case.dry:
        return
    start = activations(case.subject, case.rows["forget"][:MEASURED], Taps(final=False, layers=(layer,)))
    norm = float(torch.cat([row[f"layer.{layer}"].float().norm(dim=-1) for row in start]).mean())
    share = settings["radius"] / max(norm, 1e-30)
    case.summary |= {"attacked_layer": layer, "activation_norm": norm, "radius_share": share}
    if settings["radius"] and not 0.01 <= share <= 1:
        case.warnings.append(
            f"latent_adversarial: the radius is {share:.2g} of the mean activation norm {norm:.3g} after block {layer}"
        )


@optimise(
    paper="arXiv:2407.15549",
    intention="removal",
    needs=("forget",),
    requires=("weights", "gradients", "forget_data", "retain_data"),
    cost="the objective's, and inner_steps times a forward and about half a backward pass of the forget rows",
    known_weaknesses=("relearn",),
    prepare=_prepare,
)
def latent_adversarial(
    turn: Turn,
    *,
    objective: Objective = "npo",
    layer: int | None = None,
    radius: float = 2.0,
    inner_steps: int = 16,
    inner_rate: float = 0.05,
    positions: Literal["all", "prompt"] = "all",
) -> Tensor:
    """Forget under the worst shift of the residual stream after one block (Sheshadri et al. 2024, targeted).

    Every position p of a forget row has its own shift with |delta_p| <= radius, worked out anew in each step by
    projected Adam so that the forgotten answer becomes likely; the retain term is taken without it. `layer` None is the
    block below the lowest one the objective reads, or 0.22 of the depth.
    """
    delta = adversary(turn, radius, inner_steps, inner_rate, positions)
    with turn.perturbed(turn.recipe.given["attacked"], delta):
        loss = turn.backward("forget")
    return loss + turn.backward("retain")


def adversary(turn: Turn, radius: float, steps: int, rate: float, positions: str = "all") -> Tensor:
    """(P, d) shifts that make the forget rows' answers likely."""
    rows = turn.rows([side for side in turn.recipe.sides if side != "retain"])
    free = torch.cat(
        [torch.arange(len(row.ids) - 1) < (row.start if positions == "prompt" else len(row.ids)) for row in rows]
    )
    free = free[:, None].to(turn.subject.device)
    width = turn.subject.model.config.get_text_config().hidden_size
    delta = torch.zeros(len(free), width, device=turn.subject.device, requires_grad=True)
    optimiser = torch.optim.Adam([delta], lr=rate)
    for _ in range(steps if radius else 0):
        with turn.perturbed(turn.recipe.given["attacked"], delta):
            _, gradient = turn.delta_gradient(lambda step: negative_log_likelihood(step.forget))
        delta.grad = gradient * free
        optimiser.step()
        with torch.no_grad():
            delta /= (delta.norm(dim=-1, keepdim=True) / radius).clamp_min(1)
    return delta.detach()
