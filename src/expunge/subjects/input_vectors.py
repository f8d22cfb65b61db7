"""A neuron's other vectors: the rows by which it reads the residual stream.

A gated MLP gives out  sum_j act(g_j . x) (u_j . x) v_j: neuron j has a row u_j of the matrix that leads in (up), a row
g_j of the gate, and a value vector v_j (down). Without a gate it is  sum_j act(u_j . x) v_j.

Where gate and up are one matrix, or stacks of experts, nothing in the weights says which is which. The MLP itself does:
what it gives is linear in its up rows, and not in its gate rows. It is tried on one MLP with rows times -1, 1 and 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import SubjectError
from .anatomy import Block, anatomy, plain_attention, transposed
from .routing import takes_choices
from .value_vectors import ValueMatrix, value_matrices

Kind = Literal["up", "gate", "down"]
Holding = Callable[[Sequence[str]], AbstractContextManager[None]]
"""Within it these parameters are there: of a model that is read from disk piece by piece."""
TOKENS = 5
CLEARER = 0.5
"""The up rows' departure from linearity is at most this share of any other candidate's."""


@contextmanager
def present(_: Sequence[str]) -> Iterator[None]:
    """The weights of a loaded model are always there."""
    yield


def neuron_matrices(model: nn.Module, kind: Kind = "up", holding: Holding = present) -> list[ValueMatrix]:
    """Every matrix of a causal language model that holds neurons' vectors of one kind, layer by layer.

    Raises:
        SubjectError: there is none (a model without gates), or gate and up rows cannot be told apart.
    """
    found = value_matrices(model) if kind == "down" else _leading_in(model, kind, holding)
    if not found:
        raise SubjectError(f"{type(model).__name__} has no {kind} matrix in its MLPs; it has up and down")
    return found


def reading_matrices(model: nn.Module) -> list[ValueMatrix]:
    """Every matrix by whose rows MLPs read the residual stream: gates, where there are any, then up matrices.

    Raises:
        SubjectError: gate and up rows cannot be told apart.
    """
    return [*_leading_in(model, "gate", present), *_leading_in(model, "up", present)]


def _leading_in(model: nn.Module, kind: Kind, holding: Holding) -> list[ValueMatrix]:
    outputs = value_matrices(model)
    told: dict[int, int] = {}
    found: list[ValueMatrix] = []
    for block in anatomy(model).blocks:
        here = [matrix for matrix in outputs if matrix.layer == block.index]
        found += _dense(model, block, kind, [m for m in here if m.expert is None], holding, told)
        found += _experts(model, block, kind, [m for m in here if m.expert is not None], holding, told)
    return found


def _dense(
    model: nn.Module, block: Block, kind: Kind, outputs: list[ValueMatrix], holding: Holding, told: dict[int, int]
) -> list[ValueMatrix]:
    names = [name for name in (block.mlp_in if kind == "up" else block.mlp_gate) if name.endswith(".weight")]
    both = set(block.mlp_in) & set(block.mlp_gate)
    found = []
    for name, output in zip(names, outputs):
        module: nn.Module = model.get_submodule(name.rpartition(".")[0])
        matrix = replace(output, name=name, across=transposed(module))
        if name in both:
            options = _halves(matrix)
            around = _common([name, output.name])
            found.append(options[_which(model, options, kind, around, holding, told)])
        else:
            found.append(matrix)
    return found


def _experts(
    model: nn.Module, block: Block, kind: Kind, outputs: list[ValueMatrix], holding: Holding, told: dict[int, int]
) -> list[ValueMatrix]:
    if not outputs:
        return []
    options: list[list[ValueMatrix]] = []  # for each expert every candidate
    for output in outputs:
        options.append(_stacks(model, block, output) if output.fused else _modules(model, block, output))
    first = options[0]
    if len(first) < 2:  # no gate
        return [several[0] for several in options if several and kind == "up"]
    around = (
        first[0].name.rpartition(".")[0] if outputs[0].fused else _common([*(m.name for m in first), outputs[0].name])
    )
    which = _which(model, first, kind, around, holding, told)
    return [several[which] for several in options]


def _stacks(model: nn.Module, block: Block, output: ValueMatrix) -> list[ValueMatrix]:
    """Where an expert's rows may be, of fused experts."""
    found: list[ValueMatrix] = []
    for name in block.experts:
        shape = model.get_parameter(name).shape
        if len(shape) != 3 or name == output.name:
            continue
        across = shape[1] == output.width if shape[1] != shape[2] else not output.across
        matrix = replace(output, name=name, across=across)
        found += [matrix] if shape[2 if across else 1] == output.count else _halves(matrix)
    return found


def _modules(model: nn.Module, block: Block, output: ValueMatrix) -> list[ValueMatrix]:
    """... of experts that are modules of their own."""
    inside = output.name.rpartition(".")[0].rpartition(".")[0] + "."
    found = []
    for name in block.experts:
        module: nn.Module = model.get_submodule(name.rpartition(".")[0])
        if name.startswith(inside) and name.endswith(".weight") and name != output.name:
            found.append(replace(output, name=name, across=transposed(module)))
    return found


