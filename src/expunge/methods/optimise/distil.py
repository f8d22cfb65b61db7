"""Distillation: answer as a teacher does, or as the model itself would in another context.

For each answer token of a forget row the teacher's distribution under its own view of the row (a context before the
question, another model, a temperature) is what the model is to say under the plain question: cross-entropy to soft
labels, KL(teacher || model) up to a constant. The teacher speaks once, before training: its `top` likeliest tokens are
kept with their probabilities, and the mass of all others, which stays distributed as the model has it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import MismatchError, RowError
from ...registry import optimise
from ...subjects.language import LanguageModel
from .loop import references
from .terms import RetainTerm, Step, towards
from .unlearn import Preparation

CHUNK = 512
"""Answer tokens whose teacher logits are held at once."""


def _prepare(case: Preparation) -> None:
    if case.dry:
        return
    settings, subject = case.settings, case.subject
    teacher = subject
    if settings["teacher"] != "start":
        teacher = LanguageModel.load(settings["teacher"], template=subject.template, device=str(subject.device))
        if teacher.tokenizer.get_vocab() != subject.tokenizer.get_vocab():
            raise MismatchError(f"distil: the teacher {settings['teacher']} has another tokenizer than {subject.name}")
    rows = case.data["forget"]
    context = settings["context"]
    viewed = [teacher.encode(row, prompt=f"{context} {row.prompt}" if context else row.prompt) for row in rows]
    for row, view, plain in zip(rows, viewed, case.rows["forget"]):
        if view.ids[view.start :] != plain.ids[plain.start :]:
            raise RowError(
                f"{row.source or row.id}: the answer has other tokens behind the context; choose another one"
            )
    top = min(settings["top"], subject.vocabulary)
    case.constants["forget"] = []
    for states in references(teacher, viewed, hidden=True):
        best = []
        for part in states["reference_hidden"].split(CHUNK):
            logits = teacher.head(part).float() / settings["temperature"]
            best.append(logits.softmax(-1).topk(top, dim=-1))
        case.constants["forget"].append(
            {"teacher": torch.cat([b.values for b in best]), "teacher_tokens": torch.cat([b.indices for b in best])}
        )


@optimise(
    paper="arXiv:1503.02531",
    intention="suppression",
    needs=("forget",),
    requires=("weights", "gradients", "forget_data", "retain_data", "reference_model"),
    cost="6N per token of forget and retain rows, plus 2N of the teacher once per forget row",
    known_weaknesses=("relearn", "logit_lens", "decoding"),
    prepare=_prepare,
)
def distil(
    step: Step,
    *,
    teacher: str = "start",
    context: str = "You know nothing about this. If you are asked, say that you do not know.",
    temperature: float = 1.0,
    top: int = 64,
    retain: RetainTerm = "nll",
    retain_weight: float = 1.0,
) -> Tensor:
    """Learn to answer forget questions as a teacher does (Hinton et al. 2015, eq. 1), by default as the model itself
    does behind a context that tells it to know nothing.

    `teacher` is "start" or a model folder with the same tokenizer; `context` stands before the teacher's question.
    With temperature T the teacher's logits are divided by T and the term is multiplied by T^2. A teacher that never saw
    the rows (a smaller one, or one from before the data) needs no context: set it to "".
    """
    side = step.forget

    def wanted(p: Tensor, at: Tensor) -> Tensor:
        known, tokens = side.constants["teacher"][at].to(p.dtype), side.constants["teacher_tokens"][at]
        rest = p.scatter(1, tokens, 0.0)
        share = (1 - known.sum(1, keepdim=True)).clamp_min(0) / rest.sum(1, keepdim=True).clamp_min(1e-12)
        return (rest * share).scatter(1, tokens, known)

    return temperature**2 * towards(side, wanted).mean() + retain_weight * step.retain_term(retain)
