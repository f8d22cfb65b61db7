"""Log-probabilities of answer tokens through a linear LM head, without a graph over the vocabulary.

Autograd's own path holds logits, log-softmax and their gradients at once, and a whole weight gradient for every chunk.
Here one buffer of logits becomes its own gradient in place, and the weight gradient is added to chunk by chunk. Where
even one buffer is too large, chunks are computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .gather import Gather

KEEP_ELEMENTS = 1 << 26
"""Logits kept from the forward to the backward pass (256 MiB in fp32); beyond, they are recomputed."""
CHUNK_ELEMENTS = 1 << 23
"""Logits of one chunk when they are recomputed."""
BLOCK_ELEMENTS = 1 << 20
"""Logits of one block of rows: 4 MiB in fp32."""


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, gather: Gather | None
    ) -> Tensor:
        size = max(1, CHUNK_ELEMENTS // weight.shape[0])
        keep = hidden.shape[0] * weight.shape[0] <= KEEP_ELEMENTS
        if keep:
            size = max(1, hidden.shape[0])
        values, normalisers, kept = [], [], None
        for h, t in zip(hidden.split(size), target.split(size)):
            room = gather.logits(h, len(weight)) if keep and gather is not None else None
            if room is None:
                logits = F.linear(h, weight, bias)
            else:
                logits = torch.mm(h, weight.T, out=room) if bias is None else torch.addmm(bias, h, weight.T, out=room)
            normaliser = _logsumexp(logits)
            values.append(logits.gather(1, t[:, None])[:, 0].float() - normaliser)
            normalisers.append(normaliser)
            kept = logits if keep and any(ctx.needs_input_grad) else None
        ctx.save_for_backward(hidden, weight, bias, target, torch.cat(normalisers))
        ctx.size, ctx.kept, ctx.gather = size, kept, gather
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        hidden, weight, bias, target, normaliser = ctx.saved_tensors
        size, kept, ctx.kept = ctx.size, ctx.kept, None
        wants_hidden, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        to_hidden = torch.empty_like(hidden) if wants_hidden else None
        to_weight: Tensor | None = None
        to_bias = torch.zeros_like(bias) if wants_bias else None
        for start in range(0, hidden.shape[0], size):
            part = slice(start, start + size)
            h = hidden[part]
            z = kept if kept is not None else F.linear(h, weight, bias)
            _logits_to_gradient(z, target[part], normaliser[part], gradients[0][part])
            if to_hidden is not None:
                to_hidden[part] = z @ weight
            if ctx.gather is not None:
                ctx.gather.product(weight, z.T, h)
            elif wants_weight:
                to_weight = z.T @ h if to_weight is None else to_weight.addmm_(z.T, h)
            if to_bias is not None:
                to_bias += z.sum(0)
        return to_hidden, to_weight, to_bias, None, None


def _blocks(rows: int, vocabulary: int) -> Iterator[slice]:
    """Rows in blocks small enough that what is done to one stays in cache."""
    size = max(1, BLOCK_ELEMENTS // vocabulary)
    return (slice(start, start + size) for start in range(0, rows, size))


def _logsumexp(logits: Tensor) -> Tensor:
    """(n,) fp32 normalisers; torch.logsumexp is slow on wide rows."""
    parts = []
    for block in _blocks(*logits.shape):
        z = logits[block].float()
        top = z.amax(1, keepdim=True)
        parts.append((z - top).exp_().sum(1).log_() + top[:, 0])
    return torch.cat(parts)


def _logits_to_gradient(logits: Tensor, target: Tensor, normaliser: Tensor, gradient: Tensor) -> None:
    """Turn logits (n, V), in their own memory, into gradient (n,) times d logprob / d logits = onehot - softmax."""
    for block in _blocks(*logits.shape):
        z = logits[block].float()  # the logits themselves where they are fp32
        z.sub_(normaliser[block, None]).exp_().mul_(-gradient[block, None])
        z.scatter_add_(1, target[block, None], gradient[block, None])
        logits[block] = z


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