def _halves(matrix: ValueMatrix) -> list[ValueMatrix]:
    """One after the other, or in turn."""
    count = matrix.count
    parts = ((0, 1, 2 * count), (count, 1, 2 * count), (0, 2, 2 * count), (1, 2, 2 * count))
    return [replace(matrix, part=part) for part in parts]


def _common(names: Sequence[str]) -> str:
    """The innermost module that holds all of these parameters."""
    parts = [name.split(".")[:-2] for name in names]
    shared = next((i for i, several in enumerate(zip(*parts)) if len(set(several)) > 1), min(map(len, parts)))
    return ".".join(parts[0][:shared])


def _which(
    model: nn.Module, options: Sequence[ValueMatrix], kind: Kind, around: str, holding: Holding, told: dict[int, int]
) -> int:
    """Which candidate holds the rows; tried once for MLPs of one form.

    Raises:
        SubjectError: the MLP does not run alone, or no candidate is clearly the up rows.
    """
    form = hash(tuple((option.name.rpartition(".")[2], option.part, option.fused) for option in options))
    if form not in told:
        module: nn.Module = model.get_submodule(around)
        names = [f"{around}.{name}" for name, _ in module.named_parameters()]
        with holding(names):
            try:
                found = [_bend(module, option, option.name.removeprefix(around + ".")) for option in options]
            except Exception as error:  # any failure means that this module does not run by itself
                raise SubjectError(f"{around}: gate and up rows cannot be told apart ({str(error)[:120]})") from None
        order = sorted(range(len(options)), key=lambda i: found[i])
        if not found[order[0]] <= CLEARER * found[order[1]]:
            shown = ", ".join(f"{value:.3f}" for value in found)
            raise SubjectError(f"{around}: gate and up rows cannot be told apart (departures from linearity {shown})")
        told[form] = order[0]
    up = told[form]
    # Halves go in pairs: 0 with 1, 2 with 3; so do two matrices.
    return up if kind == "up" else up ^ 1


@torch.no_grad()
def _bend(module: nn.Module, option: ValueMatrix, name: str) -> float:
    """How far the module's output is from linear in these rows: 0 where it is."""
    parameter = module.get_parameter(name)
    draw = torch.Generator().manual_seed(0)

    def run(factor: float) -> Tensor:
        changed = parameter.detach().clone()
        rows = changed.transpose(-1, -2) if option.across else changed
        first, step, _ = option.part or (0, 1, option.count)
        rows[..., first::step, :][..., : option.count, :] *= factor
        return _plain(torch.func.functional_call(module, {name: changed}, arguments)).float()

    x = 2 * torch.randn(TOKENS, option.width, generator=draw)
    x = x.to(parameter.device, parameter.dtype)
    arguments: tuple[Any, ...] = (x[None],)
    if option.fused and takes_choices(type(module)):
        arguments = (x, torch.zeros(TOKENS, 1, dtype=torch.long, device=x.device), x.new_ones(TOKENS, 1))
    elif option.fused:
        arguments = (x.repeat(len(parameter), 1),)
    back, same, twice = (run(factor) for factor in (-1.0, 1.0, 2.0))
    straight = (same - back) / 2
    return float((twice - same - straight).norm() / straight.norm().clamp_min(1e-30))


def _plain(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def front_norm(model: nn.Module) -> str:
    """Path, inside a block, of the norm whose output the block's MLP reads.

    Raises:
        SubjectError: the MLP reads no norm's output as it is.
    """
    block = anatomy(model).blocks[0]
    readers = {name.rpartition(".")[0] for name in (*block.mlp_in, *block.mlp_gate, *block.router, *block.experts)}
    given: dict[int, tuple[str, Tensor]] = {}
    found: list[str] = []

    def leave(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            given[_place(_plain(output))] = path, _plain(output)

        return hook

    def enter(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        tensors = [value for value in (*arguments, *named.values()) if isinstance(value, Tensor)]
        found.extend(given[_place(tensor)][0] for tensor in tensors[:1] if _place(tensor) in given)

    owners = {name.rpartition(".")[0] for name in block.norm}
    handles: list[Any] = []
    for path in owners:
        handles.append(model.get_submodule(path).register_forward_hook(leave(path)))
    for path in readers:
        handles.append(model.get_submodule(path).register_forward_pre_hook(enter, with_kwargs=True))
    ids = torch.zeros(1, TOKENS, dtype=torch.long, device=next(model.parameters()).device)
    try:
        # Without weights experts cannot be chosen; norms come before them.
        with torch.no_grad(), plain_attention(model), suppress(Exception):
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise SubjectError(f"{type(model).__name__}: no norm stands right in front of its MLPs; use norm none or final")
    return found[0].removeprefix(block.name + ".")


def _place(tensor: Tensor) -> int:
    """Equal for views of one tensor, with and without memory."""
    return int(tensor.untyped_storage()._cdata)
