"""The last MLP of a pass takes only the tokens that somebody reads.

Objectives read the states that predict answers. Prompts are needed for their keys and values, but what the last block's
MLP makes of them goes nowhere: in question-answer rows that is half of its work, forward and backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .anatomy import Block
from .packed import Gathered


def mlp_of(block: Block) -> str | None:
    """The module that holds a block's dense MLP and nothing else; None where there is none."""
    names = [name.split(".") for name in (*block.mlp_in, *block.mlp_gate, *block.mlp_out)]
    if block.experts or not block.mlp_in or not block.mlp_out:
        return None
    alike = 0
    while len({name[alike] for name in names}) == 1:
        alike += 1
    found = ".".join(names[0][:alike])
    return found if found.startswith(block.name + ".") else None


def out_of(block: Block) -> str | None:
    """The module through which the whole of a block's dense MLP gives out; None where there is none."""
    owners = {name.rpartition(".")[0] for name in block.mlp_out}
    return owners.pop() if len(owners) == 1 and mlp_of(block) is not None else None


@contextmanager
def sparing(mlp: nn.Module, read: Tensor) -> Iterator[None]:
    """Within the block an MLP runs on the tokens `read` (m,) alone of all that it is called with (..., d); for others
    it gives zero."""
    shape = torch.Size()

    def gather(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Tensor]:
        nonlocal shape
        (states,) = arguments
        shape = states.shape
        return (Gathered.apply(states.flatten(0, -2), read)[None],)

    def scatter(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return output.new_zeros(shape[:-1].numel(), shape[-1]).index_copy(0, read, output[0]).view(shape)

    handles = [mlp.register_forward_pre_hook(gather), mlp.register_forward_hook(scatter)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
