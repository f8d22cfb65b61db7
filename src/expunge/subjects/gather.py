"""Gradients of vocabulary-sized weights, added up where they lie.

Autograd makes a new tensor for every use of a weight and adds them afterwards. With 128k rows and a head that is also
the embedding, that is three fresh tensors of the weight's size and four passes over them in each step, while only the
head's products have anything to compute. Inside `Gather.adding` the head (subjects/head.py) and a plain embedding add
to `weight.grad` themselves. Its memory and that of the logits serve step after step: a fresh page costs more than what
is computed on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Gather:
    """Where a training loop's gradients of such weights are added up."""

    def __init__(self) -> None:
        self.active = False
        self._spare: dict[int, Tensor] = {}
        self._own: set[int] = set()
        self._room = torch.empty(0)
        self._used = 0
        self._waiting: dict[int, list[tuple[Tensor, Tensor, Tensor]]] | None = None

    def takes(self, weight: Tensor) -> bool:
        """Whether uses of this weight add to its gradient themselves now."""
        return self.active and weight.is_leaf and weight.requires_grad and torch.is_grad_enabled()

    def product(self, weight: Tensor, left: Tensor, right: Tensor) -> None:
        """weight.grad (V, d) += left (V, n) @ right (n, d)"""
        if weight.grad is not None:
            weight.grad.addmm_(left, right)
        else:
            spare = self._take(weight)
            weight.grad = left @ right if spare is None else torch.mm(left, right, out=spare)

    def owns(self, weight: Tensor) -> bool:
        """Whether its gradient was added up here."""
        return weight.grad is not None and id(weight) in self._own

    def rows(self, weight: Tensor, places: Tensor, values: Tensor, part: int = 0) -> None:
        """weight.grad[places] += values, places (n,), values (n, d)"""
        if self._waiting is not None:
            self._waiting.setdefault(part, []).append((weight, places, values))
            return
        if weight.grad is None:
            spare = self._take(weight)
            weight.grad = torch.zeros_like(weight) if spare is None else spare.zero_()
        weight.grad.index_add_(0, places, values)

    def logits(self, hidden: Tensor, vocabulary: int) -> Tensor | None:
        """Memory for logits (n, V) of hidden states (n, d) until the block of `adding` ends; None where there is none:
        in a first step, and in one with more answer tokens than were ever seen."""
        start, self._used = self._used, self._used + len(hidden) * vocabulary
        if self._room.dtype != hidden.dtype or self._room.device != hidden.device:
            self._room = hidden.new_empty(0)
        if self._used > len(self._room):
            return None
        return self._room[start : self._used].view(len(hidden), vocabulary)

    def clear(self, weight: Tensor) -> None:
        """Take the gradient away; its memory is the next step's, where this object made it."""
        if weight.grad is not None and id(weight) in self._own:
            self._spare[id(weight)] = weight.grad
        weight.grad = None

    def _take(self, weight: Tensor) -> Tensor | None:
        self._own.add(id(weight))
        return self._spare.pop(id(weight), None)

    @contextmanager
    def adding(self) -> Iterator[None]:
        """Passes begun within the block end within it, by `backward`: `autograd.grad` would not see what was added."""
        if self._used > len(self._room):
            self._room = self._room[:0].clone()  # lets go of the old memory first
            self._room = self._room.new_empty(self._used + self._used // 8)
        self.active, self._used = True, 0
        try:
            yield
        finally:
            self.active = False

    @contextmanager
    def in_parts(self) -> Iterator[None]:
        """Parts of a step whose threads end within the block, whichever first, have their rows added in their order."""
        self._waiting = {}
        try:
            yield
            waiting = self._waiting
        finally:
            self._waiting = None
        for part in sorted(waiting):
            for found in waiting[part]:
                self.rows(*found)

    @contextmanager
    def embedding(
        self, module: nn.Embedding | None, own: tuple[Tensor, Tensor] | None = None, part: int = 0
    ) -> Iterator[None]:
        """Within the block a plain embedding takes part.

        Args:
            own: (k, d) rows that are in training in the table's place, and (V,) where a token's row stands among them.
            part: of the step, if it has several.
        """
        if module is None:
            yield
            return
        padding = module.padding_idx
        if own is not None and padding is not None:
            padding = int(own[1][padding])

        def look_up(module: Any, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
            weight = module.weight if own is None else own[0]
            if not arguments or not self.takes(weight):
                return output
            places = arguments[0] if own is None else own[1][arguments[0]]
            return _Rows.apply(weight, places, output.detach(), padding, self, part)  # type: ignore[no-any-return]

        handle = module.register_forward_hook(look_up)
        try:
            yield
        finally:
            handle.remove()


class _Rows(torch.autograd.Function):
    """What an embedding gave out, with a backward pass that adds rows where they belong."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, ids: Tensor, output: Tensor, padding: int | None, gather: Gather, part: int
    ) -> Tensor:
        ctx.save_for_backward(weight, ids)
        ctx.padding, ctx.gather, ctx.part = padding, gather, part
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, ...]:
        weight, ids = ctx.saved_tensors
        places, values = ids.reshape(-1), gradients[0].reshape(-1, weight.shape[1])
        if ctx.padding is not None:  # an embedding's padding row gets no gradient
            values = values.masked_fill((places == ctx.padding)[:, None], 0)
        ctx.gather.rows(weight, places, values.to(weight.dtype), ctx.part)
        return (None,) * 6
