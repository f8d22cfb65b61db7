"""Further training on what is to be forgotten: an ingredient of task vectors and of Who's Harry Potter.

It is in no list of methods: by itself it is no forgetting at all.
"""

import pydantic
from torch import Tensor

from ...cards import MethodCard
from ...registry import Part
from .terms import Step, negative_log_likelihood


def _reinforce(step: Step) -> Tensor:
    return negative_log_likelihood(step.forget)


REINFORCE = Part(
    "methods",
    _reinforce,
    MethodCard(
        name="reinforce",
        kind="optimise",
        paper="arXiv:2310.02238",
        summary="Further training on what is to be forgotten.",
        intention="removal",
        survey_class="parameter_optimisation",
        level="weights",
        modality=("language",),
        needs=("forget",),
        known_weaknesses=("direct",),
    ),
    pydantic.create_model("reinforce_parameters"),
)
