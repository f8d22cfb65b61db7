"""Contexts: what a model has read of many texts, and room to go on from any place of each.

One packed pass reads texts (no padding, common beginnings once) and keeps every block's keys and values. Beginnings of
any lengths are cut from them so that all end in one column, and go on together, one token a step, in a buffer that
grows by doubling. What all of them begin with is kept, and looked at, once. Models whose keys and values cannot be cut,
or whose positions cannot be given, read beginnings of one length at a time (`Whole`); which it is, is tried once
(`can_cut`).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from .fused import fused
from .language import LanguageModel, cache_name
from .packed import (
    TOKEN_BUDGET,
    About,
    Encoded,
    Scoring,
    attends,
    attention_by,
    batches,
    common_beginning,
    configurations,
    pack,
)
from .plain_pass import Layers, plain_pass
from .side_by_side import alone

Text = Sequence[int]
SPARE = 32
"""Columns that a buffer has to spare when it is made."""


@dataclass(frozen=True)
class Read:
    """Texts that were read."""

    ids: Tensor
    """(tokens,) what was fed."""
    states: Tensor
    """(tokens, d) final hidden states."""
    layers: Layers
    places: list[Tensor]
    """Per text the places (T,) of its tokens among `tokens`."""


@torch.no_grad()
def read(subject: LanguageModel, texts: Sequence[Text], *, keep: bool = True) -> Read:
    """Read texts whole.

    Args:
        keep: keep keys and values too.
    """
    if subject.mode == "rows":
        return _read_padded(subject, texts, keep)
    # The last token of a row is not fed, so that a text is the prompt of a row with one token more.
    rows = [Encoded((*text, 0), len(text), 0, "") for text in texts]
    places: list[Tensor] = [torch.empty(0)] * len(texts)
    ids, states, parts = [], [], []
    before = 0
    plain = plain_pass(subject)
    for group in batches(rows, TOKEN_BUDGET):
        pack_ = pack([rows[i] for i in group], subject.device)
        if plain:
            found, layers = plain.every(pack_)
        else:
            # Without the configuration, sliding windows keep all tokens too: beginnings are cut from them later.
            cache = DynamicCache() if keep else None
            with subject.packing(pack_):
                found = subject.run_decoder(pack_, cache)
            layers = [(layer.keys[0], layer.values[0]) for layer in cache.layers] if cache else []
        states.append(found)
        ids.append(pack_.ids[0])
        parts.append(layers if keep else [])
        for index, at in zip(group, pack_.every.split([len(texts[i]) for i in group])):
            places[index] = at + before
        before += pack_.tokens
    layers = [
        (torch.cat([keys for keys, _ in of], dim=1), torch.cat([values for _, values in of], dim=1))
        for of in zip(*parts)
    ]
    return Read(torch.cat(ids), torch.cat(states), layers, places)


def _read_padded(subject: LanguageModel, texts: Sequence[Text], keep: bool) -> Read:
    width = max(map(len, texts))
    # Nothing looks ahead, so what fills the end of shorter texts changes nothing before it.
    ids = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts], device=subject.device)
    cache = DynamicCache() if keep else None
    named = {cache_name(subject.decoder): cache, "use_cache": keep}
    states = subject.decoder(input_ids=ids, **named).last_hidden_state.flatten(0, 1)
    layers = [
        tuple(part.transpose(0, 1).flatten(1, 2) for part in (layer.keys, layer.values))
        for layer in (cache.layers if cache else ())
    ]
    places = [torch.arange(len(text), device=subject.device) + i * width for i, text in enumerate(texts)]
    return Read(ids.flatten(), states, layers, places)  # type: ignore[arg-type]


class Room(DynamicLayer):
    """Keys and values of a batch with room for more: growing by concatenation would copy all of them at every token."""

    def __init__(self, keys: Tensor, values: Tensor, index: Tensor) -> None:
        """Contexts (rows, columns) of places among the tokens of keys and values (heads, tokens, width)."""
        super().__init__()
        self.lazy_initialization(keys, values)
        rows, self.used = index.shape
        self.whole = []
        for part in (keys, values):
            room = part.new_empty(rows, len(part), self.used + SPARE, part.shape[2])
            taken = part.index_select(1, index.flatten()).unflatten(1, index.shape)
            room[:, :, : self.used] = taken.transpose(0, 1)
            self.whole.append(room)
        self._show()

    def _show(self) -> None:
        self.keys, self.values = (part[:, :, : self.used] for part in self.whole)

    def keep(self, rows: Tensor | slice, unused: int) -> None:
        """Keep these rows, in this order, without the first `unused` columns; what stays in its place is not copied."""
        for i, part in enumerate(self.whole):
            if isinstance(rows, slice):
                part = part[rows]
            else:
                shown = part[:, :, unused : self.used]
                moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero()[:, 0]
                shown[moved] = shown[rows[moved]]
                part = part[: len(rows)]
            self.whole[i] = part[:, :, unused:]
        self.used -= unused
        self._show()

    def put(self, width: int, row: Tensor, column: Tensor, parts: tuple[Tensor, Tensor]) -> None:
        """Stand at the end of so many columns, with keys and values (heads, n, d) at these places (rows, n) of each."""
        for i, (part, new) in enumerate(zip(self.whole, parts)):
            room = part.new_zeros(len(part), part.shape[1], width + SPARE, part.shape[3])
            room[:, :, width - self.used : width] = part[:, :, : self.used]
            room[row, :, column] = new.transpose(0, 1)
            self.whole[i] = room
        self.used = width
        self._show()

    def join(self, other: Room, width: int) -> None:
        """Take in the rows of another; both then end at column `width`."""
        both = [self, other]
        for i, part in enumerate(self.whole):
            # Zeros, since what attention leaves out still must not be NaN.
            room = part.new_zeros(sum(len(one.whole[i]) for one in both), part.shape[1], width + SPARE, part.shape[3])
            first = 0
            for one in both:
                rows = one.whole[i][:, :, : one.used]
                room[first : first + len(rows), :, width - one.used : width] = rows
                first += len(rows)
            self.whole[i] = room
        self.used = width
        self._show()

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Take in the next tokens (rows, heads, n, width); returns all keys and values."""
        first, self.used = self.used, self.used + key_states.shape[2]
        if self.used > self.whole[0].shape[2]:
            for i, part in enumerate(self.whole):
                many, heads, width = len(part), part.shape[1], part.shape[3]
                self.whole[i] = part.new_empty(many, heads, self.used + max(first, SPARE), width)
                self.whole[i][:, :, :first] = part[:, :, :first]
        for part, new in zip(self.whole, (key_states, value_states)):
            part[:, :, first : self.used] = new
        self._show()
        return self.keys, self.values


