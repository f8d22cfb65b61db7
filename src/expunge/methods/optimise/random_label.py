"""Random labels: forget rows are trained on answers drawn at random."""

from dataclasses import replace

import torch
from torch import Tensor

from ...registry import optimise
from .terms import RetainTerm, Step, negative_log_likelihood
from .unlearn import Preparation

ROUNDS = 16
"""Labels drawn for each answer; an epoch uses the next one."""


def _prepare(case: Preparation) -> None:
    if case.dry:
        return
    generator = torch.Generator().manual_seed(case.seed)
    count, device = case.subject.vocabulary, case.subject.device
    case.constants["forget"] = []
    for row in case.rows["forget"]:
        true = torch.tensor(row.ids[row.start :])[:, None]
        if case.settings["include_true"]:
            drawn = torch.randint(count, (row.scored, ROUNDS), generator=generator)
        else:
            drawn = torch.randint(count - 1, (row.scored, ROUNDS), generator=generator)
            drawn += (drawn >= true).long()
        case.constants["forget"].append({"wrong": drawn.to(device)})


@optimise(
    paper="arXiv:1911.04933",
    modality=("image", "language"),
    intention="suppression",
    needs=("forget",),
    requires=("weights", "gradients", "forget_data", "retain_data"),
    cost="6N per token of forget and retain rows",
    known_weaknesses=("relearn",),
    prepare=_prepare,
    aliases={"amnesiac": {"redraw": False}},
)
def random_label(
    step: Step,
    *,
    redraw: bool = True,
    include_true: bool = False,
    retain: RetainTerm = "nll",
    retain_weight: float = 1.0,
) -> Tensor:
    """Train forget rows on random classes and retain rows on their own (Golatkar et al. 2020); of a language model on
    random tokens in the places of the answer's.

    A wrong class is drawn anew every epoch, uniformly among all others; `include_true` draws among all, as published
    code does. `amnesiac` draws once (arXiv:2010.10981, as it stands in later tables). Answers end up less likely than
    under a model that never saw the rows, which membership attacks see.
    """
    wrong = step.forget.constants["wrong"][:, step.epoch % ROUNDS if redraw else 0]
    return negative_log_likelihood(replace(step.forget, target=wrong)) + retain_weight * step.retain_term(retain)
