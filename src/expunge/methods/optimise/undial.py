"""Self-distillation from adjusted logits."""

from torch import Tensor

from ...registry import optimise
from .terms import RetainTerm, Step, towards
from .unlearn import Preparation


def _prepare(case: Preparation) -> None:
    """The published adapters, unless the user names a scope."""
    if case.scope is None:
        case.scope = "lora(r=8, alpha=16)"


@optimise(
    paper="arXiv:2402.10052",
    intention="removal",
    needs=("forget.reference_hidden",),
    requires=("weights", "gradients", "forget_data", "reference_model"),
    cost="6N per token of forget rows, plus 2N once per distinct one and the frozen head once per answer token",
    known_weaknesses=("direct", "relearn", "decoding"),
    prepare=_prepare,
)
def undial(step: Step, *, strength: float = 10.0, retain: RetainTerm = "none", retain_weight: float = 1.0) -> Tensor:
    """Learn the start model's predictions with the forgotten token's logit lowered by `strength` (Dong et al. 2024).

    The target is fixed, so training cannot run away and needs no retain rows. A strength below the margin by which the
    token leads leaves it first in the target itself; the published ones are 3, 10 and 30.
    """
    side = step.forget

    def lowered(_: Tensor, at: Tensor) -> Tensor:
        z = side.frozen_head(side.reference_hidden[at]).float()
        target = side.target[at, None]
        return z.scatter(1, target, z.gather(1, target) - strength).softmax(-1)

    return towards(side, lowered).mean() + retain_weight * step.retain_term(retain)
