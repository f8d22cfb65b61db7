"""MEMIT: many facts at once, spread over the MLPs of several layers (arXiv:2210.07229).

Values z are worked out at the residual stream after the last of the layers. From the lowest layer up, each closes its
share of what is missing, under the changes made below it:

    R = (Z - Z now) / (layers left)        W <- W + R K^T (weight * C + K K^T)^-1

K (f, n): the facts' keys there; C: their second moment over a corpus. With M = (weight C)^-1 K the inverse of an n x n
matrix is enough: (weight C + K K^T)^-1 K = M (I + K^T M)^-1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ParameterError
from ...registry import edit
from .case import Edit, EditCase
from .spread import LAYERS, spread, within
from .traced import Layers
from .values import Settings, located


@edit(
    paper="arXiv:2210.07229",
    intention="removal",
    requires=("weights", "gradients", "forget_data", "retain_data"),
    cost="ROME's at the last layer, and a pass over contexts for every layer",
    known_weaknesses=("paraphrase", "relearn"),
)
def memit(
    case: EditCase,
    *,
    layers: Layers = LAYERS,
    contexts: int = 5,
    steps: int = 25,
    learning_rate: float = 0.5,
    kl: float = 0.0625,
    decay: float = 1e-3,
    clamp: float = 4.0,
    weight: float = 15_000.0,
    max_tokens: int = 3_200_000,
    ridge: float = 1e-2,
) -> Edit:
    """Spread the facts over the MLPs of several layers, least squares against what the corpus needs (Meng et al. 2023).

    `layers`: first and last, as numbers or fractions of the depth, or `trace`. `weight` of C against the facts' own
    keys (eq. 14's lambda); small models want far less than the published 15 000: weight * tr(C) of 10-100 times
    tr(K K^T).
    """
    if weight <= 0:
        raise ParameterError(f"memit: weight is {weight}, expected more than 0")
    span = within(case, layers)
    moments = case.moments(span, max_tokens)

    def solve(layer: int, k: Tensor) -> Tensor:
        m = moments[layer].solve(k, ridge) / weight
        return m @ torch.linalg.inv(torch.eye(k.shape[1], dtype=k.dtype) + k.T @ m)

    facts = located(case, contexts)
    return spread(case, facts, span, Settings(steps, learning_rate, kl, decay, clamp), solve)
