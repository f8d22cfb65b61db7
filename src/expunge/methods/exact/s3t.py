"""S3T (arXiv:2406.16257): shards learn slice by slice and block by block, so that forgetting is leaving stages out."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ...registry import exact
from .ensemble import Ensemble, ExactCase, fit
from .orders import Family, orders


@exact(
    paper="arXiv:2406.16257",
    modality=("image", "language"),
    requires=("weights", "gradients", "training_checkpoints"),
    keeps=("a stage of adapters for every beginning of every order",),
    cost="training: budget x (slices + 1) / 2 passes over all rows per epoch; a deletion: none",
    known_weaknesses=("not studied",),
    sequential="exact",
)
def s3t(
    case: ExactCase,
    *,
    shards: Annotated[int, Field(ge=1)] = 5,
    slices: Annotated[int, Field(ge=1)] = 6,
    budget: Annotated[int, Field(ge=0)] = 0,
    order: Family = "cyclic",
    probabilities: tuple[float, ...] = (),
    requests: Annotated[int, Field(ge=0)] = 0,
    shuffle: bool = True,
    min_shards: Annotated[int, Field(ge=1)] = 1,
    rank: Annotated[int, Field(ge=1)] = 16,
    alpha: Annotated[float, Field(gt=0)] = 16.0,
    rslora: bool = True,
    modules: str = "all",
    epochs: Annotated[float, Field(gt=0)] = 15.0,
    batch_size: Annotated[int, Field(ge=1)] = 64,
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4,
    weight_decay: Annotated[float, Field(ge=0)] = 0.0,
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0,
    classes: tuple[str, ...] = (),
    seed: Annotated[int, Field(ge=0)] = 0,
) -> Ensemble:
    """Sequence-aware sharded sliced training: stage i of an order teaches the i-th group of blocks from the top, and
    the head, on the first i slices; a deletion leaves out the stages that have seen the row, and another order answers.

    Every shard is trained in `budget` orders (0: as many as slices), `order` says which: rotations, `matching` for
    slices of known `probabilities` of being hit (`requests` ahead; 0: until all are), random ones, or all of them.
    Orders that begin alike share what they begin with. Adapters add alpha / sqrt(rank) B A (`rslora`), else alpha /
    rank. `epochs` are those of each stage: 2 e / (slices + 1) read as many rows as e epochs without slices. A
    classifier gets a new head for `classes`; LM heads stay as they are. No dropout.
    """
    settings = {name: value for name, value in locals().items() if name != "case"}
    many = [
        orders(
            order,
            slices,
            budget or slices,
            probabilities=probabilities,
            requests=requests or None,
            seed=seed + shard,
        )
        for shard in range(shards)
    ]
    return fit(case, "s3t", settings, many, layer_wise=True)
