"""Tails: what a change of one token at one layer does to the final states, computed from that token on.

A text is read once. What stands before the token does not depend on it, nor does anything below the layer: a change is
carried through the later tokens and the blocks above alone, and gradients go no further. In the last block the MLP runs
only where states are read: nothing looks at what it gives elsewhere.

    text      The  birthplace  of  Orin  Valk | was  born  in
    read once  .       .        .    .    .   |  .    .    .      all blocks; keys and values are kept
    each step                            +d   |  .    .    .      blocks above the layer

The change is added to what the MLP of the layer gives. Where that is nothing but added to the residual stream, the
blocks above start from the stream, those of the common kind as one function (plain_tail.py); where a norm follows the
MLP (Gemma 2, OLMo 2), and in models whose keys and values cannot be cut, whole texts run. Which it is, is tried on the
model itself.
"""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..errors import SubjectError
from .anatomy import anatomy
from .entering import Skipped
from .language import LanguageModel, _Stop, cache_name
from .plain_tail import PlainTail
from .sparing import sparing
from .value_vectors import ValueMatrix, value_matrices

Text = Sequence[int]


def edited_matrix(subject: LanguageModel, layer: int) -> ValueMatrix:
    """The output matrix of one dense MLP.

    Raises:
        SubjectError: there is no such layer, or it is a mixture of experts.
    """
    matrices = value_matrices(subject.model)
    depth = 1 + max(matrix.layer for matrix in matrices)
    here = [matrix for matrix in matrices if matrix.layer == layer]
    if not here:
        raise SubjectError(f"{subject.name} has layers 0-{depth - 1}, there is no layer {layer}")
    if len(here) > 1 or here[0].expert is not None:
        dense = sorted({m.layer for m in matrices} - {m.layer for m in matrices if m.expert is not None})
        others = f"; dense layers: {', '.join(map(str, dense))}" if dense else "; it has no dense layer"
        raise SubjectError(
            f"layer {layer} of {subject.name} is a mixture of experts: a fact stands in the experts that its tokens "
            f"take, and edits are of dense MLPs{others}"
        )
    return here[0]


@dataclass(frozen=True)
class Looked:
    """What one token of each text shows at some layers."""

    keys: dict[int, Tensor]
    """Layer to (n, f): what goes into the MLP's output matrix, fp32."""
    values: dict[int, Tensor]
    """Layer to (n, d): what comes out of it."""
    streams: dict[int, Tensor]
    """Layer to (n, d): the residual stream after the block."""


