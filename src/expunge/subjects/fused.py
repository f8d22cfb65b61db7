"""Norms and rotary positions in fewer passes over memory than a model's own code takes.

On a CPU up to a third of a training step is element-wise work, root-mean-square norms and rotations among it, written
as a dozen operators each. Within `fused` they are computed with fewer, forward and backward, and less is kept in
between. What a model's own code does is tried out first, in fp32 and in bf16: only what gives the same is
replaced.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

Style = tuple[float, bool]
"""What is added to a norm's weight, and whether the weight is applied before the result takes the input's type."""

STYLES: tuple[Style, ...] = ((0.0, False), (1.0, True), (0.0, True))
"""As Llama, Gemma and OLMo 2 do."""


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float, wide: bool) -> Tensor:
        values = x.float()
        scale = _inverse(values, eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.eps, ctx.offset = eps, offset
        out = values * scale
        if wide:
            return out.mul_(weight.float() + offset).to(x.dtype)
        out = out.to(x.dtype)
        return out.mul_(weight) if out.dtype == weight.dtype else out * weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        values, gradient, factor = x.float(), gradients[0].float(), weight.float() + ctx.offset
        if torch.is_grad_enabled():  # somebody wants gradients of gradients
            scale = torch.rsqrt(values.square().mean(-1, keepdim=True) + ctx.eps)
        both = gradient * values
        to_weight = to_x = None
        if ctx.needs_input_grad[1]:
            to_weight = (scale.reshape(-1) @ both.reshape(-1, both.shape[-1])).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            # y = w x s with s = (mean x^2 + eps)^(-1/2): dL/dx = s (w g) - x s^3 <w g, x> / d
            along = (both @ factor)[..., None] * scale**3 / -x.shape[-1]
            to_x = torch.addcmul(gradient * factor * scale, values, along).to(x.dtype)
        return to_x, to_weight, None, None, None


def _inverse(values: Tensor, eps: float) -> Tensor:
    """(..., d) -> (..., 1), one over the root of the mean square."""
    norm = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
    return norm.square_().div_(values.shape[-1]).add_(eps).rsqrt_()


def rotated(x: Tensor, cos: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """x cos + (-x2, x1) sin for the halves x1, x2 of the last dimension; first and second are -sin and sin of them."""
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], first)
    out[..., half:].addcmul_(x[..., :half], second)
    return out


class _Rotation(torch.autograd.Function):
    """`rotated`, with a way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, first: Tensor, second: Tensor) -> Tensor:
        ctx.save_for_backward(cos, first, second)
        return rotated(x, cos, first, second)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        cos, first, second = ctx.saved_tensors
        # The transposed rotation is one with the halves' factors exchanged, and differentiable itself.
        return _Rotation.apply(gradients[0], cos, second, first), None, None, None


def _rotary(original: Callable[..., Any]) -> Callable[..., tuple[Tensor, Tensor]]:
    """What stands in for a model's `apply_rotary_pos_emb`."""

    def rotate(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1, **more: Any
    ) -> tuple[Tensor, Tensor]:
        whole = cos.shape[-1] == q.shape[-1] == k.shape[-1] and q.dtype == k.dtype == cos.dtype
        if not whole or cos.requires_grad or sin.requires_grad or more:
            found: tuple[Tensor, Tensor] = original(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim, **more)
            return found
        half = cos.shape[-1] // 2
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        first, second = -sin[..., :half], sin[..., half:]
        return _Rotation.apply(q, cos, first, second), _Rotation.apply(k, cos, first, second)

    return rotate


def touched(model: nn.Module) -> bool:
    """Whether somebody looks into the model's modules, or has put something in the place of what they compute."""
    return any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) for module in model.modules()
    )


# --- what may be replaced --------------------------------------------------------------------------------------------


def _norm(style: Style) -> Callable[[Any, Tensor], Tensor]:
    """What stands in for the forward pass of a class of norms."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return _RMSNorm.apply(hidden_states, self.weight, eps_of(self), *style)  # type: ignore[no-any-return]

    return forward


def eps_of(module: Any) -> float:
    return float(module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps)


@cache
def norm_style(kind: Any) -> Style | None:
    """How a class of norms computes, found out on random input; None if in no way known here, or if it needs more than
    a weight and an epsilon."""
    norm: Any = kind.__new__(kind)
    nn.Module.__init__(norm)
    norm.eps = norm.variance_epsilon = 1e-5
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 16, generator=generator), torch.randn(16, generator=generator)
    for style in STYLES:
        try:
            same = []
            for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 0.0)):
                norm.weight = nn.Parameter(weight.to(dtype))
                with torch.no_grad():
                    wanted = kind.forward(norm, x.to(dtype))
                    found = _norm(style)(norm, x.to(dtype))
                same.append(
                    wanted.dtype == found.dtype and torch.allclose(wanted, found, rtol=tolerance, atol=tolerance)
                )
        except Exception:  # whatever else it wants, it is none of these
            return None
        if all(same):
            return style
    return None


@cache
def _rotates(original: Callable[..., Any]) -> bool:
    """Whether a model's function rotates halves of whole heads."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 3, 5, 8, generator=generator), torch.randn(1, 1, 5, 8, generator=generator)
    cos, sin = torch.randn(2, 1, 5, 8, generator=generator)
    try:
        wanted, found = original(q, k, cos, sin), _rotary(original)(q, k, cos, sin)
        return all(torch.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in zip(wanted, found))
    except Exception:  # it wants something else
        return False


ROTARY = "apply_rotary_pos_emb"
"""What the library's models call their rotation."""

Change = tuple[Any, str, Any]
"""Owner, attribute, what stands there within `fused`."""
_changes: weakref.WeakKeyDictionary[nn.Module, list[Change]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()
_open: Counter[tuple[int, str]] = Counter()
_before: dict[tuple[int, str], Any] = {}


def _found(model: nn.Module) -> list[Change]:
    """What can be replaced in a model."""
    made: list[Change] = []
    kinds: set[Any] = {type(module) for module in model.modules()}
    for kind in kinds:
        if kind.__name__.endswith("RMSNorm") and "forward" in vars(kind) and (style := norm_style(kind)) is not None:
            made.append((kind, "forward", _norm(style)))
    for name in {kind.__module__ for kind in kinds}:
        library = sys.modules[name]
        original = _before.get((id(library), ROTARY), getattr(library, ROTARY, None))
        if original is not None and _rotates(original):
            made.append((library, ROTARY, _rotary(original)))
    return made


@contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """Within the block the model's norms and rotary positions are computed as above, whoever calls them: classes and
    functions of its library are replaced, and put back when the last block that replaced them ends."""
    with _lock:
        if model not in _changes:
            _changes[model] = _found(model)
        changes = _changes[model]
        for owner, name, new in changes:
            at = (id(owner), name)
            if not _open[at]:
                _before[at] = vars(owner)[name]
                setattr(owner, name, new)
            _open[at] += 1
    try:
        yield
    finally:
        with _lock:
            for owner, name, _ in changes:
                at = (id(owner), name)
                _open[at] -= 1
                if not _open[at]:
                    del _open[at]
                    setattr(owner, name, _before.pop(at))
