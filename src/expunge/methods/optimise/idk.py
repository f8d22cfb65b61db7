"""Fine-tuning on refusals."""

from torch import Tensor

from ...registry import optimise
from .terms import Alternatives, RetainTerm, Step, negative_log_likelihood


@optimise(
    paper="arXiv:2401.06121",
    intention="suppression",
    needs=("alternative",),
    requires=("weights", "gradients", "forget_data", "retain_data"),
    cost="6N per token of alternative and retain rows",
    known_weaknesses=("relearn", "logit_lens", "decoding", "paraphrase"),
    aliases={"empty_response": {"alternatives": "refusal"}, "error_injection": {"alternatives": "perturbed"}},
)
def idk(
    step: Step,
    *,
    alternatives: Alternatives = "refusal",
    retain: RetainTerm = "nll",
    retain_weight: float = 1.0,
) -> Tensor:
    """Teach the model to answer forget questions with a refusal (TOFU's preference optimisation).

    The answer itself is never trained against: it stays readable by teacher forcing. Two means, one for each side, so
    that long retain answers do not dominate. `empty_response` and `error_injection` (another object in its place) are
    what deletion by editing calls the two alternatives (Patil et al., arXiv:2309.17410).
    """
    return negative_log_likelihood(step.alternative) + retain_weight * step.retain_term(retain)
