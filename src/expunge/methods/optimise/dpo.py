"""Direct preference optimisation towards an alternative answer."""

from torch import Tensor

from ...registry import optimise
from .terms import Alternatives, RetainTerm, Step, preference


@optimise(
    paper="arXiv:2305.18290",
    intention="suppression",
    needs=("forget.reference", "alternative.reference"),
    requires=("weights", "gradients", "forget_data", "retain_data", "reference_model"),
    cost="6N per token of forget, alternative and retain rows, plus 2N once per distinct one",
    known_weaknesses=("relearn", "logit_lens", "decoding"),
)
def dpo(
    step: Step,
    *,
    beta: float = 0.1,
    alternatives: Alternatives = "refusal",
    retain: RetainTerm = "nll",
    retain_weight: float = 1.0,
) -> Tensor:
    """Prefer an alternative (a refusal: IDK-DPO) to the forgotten answer, relative to the start model.

    Rafailov et al. 2023, eq. 7, with the forgotten answer as the rejected one (TOFU, arXiv:2401.06121); scaled by
    2/beta as NPO is.
    """
    return preference(step, beta) + retain_weight * step.retain_term(retain)