class Contexts:
    """Beginnings of different lengths that end in one column, and go on together.

    Where attention runs by our function (`_attend`), the tokens that all of them begin with stand in `shared` alone.
    """

    def __init__(self, subject: LanguageModel, found: Read, places: Sequence[Tensor]) -> None:
        """
        Args:
            places: of each beginning's tokens among those of `found`.
        """
        device = found.layers[0][0].device
        ours = shares_beginnings(subject)
        self.configs = configurations(subject.model) if ours else None
        """Of the model, while our function can run its attention."""
        first = _alike(found.ids, places) if ours else 0
        self.shared = [(keys[:, places[0][:first]], values[:, places[0][:first]]) for keys, values in found.layers]
        """Of every block (heads, n, width): what all rows begin with."""
        self.before = first
        """How many tokens that is."""
        self.lengths = torch.tensor([len(at) - first for at in places], device=device)
        """(rows,) columns that each row uses."""
        self._look(int(self.lengths.max()))
        index = torch.zeros(self.seen.shape, dtype=torch.long, device=device)
        index[self.seen] = torch.cat([at[first:] for at in places])
        self.cache = DynamicCache()
        self.cache.layers = [Room(*pair, index) for pair in found.layers]

    def _look(self, width: int) -> None:
        """Rows use the last of this many columns."""
        column = torch.arange(width, device=self.lengths.device) - width + self.lengths[:, None]
        self.seen = column >= 0
        """(rows, columns) True where a row uses a column."""
        self.ragged = bool(self.lengths.min() < width) if len(self.lengths) else False
        """Some row does not use all columns."""
        self.masks: dict[int | None, Tensor | None] = {}

    def keep(self, rows: Tensor | slice) -> None:
        """Drop all other rows, and the columns that none of these uses."""
        self.lengths = self.lengths[rows]
        unused = self.seen.shape[1] - int(self.lengths.max())
        for layer in self.cache.layers:
            layer.keep(rows, unused)
        self._look(self.seen.shape[1] - unused)

    def join(self, other: Contexts) -> None:
        """Go on together with another's rows, which stand behind these."""
        for one in (self, other):
            one._part()
        width = max(self.seen.shape[1], other.seen.shape[1])
        self.lengths = torch.cat([self.lengths, other.lengths])
        for layer, more in zip(self.cache.layers, other.cache.layers):
            layer.join(more, width)
        self._look(width)

    def _part(self) -> None:
        """Give every row what all begin with."""
        if not self.before:
            return
        before, self.before = self.before, 0
        own, self.lengths = self.lengths, self.lengths + before
        self._look(self.seen.shape[1] + before)
        width = self.seen.shape[1]
        row, at = torch.meshgrid(*(torch.arange(n, device=own.device) for n in (len(own), before)), indexing="ij")
        column = width - self.lengths[:, None] + at
        for layer, shared in zip(self.cache.layers, self.shared):
            layer.put(width, row, column, shared)
        self.shared = [(keys[:, :0], values[:, :0]) for keys, values in self.shared]

    def feed(self, module: nn.Module, tokens: Tensor, **more: Any) -> Any:
        """What the module says of the next token (rows, 1), which is read from now on."""
        self.seen = torch.cat([self.seen, torch.ones_like(self.seen[:, :1])], dim=1)
        self.masks = {}
        if "position_ids" in inspect.signature(module.forward).parameters:
            more["position_ids"] = self.lengths[:, None] + self.before
        self.lengths = self.lengths + 1
        more |= {"attention_mask": None if self.configs else self.seen.long(), cache_name(module): self.cache}
        _going.stack.append(self)
        try:
            with fused(module), attention_by(self.configs or (), IMPLEMENTATION):
                return module(input_ids=tokens, use_cache=True, **more)
        finally:
            _going.stack.pop()

    def mask(self, window: int | None) -> Tensor | None:
        """(rows or 1, 1, 1, all columns) True where the last token may not look; None where it may look anywhere."""
        if window not in self.masks:
            self.masks[window] = self._mask(window)
        return self.masks[window]

    def _mask(self, window: int | None) -> Tensor | None:
        columns = self.seen.shape[1]
        if not self.ragged and (window is None or window >= self.before + columns):
            return None
        reach = self.before + columns if window is None else window
        # The last token stands at position before + lengths - 1, and in the last column.
        ago = self.before + self.lengths[:, None] - 1 - torch.arange(self.before, device=self.seen.device)
        own = torch.arange(columns - 1, -1, -1, device=self.seen.device)
        return torch.cat([ago >= reach, ~self.seen | (own >= reach)], dim=1)[:, None, None]


