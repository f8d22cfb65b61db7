"""Vectors of the residual stream read as tokens: their products with the LM head, in tiles.

For vectors v (n, d) and the head E (V, d) the scores are S = v E^T (n, V). They are never held whole: 458 752 vectors
of an 8B model would make 235 GB of them. Tiles of rows and of the vocabulary are multiplied, and of each only the best
k, the sum and the sum of squares are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import ParameterError
from .anatomy import anatomy
from .language import LanguageModel
from .value_vectors import ValueMatrix, value_matrices, vectors

Norm = Literal["none", "final"]
ROWS, COLUMNS = 1024, 8192
"""Vectors and tokens of a tile: 32 MiB of scores."""


@dataclass(frozen=True)
class Readout:
    """How a vector of the residual stream is read."""

    head: Tensor
    """(V, e) one row a token; rows beyond the tokenizer's last token, which no text can contain, are left out."""
    before: tuple[Callable[[Tensor], Tensor], ...] = ()
    """What (n, d) vectors go through on the way to (n, e)."""

    @staticmethod
    def of(subject: LanguageModel, norm: Norm = "none") -> Readout:
        """The subject's head.

        Args:
            norm: `none` multiplies with the head as it is (arXiv:2203.14680, arXiv:2406.11614); `final` takes the final
                norm's centring and gain along, whose division changes no order.
        """
        parts = anatomy(subject.model)
        steps: list[Callable[[Tensor], Tensor]] = []
        if norm == "final" and parts.final_norm is not None:
            steps.append(_linear_part(parts.final_norm[1], parts.blocks[0].width))
        if parts.narrowing is not None:
            weight = parts.narrowing[1].get_parameter("weight").detach().float()
            steps.append(lambda v: v @ weight.T)
        head = parts.lm_head[1].get_parameter("weight").detach()
        return Readout(head[: len(subject.tokenizer)], tuple(steps))

    def read(self, vectors: Tensor) -> Tensor:
        """(n, e) fp32 of (n, d) vectors: what is multiplied with the head."""
        vectors = vectors.float()
        for step in self.before:
            vectors = step(vectors)
        return vectors

    @cached_property
    def centre(self) -> Tensor:
        """(e,) the mean of the head's rows."""
        return self.head.float().mean(0)

    @cached_property
    def spread(self) -> Tensor:
        """(e, e) covariance of the head's rows."""
        total = torch.zeros(self.head.shape[1], self.head.shape[1], dtype=torch.float64, device=self.head.device)
        for rows in self.head.split(COLUMNS):
            apart = rows.float() - self.centre
            total += apart.T @ apart
        return (total / len(self.head)).float()

    def deviation(self, read: Tensor) -> Tensor:
        """(n,) standard deviation over the vocabulary of the scores of read vectors (n, e), without the scores."""
        return ((read @ self.spread) * read).sum(-1).clamp_min(0).sqrt()


@torch.no_grad()
def _linear_part(norm: nn.Module, width: int) -> Callable[[Tensor], Tensor]:
    """Gain and centring of a norm, found by what it makes of +1, -1 ... (mean 0, mean square 1), whatever its class."""
    parameter = next(norm.parameters())
    x = torch.ones(width, dtype=parameter.dtype, device=parameter.device)
    x[1::2] = -1
    gain = ((norm(x[None]) - norm(-x[None]))[0] / 2 * x).float()
    shifted = norm(x[None] + 1) - norm(x[None])
    centres = bool(shifted.abs().max() <= 1e-3 * gain.abs().max())
    return lambda v: (v - v.mean(-1, keepdim=True) if centres else v) * gain


@dataclass(frozen=True)
class Projection:
    """The best tokens of vectors, and how all tokens score."""

    tokens: Tensor
    """(n, k) int32, best first."""
    scores: Tensor
    """(n, k) fp32."""
    mean: Tensor
    """(n,) mean score over the vocabulary."""
    deviation: Tensor
    """(n,) standard deviation of the scores."""

    @property
    def z(self) -> Tensor:
        """(n,) how far the best token stands out, in standard deviations: comparable between vectors of all lengths."""
        return (self.scores[:, 0] - self.mean) / self.deviation.clamp_min(1e-12)


@torch.no_grad()
def project(readout: Readout, vectors: Tensor, k: int, *, rows: int = ROWS, columns: int = COLUMNS) -> Projection:
    """The k best tokens of each vector (n, d).

    Args:
        rows, columns: vectors and tokens multiplied at once; nothing but memory depends on them.

    Raises:
        ParameterError: there are fewer than k tokens.
    """
    head = readout.head
    if not 1 <= k <= len(head):
        raise ParameterError(f"k = {k} best tokens were asked for; the vocabulary has {len(head)}")
    parts = [_tile(readout, block.to(head.device), k, columns) for block in vectors.split(rows)]
    tokens, scores, mean, deviation = (torch.cat(column) for column in zip(*parts))
    return Projection(tokens, scores, mean, deviation)


def _tile(readout: Readout, block: Tensor, k: int, columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    read, head = readout.read(block), readout.head
    best: Tensor | None = None
    tokens = torch.empty(len(block), 0, dtype=torch.int32, device=head.device)
    for first in range(0, len(head), columns):
        scores = read @ head[first : first + columns].float().T
        values, index = scores.topk(min(k, scores.shape[1]), dim=1)
        index = (index + first).to(torch.int32)
        if best is not None:
            values, index = torch.cat([best, values], 1), torch.cat([tokens, index], 1)
            values, order = values.topk(min(k, values.shape[1]), dim=1)
            index = index.gather(1, order)
        best, tokens = values, index
    assert best is not None
    return tokens.cpu(), best.cpu(), (read @ readout.centre).cpu(), readout.deviation(read).cpu()


def read_neurons(
    subject: LanguageModel, k: int, *, norm: Norm = "none", matrices: Iterable[ValueMatrix] | None = None
) -> list[tuple[ValueMatrix, Projection]]:
    """Every value vector of the subject, read: matrix by matrix, so that one at most is held in fp32.

    Errors as `project` and `value_matrices`.
    """
    readout = Readout.of(subject, norm)
    chosen = value_matrices(subject.model) if matrices is None else matrices
    return [(matrix, project(readout, vectors(subject.model, matrix), k)) for matrix in chosen]
