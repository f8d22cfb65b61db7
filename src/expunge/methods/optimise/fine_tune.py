"""Fine-tuning on what is to be kept, and reinforcement of what is to be forgotten."""

from torch import Tensor

from ...registry import optimise
from .terms import Step, negative_log_likelihood


@optimise(
    paper="arXiv:2401.06121",
    modality=("image", "language"),
    intention="removal",
    needs=("retain",),
    requires=("weights", "gradients", "retain_data"),
    cost="6N per token of retain rows",
    known_weaknesses=("direct", "relearn"),
)
def fine_tune(step: Step) -> Tensor:
    """Train on retain rows only and hope that the rest fades: the weakest baseline of every comparison.

    Goodfellow et al. 2013 call the effect catastrophic forgetting; on rows like the forgotten ones it is small.
    In tables of image classifiers "fine-tune"; with only the last k blocks in its scope (`layers:-2- + role:head`) CF-k
    (arXiv:2201.06640).
    """
    return negative_log_likelihood(step.retain)
