"""Adapters that start in the base weight's principal directions, plain (PiSSA) or weighted by Fisher information.

LoRA's usual start, B = 0, learns slowly. Here B A starts as the best rank-r part of the weight, and the base weight
keeps the rest, so that the model computes the same at step 0:

    U S V^T ~ diag(d) W          (out, r), (r,), (r, in): the r largest singular values
    B = diag(1 / (d + eps)) U sqrt(S / s)        A = sqrt(S / s) V^T        s = alpha / r
    W <- W - s B A

pissa: d = 1 (Meng et al. 2024). fila (Cha et al. 2025): rows that forget rows use more than retain rows weigh more,

    F = sum over rows n_row (gradient of the row's mean NLL)^2 / sum of n_row        n_row: answer tokens
    d = sqrt(row sums of F_forget / (F_retain + eps))

with gradients of single rows: squares of batch means would shrink with the batch and let signs cancel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import RequestError, TrainingError
from ...subjects.language import LanguageModel
from ...subjects.packed import Encoded, pack
from .scope import PRINCIPAL, LoraSpec
from .terms import chunked, token_logprob

EPSILON = 1e-5
FISHER_BYTES = 4 << 30
"""Squared gradients held at once; with more, rows run once for every group of matrices."""
EXACT = 2048
"""Matrices with both sides below this are decomposed exactly."""
OVERSAMPLING, ITERATIONS = 8, 4


def start(
    subject: LanguageModel,
    spec: LoraSpec,
    forget: Sequence[Encoded] = (),
    retain: Sequence[Encoded] = (),
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Give fresh adapters the start that `spec.init` asks for, in place; others than pissa and fila are left alone.

    Base weights are replaced, not written to: models that share them stay as they are. No reference may be taken with
    adapters switched off afterwards: what is left then is W - s B A.

    Args:
        subject: the working copy, with peft's adapters on `spec.targets`, B still 0.
        forget, retain: what fila measures; as many retain rows as forget rows are drawn.

    Returns:
        For the report: init, rows measured, and the share of each matrix (weighted by d) outside its rank-r part.
    """
    if spec.init not in PRINCIPAL:
        return {}
    weights: dict[str, Tensor] = {}
    about: dict[str, Any] = {"init": spec.init}
    if spec.init == "fila":
        if not forget:
            raise RequestError("lora(init=fila) measures forget rows, and there are 0; expected at least 1")
        if len(retain) > len(forget):
            generator = torch.Generator().manual_seed(seed)
            chosen = torch.randperm(len(retain), generator=generator)[: len(forget)].tolist()
            retain = [retain[i] for i in sorted(chosen)]
        weights = importance(subject, spec, forget, retain)
        about["rows"] = {"forget": len(forget), "retain": len(retain)}
        if not retain:
            about["warnings"] = [
                "lora(init=fila) without retain rows: d from the forget rows' Fisher information alone"
            ]
    rest = {name: principal(subject.model.get_submodule(name), weights.get(name), spec, seed) for name in spec.targets}
    about["outside"] = {"mean": sum(rest.values()) / len(rest), "largest": max(rest.values())}
    return about


def low_rank(layer: Any, *, transposed: bool) -> dict[str, Tensor] | None:
    """A delta's entry for an adapted layer, from the untouched base weight; None where nothing changed.

    After `start` it has rank 2r: the adapter as it is, minus the adapter as it started.
    """
    a, b = _factors(layer)
    begun = layer.__dict__.get("start")
    if begun is None:
        changed = bool(b.any())
    else:
        changed = not (torch.equal(a, begun[0]) and torch.equal(b, begun[1]))
        a, b = torch.cat([a, begun[0]]), torch.cat([b, -begun[1]], dim=1)
    if not changed:
        return None
    a, b = a.float().cpu(), b.float().cpu()
    if transposed:  # the layer keeps (in, out): (B A)^T = A^T B^T
        a, b = b.T, a.T
    return {"A": a, "B": b, "scale": torch.tensor(float(layer.scaling["default"]))}


# --- importance ------------------------------------------------------------------------------------------------------


