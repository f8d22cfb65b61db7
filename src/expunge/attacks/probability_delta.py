"""Tokens whose probability moves most between layers, as guesses."""

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
def probability_delta(case: Case, *, budget: Budget = 20, k: int = 2, layers: tuple[int, ...] = ()) -> Attack:
    """Guess the k tokens that become most likelier, and the k that become most unlikelier, from one layer to the next.

    The second catches answers that are suppressed late. Of consecutive chosen layers budget / 2k pairs are compared;
    pairs between which nothing changes give no guess. Otherwise as `head_projection`.
    """
    k = max(1, min(k, budget // 2))
    count = budget // (2 * k) + 1

    def guess(scores: Tensor) -> list[list[int]]:
        change = scores.exp().diff(dim=0)
        change = change[change.abs().amax(-1) > 0]
        up, down = best(change, k), best(-change, k)
        return [sorted({*up[:, :j].flatten().tolist(), *down[:, :j].flatten().tolist()}) for j in range(1, k + 1)]

    return (yield from guesses(case, layers[:count], count, k, guess, lambda count, j: 2 * j * (count - 1)))
