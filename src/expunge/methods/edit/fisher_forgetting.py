"""Fisher forgetting: noise on weights that retained rows do not need."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from ...deltas import Delta
from ...registry import edit
from ..optimise.importance import importance
from .case import Edit, EditCase

FLOOR, CAP = 1e-8, 1e3


@edit(
    paper="arXiv:1911.04933",
    modality=("image", "language"),
    intention="removal",
    requires=("weights", "gradients", "retain_data"),
    cost="6N per token of retain rows, row by row",
    known_weaknesses=("relearn",),
)
def fisher_forgetting(case: EditCase, *, alpha: Annotated[float, Field(ge=0)] = 1e-6) -> Edit:
    """theta + N(0, v) with v = alpha min(1 / (F + 1e-8), 1e3), F the Fisher diagonal on retain rows (Golatkar et al.
    2020, sec. 4), averaged over the inputs of a matrix.

    Labels are drawn from the model itself, one for each answer token, row by row: the same expectation as the sum over
    all classes that published code takes, at a K-th of its cost. Without that code's special treatment of the last
    layer and of the forgotten class, which needs to know which one it is.
    """
    rows = case.encoded("retain", "fisher_forgetting")
    names = [name for name, _ in case.tensors("fisher_forgetting").parameters]
    generator = torch.Generator().manual_seed(case.seed)
    fisher = importance(case.subject, rows, names, kind="sampled", batch_size=1, generator=generator)
    entries = {}
    for name in names:
        noise = deviation(fisher[name], alpha).cpu() * torch.randn(fisher[name].shape, generator=generator)
        if bool(noise.any()):
            entries[name] = {"difference": noise}
    case.summary["fisher_forgetting"] = {"alpha": alpha, "rows": len(rows)}
    return Delta(case.subject.fingerprint, entries, {"method": "fisher_forgetting", "alpha": alpha})


def deviation(fisher: Tensor, alpha: float) -> Tensor:
    """Standard deviation of the noise: falls where the Fisher diagonal rises."""
    variance = alpha * (1 / (fisher + FLOOR)).clamp(max=CAP)
    if variance.dim() > 1:
        variance = variance.mean(1, keepdim=True).expand_as(variance)
    return variance.sqrt()
