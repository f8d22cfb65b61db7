"""Influence approximation unlearning: a row is removed by learning its opposite, at the cost of one gradient.

Influence functions say what dropping forget rows from a mean of n would do to trained weights:

    theta_without - theta  ~  (1/n) H^-1 sum over forget rows of grad l

Learning rows whose gradient is the opposite, -grad l, in a step of rate eta gives theta + eta sum of grad l: the same
direction, with H^-1 replaced by a multiple of the identity. Retain rows correct the step:

    g = c grad L_retain - grad L_forget,   theta' = theta - eta g

The published code hands g to the first step of Adam, which is theta - eta g / (|g| + 1e-8): every weight moves by eta,
and the sizes of gradients, the share of forget rows and c matter through signs alone (`rule: sign`).
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...deltas import Delta
from ...registry import edit
from ...subjects.packed import Encoded
from ..optimise.curvature import Vector, mean_gradient
from .case import Edit, EditCase

RATE = {"sign": 1e-3, "gradient": 0.1}
EPSILON = 1e-8
"""Adam's."""


@edit(
    paper="arXiv:2507.23257",
    modality=("image", "language"),
    intention="removal",
    requires=("weights", "gradients", "forget_data", "retain_data"),
    cost="6N per token of forget rows, and once per token of all rows where correction is above 0",
    known_weaknesses=("relearn", "direct"),
)
def iau(
    case: EditCase,
    *,
    rule: Literal["sign", "gradient"] = "sign",
    correction: Annotated[float, Field(ge=0)] = 1.0,
    learning_rate: Annotated[float, Field(gt=0)] | None = None,
    steps: Annotated[int, Field(ge=1)] = 1,
    min_magnitude: Annotated[float, Field(ge=0)] = 0.0,
    batch_size: Annotated[int, Field(ge=1)] = 64,
) -> Edit:
    """Step once up the loss of forget rows and down that of retain rows (IAU 2025).

    `sign` moves every weight with a gradient by the full rate, noise included; `min_magnitude` holds those whose |g| is
    no larger. `learning_rate` None is 1e-3 for sign, 0.1 for gradient. Each of several steps takes g anew, without
    momentum. The gradient of all training rows is worked out once for all requests that share `case.memory`: a further
    request costs only its forget rows. For gradients that stay small on odd rows see `retrain` with `restriction`.
    """
    forgotten = case.encoded("forget", "iau")
    kept = case.encoded("retain", "iau", "the rows the model keeps, or correction = 0") if correction else []
    names = [name for name, _ in case.tensors("iau").parameters]
    rate = RATE[rule] if learning_rate is None else learning_rate
    moved = [torch.zeros(case.subject.model.get_parameter(name).shape) for name in names]
    current, shares = case.subject, []
    for step in range(steps):
        forget = mean_gradient(current, forgotten, names, batch_size=batch_size)
        retain = _retain(case, current, forgotten, kept, forget, names, batch_size)
        changes = [_change(correction * r - f, rule, rate, min_magnitude) for r, f in zip(retain, forget)]
        shares.append(sum(int(c.count_nonzero()) for c in changes) / sum(c.numel() for c in changes))
        for total, change in zip(moved, changes):
            total += change.cpu()
        entries = {name: {"difference": total.clone()} for name, total in zip(names, moved) if bool(total.any())}
        delta = Delta(case.subject.fingerprint, entries, {"method": "iau", "rule": rule, "learning_rate": rate})
        if step + 1 < steps:
            current = delta.apply(case.subject)
    case.summary["iau"] = {
        "rule": rule,
        "learning_rate": rate,
        "moved": shares,
        "forget_gradient": float(torch.stack([f.norm() for f in forget]).norm()),
        "tokens": steps * sum(len(row.ids) - 1 for row in (*forgotten, *kept)),
    }
    return delta


def _change(g: Tensor, rule: str, rate: float, min_magnitude: float) -> Tensor:
    """What is added to a weight tensor; g points to where it must not go."""
    step = rate * g if rule == "gradient" else rate * g / (g.abs() + EPSILON)
    return -torch.where(g.abs() > min_magnitude, step, 0.0)


def _retain(
    case: EditCase,
    subject: object,
    forgotten: list[Encoded],
    kept: list[Encoded],
    forget: Vector,
    names: list[str],
    batch_size: int,
) -> Vector:
    """grad L_retain = (n grad L_all - n_f grad L_forget) / n_r: grad L_all is the same for every request on a model."""
    if not kept:
        return [torch.zeros_like(f) for f in forget]
    # In an order of their own, so that the sum is the same to the bit however requests cut the rows.
    every = sorted([*forgotten, *kept], key=lambda row: (row.ids, row.start))
    content = hashlib.sha256(repr([(row.ids, row.start) for row in every]).encode()).hexdigest()
    key = ("gradient", subject.fingerprint, tuple(names), content, batch_size)  # type: ignore[attr-defined]
    if key not in case.memory:
        case.memory[key] = mean_gradient(subject, every, names, batch_size=batch_size)  # type: ignore[index]
    n_f, n_r = (sum(row.scored for row in rows) for rows in (forgotten, kept))
    return [((n_f + n_r) * a - n_f * f) / n_r for a, f in zip(case.memory[key], forget)]  # type: ignore[index]
