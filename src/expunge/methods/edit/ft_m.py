"""FT-M: fine-tuning of one matrix with ordinary cross-entropy on the new target's tokens (arXiv:2401.01286)."""

from __future__ import annotations

from ...registry import edit
from .case import Edit, EditCase
from .traced import Layer
from .tuning import target_loss, tuned


@edit(
    paper="arXiv:2401.01286",
    intention="removal",
    requires=("weights", "gradients", "forget_data"),
    cost="25 times forward and backward of prompt and target in the blocks from the layer on",
    known_weaknesses=("relearn",),
)
def ft_m(
    case: EditCase,
    *,
    layer: Layer = 0.66,
    steps: int = 25,
    learning_rate: float = 5e-4,
    norm: float = 0.0,
) -> Edit:
    """Fine-tune one MLP output matrix on the new targets, each token predicted from those before it.

    `norm`: the furthest a weight may move, 0 for no bound. Facts of a batch weigh alike, whatever their length.
    """
    return tuned(case, target_loss, layer=layer, steps=steps, learning_rate=learning_rate, norm=norm)
