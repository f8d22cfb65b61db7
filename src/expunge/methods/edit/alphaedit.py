"""AlphaEdit: MEMIT whose changes lie in the null space of the keys that must keep their values (arXiv:2410.02355).

C = U diag(e) U^T, V the eigenvectors of the smallest eigenvalues, P = V V^T. Whatever stands in the span of the other
eigenvectors keeps its output to the last digit. With K of these facts, K_p of earlier edits,

    D^T = [P (K K^T + K_p K_p^T) + ridge I]^-1 P K R^T
        = V A (A^T A + ridge I)^-1 E R^T              A = V^T [K, K_p], E the columns of K

        = V (A A^T + ridge I)^-1 V^T K R^T

so that a system of as many equations as there are facts, or as there are directions in V, is enough.
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
    paper="arXiv:2410.02355",
    intention="removal",
    requires=("weights", "gradients", "forget_data", "retain_data"),
    cost="MEMIT's, and an eigendecomposition of each layer's key statistics, once",
    known_weaknesses=("paraphrase", "relearn"),
)
def alphaedit(
    case: EditCase,
    *,
    layers: Layers = LAYERS,
    contexts: int = 5,
    steps: int = 25,
    learning_rate: float = 0.1,
    kl: float = 0.0625,
    decay: float = 0.5,
    clamp: float = 0.75,
    null: float = 0.7,
    ridge: float = 1.0,
    max_tokens: int = 3_200_000,
) -> Edit:
    """Write facts into the directions that the corpus leaves alone (Fang et al. 2024, eq. 13).

    `null`: share of the directions of least variance that changes may take; by share, because the published threshold
    (an eigenvalue of 0.02, about 0.7 of the directions of Llama-3-8B) scales with the model. A narrow model has no null
    space to speak of. `ridge` is the published L2 (1 for Llama-3, 10 for GPT2-XL).
    """
    if not 0 < null <= 1 or ridge <= 0:
        raise ParameterError(f"alphaedit: null is {null} and ridge {ridge}, expected 0 < null <= 1 and ridge > 0")
    span = within(case, layers)
    moments = case.moments(span, max_tokens)
    shares = {}

    def solve(layer: int, k: Tensor) -> Tensor:
        values, vectors = moments[layer].spectrum
        count = max(1, round(null * len(values)))
        shares[str(layer)] = float(values[:count].sum() / values.sum())
        v = vectors[:, :count]
        spared = case.earlier.setdefault(layer, [])
        own, a = v.T @ k, v.T @ torch.cat([k.T, *spared]).double().T
        spared.append(k.T)
        if a.shape[1] > count:
            return v @ torch.linalg.solve(a @ a.T + ridge * torch.eye(count, dtype=a.dtype), own)
        system = a.T @ a + ridge * torch.eye(a.shape[1], dtype=a.dtype)
        return v @ torch.linalg.solve(system, a.T).T[:, : k.shape[1]]

    delta = spread(case, located(case, contexts), span, Settings(steps, learning_rate, kl, decay, clamp), solve)
    case.summary["null_space"] = {"directions": null, "variance": shares}
    return delta
