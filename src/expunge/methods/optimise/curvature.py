"""First and second derivatives of the loss of whole row sets, chunk by chunk: they do not depend on the chunks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...errors import SubjectError
from ...subjects.packed import Encoded, pack
from .importance import cross_entropy, flowing

Vector = list[Tensor]
"""One fp32 tensor for each named parameter, of its shape."""


def mean_gradient(subject: Any, rows: Sequence[Encoded], names: Sequence[str], *, batch_size: int = 64) -> Vector:
    """d L / d theta, with L the mean negative log-likelihood over all answer tokens of the rows."""
    parameters = [subject.model.get_parameter(name) for name in names]
    found = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    with flowing(subject.model, parameters):
        for share, group in _chunks(rows, batch_size):
            gradients = torch.autograd.grad(cross_entropy(subject, group), parameters, allow_unused=True)
            for total, gradient in zip(found, gradients):
                if gradient is not None:
                    total.add_(gradient.float(), alpha=share)
    return found


def hessian_product(
    subject: Any, rows: Sequence[Encoded], names: Sequence[str], vector: Vector, *, batch_size: int = 64
) -> Vector:
    """H v, with H the second derivative of the same L; a chunk runs forward once and backward twice.

    Raises:
        SubjectError: an operation of the model has no second derivative.
    """
    parameters = [subject.model.get_parameter(name) for name in names]
    found = [torch.zeros_like(v) for v in vector]
    with flowing(subject.model, parameters), twice(subject):
        for share, group in _chunks(rows, batch_size):
            loss = smooth_cross_entropy(subject, group)
            gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
            # Parameters out of reach have no gradient, and one that is linear in the loss none of its gradient.
            slopes = [(g.float() * v).sum() for g, v in zip(gradients, vector) if g is not None and g.requires_grad]
            if not slopes:
                continue
            products = torch.autograd.grad(torch.stack(slopes).sum(), parameters, allow_unused=True)
            for total, product in zip(found, products):
                if product is not None:
                    total.add_(product.float(), alpha=share)
    return found


def smooth_cross_entropy(subject: Any, rows: Sequence[Encoded]) -> Tensor:
    """`importance.cross_entropy` of operations that can be differentiated twice; holds all logits of the rows."""
    pack_ = pack(rows, subject.device)
    logits = subject.head(subject.hidden_states(pack_)).float()
    return torch.nn.functional.cross_entropy(logits, pack_.target)


@contextmanager
def twice(subject: Any) -> Iterator[None]:
    """Within the block attention runs without fused kernels, which have no second derivative.

    Raises:
        SubjectError: some other operation has none.
    """
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except RuntimeError as error:
        missing = re.search(
            r"derivative for '?([\w:]+)'? is not implemented|Trying to backward through ([\w:]+)", str(error)
        )
        if missing is None:
            raise
        operation = missing.group(1) or missing.group(2)
        raise SubjectError(
            f"{subject.name}: {operation} cannot be differentiated twice, which this needs; load the model with plain "
            "(eager) attention, or take a scope above that operation"
        ) from None


def _chunks(rows: Sequence[Encoded], size: int) -> Iterator[tuple[float, Sequence[Encoded]]]:
    """(share of all answer tokens, rows)"""
    total = sum(row.scored for row in rows)
    for first in range(0, len(rows), size):
        group = rows[first : first + size]
        yield sum(row.scored for row in group) / total, group
