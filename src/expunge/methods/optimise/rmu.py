"""Representation misdirection: forget rows lose their inner representation, retain rows keep theirs."""

from __future__ import annotations

import random
from typing import Literal

import torch
from torch import Tensor

from ...errors import ParameterError, TrainingError
from ...registry import optimise
from ...subjects.anatomy import anatomy
from ...subjects.protocol import Taps
from .loop import activations
from .terms import Step
from .unlearn import Preparation

PAIR = ("You are a novice in {} who often makes mistakes.", "You are a world-class expert in {}.")
"""What a contrast direction leads to, and from (CUT)."""


def _prepare(case: Preparation) -> None:
    """Draw the direction, measure the activations' size, read at one layer, move three matrices below it."""
    settings = case.settings
    depth = len(anatomy(case.subject.model).blocks)
    layer = round(0.22 * depth) if settings["layer"] is None else settings["layer"]
    if not -depth <= layer < depth:
        raise ParameterError(f"rmu: layer {layer} is not within 0-{depth - 1}")
    layer %= depth
    case.taps = Taps(final=False, layers=(layer,), positions=settings["positions"])
    if case.scope is None:
        span = f"{max(0, layer - 2)}-{layer}"
        roles = anatomy(case.subject.model).roles
        # Blocks that are mixtures have their MLP in experts, all of which move.
        present = {role: {at for at, _ in roles[role]} for role in ("mlp_out", "experts")}
        wanted = [role for role in present if present[role] & set(range(max(0, layer - 2), layer + 1))]
        case.scope = "+".join(f"role:{role}@{span}" for role in wanted)
    if contrast := settings["direction"] == "contrast":
        case.needs.add("forget.layers")
        if not settings["keywords"]:
            raise ParameterError("rmu: direction = contrast needs keywords, the subjects to be a novice in")
    if case.dry:
        return
    generator = torch.Generator().manual_seed(case.seed)
    width = case.subject.model.config.get_text_config().hidden_size
    draw = torch.randn if settings["direction"] == "normal" else torch.rand
    direction = _contrasts(case, layer) if contrast else draw(1, width, generator=generator)
    coefficient = settings["coefficient"]
    if coefficient == "adaptive":
        start = activations(case.subject, case.rows["forget"], case.taps)
        norm = float(torch.cat([row[f"layer.{layer}"].float().norm(dim=-1) for row in start]).mean())
        if not norm:
            raise TrainingError(f"rmu: activations after block {layer} are zero on forget rows; choose another layer")
        coefficient = settings["scale"] * norm
    steered = coefficient * torch.nn.functional.normalize(direction, dim=-1).to(case.subject.device)
    case.given |= {"layer": layer, "targets": steered, "order": case.seed}
    case.summary |= {"layer": layer, "coefficient": coefficient}


def _contrasts(case: Preparation, layer: int) -> Tensor:
    """(keywords, d) from the activations of an expert to those of a novice, after the layer at the last token."""
    words = case.settings["keywords"]
    novice, expert = (case.subject.hidden([text.format(word) for word in words])[:, layer + 1] for text in PAIR)
    return novice - expert


@optimise(
    paper="arXiv:2403.03218",
    intention="suppression",
    needs=("forget", "retain.layers"),
    requires=("weights", "gradients", "forget_data", "retain_data"),
    cost="forward and backward of the blocks up to the layer, from the lowest trained one; once more for retain rows",
    known_weaknesses=("relearn", "logit_lens", "decoding"),
    prepare=_prepare,
    aliases={"adaptive_rmu": {"coefficient": "adaptive", "scale": 5.0, "retain_weight": 1200.0}},
)
def rmu(
    step: Step,
    *,
    layer: int | None = None,
    coefficient: float | Literal["adaptive"] = "adaptive",
    scale: float = 5.0,
    retain: Literal["hidden", "none"] = "hidden",
    retain_weight: float = 100.0,
    direction: Literal["uniform", "normal", "contrast"] = "uniform",
    keywords: tuple[str, ...] = (),
    positions: Literal["all", "answer"] = "all",
) -> Tensor:
    """Pull forget rows' activations at one layer to a random direction, hold retain rows' (Li et al. 2024, eq. 1-3).

    Moves the MLP output matrices of the layer and of the two below it. `layer` None is 0.22 of the depth, as in the
    paper. `coefficient` "adaptive" is `scale` times the mean norm of the start model's activations on forget rows (Dang
    et al., arXiv:2408.06223); the published pairs of (coefficient, retain_weight) are (6.5, 1200) for Zephyr-7B and
    (20, 100) by default.

    `direction` "contrast" is CUT, of the paper's first version: each step moves forget rows' own start activations from
    an expert's towards a novice's in one of the `keywords`.
    """
    at, targets = step.given["layer"], step.given["targets"]
    target = targets[random.Random(f"{step.given['order']}/{step.index}").randrange(len(targets))]
    if direction == "contrast":
        target = target + step.forget.constants[f"layer.{at}"].float()
    forget = (step.forget.layers[at].float() - target).square().mean()
    return forget + retain_weight * step.retain_term(retain)
