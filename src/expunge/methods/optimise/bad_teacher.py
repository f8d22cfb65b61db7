"""Bad teaching: forget rows are answered as a network answers that learned nothing."""

from dataclasses import replace

from torch import Tensor

from ...registry import optimise
from ...subjects.fresh import fresh
from .loop import references
from .terms import RetainTerm, Step, divergence
from .unlearn import Preparation


def _prepare(case: Preparation) -> None:
    if case.dry:
        return
    bad = fresh(case.subject, case.seed)
    states = references(bad, case.rows["forget"], hidden=True)
    case.constants["forget"] = [{"bad_hidden": state["reference_hidden"]} for state in states]
    case.given["bad_head"] = bad.head


@optimise(
    paper="arXiv:2205.08096",
    modality=("image", "language"),
    intention="suppression",
    needs=("forget",),
    requires=("weights", "gradients", "forget_data", "retain_data", "reference_model"),
    cost="6N per token of forget and retain rows, plus 2N once per distinct one",
    known_weaknesses=("relearn",),
    prepare=_prepare,
)
def bad_teacher(step: Step, *, retain: RetainTerm = "kl", retain_weight: float = 1.0) -> Tensor:
    """KL(untrained network || model) on forget rows, KL(start model || model) on retain rows (Chundawat et al. 2023).

    Neither teacher moves, so what both say is computed once. Means are over rows; the authors' code divides by the
    number of classes as well, which makes its learning rates smaller by that factor.
    """
    bad = {"reference_hidden": step.forget.constants["bad_hidden"]}
    forget = divergence(replace(step.forget, frozen_head=step.given["bad_head"], constants=bad))
    return forget + retain_weight * step.retain_term(retain)
