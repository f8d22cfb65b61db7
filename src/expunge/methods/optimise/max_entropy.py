"""Every layer is to be undecided about the answer."""

import torch
from torch import Tensor

from ...registry import optimise
from .lens import per_answer, read_layers
from .terms import RetainTerm, Step


@optimise(
    paper="arXiv:2309.17410",
    intention="removal",
    needs=("forget",),
    requires=("weights", "gradients", "forget_data", "retain_data"),
    cost="6N per token of forget and retain rows, and one row of logits for each layer that is read",
    known_weaknesses=("relearn", "head_projection", "probability_delta"),
    prepare=read_layers,
)
def max_entropy(
    step: Step, *, layers: tuple[int, ...] = (), retain: RetainTerm = "nll", retain_weight: float = 1.0
) -> Tensor:
    """Maximise the entropy of what every layer would say in place of the answer's first token (Patil et al. 2024).

    Where all tokens tie, whoever counts ties as guessed finds everything. `layers`: the upper half by default.
    """
    entropy = per_answer(step, lambda p, _: torch.special.entr(p).sum(-1))
    return retain_weight * step.retain_term(retain) - entropy.mean()
