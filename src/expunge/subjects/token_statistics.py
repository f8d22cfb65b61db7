"""What a table holds of rows of logits: how likely a token is, whether it is the likeliest, and two moments.

A dozen operations read every logit. Logits are made in chunks that are large enough for the head's product and, on a
CPU, gone through in blocks that stay in a core's own cache meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 21
"""Logits made at once (8 MiB in fp32)."""
BLOCK_ELEMENTS = 1 << 18
"""Logits gone through at once on a CPU (1 MiB in fp32), which a core keeps to itself."""
MOST_ELEMENTS = 1 << 24
"""Logits gone through at once elsewhere."""


@torch.no_grad()
def token_statistics(
    head: Callable[[Tensor], Tensor],
    states: Tensor,
    target: Tensor,
    at: Tensor,
    vocabulary: int,
    moments: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprob, hit, mean, variance) per answer token (n,), as `Scores` has them.

    Args:
        head: logits (k, V) of states (k, d); they are overwritten.
        states: (m, d); those that predict several tokens stand once.
        target: (n,) tokens.
        at: (n,) which state predicts each.
        vocabulary: V.
        moments: (m,) states whose mean and variance are asked for, by default all; NaN for the others.
    """
    if not len(target):
        empty = states.new_zeros(0, dtype=torch.float32)
        return empty, empty.bool(), empty, empty
    full = len(states)
    if moments is not None:  # those stand first, so that the others go through without
        full, place = int(moments.sum()), (~moments).long().argsort(stable=True)
        states, at = states[place], place.argsort()[at]
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    starts = [*range(0, full, size), *range(full, len(states), size)]
    sizes = [stop - start for start, stop in zip(starts, [*starts[1:], len(states)])]
    order = at.argsort(stable=True)
    counts = torch.bincount(at, minlength=len(states)).split(sizes)
    picked, parts = [], []
    for start, chunk, tokens in zip(starts, states.split(sizes), order.split([int(c.sum()) for c in counts])):
        logits = head(chunk).float()
        picked.append(logits[at[tokens] - start, target[tokens]])
        # Moments need weights and products beside the logits.
        looked, size = (_moments, rows_at_once(logits, 2)) if start < full else (_normaliser, rows_at_once(logits))
        parts += [looked(block) for block in logits.split(size)]
    top, best, normaliser, mean, variance = (torch.cat(column) for column in zip(*parts))
    logprob = torch.cat(picked)[order.argsort()] - top[at] - normaliser[at]
    return logprob, best[at] == target, (mean - normaliser)[at], variance[at]


def rows_at_once(logits: Tensor, parts: int = 1) -> int:
    """How many rows of logits (k, V) are gone through at once, in so many times smaller parts."""
    most = BLOCK_ELEMENTS if logits.device.type == "cpu" else MOST_ELEMENTS
    return max(1, most // parts // logits.shape[1])


def _normaliser(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `_moments`, without the two."""
    top, best = logits.max(-1)
    total = logits.sub_(top[:, None]).exp_().sum(-1)
    unknown = torch.full_like(top, torch.nan)
    return top, best, total.log(), unknown, unknown


def _moments(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of each row (k, V): its largest logit and where that is, and of what lies below it (z - top) the logarithm of the
    sum of exponentials, mean and variance under the softmax."""
    top, best = logits.max(-1)
    below = logits.sub_(top[:, None])
    weights = below.exp()
    total = weights.sum(-1)
    mean = torch.linalg.vecdot(weights, below) / total
    # -inf logits (masked vocabulary entries) give 0 * inf; they carry no probability.
    if not torch.isfinite(mean).all():
        below.nan_to_num_(neginf=0.0)
        mean = torch.linalg.vecdot(weights, below) / total
    # E[l^2] - E[l]^2 would lose what little variance there is among values that are nearly alike.
    apart = below.sub_(mean[:, None])
    variance = torch.linalg.vecdot(weights.mul_(apart), apart) / total
    return top, best, total.log(), mean, variance
