"""Sharpness-aware minimisation and its relatives: a forget loss that stays low around the weights it ends at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ...registry import optimise
from .loop import Turn
from .shards import cut, norm
from .terms import Objective
from .unlearn import Preparation

Vector = Sequence[Tensor | None]
"""One tensor per parameter; None where nothing flows."""

RADIUS = {"sam": 0.01, "rs": 1e-4, "gp": 0.01, "cr": 0.01}


def _prepare(case: Preparation) -> None:
    case.given["seed"] = case.seed
    case.repeats = {"sam": 2, "gp": 2, "cr": 4, "rs": case.settings["samples"]}[case.settings["variant"]]
    if case.subject.dtype in (torch.float16, torch.bfloat16) and "lora" not in str(case.scope):
        case.warnings.append(
            f"sharpness_aware: weights in {str(case.subject.dtype).removeprefix('torch.')} round small perturbations "
            "away; load the model in float32, or use scope lora"
        )


@optimise(
    paper="arXiv:2502.05374",
    intention="removal",
    requires=("weights", "gradients", "forget_data", "retain_data"),
    cost="the objective's, with its forget pass run 2 (sam, gp), 4 (cr) or `samples` (rs) times; one copy of the scope",
    known_weaknesses=("relearn",),
    prepare=_prepare,
    aliases={"sam": {"variant": "sam"}},
)
def sharpness_aware(
    turn: Turn,
    *,
    objective: Objective = "npo",
    variant: Literal["sam", "rs", "gp", "cr"] = "sam",
    rho: float | None = None,
    samples: int = 3,
    penalty: float = 0.02,
) -> Tensor:
    """Take the forget gradient g at theta + rho g/|g|, the retain gradient at theta (Fan et al. 2025).

    rs: mean of g at `samples` points theta + rho z, z normal. gp: adds penalty |g|. cr: adds penalty |g(theta + rho
    g/|g|) - g|. Their gradients are finite differences of step rho, so that gp with penalty = rho is sam. rho None is
    0.01, for rs 1e-4.
    """
    radius = RADIUS[variant] if rho is None else rho
    memory = dict(turn.memory)

    def at(*shifts: Vector) -> tuple[Tensor, Vector]:
        # However many passes a step has, an objective's memory sees one of them.
        turn.memory.clear()
        turn.memory.update(memory)
        return forget_gradient(turn, radius, shifts)

    if variant == "rs":
        points = [at(_noise(turn, sample)) for sample in range(samples)]
        loss = torch.stack([value for value, _ in points]).mean()
        gradient = _sum([(1 / samples, g) for _, g in points])
    else:
        loss, here = at()
        v = _unit(here)
        ahead, gradient = at(v)
        if variant == "sam":
            loss = ahead
        else:
            bend = _sum([(1.0, gradient), (-1.0, here)])
            if variant == "cr":
                u = _unit(bend)
                bend = _sum([(1.0, at(v, u)[1]), (-1.0, at(u)[1]), (-1.0, gradient), (1.0, here)])
            gradient = _sum([(1.0, here), (penalty / radius if radius else 0.0, bend)])
    for p, g in zip(turn.parameters, gradient):
        p.grad = g
    return loss + turn.backward("retain")


def forget_gradient(turn: Turn, radius: float, shifts: Sequence[Vector] = ()) -> tuple[Tensor, Vector]:
    """Forget loss and gradient at theta + radius x the sum of shifts; the weights come back bit for bit."""
    start = [p.detach().clone() for p in turn.parameters] if shifts else []
    try:
        with torch.no_grad():
            for shift in shifts:
                for p, along in zip(turn.parameters, shift):
                    if along is not None:
                        p.add_(along, alpha=radius)
        loss = turn.backward("forget")
    finally:
        with torch.no_grad():
            for p, value in zip(turn.parameters, start):
                p.copy_(value)
    gradient = [p.grad for p in turn.parameters]
    for p in turn.parameters:
        p.grad = None
    return loss, gradient


def _unit(vector: Vector) -> Vector:
    """The vector over its norm over all parameters; 0 where that is 0."""
    length = norm([part for part in vector if part is not None]).clamp_min(1e-30)
    return [None if part is None else part / length for part in vector]


def _sum(terms: Sequence[tuple[float, Vector]]) -> Vector:
    """Weighted sum."""
    found: list[Tensor | None] = []
    for parts in zip(*(vector for _, vector in terms)):
        scaled = [scale * part for (scale, _), part in zip(terms, parts) if part is not None]
        found.append(sum(scaled[1:], scaled[0]) if scaled else None)
    return found


def _noise(turn: Turn, sample: int) -> Vector:
    """Standard normal numbers that depend on seed, step and sample only."""
    seed = (turn.recipe.given["seed"] * 1_000_003 + turn.index) * 1009 + sample
    generator = torch.Generator().manual_seed(seed % (1 << 63))
    return [cut(p, torch.randn(p.shape, generator=generator).to(p.device, p.dtype)) for p in turn.parameters]
