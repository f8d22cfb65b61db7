"""FT-L: fine-tuning of one matrix where every token of the target is predicted from the prompt's last token.

That is what the published code of ROME's baseline does (arXiv:2202.05262; arXiv:2401.01286 calls it FT-L). For targets
of one token it is `ft_m`; longer ones it does not teach in their order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...registry import edit
from ...subjects.language import LanguageModel
from ...subjects.packed import Pack
from .case import Edit, EditCase
from .traced import Layer
from .tuning import tuned


@edit(
    paper="arXiv:2012.00363",
    intention="removal",
    requires=("weights", "gradients", "forget_data"),
    cost="25 times forward and backward of prompt and target in the blocks from the layer on",
    known_weaknesses=("relearn",),
)
def ft_l(
    case: EditCase,
    *,
    layer: Layer = 0.66,
    steps: int = 25,
    learning_rate: float = 5e-4,
    norm: float = 0.0,
) -> Edit:
    """Fine-tune one MLP output matrix, all target tokens scored at the prompt's last position (Zhu et al. 2020).

    `norm`: the furthest a weight may move, 0 for no bound (published: 5e-4 for GPT2-XL, 5e-5 for GPT-J).
    """
    return tuned(case, _loss, layer=layer, steps=steps, learning_rate=learning_rate, norm=norm)


def _loss(model: LanguageModel, pack_: Pack, states: Tensor) -> Tensor:
    count = len(pack_.rows)
    lengths = torch.bincount(pack_.row, minlength=count)
    last = states[lengths.cumsum(0) - lengths]  # what predicts the first token of each target
    logprob = model.head(last).float().log_softmax(-1)[pack_.row, pack_.target]

    return -(logprob.new_zeros(count).index_add(0, pack_.row, logprob) / lengths).mean()
