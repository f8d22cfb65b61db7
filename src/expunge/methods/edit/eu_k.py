"""EU-k: the last blocks are built anew and trained on what is kept; what stands below them stays."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ...deltas import Delta
from ...registry import edit
from ...subjects.anatomy import top
from ...subjects.fresh import fresh
from ..optimise.teach import teach
from .case import Edit, EditCase


@edit(
    paper="arXiv:2201.06640",
    modality=("image", "language"),
    intention="removal",
    requires=("weights", "gradients", "retain_data"),
    cost="forward 2N, backward 4N of the last blocks, per token of retain rows and epoch",
    known_weaknesses=("relearn",),
)
def eu_k(
    case: EditCase,
    *,
    blocks: Annotated[int, Field(ge=1)] = 1,
    epochs: Annotated[float, Field(gt=0)] = 8.0,
    batch_size: Annotated[int, Field(ge=1)] = 64,
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3,
) -> Edit:
    """Retrain the last `blocks` blocks and what stands above them from new weights (Goel et al. 2022, EU-k).

    Weights and running statistics below them stay bit for bit: what the lower blocks learnt of the forget rows is not
    removed, which is why this is no exact method. `cf_k` trains the same blocks from where they are, `retrain` all.
    """
    rows = case.encoded("retain", "eu_k", "all rows that the model is to know")
    modules = top(case.subject.model, blocks)
    made = case.subject.copy()
    anew = fresh(case.subject, case.seed).model
    for name in modules:
        made.model.get_submodule(name).load_state_dict(anew.get_submodule(name).state_dict())
    report = teach(
        made,
        rows,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=case.seed,
        modules=modules,
        progress=None if case.progress is None else lambda done, total: case.progress("eu_k", done, total),  # type: ignore[misc]
    )
    case.summary["eu_k"] = {"modules": modules, "steps": len(report["losses"]), "tokens": report["tokens"]}
    delta = Delta.from_models(case.subject, made)
    delta.lineage.update(method="eu_k", blocks=blocks, seed=case.seed)
    return delta
