"""Blocks of the common kind by their parts: root-mean-square norms, rotary attention, gated MLPs.

    a = norm(x)    y = x + Wo attention(rotate(Wq a), rotate(Wk a), Wv a)
    m = norm(y)    z = y + Wd (act(Wg m) * Wu m)                              as in Llama, Mistral, Qwen 2

Passes that are made of these parts take few operators, write into memory that they have already, and know their way
back without autograd (plain_tail.py, plain_pass.py, plain_norms.py). What is of that kind is seen from a block's parts;
whether it computes the above is tried out by those who ask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .anatomy import Block
from .fused import eps_of, norm_style

Kept = tuple[Tensor, ...]
"""What a way back needs of the way there."""
ACTS: tuple[tuple[Callable[..., Tensor], Callable[..., Tensor]], ...] = (
    (F.silu, torch.ops.aten.silu_backward),
    (F.gelu, torch.ops.aten.gelu_backward),
    (partial(F.gelu, approximate="tanh"), partial(torch.ops.aten.gelu_backward, approximate="tanh")),
)
"""Activations of gates, and from (gradient, input) the gradient by the input."""


def _act(found: Callable[[Tensor], Tensor], like: Tensor) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The one of `ACTS` that gives what a model's own does."""
    x = torch.linspace(-6, 6, 49, device=like.device, dtype=like.dtype)
    for known in ACTS:
        if torch.allclose(known[0](x), found(x), rtol=1e-6, atol=1e-6):
            return known
    raise ValueError("no activation of a known kind")


def product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """What a linear layer gives, written into memory that is there."""
    return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)


class Norm:
    def __init__(self, norm: Any) -> None:
        kind: Any = type(norm)
        style = norm_style(kind)
        if style is None:
            raise ValueError("no norm of a known kind")
        self.parameter: Tensor = norm.weight
        self.weight = norm.weight + style[0] if style[0] else norm.weight
        self.eps = self.weight.new_tensor(eps_of(norm))

    def scale(self, x: Tensor) -> Tensor:
        """(..., 1) that the input (..., d) is multiplied by before the weight."""
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return torch.addcmul(self.eps, size, size, value=1 / x.shape[-1]).rsqrt_()

    def forward(self, x: Tensor) -> tuple[Tensor, Kept]:
        scale = self.scale(x)
        plain = x * scale
        return plain * self.weight, (plain, scale)

    def into(self, x: Tensor, out: Tensor) -> Tensor:
        return torch.mul(x, self.scale(x), out=out).mul_(self.weight)

    def backward(self, gradient: Tensor, kept: Kept) -> Tensor:
        """s (w g - p <w g, p> / d) for p = x s."""
        plain, scale = kept
        g = gradient * self.weight
        return g.addcmul_(plain, (g * plain).sum(-1, keepdim=True), value=-1 / g.shape[-1]).mul_(scale)


class Linear:
    def __init__(self, model: nn.Module, name: str) -> None:
        module = model.get_submodule(name)
        if type(module) is not nn.Linear:
            raise ValueError("no linear layer")
        self.weight, self.bias = module.weight, module.bias

    def forward(self, x: Tensor, others: Tensor | None = None) -> Tensor:
        """What it gives, added to others."""
        if others is None:
            return F.linear(x, self.weight, self.bias)
        out = torch.addmm(others, x, self.weight.t())
        return out if self.bias is None else out.add_(self.bias)

    def into(self, x: Tensor, out: Tensor) -> Tensor:
        return product(x, self.weight, self.bias, out)

    def onto(self, x: Tensor, others: Tensor) -> Tensor:
        """As `forward`, in the others' place."""
        # Not by `addmm_`, which torch's FLOP counter does not know.
        torch.addmm(others, x, self.weight.t(), out=others)
        return others if self.bias is None else others.add_(self.bias)

    def backward(self, gradient: Tensor) -> Tensor:
        return gradient @ self.weight

    def back_onto(self, gradient: Tensor, others: Tensor) -> Tensor:
        """As `backward`, added to others in their place; both (..., width)."""
        flat = others.flatten(0, -2)
        torch.addmm(flat, gradient.flatten(0, -2), self.weight, out=flat)
        return others


@dataclass(frozen=True)
class Names:
    """Where a block has its parts: names of modules."""

    q: str
    k: str
    v: str
    o: str
    gate: str
    up: str
    down: str
    first: str
    second: str

    @staticmethod
    def of(block: Block) -> Names:
        """
        Raises:
            ValueError: it is of another kind.
        """

        def owner(names: Sequence[str], start: str = "") -> str:
            owners = {name.rpartition(".")[0] for name in names}
            found = [one for one in owners if one.rpartition(".")[2].startswith(start)]
            if len(found) != 1:
                raise ValueError("no linear layer of its own")
            return found[0]

        if len(block.norm) != 2:
            raise ValueError("not two norms")
        first, second = (name.rpartition(".")[0] for name in block.norm)
        return Names(
            q=owner(block.qkv, "q"),
            k=owner(block.qkv, "k"),
            v=owner(block.qkv, "v"),
            o=owner(block.attention_out),
            gate=owner(block.mlp_gate),
            up=owner(block.mlp_in),
            down=owner(block.mlp_out),
            first=first,
            second=second,
        )


class Parts:
    """A block's parts as they are now."""

    def __init__(self, model: nn.Module, names: Names, like: Tensor) -> None:
        """
        Args:
            like: of the type and on the device that the block computes with.

        Raises:
            ValueError: it is of another kind.
        """
        self.q, self.k, self.v, self.o, self.gate, self.up, self.down = (
            Linear(model, name) for name in (names.q, names.k, names.v, names.o, names.gate, names.up, names.down)
        )
        self.matrices = (self.q, self.k, self.v, self.o, self.gate, self.up, self.down)
        self.first, self.second = (Norm(model.get_submodule(name)) for name in (names.first, names.second))
        attention: Any = model.get_submodule(names.q.rpartition(".")[0])
        mlp: Any = model.get_submodule(names.gate.rpartition(".")[0])
        self.scale: float = attention.scaling
        self.act, self.act_back = _act(mlp.act_fn, like)


def angles(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `rotated` takes beside the tokens, of what models call a rotation with."""
    half = sin.shape[-1] // 2
    return cos, -sin[..., :half], sin[..., half:]
