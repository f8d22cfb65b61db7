"""Tails through blocks of the common kind (plain.py) as one function with its own way back.

K and V of tokens that stay as they are stand before a tail's own. For a hundred tokens a model's own code is hundreds
of operators a block, those of autograd among them, which take longer than the products; and K and V are put together
anew in every pass, and get gradients that nobody wants. Here a block takes some thirty operators forward and as many
backward. Gradients go to the change alone. In the first block nothing but the first token of a tail moves, and the last
one asks for the tokens that are read. Whether a model's blocks compute this is tried out by the caller (tails.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .anatomy import Block, anatomy
from .fused import rotated
from .plain import Kept, Names, Norm, Parts, angles


class _Block:
    """One block, with what stands before the tails that it is called with."""

    def __init__(self, model: nn.Module, block: Block, keys: Tensor, values: Tensor, named: dict[str, Any]) -> None:
        """
        Args:
            keys, values: (n, groups, before, width) of what stands before.
            named: what the decoder calls the block with.

        Raises:
            ValueError: it is of another kind.
        """
        parts = Parts(model, Names.of(block), keys)
        self.q, self.k, self.v, self.o = parts.q, parts.k, parts.v, parts.o
        self.gate, self.up, self.down = parts.gate, parts.up, parts.down
        self.first, self.second, self.scale = parts.first, parts.second, parts.scale
        self.act, self.act_back = parts.act, parts.act_back
        self.n, self.groups, self.before, self.width = keys.shape
        self.heads = len(self.q.weight) // self.width
        cos, sin = named["position_embeddings"]
        self.angles = [part.expand(self.n, -1, -1)[:, :, None] for part in angles(cos, sin)]
        """Each (n, tail, 1, width or half of it), of the tokens that move."""
        self.asking = self.angles
        """Of those that ask."""
        self.tail = self.moving = cos.shape[1]
        """Tokens of each tail, and how many of them, from the first on, move."""
        self.keys, self.values = (F.pad(part, (0, 0, 0, self.tail)) for part in (keys, values))
        """With room for the tail's own, which count from their writing to the next product."""
        mask = named["attention_mask"]
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=keys.dtype).masked_fill(~mask, float("-inf"))
        self._look(mask.expand(self.n, -1, -1, -1)[:, 0])
        self.queries: Tensor | None = None
        """(n, tail - moving, heads, width) of tokens that stay as they are."""
        self.asked: Tensor | None = None
        """(n * r,) tokens that ask, r of each text; None: all."""
        self.kept: Tensor | None = None
        """(m,) places among these of what is read; None: all."""
        self.read: Tensor | None = None

    def _look(self, mask: Tensor) -> None:
        """Add (n, r, columns) to the scores of what asks."""
        self.mask = mask
        shape = (self.n, self.groups, self.heads // self.groups, *mask.shape[1:])
        self.bias = mask[:, None, None].expand(shape).reshape(self.n * self.groups, -1, shape[-1])

    def fix(self, stream: Tensor) -> None:
        """From now on all tokens (n, tail, d) but the first of every tail stay as they are here."""
        a, _ = self.first.forward(stream.flatten(0, 1))
        self._put(*self._own(a))
        self.queries = self._ask(a)[:, 1:]
        self.moving = 1
        self.angles = self.asking = [part[:, :1] for part in self.angles]

    def only(self, read: Tensor) -> None:
        """From now on give the tokens `read` (m,) of the flattened tails alone, text by text."""
        text, place = read // self.tail, read % self.tail
        counts = torch.bincount(text, minlength=self.n)
        most = int(counts.max())
        order = torch.arange(len(read), device=read.device) - (counts.cumsum(0) - counts)[text]
        columns = place.new_zeros(self.n, most)  # where a text has fewer to read its first token asks for nothing
        columns[text, order] = place
        lines = torch.arange(self.n, device=read.device)[:, None]
        self.read, self.asked = read, (lines * self.tail + columns).flatten()
        self.kept = None if len(read) == len(self.asked) else text * most + order
        self.asking = [part[lines, columns] for part in self.angles]
        self._look(self.mask[lines, columns])

    def _own(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """(n, moving, groups, width) each: keys and values of what moves."""
        shape = (self.n, -1, self.groups, self.width)
        return rotated(self.k.forward(a).view(shape), *self.angles), self.v.forward(a).view(shape)

    def _ask(self, a: Tensor) -> Tensor:
        return rotated(self.q.forward(a).view(self.n, -1, self.heads, self.width), *self.asking)

    def _put(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """(n * groups, columns, width) each."""
        columns = slice(self.before, self.before + key.shape[1])
        self.keys[:, :, columns], self.values[:, :, columns] = key.transpose(1, 2), value.transpose(1, 2)
        return self.keys.flatten(0, 1), self.values.flatten(0, 1)

    def _by_group(self, states: Tensor) -> Tensor:
        """(n, r, heads, width) to (n * groups, heads of a group * r, width)."""
        return states.transpose(1, 2).reshape(self.n * self.groups, -1, self.width)

    def _by_token(self, states: Tensor, heads: int) -> Tensor:
        """The way back, to (n, r, heads, width)."""
        return states.view(self.n, heads, -1, self.width).transpose(1, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Kept]:
        """(n * tail, d) to the same or (m, d)."""
        a, first = self.first.forward(x.view(self.n, -1, x.shape[-1])[:, : self.moving].reshape(-1, x.shape[-1]))
        key, value = self._own(a)
        if self.asked is None or self.read is None:
            query, others = self._ask(a), x
        else:
            query, others = self._ask(a.index_select(0, self.asked)), x.index_select(0, self.read)
        if self.queries is not None:
            query = torch.cat([query, self.queries], 1)
        query = self._by_group(query)
        keys, values = self._put(key, value)
        weights = torch.baddbmm(self.bias, query, keys.mT, alpha=self.scale).softmax(-1)
        out = self._by_token(torch.bmm(weights, values), self.heads).flatten(2).flatten(0, 1)
        y = self.o.forward(out if self.kept is None else out.index_select(0, self.kept), others)
        m, second = self.second.forward(y)
        gate, up = self.gate.forward(m), self.up.forward(m)
        acted = self.act(gate)
        z = self.down.forward(acted * up, y)
        return z, (*first, *second, query, key, value, weights, gate, acted, up)

    def backward(self, to_z: Tensor, kept: Kept) -> Tensor:
        """(n * moving, d) by what moves."""
        *norms, query, key, value, weights, gate, acted, up = kept
        inner = self.down.backward(to_z)
        to_m = self.gate.backward(self.act_back(inner * up, gate)).addmm_(inner.mul_(acted), self.up.weight)
        to_y = self.second.backward(to_m, tuple(norms[2:])).add_(to_z)
        to_out = self.o.backward(to_y)
        if self.kept is not None and self.asked is not None:
            to_out = to_out.new_zeros(len(self.asked), to_out.shape[1]).index_copy_(0, self.kept, to_out)
        to_out = self._by_group(to_out.view(self.n, -1, self.heads, self.width))
        keys, values = self._put(key, value)
        scores = torch.bmm(to_out, values.mT)
        scores.sub_((scores * weights).sum(-1, keepdim=True)).mul_(weights).mul_(self.scale)
        own = slice(self.before, self.before + self.moving)
        to_key = self._by_token(torch.bmm(scores[..., own].mT, query), self.groups)
        to_value = self._by_token(torch.bmm(weights[..., own].mT, to_out), self.groups)
        to_query = self._by_token(torch.bmm(scores, keys), self.heads)
        if self.queries is not None:
            to_query = to_query[:, : self.moving]
        to_a = self.v.backward(to_value.flatten(2).flatten(0, 1))
        to_a.addmm_(_back(to_key, *self.angles).flatten(2).flatten(0, 1), self.k.weight)
        to_query = _back(to_query, *self.asking).flatten(2).flatten(0, 1)
        if self.asked is None or self.read is None:
            to_x = self.first.backward(to_a.addmm_(to_query, self.q.weight), tuple(norms[:2]))
            return to_x.add_(to_y.view(self.n, -1, to_y.shape[-1])[:, : self.moving].reshape(to_x.shape))
        to_a.index_add_(0, self.asked, self.q.backward(to_query))
        return self.first.backward(to_a, tuple(norms[:2])).index_add_(0, self.read, to_y)


def _back(x: Tensor, cos: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return rotated(x, cos, second, first)


class PlainTail:
    """The blocks above a change, and the final norm."""

    @torch.no_grad()
    def __init__(
        self,
        model: nn.Module,
        stream: Tensor,
        read: Tensor,
        above: Sequence[tuple[Block, Tensor, Tensor, dict[str, Any]]],
    ) -> None:
        """
        Args:
            stream: (n, tail, d) the residual stream, to whose first tokens changes are added.
            read: (m,) tokens of the flattened tails, text by text, whose states are wanted.
            above: blocks with keys and values of what stands before, and what the decoder calls them with.

        Raises:
            ValueError: something is of another kind.
        """
        parts = anatomy(model)
        if parts.final_norm is None or parts.narrowing is not None or not above:
            raise ValueError("no block, or no final norm alone above it")
        self.stream = stream
        self.norm = Norm(parts.final_norm[1])
        self.blocks = [_Block(model, *one) for one in above]
        self.blocks[-1].only(read)
        if len(self.blocks) > 1:
            self.blocks[0].fix(stream)

    def states(self, change: Tensor) -> Tensor:
        """(m, d) final states with `change` (n, d)."""
        return _States.apply(change, self)  # type: ignore[no-any-return]


class _States(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, change: Tensor, tail: PlainTail) -> Tensor:
        stream = tail.stream.clone()
        stream[:, 0] += change
        x = stream.flatten(0, 1)
        ctx.tail, ctx.kept = tail, []
        for block in tail.blocks:
            x, kept = block.forward(x)
            ctx.kept.append(kept)
        states, ctx.last = tail.norm.forward(x)
        return states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = ctx.tail.norm.backward(gradients[0], ctx.last)
        for block, kept in zip(reversed(ctx.tail.blocks), reversed(ctx.kept)):
            gradient = block.backward(gradient, kept)
        n, _, d = ctx.tail.stream.shape
        return gradient.view(n, -1, d)[:, 0], None