def importance(
    subject: LanguageModel, spec: LoraSpec, forget: Sequence[Encoded], retain: Sequence[Encoded]
) -> dict[str, Tensor]:
    """d (out,) of every target.

    Raises:
        TrainingError: a gradient is not finite.
    """
    found = {}
    for names in _groups(subject.model, spec.targets):
        tensors = [_base(subject.model.get_submodule(name)).weight for name in names]
        on_forget = _fisher(subject, names, tensors, forget)
        on_retain = _fisher(subject, names, tensors, retain) if retain else None
        for index, name in enumerate(names):
            ratio = on_forget[index]
            if on_retain is not None:
                ratio = ratio / (on_retain[index] + EPSILON)
            found[name] = ratio.sum(0 if spec.transposed else 1).sqrt()
    return found


def _groups(model: nn.Module, targets: Sequence[str]) -> Iterator[list[str]]:
    """Targets whose Fisher information for both kinds of rows, and gradients, fit `FISHER_BYTES`."""
    group: list[str] = []
    size = 0
    for name in targets:
        more = 3 * 4 * _base(model.get_submodule(name)).weight.numel()
        if group and size + more > FISHER_BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size += more
    yield group


def _fisher(
    subject: LanguageModel, names: Sequence[str], tensors: Sequence[Tensor], rows: Sequence[Encoded]
) -> list[Tensor]:
    """F of every tensor, in its shape, fp32."""
    found = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in tensors]
    total = sum(row.scored for row in rows)
    flags = [tensor.requires_grad for tensor in tensors]
    for tensor in tensors:
        tensor.requires_grad_(True)
    try:
        for row in rows:
            packed = pack([row], subject.device)
            states = subject.hidden_states(packed)
            logprob = chunked(lambda h, t: token_logprob(subject.head, h, t), states, packed.target, subject.vocabulary)
            gradients = torch.autograd.grad(-logprob.mean(), tensors, allow_unused=True)
            for sum_, gradient in zip(found, gradients):
                if gradient is not None:
                    sum_.addcmul_(gradient.float(), gradient.float(), value=row.scored / total)
    finally:
        for tensor, flag in zip(tensors, flags):
            tensor.requires_grad_(flag)
    for name, values in zip(names, found):
        if not torch.isfinite(values).all():
            raise TrainingError(
                f"lora(init=fila): the gradient of {name} is not finite; load the model in fp32 or bf16"
            )
    return found


# --- principal parts -------------------------------------------------------------------------------------------------


@torch.no_grad()
def principal(layer: Any, d: Tensor | None, spec: LoraSpec, seed: int) -> float:
    """Move the rank-r part of diag(d) W into the layer's adapter.

    Args:
        layer: peft's layer.
        d: (out,) weights of rows; None, or nothing but zeros (no gradient arrives here), for all alike.

    Returns:
        |diag(d) (W - s B A)| / |diag(d) W|, Frobenius norms.
    """
    base = _base(layer)
    weight = base.weight.detach().float()
    matrix = weight.T if spec.transposed else weight
    d = matrix.new_ones(len(matrix)) if d is None or not bool(d.any()) else d.float()
    u, s, v = _decomposed(d[:, None] * matrix, spec.r, seed)
    root = (s / layer.scaling["default"]).sqrt()
    a, b = _factors(layer)
    # Of rank below r, the rest of the adapter starts as LoRA does.
    b[:, : len(s)] = u * root / (d[:, None] + EPSILON)
    a[: len(s)] = root[:, None] * v.T
    layer.__dict__["start"] = (a.clone(), b.clone())
    # From the factors as they are stored, so that rounding them to 16 bits changes nothing.
    rest = matrix - layer.scaling["default"] * (b.float() @ a.float())
    stored = rest.T if spec.transposed else rest
    base.weight = nn.Parameter(stored.to(base.weight.dtype).contiguous(), requires_grad=False)
    return float((d[:, None] * rest).norm() / (d[:, None] * matrix).norm().clamp_min(1e-30))


def _decomposed(matrix: Tensor, r: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (rows, k), S (k,), V (columns, k) of the k = min(r, rows, columns) largest singular values."""
    if max(matrix.shape) < EXACT:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u[:, :r], s[:r], vh[:r].T
    count = min(r + OVERSAMPLING, *matrix.shape)
    generator = torch.Generator().manual_seed(seed)
    sketch = torch.randn(matrix.shape[1], count, generator=generator).to(matrix.device)
    basis = torch.linalg.qr(matrix @ sketch).Q
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    u, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return (basis @ u)[:, :r], s[:r], vh[:r].T


def _base(layer: Any) -> Any:
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def _factors(layer: Any) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r), as views."""
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
