"""How much each weight matters for rows: squared or absolute gradients, averaged over batches (arXiv:2308.07707)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...subjects.head import linear_logprob
from ...subjects.packed import Encoded, pack
from .terms import LOGIT_ELEMENTS, chunked, token_logprob

Kind = Literal["fisher", "loss_free", "loss_free_l1", "sampled"]


def importance(
    subject: Any,
    rows: Sequence[Encoded],
    names: Sequence[str],
    *,
    kind: Kind = "fisher",
    batch_size: int = 64,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """One non-negative fp32 tensor for each named parameter, of its shape; batches are taken in the order of the rows.

    fisher: mean over batches of (d mean cross-entropy / d theta)^2. loss_free: mean over batches of |d mean ||z||^2 /
    d theta| with logits z, which needs no labels; loss_free_l1: the same of ||z||. sampled: as fisher, with
    answers drawn from the model itself by the generator. A last batch that is smaller counts
    as one.
    """
    parameters = [subject.model.get_parameter(name) for name in names]
    found = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    groups = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    with flowing(subject.model, parameters):
        for group in groups:
            gradients = torch.autograd.grad(_loss(subject, group, kind, generator), parameters, allow_unused=True)
            for total, gradient in zip(found, gradients):
                if gradient is None:
                    continue
                gradient = gradient.float()
                if kind in ("fisher", "sampled"):
                    total.addcmul_(gradient, gradient)
                else:
                    total.add_(gradient.abs())
    return {name: total.div_(max(1, len(groups))) for name, total in zip(names, found)}


def cross_entropy(subject: Any, rows: Sequence[Encoded], generator: torch.Generator | None = None) -> Tensor:
    """Mean over the rows' answer tokens of their negative log-likelihood, with gradients.

    Args:
        generator: in the places of the answers' tokens others are drawn from what the model would say there.
    """
    pack_ = pack(rows, subject.device)
    hidden, head, target = subject.hidden_states(pack_), subject.linear_head, pack_.target
    if generator is not None:
        with torch.no_grad():
            drawn = [
                torch.multinomial(subject.head(part).float().softmax(-1).cpu(), 1, generator=generator)[:, 0]
                for part in hidden.split(max(1, LOGIT_ELEMENTS // subject.vocabulary))
            ]
        target = torch.cat(drawn).to(target.device)
    if head is not None:
        return -linear_logprob(hidden, head.weight, head.bias, target).mean()
    return -chunked(lambda h, t: token_logprob(subject.head, h, t), hidden, target, subject.vocabulary).mean()


def _loss(subject: Any, rows: Sequence[Encoded], kind: Kind, generator: torch.Generator | None) -> Tensor:
    if kind in ("fisher", "sampled"):
        return cross_entropy(subject, rows, generator if kind == "sampled" else None)
    pack_ = pack(rows, subject.device)

    def size(hidden: Tensor, _: Tensor) -> Tensor:
        squares = subject.head(hidden).float().square().sum(-1)
        return squares if kind == "loss_free" else squares.sqrt()  # type: ignore[no-any-return]

    return chunked(size, subject.hidden_states(pack_), pack_.target, subject.vocabulary).mean()


@contextmanager
def flowing(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within the block gradients flow to these parameters alone; the flags come back as they were."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        model.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