def _alike(ids: Tensor, places: Sequence[Tensor]) -> int:
    """How many tokens several beginnings have in common, as `common_beginning` counts them."""
    shortest = min(map(len, places))
    return common_beginning([tuple(row) for row in ids[torch.stack([at[:shortest] for at in places])].tolist()])


IMPLEMENTATION = "expunge_contexts"
_going = About()
"""Contexts."""


def _attend(
    contexts: Contexts, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring
) -> Tensor:
    """Attention of one layer for the last token of every row.

    query (rows, heads, 1, d), key and value (rows, groups of heads, columns, d); returns (rows, 1, heads, d).
    """
    layer: Any = module.layer_idx
    keys, values = contexts.shared[layer]
    rows, groups = key.shape[:2]
    q = query * scoring.scale(query.shape[-1])
    q = q.reshape(rows, groups, -1, q.shape[-1])
    scores = q @ key.mT
    if contexts.before:
        # What all rows look at takes one product instead of one for every row.
        first = q.transpose(0, 1).flatten(1, 2) @ keys.mT
        scores = torch.cat([first.unflatten(1, (rows, -1)).transpose(0, 1), scores], dim=-1)
    scores = scoring.capped(scores)
    mask = contexts.mask(scoring.window)
    if mask is not None:
        scores = scores.masked_fill(mask, float("-inf"))
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    out = weights[..., contexts.before :] @ value
    if contexts.before:
        first = weights[..., : contexts.before].transpose(0, 1).flatten(1, 2) @ values
        out = out + first.unflatten(1, (rows, -1)).transpose(0, 1)
    return out.flatten(1, 2).unsqueeze(1)


