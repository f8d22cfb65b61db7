"""Norms of single rows' gradients in blocks of the common kind (plain.py): a way there and back without autograd.

What all rows begin with is worked out once on the way there: states look at nothing but what stands before them. On the
way back it is every row's own, as every row's loss pulls at it in its own way. Rows stand beside one another, filled up
to one length; what fills them pulls at nothing. Squared norms are sums of products of tokens (gradients.py),

    |G^T A|^2 = sum_tu (G G^T)_tu (A A^T)_tu

whose right factors are worked out on the way there, so that nothing else is kept of what matrices read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .fused import rotated
from .packed import Encoded, common_beginning
from .plain import Kept, Linear, Norm, Parts, angles
from .plain_pass import PlainPass

Add = Callable[[Tensor, Tensor], None]
"""Takes (parameter, (rows,) what its squared norms grow by)."""


def pays(plain: PlainPass, longest: int) -> bool:
    """Whether products of so many tokens are fewer than weights' gradients take."""
    matrices = [matrix.weight for block in plain.blocks for matrix in block.matrices]
    return longest * sum(sum(matrix.shape) for matrix in matrices) <= sum(matrix.numel() for matrix in matrices)


class Walk:
    """There and back through a model's blocks with a few rows."""

    def __init__(self, plain: PlainPass, rows: Sequence[Encoded]) -> None:
        self.parts, device = plain, plain.table.device
        self.rows = len(rows)
        fed = [row.ids[:-1] for row in rows]
        self.shared = common_beginning([row.ids[: row.start] for row in rows])
        """Tokens that all rows begin with."""
        self.length = max(map(len, fed))
        """Of a row, beginning included."""
        own = self.length - self.shared
        read = max(row.scored for row in rows)
        padded = [[*ids, *[0] * (self.length - len(ids))] for ids in fed]
        self.ids = torch.tensor([*fed[0][: self.shared], *(token for ids in padded for token in ids[self.shared :])])
        self.ids = self.ids.to(device)
        """(shared + rows * own,) tokens of the way there."""
        places = [
            number * own + min(row.start - 1 + at, len(row.ids) - 2) - self.shared
            for number, row in enumerate(rows)
            for at in range(read)
        ]
        self.read = torch.tensor(places, device=device)
        """(rows * most read,) own tokens whose final states are read; where a row has fewer its last one again."""
        asked = [number * read + at for number, row in enumerate(rows) for at in range(row.scored)]
        self.asked = torch.tensor(asked, device=device)
        """Those of them that are read indeed."""
        real = [number * self.length + at for number, ids in enumerate(fed) for at in range(len(ids))]
        self.real = torch.tensor(real, device=device)
        """(tokens,) places in (rows, length) that are no filling."""
        order = torch.arange(self.length, device=device)
        self.angles = [part[0][:, None] for part in angles(*self.parts.rotary(self.parts.table[None, :1], order[None]))]
        place = torch.cat([order[: self.shared], order[self.shared :].repeat(self.rows)])
        self.turned = [part[place] for part in self.angles]
        apart = order[:, None] - order
        hidden = (apart < 0) if plain.window is None else (apart < 0) | (apart >= plain.window)
        self.mask = torch.zeros(hidden.shape, device=device).masked_fill_(hidden, float("-inf"))
        self.kept: list[tuple[Kept, ...]] = []

    # --- there --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def there(self) -> Tensor:
        """(A, d) final states that predict rows' answers, row by row."""
        x = F.embedding(self.ids, self.parts.table)
        for block in self.parts.blocks:
            x = self._there(block, x, block is self.parts.blocks[-1])
        states, self.last = self.parts.norm.forward(x)
        return states.index_select(0, self.asked)

    def _there(self, block: Parts, x: Tensor, last: bool) -> Tensor:
        """(shared + rows * own, d) to the same, or to what is read of it."""
        width = self.turned[0].shape[-1]
        a, first = block.first.forward(x)

        def heads(matrix: Linear) -> Tensor:
            return matrix.forward(a).unflatten(1, (-1, width))

        # Nothing asks for what the last block makes of the beginning but for its keys and values.
        skipped = self.shared if last else 0
        query = self._spread(rotated(heads(block.q), *self.turned))[:, :, skipped:]
        key, value = self._spread(rotated(heads(block.k), *self.turned)), self._spread(heads(block.v))
        many = query.shape[1] // key.shape[1]
        query = query.reshape(self.rows * key.shape[1], -1, width)
        key, value = key.flatten(0, 1), value.flatten(0, 1)
        mask = self.mask[skipped:].repeat(many, 1)
        weights = torch.baddbmm(mask, query, key.mT, alpha=block.scale).softmax(-1)
        out = torch.bmm(weights, value).view(self.rows, -1, len(mask) // many, width).transpose(1, 2).flatten(2)
        inside = self.shared - skipped
        out = torch.cat([out[0, :inside], out[:, inside:].flatten(0, 1)])
        y = block.o.forward(out, x[skipped:])
        reads = [self._products(a, self.shared), self._products(out, inside)]
        if last:
            y, inside = y.index_select(0, self.read), 0
        m, second = block.second.forward(y)
        gate, up = block.gate.forward(m), block.up.forward(m)
        acted = block.act(gate)
        by_gate = block.act_back(up, gate)
        h = up.mul_(acted)
        reads += [self._products(m, inside), self._products(h, inside)]
        self.kept.append((first, second, (query, key, value, weights), (by_gate, acted), tuple(reads)))
        return block.down.forward(h, y)

    def _spread(self, values: Tensor) -> Tensor:
        """(shared + rows * own, heads, width) to (rows, heads, length, width)."""
        out = values.new_empty(self.rows, values.shape[1], self.length, values.shape[2])
        out[:, :, : self.shared] = values[: self.shared].transpose(0, 1)
        out[:, :, self.shared :] = values[self.shared :].unflatten(0, (self.rows, -1)).transpose(1, 2)
        return out

    def _products(self, values: Tensor, shared: int) -> Tensor:
        """(shared + rows * n, d) to (rows, shared + n, shared + n) products of a row's tokens."""
        first, own = values[:shared], values[shared:].unflatten(0, (self.rows, -1))
        inside = own @ own.mT
        if not shared:
            return inside
        out = values.new_empty(self.rows, *[shared + own.shape[1]] * 2)
        out[:, :shared, :shared] = first @ first.T
        out[:, shared:, :shared] = across = (values[shared:] @ first.T).unflatten(0, (self.rows, -1))
        out[:, :shared, shared:] = across.mT
        out[:, shared:, shared:] = inside
        return out

    # --- back ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def back(self, gradient: Tensor, add: Add) -> Tensor:
        """(tokens, d) gradients of what was fed, row by row, of gradients (A, d) of the states that `there` gave."""
        to_x = gradient.new_zeros(len(self.read), gradient.shape[1]).index_copy_(0, self.asked, gradient)
        to_x = self._norm(self.parts.norm, to_x.unflatten(0, (self.rows, -1)), self.last, add)
        for block in reversed(self.parts.blocks):
            to_x = self._back(block, to_x, self.kept.pop(), block is self.parts.blocks[-1], add)
        return to_x.flatten(0, 1).index_select(0, self.real)

    def _back(self, block: Parts, to_z: Tensor, kept: tuple[Kept, ...], last: bool, add: Add) -> Tensor:
        """(rows, n, d) gradients of what the block gave to those of what it took."""
        first, second, (query, key, value, weights), (by_gate, acted), (of_a, of_out, of_m, of_h) = kept
        self._matrix(block.down, to_z, of_h, add)
        to_gate = self._times(inner := block.down.backward(to_z), by_gate)
        to_up = self._times(inner, acted, out=inner)
        self._matrix(block.gate, to_gate, of_m, add)
        self._matrix(block.up, to_up, of_m, add)
        to_m = block.up.back_onto(to_up, block.gate.backward(to_gate))
        to_y = self._norm(block.second, to_m, second, add).add_(to_z)
        if last:
            own = self.length - self.shared
            to_y = to_y.new_zeros(self.rows * own, to_y.shape[2]).index_add_(0, self.read, to_y.flatten(0, 1))
            to_y = to_y.unflatten(0, (self.rows, -1))
        self._matrix(block.o, to_y, of_out, add)
        skipped = self.length - to_y.shape[1]
        width, groups = key.shape[-1], len(key) // self.rows
        to_out = block.o.backward(to_y).unflatten(2, (-1, width)).transpose(1, 2).reshape(query.shape)
        scores = torch.bmm(to_out, value.mT)
        scores.sub_((scores * weights).sum(-1, keepdim=True)).mul_(weights).mul_(block.scale)

        def tokens(states: Tensor, heads: int) -> Tensor:
            return states.view(self.rows, heads, -1, width).transpose(1, 2)

        asking = [part[skipped:] for part in self.angles]
        to_q = _turned_back(tokens(torch.bmm(scores, key), groups * query.shape[1] // to_y.shape[1]), asking)
        to_k = _turned_back(tokens(torch.bmm(scores.mT, query), groups), self.angles)
        to_v = tokens(torch.bmm(weights.mT, to_out), groups).flatten(2)
        self._matrix(block.q, to_q, of_a[:, skipped:, skipped:], add)
        self._matrix(block.k, to_k, of_a, add)
        self._matrix(block.v, to_v, of_a, add)
        to_a = block.v.back_onto(to_v, block.k.backward(to_k))
        if skipped:
            to_a[:, skipped:] += block.q.backward(to_q)
        else:
            block.q.back_onto(to_q, to_a)
        to_x = self._norm(block.first, to_a, first, add)
        to_x[:, skipped:] += to_y
        return to_x

    def _matrix(self, matrix: Linear, gradient: Tensor, products: Tensor, add: Add) -> None:
        add(matrix.weight, (gradient @ gradient.mT).mul_(products).sum((1, 2)))
        if matrix.bias is not None:
            add(matrix.bias, gradient.sum(1).square().sum(1))

    def _norm(self, norm: Norm, gradient: Tensor, kept: Kept, add: Add) -> Tensor:
        """As `norm.backward`, of rows (rows, n, d) that have a beginning in common; the gradient is written over."""
        plain, scale = kept
        both = self._times(gradient, plain)
        add(norm.parameter, both.sum(1).square().sum(1))
        along = (both @ norm.weight).mul_(-1 / gradient.shape[2])[..., None]
        return self._times(gradient.mul_(norm.weight).add_(self._times(along, plain, out=both)), scale, out=gradient)

    def _times(self, gradient: Tensor, values: Tensor, out: Tensor | None = None) -> Tensor:
        """(rows, n, d) of gradients (rows, n, d or 1) times values (shared + rows * own, d or 1)."""
        shared = 0 if len(values) == self.rows * gradient.shape[1] else self.shared
        own = values[shared:].unflatten(0, (self.rows, -1))
        if out is None:
            out = torch.empty_like(gradient)
        torch.mul(gradient[:, shared:], own, out=out[:, shared:])
        if shared:
            torch.mul(gradient[:, :shared], values[:shared], out=out[:, :shared])
        return out


def _turned_back(x: Tensor, turned: Sequence[Tensor]) -> Tensor:
    """(rows, n, heads, width) to (rows, n, heads * width)."""
    cos, first, second = turned
    return rotated(x, cos, second, first).flatten(2)
