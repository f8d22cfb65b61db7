"""Activation patching: another model's states put into a host, one block at a time (arXiv:2605.24614, section 3).

For every row the host reads its fact once as it is and once per block l, with the donor's output of block l at the
tokens that predict the fact. All variants of a row are branches of one prompt in one packed pass: what stands before
these tokens is computed once, and a hook at block l changes the tokens of variant l only. The last block's states are
patched before the final norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import MismatchError, RowError
from ..rows import Row
from .packed import TOKEN_BUDGET, Encoded, in_order, pack
from .protocol import innermost

if TYPE_CHECKING:
    from .language import LanguageModel
    from .protocol import Progress


def fact(subject: LanguageModel, row: Row) -> Encoded:
    """The row up to the end of its fact, whose tokens are the scored ones: its value where the answer says it.

    A row without a value, or whose answer words it differently, is scored from the first token of its answer on.

    Raises:
        RowError: as `encode`.
    """
    encoded = subject.encode(row)
    text, spans = subject.spans(row)
    begin = text.index(row.answer, spans[encoded.start][0])
    at = row.answer.find(row.value) if row.value else -1
    if at < 0:
        return replace(encoded, ids=encoded.ids[: len(encoded.ids) - encoded.closing], closing=0)
    first, last = begin + at, begin + at + len(row.value)
    tokens = [i for i, (start, stop) in enumerate(spans) if start < last and stop > first]
    if not tokens or tokens[0] < 1:
        raise RowError(f"{row.source or f'row {row.id}'}: nothing stands before the value {row.value!r}")
    return Encoded(encoded.ids[: tokens[-1] + 1], tokens[0], 0, row.value)


@torch.no_grad()
def patched(
    host: LanguageModel, donor: LanguageModel, rows: Sequence[Encoded], *, progress: Progress | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """((rows,) mean log-probability of the scored tokens under the host, (rows, blocks) the same patched).

    Raises:
        MismatchError: the models have other shapes.
    """
    host = innermost(host)
    shapes = [(len(model.blocks), model.model.config.get_text_config().hidden_size) for model in (host, donor)]
    if shapes[0] != shapes[1]:
        raise MismatchError(
            f"{donor.name} has {shapes[1][0]} blocks of width {shapes[1][1]}, {host.name} has {shapes[0][0]} of "
            f"{shapes[0][1]}: states of one cannot be put into the other"
        )
    blocks = shapes[0][0]
    groups = _groups(rows, blocks + 1) if host.mode != "rows" else [[i] for i in range(len(rows))]
    run = _packed if host.mode != "rows" else _alone

    def read(group: Sequence[int]) -> list[np.ndarray]:
        chosen = [rows[i] for i in group]
        from .protocol import Taps

        taps = Taps(final=False, layers=tuple(range(blocks)), positions="answer")
        if donor is host:  # its own states change nothing
            return list(run(host, chosen, []).repeat(blocks + 1, axis=1))
        states = donor.states(pack(chosen, donor.device), taps)
        return list(run(host, chosen, [states[f"layer.{block}"] for block in range(blocks)]))

    of = [[row.ids for row in rows], donor.name]
    found = in_order(groups, host.share(groups, read, of=of, progress=progress))
    table = np.stack(found) if found else np.zeros((0, blocks + 1), np.float32)
    return table[:, 0], table[:, 1:]


def _groups(rows: Sequence[Encoded], variants: int) -> list[list[int]]:
    found: list[list[int]] = []
    used = TOKEN_BUDGET
    for index in sorted(range(len(rows)), key=lambda i: len(rows[i].ids)):
        cost = rows[index].start + variants * rows[index].scored
        if not found or used + cost > TOKEN_BUDGET:
            found.append([])
            used = 0
        found[-1].append(index)
        used += cost
    return found


def _put(states: Tensor, places: Tensor) -> Callable[..., Any]:
    """A hook that replaces what a block gives at these tokens of its (1, tokens, d) output."""

    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[0, places] = states.to(hidden.dtype)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    return hook


def _packed(host: LanguageModel, rows: Sequence[Encoded], states: Sequence[Tensor]) -> np.ndarray:
    """(rows, blocks + 1): every row and all its variants in one pass."""
    variants = len(states) + 1
    # The token before the fact predicts it, so it belongs to what is patched.
    split = [replace(row, start=row.start - 1) for row in rows for _ in range(variants)]
    pack_ = pack(split, host.device, sharing="prompts")
    # The first scored token of such a row is that token itself, which nobody asks about.
    places = [at[1:] for at in pack_.predict.split([row.scored for row in split])]
    with ExitStack() as stack:
        stack.enter_context(host.packing(pack_))
        for block, part in enumerate(states):
            hook = _put(part, torch.cat(places[block + 1 :: variants]))
            stack.callback(_block(host, block).register_forward_hook(hook).remove)
        hidden = host.run_decoder(pack_)
    at = torch.cat(places)
    target = torch.tensor([token for row in split for token in row.ids[row.start + 1 :]], device=host.device)
    logprob = host.statistics(hidden[at], target, torch.arange(len(at), device=host.device))[0]
    parts = logprob.split([len(place) for place in places])
    return torch.stack([part.mean() for part in parts]).view(len(rows), variants).cpu().numpy()


def _alone(host: LanguageModel, rows: Sequence[Encoded], states: Sequence[Tensor]) -> np.ndarray:
    """(1, blocks + 1): one row, a pass for each variant."""
    (row,) = rows
    target = torch.tensor(row.ids[row.start :], device=host.device)
    order = torch.arange(len(target), device=host.device)
    found = []
    for block in range(-1, len(states)):
        with ExitStack() as stack:
            if block >= 0:
                hook = _put(states[block], order + row.start - 1)
                stack.callback(_block(host, block).register_forward_hook(hook).remove)
            hidden = host.plain_states(row)
        found.append(host.statistics(hidden, target, order)[0].mean())
    return torch.stack(found)[None].cpu().numpy()


def _block(host: LanguageModel, block: int) -> nn.Module:
    return host.model.get_submodule(host.blocks[block].name)
