"""What a model writes, greedily, from every prefix of a text: f(x_<t) has T - t tokens, and an end token ends nothing.

Where the model's choice after x_<t is x_t itself, f(x_<t) = x_t ++ f(x_<t+1). So only prefixes after which it goes
wrong (misses) are continued, (1 - MA)(T - 1) of them at most. One pass over the texts finds them, and leaves the keys
and values of all prefixes behind: a miss starts from a slice of them, and misses of all texts are written together.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from .language import LOGIT_ELEMENTS, TOKEN_BUDGET, LanguageModel, Progress, cache_name

Text = tuple[int, ...]
Layers = list[tuple[Tensor, Tensor]]
"""Keys and values (texts, heads, tokens, width) of every block."""


@dataclass(frozen=True)
class Miss:
    """Text `row` of a group goes on with `choice` after its first `at` tokens."""

    row: int
    at: int
    choice: int
    steps: int
    """How many tokens follow `choice`."""


@dataclass(frozen=True)
class Paths:
    """The greedy continuations of the prefixes of one text."""

    ids: np.ndarray
    """(T,) the text."""
    hit: np.ndarray
    """(T,) whether the model's choice after x_<t is x_t; the first entry is False and means nothing."""
    written: dict[int, np.ndarray]
    """f(x_<t), (T - t,), of the misses t that were asked for."""

    def next_miss(self, t: int) -> int:
        """The first miss at or after t; T where there is none."""
        wrong = np.flatnonzero(~self.hit[t:])
        return t + int(wrong[0]) if len(wrong) else len(self.ids)

    def after(self, t: int) -> np.ndarray:
        """f(x_<t), (T - t,): what the text says up to the next miss, then what the model wrote there."""
        miss = self.next_miss(t)
        return np.concatenate([self.ids[t:miss], self.written[miss]]) if miss < len(self.ids) else self.ids[t:]


@torch.no_grad()
def paths(
    subject: LanguageModel, texts: Sequence[Text], *, shortest: int = 1, progress: Progress | None = None
) -> list[Paths]:
    """The continuations of all prefixes x_<t, t = 1 ... T - shortest, of each text, in the order of the texts.

    Args:
        texts: token ids, at least two of each.
        shortest: length of the shortest continuation asked for.
        progress: (texts done, texts).
    """
    found: dict[int, Paths] = {}
    cut = bool(texts) and _can_cut(subject, max(map(len, texts)))
    for group in _groups(texts):
        rows = [texts[i] for i in group]
        choices, layers = _read(subject, rows, cut)
        made = []
        misses = []
        for row, (ids, choice) in enumerate(zip(rows, choices)):
            hit = np.concatenate([[False], np.array(ids[1:]) == choice[: len(ids) - 1]])
            path = Paths(np.array(ids), hit, {})
            made.append(path)
            wrong = {path.next_miss(t) for t in range(1, len(ids) - shortest + 1)} - {len(ids)}
            misses += [Miss(row, at, int(choice[at - 1]), len(ids) - at - 1) for at in wrong]
        for miss, tokens in _write(subject, rows, layers, misses):
            made[miss.row].written[miss.at] = np.array([miss.choice, *tokens[: miss.steps]])
        found.update(zip(group, made))
        if progress:
            progress(len(found), len(texts))
    return [found[i] for i in range(len(texts))]


