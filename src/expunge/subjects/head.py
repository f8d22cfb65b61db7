"""Log-probabilities of answer tokens through a linear LM head, without a graph over the vocabulary.

Autograd's own path holds logits, log-softmax and their gradients at once, and a whole weight gradient for every chunk.
Here one buffer of logits becomes its own gradient in place already in the forward pass, up to one factor per row, and
the weight gradient is added to chunk by chunk. Where even one buffer is too large, chunks are computed again in the
backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .gather import Gather
from .token_statistics import rows_at_once

KEEP_ELEMENTS = 1 << 26
"""Logits kept from the forward to the backward pass (256 MiB in fp32); beyond, they are recomputed."""
CHUNK_ELEMENTS = 1 << 23
"""Logits of one chunk when they are recomputed."""


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, gather: Gather | None
    ) -> Tensor:
        size = max(1, CHUNK_ELEMENTS // weight.shape[0])
        keep = hidden.shape[0] * weight.shape[0] <= KEEP_ELEMENTS
        if keep:
            size = max(1, hidden.shape[0])
        values, kept = [], None
        for h, t in zip(hidden.split(size), target.split(size)):
            room = gather.logits(h, len(weight)) if keep and gather is not None else None
            if room is None:
                logits = F.linear(h, weight, bias)
            else:
                logits = torch.mm(h, weight.T, out=room) if bias is None else torch.addmm(bias, h, weight.T, out=room)
            values.append(surprise(logits, t))
            kept = logits if keep and any(ctx.needs_input_grad) else None
        ctx.save_for_backward(hidden, weight, bias, target)
        ctx.size, ctx.kept, ctx.gather = size, kept, gather
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        hidden, weight, bias, target = ctx.saved_tensors
        size, kept, ctx.kept = ctx.size, ctx.kept, None
        wants_hidden, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        to_hidden = torch.empty_like(hidden) if wants_hidden else None
        to_weight: Tensor | None = None
        to_bias = torch.zeros_like(bias) if wants_bias else None
        for start in range(0, hidden.shape[0], size):
            part = slice(start, start + size)
            # A row's gradient is a number times z. The number goes to the narrow side of the products.
            scale = -gradients[0][part, None]
            h = hidden[part]
            z = kept
            if z is None:
                z = F.linear(h, weight, bias)
                surprise(z, target[part])
            if to_hidden is not None:
                to_hidden[part] = (z @ weight) * scale
            scaled = (h * scale).to(h.dtype)
            if ctx.gather is not None:
                ctx.gather.product(weight, z.T, scaled)
            elif wants_weight:
                to_weight = z.T @ scaled if to_weight is None else to_weight.addmm_(z.T, scaled)
            if to_bias is not None:
                to_bias += z.T @ scale[:, 0].to(z.dtype)
        return to_hidden, to_weight, to_bias, None, None


def surprise(logits: Tensor, target: Tensor) -> Tensor:
    """(n,) fp32 log-probabilities of the targets; logits (n, V) become softmax - onehot in their own memory.

    Block by block: while one is in cache it is read for its maximum, its exponentials, their sum and the quotient.
    """
    size = rows_at_once(logits)
    values = []
    room = None if logits.dtype == torch.float32 else logits.new_empty(size, logits.shape[1], dtype=torch.float32)
    for block, at in zip(logits.split(size), target[:, None].split(size)):
        z = block if room is None else room[: len(block)].copy_(block)
        own = z.gather(1, at)
        top = z.amax(1, keepdim=True)
        total = z.sub_(top).exp_().sum(1, keepdim=True)
        z.div_(total).scatter_add_(1, at, torch.full_like(total, -1.0))
        if room is not None:
            block.copy_(z)
        values.append((own - top - total.log())[:, 0])
    return torch.cat(values)


def linear_logprob(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, gather: Gather | None = None
) -> Tensor:
    """(T,) fp32 log-probabilities of `target` (T,) under softmax(hidden @ weight.T + bias).

    hidden (T, d), weight (V, d), bias (V,) or None. Differentiable once, in hidden, weight and bias.

    Args:
        gather: adds up the weight's gradient where it lies.
    """
    if not len(target):
        return hidden.new_zeros(0, dtype=torch.float32)
    own = gather is not None and gather.takes(weight)
    return _LinearLogprob.apply(hidden, weight, bias, target, gather if own else None)  # type: ignore[no-any-return]
