"""Weights in few bits, and what they stand for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_quantised(parameter: Tensor) -> bool:
    return not parameter.is_floating_point() or type(parameter).__module__.startswith("torchao.")


@torch.no_grad()
def dense_weight(layer: Any, dtype: torch.dtype) -> Tensor:
    """(out, in) of a quantised linear layer, whatever its storage: what it makes of the unit vectors."""
    device, columns = next(layer.parameters()).device, []
    for first in range(0, layer.in_features, 1024):
        places = torch.arange(first, min(first + 1024, layer.in_features), device=device)
        units = torch.zeros(len(places), layer.in_features, dtype=dtype, device=device)
        units[torch.arange(len(places), device=device), places] = 1
        given = layer(units)
        columns.append((given if layer.bias is None else given - layer.bias).to(dtype))
    return torch.cat(columns).T.contiguous()
