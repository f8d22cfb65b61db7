"""Asking the request's own questions."""

from ..registry import attack
from .case import Attack, Case, Found, judged


@attack(group="direct", access="text", modality=("image", "language"), paper="arXiv:2401.06121")
def direct(case: Case) -> Attack:
    """Ask every forget question as it stands in the request, greedily."""
    outputs = yield case.questions(case.forget)
    return Found(judged(case.forget, outputs), {"queries": len(case.forget), "samples": 1})
