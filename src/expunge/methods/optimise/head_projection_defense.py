"""Against head projection: the answer is neither among a layer's likeliest tokens nor among its unlikeliest."""

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
    known_weaknesses=("relearn", "probability_delta", "input_rephrasing"),
    prepare=read_layers,
)
def head_projection_defense(
    step: Step,
    *,
    k: int = 5,
    layers: tuple[int, ...] = (),
    retain: RetainTerm = "nll",
    retain_weight: float = 1.0,
) -> Tensor:
    """Push the answer's first token out of the k likeliest and the k unlikeliest of every layer (Patil et al. 2024).

    Per layer and row: relu(p(y) - the k-th largest p) + relu(the k-th smallest p - p(y)), on probabilities read through
    the head. It is 0 where y ties with rank k, so k is one more than an attack may guess. `layers`: the upper half by
    default; judge on others too, or the defence has seen the attack.
    """
    return per_answer(step, lambda p, y: outside(p, y, k)).mean() + retain_weight * step.retain_term(retain)


def outside(p: Tensor, y: Tensor, k: int) -> Tensor:
    """(n,) how far p(y) lies above the k-th largest or below the k-th smallest of p (n, V)."""
    own = p.gather(1, y[:, None])[:, 0]
    high = p.topk(min(k, p.shape[1]), dim=1).values[:, -1]
    low = p.topk(min(k, p.shape[1]), dim=1, largest=False).values[:, -1]
    return (own - high).relu() + (low - own).relu()
