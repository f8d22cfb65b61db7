"""Vectors of the residual stream read as tokens: their products with the LM head, in tiles.

For vectors v (n, d) and the head E (V, d) the scores are S = v E^T (n, V). They are never held whole: 458 752 vectors
of an 8B model would make 235 GB of them. Tiles of rows and of the vocabulary are multiplied, and of each only the best
k are kept. Mean and deviation over the vocabulary follow from mean and covariance of the head's rows.

The best of a tile are found in two steps: tokens stand in groups, and the k best lie in the k groups of largest maximum
(a token elsewhere would have k larger ones above it). With 16-bit weights tiles are 16-bit products with fp32 sums,
whose rounding may swap near ties: of twice k candidates the scores are made again in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import ParameterError
from .anatomy import anatomy
from .language import LanguageModel
from .value_vectors import ValueMatrix, value_matrices, vectors

Norm = Literal["none", "final"]
Sign = Literal["+", "-", "both"]
ROWS, COLUMNS = 1024, 8192
"""Vectors and tokens of a tile: at most 32 MiB of scores, which stay in a CPU's cache."""
CUDA_ROWS, CUDA_COLUMNS = 8192, 32768
"""... on a GPU, whose products need larger ones: 0.5 GiB."""
HEAD_ROWS = 2048
"""Rows of the head that its mean, norms and covariance are summed up from at once."""
GROUPS = 512
"""Groups of tokens in a tile."""
AGAIN, CUDA_AGAIN = 16, 1024
"""Vectors whose candidates are scored again at once: 0.5 MiB of the head's rows for each, at d = 4096 and k = 10."""


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
            steps.append(linear_part(parts.final_norm[1], parts.blocks[0].width))
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

    @property
    def dtype(self) -> torch.dtype:
        """In which products with the head are made: its own 16-bit type where there are kernels for it, else fp32."""
        on_cuda = self.head.device.type == "cuda"
        fast = (torch.bfloat16, torch.float16) if on_cuda else (torch.bfloat16,)
        return self.head.dtype if self.head.dtype in fast else torch.float32

    @cached_property
    def centre(self) -> Tensor:
        """(e,) the mean of the head's rows."""
        return torch.stack([rows.float().sum(0) for rows in self.head.split(HEAD_ROWS)]).sum(0) / len(self.head)

    @cached_property
    def lengths(self) -> Tensor:
        """(V,) norms of the head's rows."""
        return torch.cat([rows.float().norm(dim=1) for rows in self.head.split(HEAD_ROWS)])

    @cached_property
    def spread(self) -> Tensor:
        """(e, e) covariance of the head's rows."""
        total = torch.zeros(self.head.shape[1], self.head.shape[1], dtype=torch.float64, device=self.head.device)
        for rows in self.head.split(HEAD_ROWS):
            apart = (rows.float() - self.centre).to(self.dtype)
            total += apart.T @ apart
        return (total / len(self.head)).float()

    def deviation(self, read: Tensor) -> Tensor:
        """(n,) standard deviation over the vocabulary of the scores of read vectors (n, e), without the scores."""
        product = (read.to(self.dtype) @ self.spread.to(self.dtype)).float()
        return (product * read.float()).sum(-1).clamp_min(0).sqrt()


@torch.no_grad()
def linear_part(norm: nn.Module, width: int) -> Callable[[Tensor], Tensor]:
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
    """(n, k) fp32; of lowest tokens the lowest first."""
    mean: Tensor
    """(n,) mean score over the vocabulary."""
    deviation: Tensor
    """(n,) standard deviation of the scores."""
    cosine: Tensor
    """(n,) between the vector and the head's row of its first token."""
    log_sum: Tensor | None = None
    """(n,) log sum exp of all scores, where probabilities were asked for."""

    @property
    def z(self) -> Tensor:
        """(n,) how far the first token stands out, in standard deviations: comparable between vectors of all lengths.
        Negative where the token is the lowest."""
        return (self.scores[:, 0] - self.mean) / self.deviation.clamp_min(1e-12)

    def cpu(self) -> Projection:
        log_sum = None if self.log_sum is None else self.log_sum.cpu()
        return Projection(
            self.tokens.cpu(), self.scores.cpu(), self.mean.cpu(), self.deviation.cpu(), self.cosine.cpu(), log_sum
        )


