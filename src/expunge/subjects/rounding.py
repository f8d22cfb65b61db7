"""Weights in few bits: round to nearest, symmetric, per output channel."""

from __future__ import annotations

import torch

from .anatomy import anatomy


@torch.no_grad()
def round_to_nearest(model: torch.nn.Module, bits: int) -> None:
    """Round every matrix of the blocks, in place, to a symmetric grid per output channel; embeddings stay."""
    parts = anatomy(model)
    transposed = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if hasattr(module, "nf") and not hasattr(module, "out_features")
    }
    for name, parameter in model.named_parameters():
        if parts.layer(name) is None or parameter.dim() < 2:
            continue
        axis = -2 if name in transposed else -1  # the input axis: one scale for each output
        weight = parameter.float()
        top = 2 ** (bits - 1) - 1
        scale = weight.abs().amax(axis, keepdim=True).clamp_min(1e-12) / top
        parameter.copy_(((weight / scale).round().clamp(-top, top) * scale).to(parameter.dtype))
