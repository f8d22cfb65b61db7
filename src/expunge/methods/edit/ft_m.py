"""FT-M: fine-tuning of one matrix with ordinary cross-entropy on the new target's tokens (arXiv:2401.01286)."""

from __future__ import annotations

from torch import Tensor

from ...registry import edit
from ...subjects.language import LanguageModel
from ...subjects.packed import Pack
from .case import Edit, EditCase
from .traced import Layer
from .tuning import tuned


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
    return tuned(case, _loss, layer=layer, steps=steps, learning_rate=learning_rate, norm=norm)


def _loss(model: LanguageModel, pack_: Pack, states: Tensor) -> Tensor:
    logprob = model.head(states).float().log_softmax(-1).gather(1, pack_.target[:, None])[:, 0]
    rows = len(pack_.rows)
    length = logprob.new_zeros(rows).index_add(0, pack_.row, logprob.new_ones(len(logprob)))
    return -(logprob.new_zeros(rows).index_add(0, pack_.row, logprob) / length).mean()
