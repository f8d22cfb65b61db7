"""Passes that start in the middle: at a block, or inside it, at the matrix that its MLP gives out through.

Below the lowest thing that moves every pass gives what the pass before gave. It is stored once and passes start there.
Where of a block nothing moves but that matrix, as in RMU, its attention and what the matrix reads are stored too:

    what the block gives = rest + W read
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import processes
from .packed import TOKEN_BUDGET, Encoded, Pack, batches, in_order, pack
from .protocol import Taps

if TYPE_CHECKING:
    from .language import LanguageModel

Stored = tuple[Tensor, ...]
"""Of a row at its fed tokens: (the block's input (n, d),), or (what it gives without its MLP (n, d), what the MLP's
output matrix reads (n, f))."""


class Start(NamedTuple):
    """Where passes start: at a block, or inside it, at the matrix that its MLP gives out through."""

    layer: int
    inside: bool


@dataclass(frozen=True)
class Entry:
    """What a pass starts from."""

    layer: int
    """Blocks below are not run."""
    states: Tensor
    """(..., tokens, d) input of the block, or its rest where `read` is given."""
    read: Tensor | None = None
    """(..., tokens, f) what the MLP's output matrix reads: nothing else of the block is run."""


class Skipped(nn.Module):
    """Stands in for a block whose output nobody needs; whatever the decoder's loop asks of it the block answers."""

    def __init__(self, block: nn.Module, others: int) -> None:
        super().__init__()
        self.__dict__["block"] = block
        self.others = others

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return hidden_states if self.others < 0 else (hidden_states, *([None] * self.others))


class _Inside(Skipped):
    """Stands in for a block of which only the last matrix is run."""

    def __init__(self, block: nn.Module, others: int, matrix: nn.Module, entry: Entry) -> None:
        super().__init__(block, others)
        self.__dict__["matrix"], self.__dict__["entry"] = matrix, entry

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        entry = self.__dict__["entry"]
        return super().forward(entry.states + self.__dict__["matrix"](entry.read))


@contextmanager
def entering(subject: LanguageModel, entry: Entry | None) -> Iterator[None]:
    """Within the block passes start at an entry, whose states are as the blocks of the pass have them."""
    if entry is None:
        yield
        return
    blocks = subject.blocks
    keys = [block.name.rpartition(".")[2] for block in blocks]
    owner = subject.model.get_submodule(blocks[0].name.rpartition(".")[0])
    before: dict[str, Any] = dict(owner._modules)

    def enter(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
        if arguments:
            return (entry.states, *arguments[1:]), named
        return arguments, {**named, "hidden_states": entry.states}

    others = subject.others  # which looks at block 0 as it is
    with ExitStack() as stack:
        stack.callback(owner._modules.update, before)
        first = before[keys[entry.layer]]
        for key in keys[: entry.layer]:
            owner._modules[key] = Skipped(before[key], others)
        if entry.read is None:
            stack.callback(first.register_forward_pre_hook(enter, with_kwargs=True).remove)
        else:
            matrix = subject.model.get_submodule(str(blocks[entry.layer].out))
            owner._modules[keys[entry.layer]] = _Inside(first, others, matrix, entry)
        yield


def start_of(subject: LanguageModel, layer: int, *, inside: bool) -> Start | None:
    """Where passes start if nothing below block `layer` moves; None: at the bottom.

    Args:
        inside: of that block only the matrix moves that its MLP gives out through.
    """
    # FSDP gathers a block's weights when the block itself is run.
    if inside and not processes.sharding() and subject.can_enter_inside(layer):
        return Start(layer, True)
    return Start(layer, False) if layer and subject.can_enter else None


@torch.no_grad()
def stored(subject: LanguageModel, rows: Sequence[Encoded], start: Start) -> list[Stored]:
    """Per row what passes that start there need of it."""

    def read(group: Sequence[int]) -> list[Stored]:
        pack_ = pack([rows[i] for i in group], subject.device)
        whole = (_inside if start.inside else _below)(subject, pack_, start.layer)
        lengths = [len(rows[i].ids) - 1 for i in group]
        return [tuple(part.clone() for part in parts) for parts in zip(*(values.split(lengths) for values in whole))]

    groups = list(batches(rows, TOKEN_BUDGET))
    return in_order(groups, subject.share(groups, read, of=[row.ids for row in rows], progress=None))


def _below(subject: LanguageModel, pack_: Pack, layer: int) -> Stored:
    return (subject.states(pack_, Taps(final=False, layers=(layer - 1,)))[f"layer.{layer - 1}"],)


def _inside(subject: LanguageModel, pack_: Pack, layer: int) -> Stored:
    found: list[Tensor] = []

    def keep(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        found.append(arguments[0][0])
        return torch.zeros_like(output)

    handle = subject.model.get_submodule(str(subject.blocks[layer].out)).register_forward_hook(keep)
    try:
        rest = subject.states(pack_, Taps(final=False, layers=(layer,)))[f"layer.{layer}"]
    finally:
        handle.remove()
    return rest, found[-1][pack_.every]


def laid(layer: int, rows: Sequence[Stored], pack_: Pack) -> Entry:
    """The entry of a pass over a pack, from what is stored of its rows."""
    # What stands side by side in a row mostly does in the pack.
    spans: list[list[int]] = []
    for row, at in pack_.owner:
        if spans and spans[-1][0] == row and spans[-1][2] == at:
            spans[-1][2] += 1
        else:
            spans.append([row, at, at + 1])
    parts = [tuple(values[start:stop] for values in rows[row]) for row, start, stop in spans]
    return Entry(layer, *map(torch.cat, zip(*parts)))


def enters(subject: LanguageModel, start: Start) -> bool:
    """Whether a pass that starts there equals a whole one."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, subject.vocabulary, (4, 9), generator=generator).tolist()
    rows = [Encoded((*ids[0][:5], *row), 8, 0, "") for row in ids]
    pack_ = pack(rows, subject.device)
    with torch.no_grad():
        whole = subject.hidden_states(pack_).float()
        try:
            entry = laid(start.layer, stored(subject, rows, start), pack_)
            entered = subject.states(pack_, Taps(), entry)["final"].float()
        except Exception:  # any failure means that this model cannot be entered
            return False
    # To the last digits in every precision: what stands between a matrix and the stream can be small in 16 bits.
    return bool((whole - entered).abs().max() <= 1e-5 * whole.abs().max())