def _groups(texts: Sequence[Text]) -> Iterator[list[int]]:
    """Texts of alike length whose keys and values are held at once."""
    group: list[int] = []
    for index in sorted(range(len(texts)), key=lambda i: len(texts[i])):
        if group and (len(group) + 1) * len(texts[index]) > TOKEN_BUDGET * 2:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def _read(subject: LanguageModel, texts: Sequence[Text], keep: bool) -> tuple[np.ndarray, Layers]:
    """(texts, T - 1) the model's choice after each prefix, and what blocks keep of the texts."""
    states, layers = _states(subject, texts, keep)
    size = max(1, LOGIT_ELEMENTS // subject.vocabulary)
    flat = torch.cat([subject.head(part).argmax(-1) for part in states.flatten(0, 1).split(size)])
    return flat.view(states.shape[:2]).cpu().numpy(), layers


def _states(subject: LanguageModel, texts: Sequence[Text], keep: bool) -> tuple[Tensor, Layers]:
    width = max(map(len, texts)) - 1
    # Nothing looks ahead, so what fills the end of shorter texts changes nothing before it.
    ids = torch.tensor([[*text[:-1], *[0] * (width + 1 - len(text))] for text in texts], device=subject.device)
    # Without the configuration, sliding windows keep all tokens too: prefixes are cut from them later.
    cache = DynamicCache() if keep else None
    states = subject.decoder(input_ids=ids, use_cache=keep, **{cache_name(subject.decoder): cache}).last_hidden_state
    return states, [(layer.keys, layer.values) for layer in cache.layers] if cache else []


# --- writing ---------------------------------------------------------------------------------------------------------


def _write(
    subject: LanguageModel, texts: Sequence[Text], layers: Layers, misses: Sequence[Miss]
) -> Iterator[tuple[Miss, list[int]]]:
    """At least `steps` tokens after each miss: in as few batches as fit, or those of one length together."""
    size = max(1, TOKEN_BUDGET * 4 // max(map(len, texts)))
    order = sorted(misses, key=lambda miss: (-miss.steps if layers else miss.at, -miss.steps))
    for _, alike in groupby(order, lambda miss: bool(layers) or miss.at):
        group = list(alike)
        for batch in (group[first : first + size] for first in range(0, len(group), size)):
            start = Cut(batch, layers, batch[0].steps) if layers else Whole(subject)
            feed = [[*(() if layers else texts[miss.row][: miss.at]), miss.choice] for miss in batch]
            yield from zip(batch, _continue(subject, start, feed, [miss.steps for miss in batch]))


def _continue(subject: LanguageModel, start: Cut | Whole, feed: list[list[int]], steps: list[int]) -> list[list[int]]:
    """Greedy tokens after `feed`; `steps` says how many each needs, in falling order."""
    written = torch.zeros(len(feed), steps[0], dtype=torch.long, device=subject.device)
    tokens = torch.tensor(feed, device=subject.device)
    for step in range(steps[0]):
        count = sum(needed > step for needed in steps)
        if count < len(tokens):
            start.keep(count)
            tokens = tokens[:count]
        tokens = start.feed(subject.model, tokens, logits_to_keep=1).logits[:, -1:].argmax(-1)
        written[:count, step] = tokens[:, 0]
    return written.tolist()


class Whole:
    """Nothing read yet: prefixes of one length are fed whole, which every model can do."""

    def __init__(self, subject: LanguageModel) -> None:
        self.cache = DynamicCache(config=subject.model.config)

    def keep(self, count: int) -> None:
        """Drop all but the first `count`."""
        self.cache.batch_select_indices(torch.arange(count))

    def feed(self, module: nn.Module, tokens: Tensor, **more: Any) -> Any:
        """What the module says of the next tokens (batch, n), which are read from now on."""
        return module(input_ids=tokens, use_cache=True, **{cache_name(module): self.cache}, **more)


class Room(DynamicLayer):
    """Keys and values of a batch with room for more: growing by concatenation would copy all of them at every token."""

    def __init__(self, keys: Tensor, values: Tensor, *, room: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.used = keys.shape[2]
        self.whole = [torch.cat([part, part[:, :, :1].expand(-1, -1, room, -1)], dim=2) for part in (keys, values)]
        self.keep(len(keys), 0)

    def keep(self, count: int, unused: int) -> None:
        """Drop all but the first `count`, and the first `unused` tokens."""
        self.used -= unused
        self.whole = [part[:count, :, unused:] for part in self.whole]
        self.keys, self.values = (part[:, :, : self.used] for part in self.whole)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Take in the next tokens (batch, heads, n, width); returns all keys and values."""
        first, self.used = self.used, self.used + key_states.shape[2]
        for part, new in zip(self.whole, (key_states, value_states)):
            part[:, :, first : self.used] = new
        self.keys, self.values = (part[:, :, : self.used] for part in self.whole)
        return self.keys, self.values


class Cut:
    """Prefixes of different lengths, cut from the keys and values of whole texts so that they end in one column."""

    def __init__(self, misses: Sequence[Miss], layers: Layers, steps: int) -> None:
        device = layers[0][0].device
        self.lengths = torch.tensor([miss.at for miss in misses], device=device)
        rows = torch.tensor([[miss.row] for miss in misses], device=device)
        width = int(self.lengths.max())
        place = torch.arange(width, device=device) - width + self.lengths[:, None]
        self.seen = (place >= 0).long()
        place = place.clamp_min(0)
        self.cache = DynamicCache()
        self.cache.layers = [
            Room(*(part[rows, :, place].transpose(1, 2) for part in pair), room=steps) for pair in layers
        ]

    def keep(self, count: int) -> None:
        """Drop all but the first `count`, and the columns that none of them uses."""
        self.lengths = self.lengths[:count]
        unused = self.seen.shape[1] - int(self.lengths.max())
        self.seen = self.seen[:count, unused:]
        for layer in self.cache.layers:
            layer.keep(count, unused)

    def feed(self, module: nn.Module, tokens: Tensor, **more: Any) -> Any:
        """What the module says of the next token (batch, 1), which is read from now on."""
        self.seen = torch.cat([self.seen, torch.ones_like(tokens)], dim=1)
        if "position_ids" in inspect.signature(module.forward).parameters:
            more["position_ids"] = self.lengths[:, None]
        self.lengths = self.lengths + 1
        more |= {"attention_mask": self.seen, cache_name(module): self.cache}
        return module(input_ids=tokens, use_cache=True, **more)


def _can_cut(subject: LanguageModel, length: int) -> bool:
    """Whether tokens fed after cut prefixes of different lengths have the states they have in the whole text."""
    length = max(length, 8)
    generator = torch.Generator().manual_seed(2)
    text = tuple(torch.randint(0, subject.vocabulary, (length,), generator=generator).tolist())
    starts = [length // 3, length - 3]
    try:
        plain, layers = _states(subject, [text], True)
        start = Cut([Miss(0, at, 0, 2) for at in starts], layers, 2)
        for step in range(2):
            tokens = torch.tensor([[text[at + step]] for at in starts], device=subject.device)
            states = start.feed(subject.decoder, tokens).last_hidden_state[:, -1]
    except Exception:  # any failure means that this model's keys and values cannot be cut
        return False
    wanted = plain[0, [at + 1 for at in starts]]
    tolerance = 1e-4 if subject.dtype == torch.float32 else 5e-2
    return bool((states - wanted).abs().max() <= tolerance * plain.abs().max())
