"""What states say of target tokens, and how far others are from what was said before: one product with a linear head.

As in subjects/head.py logits become their own gradient in their own memory, up to one factor per row; autograd's record
of log-softmax, look-ups and divergence would hold several tensors over the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...subjects.head import surprise


def told(head: nn.Linear, states: Tensor, target: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """(T,) fp32 log-probabilities of `target` after the first T states of (T + m, d), and (m,) KL(now || before) after
    the others.

    Differentiable once, in the states.

    Args:
        before: (m, V) log-probabilities.
    """
    return _Told.apply(states, head.weight, head.bias, target, before)  # type: ignore[no-any-return]


class _Told(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, before: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits = F.linear(states, weight, bias)
        said, others = logits.split([len(target), len(before)])
        now = others.float().log_softmax(-1)
        apart, share = now - before, now.exp()
        divergence = (share * apart).sum(-1)
        # p (log p/q - KL) is the gradient of KL(p || q) by the logits of p; p - 1 that of -log p of the target.
        others.copy_(apart.sub_(divergence[:, None]).mul_(share))
        logprob = surprise(said, target)
        ctx.save_for_backward(logits, weight)
        return logprob, divergence

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        z, weight = ctx.saved_tensors
        factor = torch.cat([-gradients[0], gradients[1]])[:, None]
        return ((z @ weight) * factor).to(z.dtype), None, None, None, None