attends(IMPLEMENTATION, _going, _attend)


class Whole:
    """Nothing read yet: beginnings of one length are fed whole, which every model can do."""

    def __init__(self, subject: LanguageModel) -> None:
        self.cache = DynamicCache(config=subject.model.config)

    def keep(self, rows: Tensor | slice) -> None:
        """Drop all other rows."""
        index = torch.arange(rows.stop) if isinstance(rows, slice) else rows
        self.cache.batch_select_indices(index)

    def feed(self, module: nn.Module, tokens: Tensor, **more: Any) -> Any:
        """What the module says of the next tokens (rows, n), which are read from now on."""
        return module(input_ids=tokens, use_cache=True, **{cache_name(module): self.cache}, **more)


def can_cut(subject: LanguageModel, length: int) -> bool:
    """Whether tokens that follow cut beginnings have the states they have in the whole text, in texts of this length.

    Tried once for every power of two: a window of attention shows only in texts that are longer.
    """
    length = 1 << max(length - 1, 15).bit_length()
    length = min(length, subject.context_length)
    if length not in subject.cuts:
        # By our attention first. Caches of latent keys and values do not hold what attention is given.
        for way in ("shared", "apart") if shares_beginnings(subject) else ("apart",):
            subject.cuts[length] = way
            if _try(subject, length):
                break
        else:
            subject.cuts[length] = ""
    return bool(subject.cuts[length])


def shares_beginnings(subject: LanguageModel) -> bool:
    """Whether our function runs the attention of contexts."""
    return subject.mode == "families" and "apart" not in subject.cuts.values()


@torch.no_grad()
@alone()
def _try(subject: LanguageModel, length: int) -> bool:
    generator = torch.Generator().manual_seed(2)
    text = torch.randint(0, subject.vocabulary, (length,), generator=generator).tolist()
    starts = [length // 3, length - 3]
    try:
        found = read(subject, [text[:at] for at in starts])
        contexts = Contexts(subject, found, found.places)
        for step in range(2):
            tokens = torch.tensor([[text[at + step]] for at in starts], device=subject.device)
            states = contexts.feed(subject.decoder, tokens).last_hidden_state[:, -1]
    except Exception:  # any failure means that this model's keys and values cannot be cut
        return False
    ids = torch.tensor([text], device=subject.device)
    plain = subject.decoder(input_ids=ids, use_cache=False).last_hidden_state[0]
    tolerance = 1e-4 if subject.dtype == torch.float32 else 5e-2
    wanted = plain[[at + 1 for at in starts]]
    return bool((states - wanted).abs().max() <= tolerance * plain.abs().max())
