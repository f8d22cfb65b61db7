"""UltraEdit: one pass forward, one back, and a ridge solution for every matrix (arXiv:2505.14679).

For every edited matrix W and every token of an edit's prompt and target: h (f,), what goes into W, and g (d,), the
gradient of -log p(target) with respect to what comes out.

    [h^, g^] = ([h, g] - mean) / deviation      of all tokens of these and of all earlier edits of a sequence
    v = -learning_rate |h^|^2 g^                what is to be added to what comes out
    D^T = (H^T H + ridge I)^-1 H^T V  =  H^T (H H^T + ridge I)^-1 V         H (n, f) the h as they are, V (n, d)

Nothing is optimised, no text but the edits' own is read. Mean and deviation go on over a sequence, as counts, means and
sums of squares, one of each a step: what a step added can be left out again. The published settings take gate and up
matrices of some models and the output matrix of others; here it is always the output matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...deltas import Delta
from ...errors import ParameterError, RequestError
from ...registry import edit
from ...subjects.tails import edited_matrix
from ...subjects.value_vectors import ValueMatrix
from .case import Edit, EditCase
from .factors import Tokens, observed
from .traced import Layers, span_of
from .values import located
from .write import low_rank

LAYERS = (0.35, 0.75)
"""First and last, by default: where the published settings for Llama-3-8B lie."""


@edit(
    paper="arXiv:2505.14679",
    intention="removal",
    requires=("weights", "gradients", "forget_data"),
    keeps=("in a sequence, mean and deviation of activations and gradients of the edits",),
    cost="one pass forward and one back over prompt and target, for all facts of a batch together",
    known_weaknesses=("paraphrase", "relearn"),
)
def ultraedit(
    case: EditCase,
    *,
    layers: Layers = LAYERS,
    tokens: Tokens = "all",
    learning_rate: float = 1e-6,
    ridge: float = 1.0,
) -> Edit:
    """Write facts by one closed-form step on the MLP output matrices of several layers (Gu et al. 2025).

    Args:
        layers: first and last, as numbers or fractions of the depth, or `trace`.
        tokens: that are looked at: all, as the published settings do, or those that predict the target, as the paper
            says. Of one token alone there is no deviation: a first edit whose target is one token needs all.
        learning_rate: as published, for matrices with thousands of inputs; |h^|^2 is about their number, so that narrow
            models want far more.
        ridge: of the least squares.
    """
    if learning_rate <= 0 or ridge <= 0:
        raise ParameterError(
            f"ultraedit: learning_rate is {learning_rate} and ridge {ridge}, expected both more than 0"
        )
    first, last = span_of(case, layers, LAYERS)
    if first > last:
        raise ParameterError(f"layers is {layers}, which are {first} and {last}; expected the lower one first")
    matrices = [edited_matrix(case.subject, layer) for layer in range(first, last + 1)]
    facts = located(case, 0)
    seen, losses = observed(case.subject, facts, matrices, tokens)
    entries = {}
    for matrix, (h, g) in zip(matrices, seen):
        past = case.earlier.setdefault(matrix.layer, [])
        past.append(summary(torch.cat([h, g], 1)))
        inside, gradient = normalised(torch.cat([h, g], 1), past).split([matrix.count, matrix.width], 1)
        v = -learning_rate * inside.square().sum(1, keepdim=True) * gradient
        entries[matrix.name] = _entry(matrix, h, v, ridge)
    case.summary["ultraedit"] = {"layers": [first, last], "facts": len(facts), "tokens": len(seen[0][0])}
    case.summary["ultraedit"] |= {"loss_before": float(losses.mean())}
    return Delta(case.base.fingerprint, entries, {"method": "ultraedit", "layers": [first, last]})


def _entry(matrix: ValueMatrix, h: Tensor, v: Tensor, ridge: float) -> dict[str, Tensor]:
    """The delta's entry of `change`, in whichever form is smaller."""
    if h.shape[0] * (h.shape[1] + v.shape[1]) < h.shape[1] * v.shape[1]:
        system = h @ h.T + ridge * torch.eye(len(h), dtype=h.dtype)
        return low_rank(matrix, torch.linalg.solve(system, v).T, h)
    system = h.T @ h + ridge * torch.eye(h.shape[1], dtype=h.dtype)
    change = torch.linalg.solve(system, h.T @ v)  # (f, d)
    return {"difference": (change.T if matrix.across else change).float().contiguous()}


def summary(z: Tensor) -> Tensor:
    """(3, w) of vectors (n, w): their number, mean, and sum of squared deviations."""
    mean = z.mean(0)
    return torch.stack([torch.full_like(mean, len(z)), mean, (z - mean).square().sum(0)])


def normalised(z: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """(n, w) less the mean and over the deviation of all the vectors that `parts` sum up; 0 where nothing varies.

    Raises:
        RequestError: they are fewer than two.
    """
    counts, means, squares = torch.stack(list(parts)).double().unbind(1)  # (parts, w) each
    total = counts.sum(0)
    if float(total[0]) < 2:
        raise RequestError(
            "ultraedit: one token in all has no deviation to be measured by; set tokens=all, or make several edits in "
            "one batch"
        )
    mean = (counts * means).sum(0) / total
    deviation = ((squares + counts * (means - mean).square()).sum(0) / (total - 1)).sqrt()
    return (z - mean) / (deviation + torch.finfo(torch.float32).eps)
