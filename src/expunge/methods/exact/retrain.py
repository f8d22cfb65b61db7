"""Retraining: the model that forgetting is measured against."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ...deltas import Delta
from ...errors import RequestError
from ...registry import exact
from ...subjects.fresh import fresh
from ..edit.case import Edit, EditCase
from ..optimise.teach import teach


@exact(
    paper="arXiv:1912.03817",
    modality=("image", "language"),
    requires=("weights", "gradients", "retain_data"),
    cost="6N per token of retain rows and epoch",
    known_weaknesses=("not studied",),
    sequential="exact",
)
def retrain(
    case: EditCase,
    *,
    epochs: Annotated[float, Field(gt=0)] = 8.0,
    batch_size: Annotated[int, Field(ge=1)] = 64,
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3,
    restriction: Annotated[float, Field(ge=0)] = 0.0,
) -> Edit:
    """New weights from the architecture's own initialiser, trained on retain rows alone: the gold of every comparison.

    It is exact where `retain` is all that the original was trained on but the forget rows, and these settings are the
    original's; what a pretrained start had seen before stays outside of the guarantee. The delta holds the whole model.
    `restriction` adds that much of the sum over tensors of |gradient|_2 to the loss (arXiv:2507.23257), so that a later
    `iau` finds no row with an outstanding gradient; training then costs two to three times as much.
    """
    retain = case.data.get("retain", [])
    if not retain:
        raise RequestError("request.data.retain: 0 rows, but retrain needs all rows that the model is to know")
    made = fresh(case.subject, case.seed)
    report = teach(
        made,
        [made.encode(row) for row in retain],
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=case.seed,
        restriction=restriction,
        progress=None if case.progress is None else lambda done, total: case.progress("retrain", done, total),  # type: ignore[misc]
    )
    case.summary["retrain"] = {"rows": len(retain), "steps": len(report["losses"]), "tokens": report["tokens"]}
    made.__dict__.pop("fingerprint", None)
    delta = Delta.from_models(case.subject, made)
    delta.lineage.update(method="retrain", seed=case.seed)
    return delta
