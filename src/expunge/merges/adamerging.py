"""AdaMerging: the coefficients of task arithmetic, learnt so that the merged model is sure of what it says."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ..deltas import Delta, aligned, moving
from ..methods.optimise.terms import chunked
from ..registry import merge
from ..subjects.packed import Encoded, pack
from .case import Entries, Merging
from .vectors import elected, trimmed


@merge(
    paper="arXiv:2310.02575",
    requires=("base", "rows"),
    cost="6N per token of the rows drawn; one fp32 copy of every delta, multiplied out",
)
def adamerging(
    case: Merging,
    *,
    by: Literal["task", "layer"] = "layer",
    start: float = 0.3,
    learning_rate: float = 1e-3,
    steps: int = 500,
    batch_size: int = 16,
    density: Annotated[float, Field(gt=0, le=1)] | None = None,
    seed: int = 0,
) -> Entries:
    """base + sum_k c_k delta_k with coefficients in 0 ... 1 that make predictions sure (Yang et al. 2024, eq. 4-5).

    One coefficient for each delta (`by` task) or for each delta and tensor (layer), by Adam on the entropy of rows
    whose classes nobody needs to know; a step takes `batch_size` rows of every row set. `density` makes it
    AdaMerging++: deltas are trimmed and signs elected first, as TIES does. A language model's entropy is that of the
    tokens it predicts along each row's answer. Statistics of batch norms move as the coefficients say and have no
    gradient.
    """
    subject = case.model("adamerging")
    if density is not None:
        case = Merging(_agreeing([trimmed(delta, density) for delta in case.deltas]), subject, case.rows, case.about)
    own = {name: tensor for name, tensor in moving(subject.model).items() if name in case.names}
    shapes = {name: tensor.shape for name, tensor in own.items()}
    vectors = {
        name: torch.stack([_dense(delta, name, shape) for delta in case.deltas]).to(subject.device)
        for name, shape in shapes.items()
    }
    merged = Delta(subject.fingerprint, {name: {"difference": torch.zeros(shape)} for name, shape in shapes.items()})
    working = merged.apply(subject)
    places = list(shapes) if by == "layer" else ["all"]
    coefficients = torch.full((len(places), len(case.deltas)), start, device=subject.device, requires_grad=True)
    optimiser = torch.optim.Adam([coefficients], lr=learning_rate)
    draws = [_drawn([subject.encode(row) for row in rows], batch_size, seed) for rows in case.rows]
    moved = {name: tensor for name, tensor in moving(working.model).items() if name in shapes}
    flags = {name: tensor.requires_grad for name, tensor in moved.items()}
    entropies = []
    try:
        for _ in range(steps):
            _lay(moved, own, vectors, coefficients, by)
            learning = {n: t.requires_grad_(True) for n, t in moved.items() if isinstance(t, torch.nn.Parameter)}
            loss = torch.stack([entropy(working, next(drawn)) for drawn in draws]).sum()
            gradients = torch.autograd.grad(loss, list(learning.values()), allow_unused=True)
            coefficients.grad = torch.zeros_like(coefficients)
            # d loss / d c_k = <d loss / d theta, delta_k>
            for name, gradient in zip(learning, gradients):
                if gradient is not None:
                    along = vectors[name].flatten(1) @ gradient.float().flatten()
                    coefficients.grad[places.index(name) if by == "layer" else 0] += along
            optimiser.step()
            with torch.no_grad():
                coefficients.clamp_(0, 1)
            entropies.append(float(loss.detach()) / len(draws))
    finally:
        for name, flag in flags.items():
            moved[name].requires_grad_(flag)
    found = dict(zip(places, coefficients.detach().tolist()))
    case.about |= {
        "coefficients": found,
        "entropy": {"first": entropies[0], "last": entropies[-1]} if entropies else {},
    }
    return case.combined(found if by == "layer" else found["all"])


def entropy(subject: Any, rows: Sequence[Encoded]) -> Tensor:
    """Mean entropy () in nats of what the subject predicts at the rows' answer tokens, whatever those are."""
    packed = pack(rows, subject.device)

    def tokens(hidden: Tensor, _: Tensor) -> Tensor:
        logs = subject.head(hidden).float().log_softmax(-1)
        return -(logs.exp() * logs).sum(-1)

    return chunked(tokens, subject.hidden_states(packed), packed.target, subject.vocabulary).mean()


def _drawn(rows: Sequence[Encoded], size: int, seed: int) -> Iterator[list[Encoded]]:
    """Batches without end, every row once before any comes again."""
    generator = torch.Generator().manual_seed(seed)

    def endless() -> Iterator[int]:
        while True:
            yield from torch.randperm(len(rows), generator=generator).tolist()

    stream = endless()
    while True:
        yield [rows[i] for i in itertools.islice(stream, min(size, len(rows)))]


@torch.no_grad()
def _lay(
    moved: dict[str, Tensor], own: dict[str, Tensor], vectors: dict[str, Tensor], coefficients: Tensor, by: str
) -> None:
    """Put base + sum_k c_k delta_k into the working copy."""
    for place, (name, tensor) in enumerate(moved.items()):
        c = coefficients[place if by == "layer" else 0]
        tensor.copy_(own[name].float() + torch.tensordot(c, vectors[name], 1))


def _dense(delta: Delta, name: str, shape: torch.Size) -> Tensor:
    """fp32 change of one tensor, 0 where the delta leaves it alone."""
    if name not in delta.entries:
        return torch.zeros(shape)
    return delta.change(name, shape)


def _agreeing(deltas: Sequence[Delta]) -> list[Delta]:
    """Each delta where its sign is the elected one."""
    case = Merging(deltas)
    made: list[dict[str, dict[str, Tensor]]] = [{} for _ in deltas]
    for name in case.names:
        holders = [i for i, delta in enumerate(deltas) if name in delta.entries]
        values, put = aligned(name, case.parts(name))
        for i, value in zip(holders, elected(values)):
            made[i][name] = put(value)
    return [Delta(delta.base, entries, delta.lineage) for delta, entries in zip(deltas, made)]