class _Fixed(DynamicLayer):
    """Keys and values that nothing is added to: every pass goes on from the same ones."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, key_states], 2), torch.cat([self.values, value_states], 2)


def padded(texts: Sequence[Text], device: torch.device) -> Tensor:
    """(n, longest) token ids. Nothing looks ahead, so what fills the end of shorter texts changes nothing before it."""
    width = max(map(len, texts))
    return torch.tensor([[*text, *[0] * (width - len(text))] for text in texts], device=device)


@contextmanager
def hooked(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _plain(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def look(
    subject: LanguageModel,
    texts: Sequence[Text],
    at: Sequence[int],
    layers: Sequence[int],
    *,
    rows: Sequence[int] | None = None,
) -> Looked:
    """One pass that ends after the highest layer.

    Args:
        at: tokens that are looked at: one of each text, or of the texts in `rows`.
    """
    seen, handles = _watched(subject, layers)

    def stop(*_: Any) -> None:
        raise _Stop

    handles.append(subject.model.get_submodule(subject.blocks[max(layers)].name).register_forward_hook(stop))
    with hooked(handles), suppress(_Stop):
        subject.decoder(input_ids=padded(texts, subject.device), use_cache=False)
    return _looked(seen, len(texts), at, rows)


Seen = dict[str, dict[int, Tensor]]


def _watched(subject: LanguageModel, layers: Sequence[int]) -> tuple[Seen, list[Any]]:
    seen: Seen = {"keys": {}, "values": {}, "streams": {}}

    def reading(layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            seen["keys"][layer], seen["values"][layer] = arguments[0], _plain(output)

        return hook

    def leaving(layer: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            seen["streams"][layer] = _plain(output)

        return hook

    handles = []
    for layer in layers:
        owner = subject.model.get_submodule(str(edited_matrix(subject, layer).owner))
        handles.append(owner.register_forward_hook(reading(layer)))
        handles.append(subject.model.get_submodule(subject.blocks[layer].name).register_forward_hook(leaving(layer)))
    return seen, handles


def _looked(seen: Seen, count: int, at: Sequence[int], rows: Sequence[int] | None = None) -> Looked:
    lines, columns = torch.arange(count) if rows is None else torch.tensor(rows), torch.tensor(at)

    def picked(found: dict[int, Tensor]) -> dict[int, Tensor]:
        # Some MLPs see tokens of all rows in one axis.
        return {
            layer: t.reshape(count, -1, t.shape[-1])[lines.to(t.device), columns.to(t.device)].float()
            for layer, t in found.items()
        }

    return Looked(*(picked(seen[name]) for name in ("keys", "values", "streams")))


class Tails:
    """Texts that were read, and how their final states move with a change of one token of each."""

    def __init__(
        self,
        subject: LanguageModel,
        texts: Sequence[Text],
        at: Sequence[int],
        layer: int,
        read: Sequence[Sequence[int]],
    ) -> None:
        """
        Args:
            texts: token ids; all of them are fed.
            at: per text the token that changes.
            layer: the MLP that gives the change.
            read: per text the tokens whose final states are wanted, none before `at`.

        Raises:
            SubjectError: there is no such dense layer.
        """
        self.subject, self.texts, self.at, self.layer = subject, texts, list(at), layer
        self.matrix = edited_matrix(subject, layer)
        self.rest = max(len(text) - first for text, first in zip(texts, at))
        """Tokens of the longest tail."""
        places = [i * self.rest + place - at[i] for i, several in enumerate(read) for place in several]
        self.read = torch.tensor(places, dtype=torch.long, device=subject.device)
        ids = padded(texts, subject.device)
        blocks = subject.blocks
        sparable = layer < len(blocks) - 1 and subject.can_spare
        self.mlp = subject.model.get_submodule(str(blocks[-1].mlp)) if sparable else None
        """The last one, where it may take only the tokens that are read."""
        every = [i * ids.shape[1] + place for i, several in enumerate(read) for place in several]
        fed = torch.tensor(every, dtype=torch.long, device=subject.device)
        seen, handles = _watched(subject, [layer])
        cache = DynamicCache()
        more: dict[str, Any] = {"use_cache": True, cache_name(subject.decoder): cache}
        with torch.no_grad(), hooked(handles), self._sparing(fed):
            clean = subject.decoder(input_ids=ids, **more).last_hidden_state
        self.looked = _looked(seen, len(texts), at)
        # (n, rest) where each tail's tokens stand in its text; behind its end the last one again.
        steps = torch.tensor(self.at, device=subject.device)[:, None] + torch.arange(self.rest, device=subject.device)
        self.columns = steps.clamp_max(ids.shape[1] - 1)
        self.lines = torch.arange(len(texts), device=subject.device)[:, None]
        self.clean = self._wanted(clean[self.lines, self.columns])
        """(states read, d) as they are."""
        self.stream = seen["streams"][layer][self.lines, self.columns]
        self.plain: PlainTail | None = None
        self._pass: Callable[..., Tensor] = self._whole
        if self._can_cut(cache):
            self._cut(cache)
            self._pass = self._first

    def states(self, change: Tensor) -> Tensor:
        """(states read, d) where `change` (n, d) is added to what the MLP gives at each text's token."""
        return self._pass(change)

    def _first(self, change: Tensor) -> Tensor:
        """The first pass proves tails on this model: without a change their states are those of the whole pass."""
        for make in (self._plain_tail, lambda: None):
            try:
                self.plain = make()
                found = self._tail(change)
                with torch.no_grad():
                    still = self._tail(torch.zeros_like(change)) if bool(change.any()) else found
            except Exception:  # any failure means that this model's tails do not run alone in this way
                continue
            if bool((still.detach() - self.clean).abs().max() <= self._rounding() * self.clean.abs().max()):
                self._pass = self._tail
                return found
        self._pass = self._whole
        return self._whole(change)

    def _rounding(self) -> float:
        """How far apart, as a share of the largest, states are that differ by rounding alone.

        Products over other numbers of tokens add up in another order. In 16 bits each block then rounds what it gives
        in another way, and what blocks do adds up as random steps do.
        """
        dtype = self.subject.dtype
        if dtype.itemsize >= 4:
            return 1e-5
        return 2 * torch.finfo(dtype).eps * math.sqrt(max(1, len(self.subject.blocks) - 1 - self.layer))

    def through(self, change: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """As `states`, and (n, d) the residual stream after block `layer`, above the change, at each text's token."""
        if self._pass == self._first:
            with torch.no_grad():
                self.states(torch.zeros_like(change))
        seen: list[Tensor] = []
        block = self.subject.model.get_submodule(self.subject.blocks[layer].name)
        with hooked([block.register_forward_hook(lambda _, __, output: seen.append(_plain(output)))]):
            states = self._pass(change, layer)
        column = 0 if self._pass == self._tail else torch.tensor(self.at, device=self.subject.device)
        return states, seen[0][self.lines[:, 0], column]

    def _wanted(self, states: Tensor) -> Tensor:
        return states.flatten(0, 1)[self.read]

    # --- whole texts ------------------------------------------------------------------------------------------

    def _whole(self, change: Tensor, watched: int | None = None) -> Tensor:
        subject = self.subject
        rows, columns = self.lines[:, 0], torch.tensor(self.at, device=subject.device)

        def add(_: nn.Module, __: Any, output: Any) -> Tensor:
            shifted = output.reshape(len(rows), -1, output.shape[-1]).clone()
            shifted[rows, columns] = shifted[rows, columns] + change.to(output.dtype)
            return shifted.reshape(output.shape)

        owner = subject.model.get_submodule(str(self.matrix.owner))
        with hooked([owner.register_forward_hook(add)]):
            found = subject.decoder(input_ids=padded(self.texts, subject.device), use_cache=False)
        return self._wanted(found.last_hidden_state[self.lines, self.columns])

    # --- tails ------------------------------------------------------------------------------------------------

    def _can_cut(self, cache: DynamicCache) -> bool:
        plain = all(type(layer) is DynamicLayer and layer.is_initialized for layer in cache.layers)
        return plain and len(cache.layers) == len(self.subject.blocks) and adds_up(self.subject, self.layer)

    def _cut(self, cache: DynamicCache) -> None:
        """Keep what stands before each tail, so that it ends in one column."""
        device, width = self.subject.device, max(self.at)
        first = torch.tensor(self.at, device=device)[:, None]
        column = torch.arange(width, device=device) - width + first
        seen = column >= 0
        index = column.clamp_min(0)
        tail = torch.ones_like(self.columns)
        self.mask = torch.cat([seen.long(), tail], 1)
        last = self.subject.context_length - 1
        self.positions = (first + torch.arange(self.rest, device=device)).clamp_max(last)
        self.layers = []
        for number, layer in enumerate(cache.layers):
            if number <= self.layer:  # not run; it only says how much was read
                shape = (1, 1, width, 1)
                self.layers.append(_Fixed(layer.keys.new_zeros(shape), layer.keys.new_zeros(shape)))
                continue
            parts = []
            for part in (layer.keys, layer.values):
                at = index[:, None, :, None].expand(-1, part.shape[1], -1, part.shape[3])
                parts.append(part.gather(2, at))
            self.layers.append(_Fixed(*parts))

    def _tail(self, change: Tensor, watched: int | None = None) -> Tensor:
        """The blocks above on the tails, each called with what the decoder itself called it with.

        Args:
            watched: a layer whose block somebody looks at: its module runs, the last one on every token.
        """
        if self.plain is not None and watched is None:
            return self.plain.states(change.to(self.stream.dtype))
        stream = torch.cat([self.stream[:, :1] + change.to(self.stream.dtype)[:, None], self.stream[:, 1:]], 1)
        every = watched == len(self.subject.blocks) - 1
        with nullcontext() if every else self._sparing(self.read):
            for block, arguments, named in self.calls:
                stream = _plain(block(stream, *arguments, **named))
        states = self._wanted(stream)
        parts = anatomy(self.subject.model)
        for part in (parts.final_norm, parts.narrowing):
            states = part[1](states) if part is not None else states
        return states

    def _plain_tail(self) -> PlainTail:
        """The same as a function of its own.

        Raises:
            ValueError: something above is of another kind.
        """
        model, first = self.subject.model, self.layer + 1
        if self.subject.dtype.itemsize < 4:
            raise ValueError("models round to half precision in ways of their own")
        above = zip(anatomy(model).blocks[first:], self.layers[first:], self.calls)
        given = [(block, layer.keys, layer.values, named) for block, layer, (*_, named) in above]
        plain = PlainTail(model, self.stream, self.read, given)
        for layer, block in zip(self.layers[first:], plain.blocks):  # nothing is held twice
            layer.keys, layer.values = (part[:, :, : block.before] for part in (block.keys, block.values))
        return plain

    @cached_property
    def calls(self) -> list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]:
        """Blocks above with the masks, positions and caches that the decoder hands them; no step moves these."""
        subject = self.subject
        cache = DynamicCache()
        cache.layers = self.layers
        more: dict[str, Any] = {cache_name(subject.decoder): cache, "attention_mask": self.mask}
        if "position_ids" in inspect.signature(subject.decoder.forward).parameters:
            more["position_ids"] = self.positions
        names = [block.name for block in subject.blocks]
        owner: nn.Module = subject.model.get_submodule(names[0].rpartition(".")[0])
        before = dict(owner._modules)
        calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []

        def record(block: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            others = {name: value for name, value in named.items() if name != "hidden_states"}
            calls.append((block.__dict__["block"], arguments[1:], others))

        handles = []
        try:
            for number, name in enumerate(names):  # what blocks are called with is asked, not what they give
                key = name.rpartition(".")[2]
                block = before[key]
                assert block is not None
                stand_in = owner._modules[key] = Skipped(block, subject.others)
                if number > self.layer:
                    handles.append(stand_in.register_forward_pre_hook(record, with_kwargs=True))
            with torch.no_grad():
                subject.decoder(input_ids=torch.zeros_like(self.positions), use_cache=True, **more)
        finally:
            owner._modules.update(before)
        return calls

    def _sparing(self, read: Tensor) -> AbstractContextManager[None]:
        """Within the block the last MLP takes only the tokens `read` of all that are fed."""
        return nullcontext() if self.mlp is None else sparing(self.mlp, read)


_known: weakref.WeakKeyDictionary[nn.Module, dict[int, bool]] = weakref.WeakKeyDictionary()


@torch.no_grad()
def adds_up(subject: LanguageModel, layer: int) -> bool:
    """Whether what is added to the MLP's output is added to the residual stream as it is: no norm stands between."""
    found = _known.setdefault(subject.model, {})
    if layer not in found:
        owner = subject.model.get_submodule(str(edited_matrix(subject, layer).owner))
        block = subject.model.get_submodule(subject.blocks[layer].name)
        streams: list[Tensor] = []

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            streams.append(_plain(output))
            raise _Stop

        ids = torch.zeros(1, 3, dtype=torch.long, device=subject.device)
        shift = torch.linspace(-1, 1, edited_matrix(subject, layer).width, device=subject.device, dtype=subject.dtype)
        for change in (torch.zeros_like(shift), shift):
            with (
                hooked(
                    [
                        owner.register_forward_hook(lambda _, __, output, change=change: output + change),
                        block.register_forward_hook(keep),
                    ]
                ),
                suppress(_Stop),
            ):
                subject.decoder(input_ids=ids, use_cache=False)
        tolerance = 1e-4 if subject.dtype in (torch.float32, torch.float64) else 5e-2
        found[layer] = bool(
            (streams[1] - streams[0] - shift).abs().max() <= tolerance * streams[0].abs().max().clamp_min(1)
        )
    return found[layer]


def residual_matrix(subject: LanguageModel, layer: int) -> ValueMatrix:
    """As `edited_matrix`, for methods that need what the MLP adds to the residual stream.

    Raises:
        SubjectError: also where a norm follows the MLP.
    """
    matrix = edited_matrix(subject, layer)
    if not adds_up(subject, layer):
        raise SubjectError(
            f"layer {layer} of {subject.name} has a norm after its MLP, so a change of the residual stream cannot be "
            "made by its output matrix alone; use rome, whose value is the MLP's own output"
        )
    return matrix
