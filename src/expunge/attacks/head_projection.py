"""The k likeliest tokens after each of a few layers, as guesses."""

from torch import Tensor

from ..registry import attack
from .case import Attack, Case
from .layers import Budget, best, guesses


@attack(
    group="latent",
    access="hidden",
    paper="arXiv:2309.17410",
    caveat="Guesses the first token of the answer; frequent values are guessed in any model: subtract gold.",
)
def head_projection(case: Case, *, budget: Budget = 20, k: int = 4, layers: tuple[int, ...] = ()) -> Attack:
    """Read the residual stream through the head after some layers and guess the k likeliest tokens of each.

    A fact is found if its answer's first token is among at most `budget` distinct guesses (Patil et al. 2024). Without
    `layers`, budget / k of them are chosen: those that tell most of the retained answers. Small vocabularies need small
    budgets.
    """
    k = max(1, min(k, budget))

    def guess(scores: Tensor) -> list[list[int]]:
        order = best(scores, k)
        return [sorted(set(order[:, :j].flatten().tolist())) for j in range(1, k + 1)]

    return (yield from guesses(case, layers[: budget // k], budget // k, k, guess, lambda count, j: count * j))
