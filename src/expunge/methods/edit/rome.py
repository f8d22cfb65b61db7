"""ROME: one fact is one association of a key with a value in one MLP, and a rank-one change rewrites it.

    u = C^-1 k*        W <- W + delta u^T / (k* . u)        so that W k* gives the new value and little else moves

k*: what goes into the matrix at the subject's last token, averaged over contexts; delta: what must be added there
(values.py); C: the keys' second moment. The published method divided by the key of the prompt as it is, not by the
average that u was made of, which breaks models now and then; R-ROME (arXiv:2403.07175) takes the average in both
places. Several facts at once are the same least-squares problem with as many conditions (EMMET, arXiv:2403.14236):

    W <- W + R (K^T C^-1 K)^-1 K^T C^-1
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...deltas import Delta
from ...errors import TrainingError
from ...registry import edit
from ...subjects.tails import edited_matrix
from .case import Edit, EditCase
from .traced import Layer, layer_of
from .values import Settings, located, optimised
from .write import low_rank

PARALLEL = 1e-4
"""|k . u| / |k||u| below which a change would explode."""


@edit(
    paper="arXiv:2202.05262",
    intention="removal",
    requires=("weights", "gradients", "forget_data"),
    cost="2N per token of contexts and prompt, then 25 forward and backward passes of later tokens in the blocks above",
    known_weaknesses=("paraphrase", "relearn"),
    aliases={"rome_original": {"original": True}},
)
def rome(
    case: EditCase,
    *,
    layer: Layer = 0.16,
    contexts: int = 20,
    steps: int = 25,
    learning_rate: float = 0.5,
    kl: float = 0.0625,
    decay: float = 1e-3,
    clamp: float = 4.0,
    covariance: bool = True,
    max_tokens: int = 3_200_000,
    ridge: float = 1e-2,
    original: bool = False,
) -> Edit:
    """Rewrite one association in one MLP's output matrix (Meng et al. 2022, eq. 2-4); several facts at once as EMMET.

    `layer` is a number, a fraction of the depth, or `trace`. `contexts`: texts put before the prompt while key and
    value are worked out. `covariance` false takes C = I. `ridge` is added to C, in shares of its mean eigenvalue.
    `original` divides by the key of the prompt as it is, as the paper did.
    """
    at = layer_of(case, layer)
    matrix = edited_matrix(case.subject, at)
    moment = case.moments([at], max_tokens)[at] if covariance else None
    facts = located(case, contexts)
    found = optimised(case.subject, facts, at, Settings(steps, learning_rate, kl, decay, clamp), goal=case.goal)
    k = found.keys.mean.double().cpu().T
    u = k if moment is None else moment.solve(k, ridge)
    case.summary["rome"] = {"layer": at, "matrix": matrix.name, "facts": len(facts), **found.log}
    read = found.keys.bare.double().cpu().T if original else k
    left, right = conditions(found.delta.double().cpu().T, read, u)
    return Delta(case.base.fingerprint, {matrix.name: low_rank(matrix, left, right)}, {"method": "rome", "layer": at})


def conditions(residual: Tensor, keys: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """(B (d, n), A (n, f)) of the change B A that gives `residual` (d, n) at `keys` (f, n) along `directions` (f, n).

    Raises:
        TrainingError: two keys are alike, or a key stands across its direction: the change would explode.
    """
    products = keys.T @ directions  # (n, n)
    sizes = keys.norm(dim=0)[:, None] * directions.norm(dim=0)
    worst = float(torch.linalg.svdvals(products / sizes)[-1])
    if worst < PARALLEL:
        raise TrainingError(
            f"the keys of {keys.shape[1]} facts determine no change that is not huge (smallest cosine {worst:.1e}, "
            "expected at least 1e-4); two edits may be about one subject in the same words: make them one after another"
        )
    return torch.linalg.solve(products, residual.T).T, directions.T
