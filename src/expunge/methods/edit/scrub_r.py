"""SCRUB+R: SCRUB, rewound to the epoch at which forgotten rows are answered as badly as rows that were never seen."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from ... import registry
from ...deltas import Delta
from ...errors import RequestError
from ...registry import edit
from ..optimise.unlearn import unlearn
from .case import Edit, EditCase, knows


@edit(
    paper="arXiv:2302.09880",
    modality=("image", "language"),
    intention="removal",
    requires=("weights", "gradients", "forget_data", "retain_data", "reference_model"),
    cost="scrub's, 2N per token of forget rows after every epoch, and one copy of the scope for each epoch",
    known_weaknesses=("relearn",),
)
def scrub_r(
    case: EditCase,
    *,
    alpha: Annotated[float, Field(ge=0)] = 0.5,
    gamma: Annotated[float, Field(ge=0)] = 1.0,
    temperature: Annotated[float, Field(gt=0)] = 4.0,
    ascent_epochs: Annotated[int, Field(ge=0)] = 3,
    ascent: Literal["kl", "ce+kl"] = "kl",
) -> Edit:
    """Run `scrub`, keep the weights of every epoch, and return those whose error on forget rows is nearest to the final
    model's error on holdout rows (Kurmanji et al. 2023).

    Holdout rows must be like the forget rows, of the same classes, and never trained on: their error is what a model
    that never saw the forget rows would make on these. Of two epochs as near the later one is taken. Scopes are those
    of whole tensors.
    """
    if not case.data.get("holdout"):
        raise RequestError(
            "request.data.holdout: 0 rows, but scrub_r rewinds to their error: give rows like the forget rows that the "
            "model was never trained on"
        )
    names = [name for name, _ in case.tensors("scrub_r").parameters]
    forget, holdout = case.data["forget"], case.data["holdout"]
    per_epoch = max(1, math.ceil(len(forget) / case.training.batch_size))
    total = case.training.steps
    total = math.ceil(case.training.epochs * per_epoch) if total is None else total
    ends = sorted({*range(per_epoch, total + 1, per_epoch), total})
    kept: list[dict[str, torch.Tensor]] = []
    errors: list[float] = []

    def look(working: Any, step: int) -> None:
        kept.append({name: working.model.get_parameter(name).detach().float().cpu().clone() for name in names})
        errors.append(1 - knows(working, forget).accuracy)

    outcome = unlearn(
        case.subject,
        registry.get("methods", "scrub"),
        {"alpha": alpha, "gamma": gamma, "temperature": temperature, "ascent_epochs": ascent_epochs, "ascent": ascent},
        scope=case.scope,
        data=case.data,
        # Rewinding takes the place of the guard and of a stopping rule: it has a rule of its own for both.
        training=replace(case.training, guard=None, stop=None),
        evaluate_at=ends,
        evaluate=look,
        progress=None if case.progress is None else lambda done, total: case.progress("scrub_r", done, total),  # type: ignore[misc]
    )
    wanted = 1 - knows(outcome.subject, holdout).accuracy
    chosen = min(range(len(errors)), key=lambda i: (abs(errors[i] - wanted), -i))
    case.warnings += outcome.summary["warnings"]
    case.summary["scrub_r"] = {
        "steps": ends,
        "errors": errors,
        "holdout_error": wanted,
        "chosen_step": ends[chosen],
        "tokens": outcome.summary["tokens"],
    }
    entries = {}
    for name in names:
        change = kept[chosen][name] - case.subject.model.get_parameter(name).detach().float().cpu()
        if bool(change.any()):
            entries[name] = {"difference": change}
    return Delta(case.subject.fingerprint, entries, {"method": "scrub_r", "step": ends[chosen]})
