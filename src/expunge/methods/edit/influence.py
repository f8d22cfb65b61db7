"""Influence unlearning: one step of Newton's method from the trained weights towards those without the forget rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...deltas import Delta
from ...registry import edit
from ...subjects.packed import Encoded
from ..optimise.curvature import Vector, hessian_product, mean_gradient
from .case import Edit, EditCase

ROWS = 1000
"""Retain rows of the Woodbury recursion."""
RESIDUAL = 1e-6
"""Relative to the right side; the solver stops there."""


@edit(
    paper="arXiv:1703.04730",
    modality=("image", "language"),
    intention="removal",
    requires=("weights", "gradients", "forget_data", "retain_data"),
    cost="12N per token of retain rows and iteration; with woodfisher 6N per token of at most 1000 of them",
    known_weaknesses=("relearn",),
)
def influence(
    case: EditCase,
    *,
    solver: Literal["conjugate_gradient", "woodfisher"] = "conjugate_gradient",
    scale: Annotated[float, Field(gt=0)] = 1.0,
    damping: Annotated[float, Field(ge=0)] = 0.01,
    iterations: Annotated[int, Field(ge=1)] = 50,
    batch_size: Annotated[int, Field(ge=1)] = 64,
) -> Edit:
    """theta + scale (n_f / n_r) x with (H + d I) x = grad L_forget, H of the retain rows' loss (Koh and Liang 2017).

    At an optimum n_r grad L_retain = -n_f grad L_forget, so that this is the Newton step of the retain rows' loss.
    conjugate_gradient: H exact, from products with it; where a direction has negative curvature the solver stops, with
    a warning. woodfisher: the baseline of image tables (arXiv:2310.12508): scale H^-1 v with v = (n_f / n) (grad
    L_forget - grad L_retain) and the published recursion over single retain rows, whose o stays along the first row's
    gradient, so that v is corrected along that one direction; `damping` and `iterations` are unused.
    """
    forgotten, kept = case.encoded("forget", "influence"), case.encoded("retain", "influence")
    names = [name for name, _ in case.tensors("influence").parameters]
    n_f, n_r = (sum(row.scored for row in rows) for rows in (forgotten, kept))
    forget = mean_gradient(case.subject, forgotten, names, batch_size=batch_size)
    about: dict[str, Any]
    if solver == "woodfisher":
        retain = mean_gradient(case.subject, kept, names, batch_size=batch_size)
        order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(case.seed))[:ROWS].tolist()
        start = [n_f / (n_f + n_r) * (f - r) for f, r in zip(forget, retain)]
        step = woodbury(start, (mean_gradient(case.subject, [kept[i]], names) for i in order))
        about = {"rows": len(order)}
    else:
        solution, about = solve(case, kept, names, forget, damping, iterations, batch_size)
        step = [n_f / n_r * x for x in solution]
    entries = {name: {"difference": (scale * s).cpu()} for name, s in zip(names, step) if bool(s.any())}
    passes = about.get("iterations", 1)
    tokens = sum(len(row.ids) - 1 for row in forgotten) + passes * sum(len(row.ids) - 1 for row in kept)
    case.summary["influence"] = {"solver": solver, **about, "norm": float(_dot(step, step) ** 0.5), "tokens": tokens}
    return Delta(case.subject.fingerprint, entries, {"method": "influence", "solver": solver, "scale": scale})


def solve(
    case: EditCase,
    rows: list[Encoded],
    names: list[str],
    right: Vector,
    damping: float,
    iterations: int,
    batch_size: int,
) -> tuple[Vector, dict[str, Any]]:
    """x with (H + damping I) x = right by conjugate gradients, and how it went; warns of negative curvature."""
    x = [torch.zeros_like(b) for b in right]
    residual = [b.clone() for b in right]
    direction = [b.clone() for b in right]
    start = now = _dot(residual, residual)
    done = 0
    while done < iterations and now > RESIDUAL**2 * start:
        product = hessian_product(case.subject, rows, names, direction, batch_size=batch_size)
        curvature = _dot(direction, product)
        done += 1
        # Of H itself: where it is negative but damping just outweighs it, the step along it has no bound.
        if curvature <= 0:
            case.warnings.append(
                f"influence: negative curvature in direction {done} of the solver; its solution so far is used. The "
                "model is at no minimum of the retain rows' loss"
            )
            break
        product = [h + damping * p for h, p in zip(product, direction)]
        curvature += damping * _dot(direction, direction)
        length = now / curvature
        for values, along in ((x, direction), (residual, [-h for h in product])):
            for value, a in zip(values, along):
                value.add_(a, alpha=length)
        before, now = now, _dot(residual, residual)
        direction = [r + now / before * p for r, p in zip(residual, direction)]
    return x, {"iterations": done, "relative_residual": (now / start) ** 0.5 if start else 0.0}


def woodbury(v: Vector, gradients: Iterable[Vector]) -> Vector:
    """The published recursion over gradients of single rows: k <- k - (k.g)/(N + o.g) o, o <- o - (o.g)/(N + o.g) o,
    with k = v and o the first gradient at the start, N = 1000 however many rows there are."""
    k: Vector = [part.clone() for part in v]
    o: Vector | None = None
    for g in gradients:
        if o is None:
            o = g
            continue
        overlap = _dot(o, g)
        weight = _dot(k, g) / (ROWS + overlap)
        k = [a - weight * b for a, b in zip(k, o)]
        o = [(1 - overlap / (ROWS + overlap)) * b for b in o]
    return k


def _dot(first: list[Tensor], second: list[Tensor]) -> float:
    return float(sum((a.double() * b.double()).sum() for a, b in zip(first, second)))
