"""SISA (arXiv:1912.03817): shards learn slice by slice with a checkpoint after each, so that retraining starts late."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ...registry import exact
from .ensemble import Ensemble, ExactCase, fit


@exact(
    paper="arXiv:1912.03817",
    modality=("image", "language"),
    requires=("weights", "gradients", "training_checkpoints"),
    keeps=("a checkpoint after every slice",),
    cost="training: (slices + 1) / 2 passes over all rows per epoch; a deletion: 2/3 + 1/(3 slices) of a shard's",
    known_weaknesses=("not studied",),
    sequential="exact",
)
def sisa(
    case: ExactCase,
    *,
    shards: Annotated[int, Field(ge=1)] = 5,
    slices: Annotated[int, Field(ge=1)] = 6,
    weights: Literal["adapters", "all"] = "adapters",
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
    """Sharded, isolated, sliced and aggregated training: a shard learns slice 0, then slices 0 and 1, and so on; a
    deletion goes back to the checkpoint before the row's slice, from where the shard is retrained without it.

    Until it is retrained the shard answers from that checkpoint. `weights` says what moves: adapters in all blocks, as
    S3T's paper has it, or every weight, as SISA's. The other parameters are those of `s3t`.
    """
    settings = {name: value for name, value in locals().items() if name != "case"}
    many = [[tuple(range(slices))] for _ in range(shards)]
    return fit(case, "sisa", settings, many, layer_wise=False, adapters=weights == "adapters")