@torch.no_grad()
def project(
    readout: Readout,
    vectors: Tensor,
    k: int,
    *,
    sign: Sign = "+",
    probabilities: bool = False,
    rows: int | None = None,
    columns: int | None = None,
) -> Projection:
    """The k best tokens of each vector (n, d).

    Args:
        sign: `+` the highest scores, `-` the lowest; `both` whichever of a vector's first tokens stands out further.
        probabilities: also the log sum exp of every vector's scores; a pass over them.
        rows, columns: vectors and tokens multiplied at once; nothing but memory depends on them.

    Raises:
        ParameterError: there are fewer than k tokens.
    """
    head = readout.head
    if not 1 <= k <= len(head):
        raise ParameterError(f"k = {k} best tokens were asked for; the vocabulary has {len(head)}")
    on_cuda = head.device.type == "cuda"
    rows, columns = rows or (CUDA_ROWS if on_cuda else ROWS), columns or (CUDA_COLUMNS if on_cuda else COLUMNS)
    parts = [
        _rows(readout, block.to(head.device), k, sign, probabilities, columns).cpu() for block in vectors.split(rows)
    ]

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    return Projection(
        joined("tokens"),
        joined("scores"),
        joined("mean"),
        joined("deviation"),
        joined("cosine"),
        joined("log_sum") if probabilities else None,
    )


def _rows(readout: Readout, block: Tensor, k: int, sign: Sign, probabilities: bool, columns: int) -> Projection:
    """A few vectors against the whole vocabulary."""
    read, head = readout.read(block), readout.head
    factors = {"+": (1,), "-": (-1,), "both": (1, -1)}[sign]
    count = k if readout.dtype == torch.float32 else min(2 * k, len(head))
    narrow = read.to(readout.dtype)
    found: list[tuple[Tensor, Tensor] | None] = [None] * len(factors)
    sums = []
    tile = narrow.new_empty(len(narrow), min(columns, len(head)))  # memory that is new each time costs a tenth more
    for first in range(0, len(head), columns):
        part = head[first : first + columns].to(readout.dtype).T
        scores = torch.mm(narrow, part, out=tile) if part.shape[1] == tile.shape[1] else narrow @ part
        if probabilities:
            sums.append(scores.float().logsumexp(1))
        for number, factor in enumerate(factors):
            values, index = _best(scores if factor > 0 else -scores, count)
            index = index.to(torch.int32) + first
            before = found[number]
            if before is not None:
                values, index = torch.cat([before[0], values], 1), torch.cat([before[1], index], 1)
                values, order = values.topk(min(count, values.shape[1]), dim=1)
                index = index.gather(1, order)
            found[number] = values, index
    mean, deviation = read @ readout.centre, readout.deviation(read)
    sides = []
    for factor, best in zip(factors, found):
        assert best is not None
        values, tokens = _settled(readout, read * factor, *best, k)
        cosine = values[:, 0] / (read.norm(dim=1) * readout.lengths[tokens[:, 0].long()]).clamp_min(1e-30)
        sides.append(Projection(tokens, values * factor, mean, deviation, cosine * factor))
    one = sides[0]
    if len(sides) == 2:
        lower = (sides[1].z.abs() > one.z.abs())[:, None]
        tokens, scores = (torch.where(lower, getattr(sides[1], n), getattr(one, n)) for n in ("tokens", "scores"))
        cosine = torch.where(lower[:, 0], sides[1].cosine, one.cosine)
        one = Projection(tokens, scores, mean, deviation, cosine)
    return replace(one, log_sum=torch.stack(sums).logsumexp(0) if probabilities else None)


def _best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(n, count) highest of scores (n, c) and where they stand, in no order among equals."""
    rows, columns = scores.shape
    deep = columns // GROUPS
    if deep < 2 or columns % GROUPS or count >= GROUPS // 4:
        values, index = scores.topk(min(count, columns), dim=1)
        return values, index
    # A group is every GROUPS-th token: maxima of neighbours in memory are taken side by side.
    grouped = scores.view(rows, deep, GROUPS)
    group = grouped.amax(1).topk(count, dim=1).indices
    values, place = grouped.gather(2, group[:, None].expand(-1, deep, -1)).flatten(1).topk(count, dim=1)
    return values, place // count * GROUPS + group.gather(1, place % count)


def _settled(readout: Readout, read: Tensor, values: Tensor, tokens: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of the candidates, scored in fp32; of equal ones the lowest token first."""
    tokens, order = tokens.sort(dim=1)
    values = values.gather(1, order)
    if readout.dtype != torch.float32:
        size = CUDA_AGAIN if read.is_cuda else AGAIN
        rows = (readout.head.index_select(0, t.flatten()).view(*t.shape, -1) for t in tokens.split(size))
        values = torch.cat([torch.bmm(r.float(), v[:, :, None])[..., 0] for r, v in zip(rows, read.split(size))])
    values, order = values.float().sort(dim=1, descending=True, stable=True)
    return values[:, :k], tokens.gather(1, order)[:, :k]


def read_neurons(
    subject: LanguageModel, k: int, *, norm: Norm = "none", matrices: Iterable[ValueMatrix] | None = None
) -> list[tuple[ValueMatrix, Projection]]:
    """Every value vector of the subject, read: matrix by matrix, so that one at most is held in fp32.

    Errors as `project` and `value_matrices`.
    """
    readout = Readout.of(subject, norm)
    chosen = value_matrices(subject.model) if matrices is None else matrices
    return [(matrix, project(readout, vectors(subject.model, matrix), k)) for matrix in chosen]
