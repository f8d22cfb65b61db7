"""UNDO: unlearn, noise, distil. A damaged copy of the unlearned model learns its outputs again, not what it hides."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Literal

import torch
from torch import Tensor

from ...deltas import Delta
from ...errors import RequestError
from ...registry import edit
from ...subjects.language import LanguageModel
from ...tables.store import content_key
from ..optimise.loop import Recipe, draw, references, train
from ..optimise.scope import resolve
from ..optimise.terms import Objective, Step, divergence
from .case import Edit, EditCase


@edit(
    paper="arXiv:2506.06278",
    intention="removal",
    requires=("weights", "gradients", "forget_data", "retain_data"),
    cost="the objective's, 2N per token of the rows distilled on, then 6N per token and epoch",
    known_weaknesses=("relearn",),
)
def undo(
    case: EditCase,
    *,
    objective: Objective = "npo",
    alpha: float = 0.25,
    beta: float = 0.1,
    rows: Literal["all", "retain"] = "all",
    epochs: float = 10.0,
    learning_rate: float = 2e-5,
) -> Edit:
    """Unlearn, shrink and noise the weights, distil the unlearned model into what is left (Lee et al. 2025).

    theta <- (1 - alpha) theta + alpha beta N with Xavier noise N, then KL(unlearned || student) on every token of the
    rows (`all`: forget and retain). alpha and the rate are those of the authors' WMDP runs, where the rows were like
    the pretraining corpus: what the rows do not show fades with alpha.
    """
    if not (0 <= alpha <= 1 and 0 <= beta <= 1):
        raise RequestError(f"undo: alpha is {alpha} and beta {beta}, expected both within 0-1")
    scope = resolve("all" if case.scope is None else case.scope, case.subject.model)
    if scope.lora is not None:
        raise RequestError("undo: noise has full rank; expected a scope of tensors, found adapters")
    names = [name for name, _ in scope.parameters]
    if not names:
        raise RequestError(f"undo: scope {scope.form!r} holds no whole tensor, expected at least 1")
    teacher = case.unlearn(objective, phase="unlearn").delta.apply(case.subject)
    student = noised(teacher, names, alpha, beta, case.seed)
    summary = _distil(case, teacher, student, names, rows, epochs, learning_rate)
    if alpha:
        case.warnings.append(
            f"undo: what the {summary.get('rows', 0)} rows that it distilled on do not show fades with "
            f"alpha = {alpha:g}; rows of a request are no corpus: measure general ability too (request.data.general)"
        )
    case.summary["undo"] = {"alpha": alpha, "beta": beta, **summary}
    return Delta.from_models(case.subject, student)


def noised(subject: LanguageModel, names: list[str], alpha: float, beta: float, seed: int) -> LanguageModel:
    """A copy with matrices drawn towards noise and vectors towards 0; stacked matrices (experts) one by one."""
    made = subject.copy()
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(made.model.named_parameters())
    with torch.no_grad():
        for name in names if alpha else []:
            p = parameters[name]
            p.mul_(1 - alpha)
            if p.dim() > 1:
                bound = (6 / (p.shape[-1] + p.shape[-2])) ** 0.5
                p.add_((torch.rand(p.shape, generator=generator) * 2 - 1).to(p) * (bound * beta * alpha))
    return made


def _distil(
    case: EditCase,
    teacher: LanguageModel,
    student: LanguageModel,
    names: list[str],
    rows: str,
    epochs: float,
    learning_rate: float,
) -> dict[str, float]:
    """Train the student in place on the teacher's next-token distributions."""
    chosen = [
        row for side in (("forget", "retain") if rows == "all" else ("retain",)) for row in case.data.get(side, [])
    ]
    if not chosen:
        raise RequestError(f"undo(rows={rows!r}): 0 rows to distil on, expected at least 1")
    training = replace(case.training, epochs=epochs, steps=None, learning_rate=learning_rate, guard=None)
    # Prompts too: what a corpus has most of is not answers.
    encoded = [replace(teacher.encode(row), start=1) for row in chosen]
    drawn = draw({"rows": encoded}, ["rows"], training=training, generator=torch.Generator().manual_seed(case.seed))
    drawn.constants["rows"] = references(teacher, encoded, hidden=True)
    tell = case.progress
    student.model.requires_grad_(False)
    parameters = [p.requires_grad_(True) for name, p in student.model.named_parameters() if name in set(names)]

    def loss(step: Step) -> Tensor:
        return divergence(step.sides["rows"])

    log = train(
        student,
        parameters,
        drawn,
        Recipe(loss, ("rows",)),
        training,
        frozen_head=teacher.head,
        checkpoint=None if case.folder is None else case.folder / "distil",
        key=content_key(
            student.fingerprint, asdict(replace(training, checkpoint_seconds=0.0)), [r.ids for r in encoded]
        ),
        progress=None if tell is None else lambda done, total: tell("distil", done, total),
    )
    student.model.requires_grad_(False)
    student.__dict__.pop("fingerprint", None)
    return (
        {"rows": len(encoded), "steps": len(log.loss), "first": log.loss[0], "last": log.loss[-1]} if log.loss else {}
    )
