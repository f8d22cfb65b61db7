"""Experts that move alone: slices of fused expert tensors as parameters of their own.

Mixtures of experts keep the experts of a layer in tensors (E, ...). If such a tensor simply moved, all E experts would
get gradients and optimiser state. `take` makes each chosen expert's slices leaf parameters: views into the tensor, so
that passes without gradients run as ever and see what was trained. In passes with gradients

    output = experts(x, chosen, w with 0 at the experts taken) + sum_e expert_e(x_e) w_e

with the frozen tensors in the first term and the parameters in the second: no gradient is larger than one expert. The
second term runs the module's own code on a module with a single expert, so layouts, biases and activations of every
model family stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ...subjects.anatomy import Block
from ...subjects.routing import takes_choices

Slice = tuple[str, tuple[int, ...], tuple[int, ...]]
"""(parameter name, places on its first axis, shape of what moves (len(places), ...))"""


@dataclass(frozen=True)
class Experts:
    """The routed experts of one block."""

    count: int
    fused: tuple[str, ...]
    """Parameters (E, ...) that hold all experts."""
    own: tuple[tuple[str, ...], ...]
    """Parameters of every expert, where each is a module."""
    router: tuple[str, ...]
    """The matrix with one row per expert, and its bias."""


def experts(model: nn.Module, block: Block) -> Experts | None:
    """What is known about a block's experts; None in a dense block."""
    if not block.experts:
        return None
    shapes = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
    fused: tuple[str, ...] = tuple(name for name in block.experts if len(shapes[name]) == 3)
    own: tuple[tuple[str, ...], ...] = ()
    if fused:
        count = shapes[fused[0]][0]
        fused = tuple(name for name in block.experts if shapes[name][0] == count)
    else:
        path = next(
            path
            for path, module in model.named_modules()
            if isinstance(module, nn.ModuleList) and path.startswith(block.name + ".") and _inside(path, block.experts)
        )
        count = len(model.get_submodule(path))  # type: ignore[arg-type]
        own = tuple(
            tuple(name for name in block.experts if name.startswith(f"{path}.{index}.")) for index in range(count)
        )
    # A gate on a shared expert stands beside the router and has one row.
    owners = {n.rpartition(".")[0] for n in block.router if len(shapes[n]) == 2 and shapes[n][0] == count}
    return Experts(count, fused, own, tuple(n for n in block.router if n.rpartition(".")[0] in owners))


def _inside(path: str, names: Sequence[str]) -> bool:
    return any(name.startswith(path + ".") for name in names)


# --- taking and putting back ---------------------------------------------------------------------------------------


def take(model: nn.Module, slices: Sequence[Slice]) -> list[nn.Parameter]:
    """Make the slices parameters that can be trained, in place; one for each tensor and place, in this order.

    The tensors are copied first: what the model shared with another one stays as it is. The model's own parameters are
    as many as before, under the same names, and always hold the slices' values.
    """
    made = []
    for name, places, _ in slices:
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        whole = nn.Parameter(getattr(module, key).detach().clone(), requires_grad=False)
        setattr(module, key, whole)
        if not isinstance(module, _Taken):
            module.__class__ = _taken(type(module))  # type: ignore[arg-type]
            module.__dict__["taken"] = {}
        for place in places:
            leaf = nn.Parameter(whole.detach()[place])
            module.__dict__["taken"].setdefault(place, {})[key] = leaf
            made.append(leaf)
    return made


def put(model: nn.Module) -> None:
    """End what `take` began: the fused tensors hold the trained values and are ordinary again."""
    for module in model.modules():
        if isinstance(module, _Taken):
            module.__class__ = module.kind  # type: ignore[assignment]
            del module.__dict__["taken"]


def changes(before: nn.Module, after: nn.Module, slices: Sequence[Slice]) -> dict[str, dict[str, Tensor]]:
    """Entries of a delta: what changed in the slices."""
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    found: dict[str, dict[str, Tensor]] = {}
    for name, places, _ in slices:
        index = torch.tensor(places, device=old[name].device)
        difference = new[name].detach()[index].float() - old[name].detach()[index].float()
        if bool(difference.any()):
            found[name] = {"difference": difference.cpu(), "slice": index.cpu()}
    return found


# --- the passes ----------------------------------------------------------------------------------------------------


class _Taken(nn.Module):
    """Stands before the class of an experts module of which some experts are parameters of their own."""

    kind: type[nn.Module]
    """The module's class without this."""
    routed: bool
    """Whether it is called with (hidden states, chosen experts, their weights)."""
    taken: dict[int, dict[str, nn.Parameter]]
    """Expert to its parameters by name."""

    def forward(self, *arguments: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled() or not self._in_force():
            return self.kind.forward(self, *arguments, **named)
        if not self.routed or len(arguments) != 3:
            return self.kind.forward(_with(self, dict(self._whole())), *arguments, **named)
        hidden, index, weights = arguments
        frozen = weights.masked_fill(torch.isin(index, torch.tensor([*self.taken], device=index.device)), 0)
        output = self.kind.forward(self, hidden, index, frozen)
        for place, own in self.taken.items():
            token, slot = torch.where(index == place)
            if len(token) == 0:  # gradients of zero, rather than none
                output = output + sum(0 * leaf.view(-1)[0] for leaf in own.values())
                continue
            one = _with(self, {key: leaf[None] for key, leaf in own.items()})
            one.num_experts = 1
            found = self.kind.forward(one, hidden[token], torch.zeros_like(token)[:, None], weights[token, slot, None])
            output = output.index_add(0, token, found.to(output.dtype))
        return output

    def _in_force(self) -> bool:
        """A copy of a model, or one that was moved, has tensors that no longer are one with the parameters: there the
        tensors count."""
        return all(
            leaf.data_ptr() == getattr(self, key)[place].data_ptr()
            for place, own in self.taken.items()
            for key, leaf in own.items()
        )

    def _whole(self) -> Iterator[tuple[str, Tensor]]:
        """Fused tensors with the parameters laid in, for modules of another kind (Llama 4): needs a copy of each."""
        for key in next(iter(self.taken.values())):
            places = torch.tensor([*self.taken], device=getattr(self, key).device)
            own = torch.stack([leaves[key] for leaves in self.taken.values()])
            yield key, getattr(self, key).detach().index_copy(0, places, own)


@cache
def _taken(kind: type[nn.Module]) -> type[_Taken]:
    inside = {"kind": kind, "routed": takes_choices(kind), "__module__": kind.__module__}
    return type(kind.__name__, (_Taken, kind), inside)


def _with(module: _Taken, tensors: dict[str, Tensor]) -> Any:
    """A shallow copy with other tensors, of the class the module had before."""
    made: Any = copy.copy(module)
    made.__class__ = module.kind
    made._parameters = {**module._parameters, **tensors}
    return made
