"""Weights in few bits (round to nearest, symmetric, per output channel), and weights removed."""

from __future__ import annotations

import torch

from .anatomy import structure


@torch.no_grad()
def round_to_nearest(model: torch.nn.Module, bits: int) -> None:
    """Round every matrix of the blocks, filters too, in place, to a symmetric grid per output channel; embeddings
    stay."""
    parts = structure(model)
    transposed = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if hasattr(module, "nf") and not hasattr(module, "out_features")
    }
    for name, parameter in model.named_parameters():
        if parts.layer(name) is None or parameter.dim() < 2:
            continue
        # The input axes, so that there is one scale for each output; a convolution has three.
        axis = (1, 2, 3) if parameter.dim() == 4 else (-2,) if name in transposed else (-1,)
        weight = parameter.float()
        top = 2 ** (bits - 1) - 1
        scale = weight.abs().amax(axis, keepdim=True).clamp_min(1e-12) / top
        parameter.copy_(((weight / scale).round().clamp(-top, top) * scale).to(parameter.dtype))


@torch.no_grad()
def prune(model: torch.nn.Module, share: float) -> None:
    """Set the smallest weights of every matrix and filter of the blocks to zero, in place; embeddings stay.

    Args:
        share: of each matrix, 0 to 1; rounded down to whole weights.
    """
    parts = structure(model)
    for name, parameter in model.named_parameters():
        count = int(share * parameter.numel())
        if parts.layer(name) is not None and parameter.dim() >= 2 and count:
            size = parameter.abs().flatten().float()
            parameter.view(-1)[size.topk(count, largest=False).indices] = 0
