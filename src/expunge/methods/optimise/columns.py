"""Single neurons' value vectors that move alone: columns of MLP output matrices as parameters of their own.

A gradient mask over the whole matrix would leave AdamW's weight decay at work on what it hides, and hold a gradient and
two moments of every entry. Here the chosen vectors get a shift (c, d) that starts at 0 and is added on the way:

    output = W k + k[chosen] shift

so that gradients, decay and optimiser state exist for nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...subjects.value_vectors import ValueMatrix, vectors

Column = tuple[ValueMatrix, tuple[int, ...]]
"""(matrix, its neurons that move)"""


def take(model: nn.Module, columns: Sequence[Column]) -> tuple[list[nn.Parameter], Callable[[], None]]:
    """Give the vectors shifts that can be trained, in place.

    Returns:
        One parameter (neurons, d) in fp32 for each matrix, and what ends it: the shifts become part of the matrices,
        which are copied first, so that what the model shared with another one stays as it is.
    """
    shifts, handles = [], []
    for matrix, dims in columns:
        module: Any = model.get_submodule(str(matrix.owner))
        module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)
        shift = nn.Parameter(torch.zeros(len(dims), matrix.width, device=module.weight.device))
        handles.append(module.register_forward_hook(_adding(shift, dims)))
        shifts.append(shift)

    def put() -> None:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for (matrix, dims), shift in zip(columns, shifts):
                whole = vectors(model, matrix)
                index = torch.tensor(dims, device=whole.device)
                whole[index] = (whole[index].float() + shift).to(whole.dtype)

    return shifts, put


def _adding(shift: nn.Parameter, dims: tuple[int, ...]) -> Callable[..., Tensor]:
    index = torch.tensor(dims, device=shift.device)

    def hook(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + (arguments[0].index_select(-1, index).float() @ shift).to(output.dtype)

    return hook


def changes(before: nn.Module, after: nn.Module, columns: Sequence[Column]) -> dict[str, dict[str, Tensor]]:
    """Entries of a delta: what changed in the vectors."""
    found: dict[str, dict[str, Tensor]] = {}
    for matrix, dims in columns:
        old, new = vectors(before, matrix), vectors(after, matrix)
        moved = {dim: (new[dim].float() - old[dim].float()).cpu() for dim in dims}
        found |= sparse({matrix.name: [(matrix, dim, change) for dim, change in moved.items() if bool(change.any())]})
    return found


def sparse(moved: dict[str, list[tuple[ValueMatrix, int, Tensor]]]) -> dict[str, dict[str, Tensor]]:
    """Entries of a delta from (matrix, neuron, change (d,)) by parameter; those without any are left out."""
    return {
        name: {
            "index": torch.cat([matrix.places(dim) for matrix, dim, _ in parts]),
            "value": torch.cat([change.float() for *_, change in parts]),
        }
        for name, parts in moved.items()
        if parts
    }
