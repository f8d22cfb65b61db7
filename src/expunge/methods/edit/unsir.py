"""UNSIR: a class is impaired with noise that maximises its error, and the others are repaired."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Annotated, Any

import torch
from pydantic import Field

from ...deltas import Delta
from ...errors import RequestError
from ...registry import edit
from ...subjects.image import EncodedPicture
from ..optimise.importance import cross_entropy, flowing
from ..optimise.loop import fit
from .case import Edit, EditCase

PENALTY = 0.1
"""Weight of the noise's squared size, per picture."""


@edit(
    paper="arXiv:2111.08947",
    modality="image",
    intention="removal",
    requires=("weights", "gradients", "forget_data", "retain_data"),
    cost="25 passes over 32 pictures of noise, then two epochs over a sample of retain rows",
    known_weaknesses=("relearn",),
)
def unsir(
    case: EditCase,
    *,
    pictures: Annotated[int, Field(ge=1)] = 32,
    noise_steps: Annotated[int, Field(ge=1)] = 25,
    noise_rate: Annotated[float, Field(gt=0)] = 0.1,
    copies: Annotated[int, Field(ge=1)] = 80,
    per_class: Annotated[int, Field(ge=1)] = 500,
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4,
) -> Edit:
    """Learn noise on which the model errs about the class, train on it as the class, then repair (Tarun et al. 2023).

    Noise: `pictures` of N(0, 1), `noise_steps` of Adam on -CE + 0.1 |z|^2, the model held. Impair: `copies` of it and
    up to `per_class` rows of every other class, one epoch in batches of 32. Repair: one epoch on the same rows in
    batches of 128. The forget rows only say which class it is: their pictures are not needed.
    """
    forget, retain = (case.data.get(name, []) for name in ("forget", "retain"))
    subject: Any = case.subject
    if subject.modality != "image":
        raise RequestError(f"unsir makes pictures; {subject.name} is a {subject.modality} model")
    labels = sorted({row.answer for row in forget})
    if len(labels) != 1 or any(row.answer == labels[0] for row in retain):
        raise RequestError(
            f"unsir needs a class request: forget rows all of one class, retain rows none; found {labels}"
        )
    if not retain:
        raise RequestError("request.data.retain: 0 rows, but unsir repairs on them")
    generator = torch.Generator().manual_seed(case.seed)
    example = subject.encode(forget[0])
    z = torch.randn(pictures, *example.pixels.shape, generator=generator)
    noise, losses = _noise(subject, z, example, noise_steps, noise_rate)
    by_class: dict[str, list[Any]] = defaultdict(list)
    for i in torch.randperm(len(retain), generator=generator).tolist():
        by_class[retain[i].answer].append(retain[i])
    kept = [subject.encode(row) for rows in by_class.values() for row in rows[:per_class]]
    made = subject.copy()
    for name, rows, size in (("impair", [*noise * copies, *kept], 32), ("repair", kept, 128)):
        report = fit(
            made,
            rows,
            steps=math.ceil(len(rows) / size),
            batch_size=size,
            learning_rate=learning_rate,
            seed=case.seed,
        )
        case.summary[name] = {"steps": len(report["losses"]), "tokens": report["tokens"]}
    case.summary["noise"] = {"class": labels[0], "first": losses[0], "last": losses[-1]}
    made.__dict__.pop("fingerprint", None)
    return Delta.from_models(case.subject, made)


def _noise(
    subject: Any, z: torch.Tensor, example: EncodedPicture, steps: int, rate: float
) -> tuple[list[EncodedPicture], list[float]]:
    """(pictures that count as the example's class, losses); the model is not touched."""
    z = z.clone().requires_grad_(True)
    optimiser, losses = torch.optim.Adam([z], lr=rate), []

    def rows() -> list[EncodedPicture]:
        # Numbers of their own: the same picture would be run once.
        return [EncodedPicture((-1 - i, *example.ids[1:]), 1, 0, example.text, one) for i, one in enumerate(z)]

    with flowing(subject.model, []):
        for _ in range(steps):
            loss = PENALTY * z.square().flatten(1).sum(1).mean() - cross_entropy(subject, rows())
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            losses.append(float(loss.detach()))
    z = z.detach()
    return rows(), losses
