"""Fine-tuning on what is to be kept, of the whole model or of its last blocks alone (CF-k)."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from ...registry import optimise
from ...subjects.anatomy import top
from .terms import Step
from .unlearn import Preparation


def _prepare(case: Preparation) -> None:
    blocks = case.settings["blocks"]
    if blocks is not None and case.scope is None:
        modules = "|".join(re.escape(name) for name in top(case.subject.model, blocks))
        case.scope = rf"regex:(?:{modules})\..*"


@optimise(
    paper="arXiv:2401.06121",
    modality=("image", "language"),
    intention="removal",
    needs=("retain",),
    requires=("weights", "gradients", "retain_data"),
    cost="6N per token of retain rows",
    known_weaknesses=("direct", "relearn"),
    prepare=_prepare,
    aliases={"cf_k": {"blocks": 1}},
)
def fine_tune(
    step: Step,
    *,
    retain: Literal["nll", "kl"] = "nll",
    retain_weight: float = 1.0,
    blocks: Annotated[int, Field(ge=1)] | None = None,
) -> Tensor:
    """Train on retain rows only and hope that the rest fades: the weakest baseline of every comparison.

    Goodfellow et al. 2013 call the effect catastrophic forgetting; on rows like the forgotten ones it is small.
    `cf_k` (arXiv:2201.06640) moves only the last `blocks` blocks and what stands above them, unless a scope says
    otherwise; `eu_k` gives these new weights first.
    """
    return retain_weight * step.retain_term(retain)  # type: ignore[return-value]
