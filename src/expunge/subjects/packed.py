"""Rows in one sequence: no padding, and what rows share is computed once.

Rows are laid end to end in one sequence of tokens. Rows with the same prompt form a *family*: the prompt once, then
every continuation, each of which sees the prompt and itself. A beginning common to all prompts (a system message) is a
family of its own that all others see. Linear layers run on the packed tokens; attention runs family by family.

Three ways of telling a model so, tried in this order and kept when a packed pass equals plain passes (`choose_mode`):

- `families`: our attention function, through transformers' attention interface;
- `mask`: a dense mask over the whole pack with the model's own attention;
- `rows`: no packing (models whose positions cannot be given, ALiBi for example).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from ..errors import SubjectError

SHARED_BEGINNING = 8
"""Fewer common tokens than this are not worth a family of their own."""


@dataclass(frozen=True)
class Encoded:
    """Token ids of prompt and answer."""

    ids: tuple[int, ...]
    start: int
    """Index of the first answer token, at least 1."""
    closing: int
    """How many trailing tokens close the answer and are not part of its text."""
    text: str
    """The answer."""

    @property
    def scored(self) -> int:
        return len(self.ids) - self.start


@dataclass(frozen=True)
class Family:
    """Tokens `start:stop` of the pack that attend to one another, and to the common beginning if there is one."""

    start: int
    stop: int
    branch: Tensor | None
    """(stop - start,) branch number of each token, 0 for the prompt; None for a single row (plain causal)."""


@dataclass
class Pack:
    """Rows laid end to end.

    `every` (P,) holds the packed position of each fed token of each row, row by row; rows that share tokens name one
    position. `owner[i]` is the (row, position in it) that packed token i was taken from.
    `predict[j]` is the packed position whose output predicts answer token j, `target[j]` that token, `row[j]` the row
    it belongs to; answer tokens are ordered by row, then by position.
    """

    ids: Tensor
    positions: Tensor
    families: list[Family]
    beginning: int
    predict: Tensor
    target: Tensor
    row: Tensor
    rows: list[Encoded]
    every: Tensor
    owner: list[tuple[int, int]]
    masks: dict[Any, Tensor | None] = field(default_factory=dict)

    @cached_property
    def runs(self) -> list[tuple[int, int]]:
        """(first family, how many): neighbouring single rows of one length, which attention takes together."""
        found: list[tuple[int, int]] = []
        for index, family in enumerate(self.families):
            if found and not (self.beginning and index == 1):
                first, count = found[-1]
                before = self.families[first]
                alike = before.stop - before.start == family.stop - family.start
                if alike and before.branch is None and family.branch is None:
                    found[-1] = (first, count + 1)
                    continue
            found.append((index, 1))
        return found

    @property
    def tokens(self) -> int:
        return int(self.ids.shape[1])

    def mask(self, family: int, window: int | None) -> Tensor | None:
        """(queries, keys) True where a token may look; None for plain causal attention within one row."""
        if (family, window) not in self.masks:
            self.masks[family, window] = self._mask(self.families[family], window)
        return self.masks[family, window]

    def _mask(self, family: Family, window: int | None) -> Tensor | None:
        first = family.start == 0 and self.beginning > 0
        shared = 0 if first else self.beginning
        length = family.stop - family.start
        if family.branch is None and shared == 0 and (window is None or window >= length):
            return None
        at = self.positions[0]
        mine, keys = at[family.start : family.stop], torch.cat([at[:shared], at[family.start : family.stop]])
        order = torch.arange(length, device=at.device)
        allowed = order[:, None] >= order[None, :]
        if family.branch is not None:
            branch = family.branch
            allowed &= (branch[None, :] == 0) | (branch[:, None] == branch[None, :])
        allowed = torch.cat([allowed.new_ones(length, shared), allowed], dim=1)
        if window is not None:
            allowed &= mine[:, None] - keys[None, :] < window
        return allowed

    def dense_mask(self, dtype: torch.dtype) -> Tensor:
        """(1, 1, tokens, tokens) additive mask of the whole pack."""
        allowed = torch.zeros(self.tokens, self.tokens, dtype=torch.bool, device=self.ids.device)
        for family in self.families:
            span = slice(family.start, family.stop)
            order = torch.arange(family.stop - family.start, device=self.ids.device)
            inside = order[:, None] >= order[None, :]
            if family.branch is not None:
                inside &= (family.branch[None, :] == 0) | (family.branch[:, None] == family.branch[None, :])
            allowed[span, span] = inside
            if family.start >= self.beginning:
                allowed[span, : self.beginning] = True
        floor = torch.finfo(dtype).min
        return torch.zeros(1, 1, self.tokens, self.tokens, dtype=dtype, device=self.ids.device).masked_fill_(
            ~allowed, floor
        )


def pack(rows: Sequence[Encoded], device: torch.device | str = "cpu") -> Pack:
    """Lay rows end to end. The last token of a row predicts nothing and is not fed."""
    prompts: dict[tuple[int, ...], list[int]] = {}
    for index, row in enumerate(rows):
        prompts.setdefault(row.ids[: row.start], []).append(index)
    beginning = _common_beginning(list(prompts))
    ids: list[int] = []
    positions: list[int] = []
    families: list[Family] = []
    owner: list[tuple[int, int]] = []
    if beginning:
        ids += next(iter(prompts))[:beginning]
        positions += range(beginning)
        owner += ((0, at) for at in range(beginning))
        families.append(Family(0, beginning, None))
    predict: list[list[int]] = [[] for _ in rows]
    every: list[list[int]] = [[] for _ in rows]

    def length(prompt: tuple[int, ...]) -> int:
        return len(prompt) - beginning + sum(rows[i].scored - 1 for i in prompts[prompt])

    # Single rows of one length stand together: attention takes them in one call.
    for prompt in sorted(prompts, key=lambda prompt: (len(prompts[prompt]) > 1, length(prompt))):
        members = prompts[prompt]
        start = len(ids)
        ids += prompt[beginning:]
        positions += range(beginning, len(prompt))
        owner += ((members[0], at) for at in range(beginning, len(prompt)))
        branch = [0] * (len(prompt) - beginning)
        last = len(ids) - 1
        for number, index in enumerate(members, start=1):
            fed = rows[index].ids[len(prompt) : -1]
            predict[index] = [last, *range(len(ids), len(ids) + len(fed))]
            every[index] = [*range(beginning), *range(start, last + 1), *predict[index][1:]]
            owner += ((index, at) for at in range(len(prompt), len(prompt) + len(fed)))
            ids += fed
            positions += range(len(prompt), len(prompt) + len(fed))
            branch += [number] * len(fed)
        single = len(members) == 1
        families.append(Family(start, len(ids), None if single else torch.tensor(branch, device=device)))

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    return Pack(
        ids=tensor(ids)[None],
        positions=tensor(positions)[None],
        families=families,
        beginning=beginning,
        predict=tensor([position for row in predict for position in row]),
        target=tensor([token for row in rows for token in row.ids[row.start :]]),
        row=tensor([index for index, row in enumerate(rows) for _ in range(row.scored)]),
        rows=list(rows),
        every=tensor([position for row in every for position in row]),
        owner=owner,
    )


def _common_beginning(prompts: list[tuple[int, ...]]) -> int:
    if len(prompts) < 2:
        return 0
    low, high = min(prompts), max(prompts)
    # Every prompt keeps at least one token of its own: its last token's state is what predicts the answer.
    limit = min(len(prompt) for prompt in prompts) - 1
    common = next((i for i in range(min(limit, len(low), len(high))) if low[i] != high[i]), limit)
    return common if common >= SHARED_BEGINNING else 0


def batches(rows: Sequence[Encoded], budget: int) -> Iterator[list[int]]:
    """Indices of rows, those with one prompt together and alike lengths near one another, within a token budget."""
    order = sorted(range(len(rows)), key=lambda i: (rows[i].start, rows[i].ids[: rows[i].start], len(rows[i].ids)))
    group: list[int] = []
    used = 0
    previous: tuple[int, ...] | None = None
    for index in order:
        prompt = rows[index].ids[: rows[index].start]
        cost = rows[index].scored + (0 if prompt == previous else rows[index].start)
        if group and used + cost > budget:
            yield group
            group, used, cost = [], 0, rows[index].scored + rows[index].start
        group.append(index)
        used += cost
        previous = prompt
    if group:
        yield group


# --- attention, family by family ---------------------------------------------------------------------------------

IMPLEMENTATION = "expunge_families"
_active: list[Pack] = []


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer over the active pack. query (1, heads, tokens, d), returns (1, tokens, heads, d)."""
    if s_aux is not None or position_bias is not None:
        raise SubjectError("this model's attention has sinks or biases; it cannot run family by family")
    pack_ = _active[-1]
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    runs, shared = pack_.runs, pack_.beginning
    lengths = [pack_.families[first + count - 1].stop - pack_.families[first].start for first, count in runs]
    queries, keys, values = (tensor.split(lengths, dim=2) for tensor in (query, key, value))
    outputs = []
    for index, (first, count) in enumerate(runs):
        q, k, v = (_stack(part[index], count) for part in (queries, keys, values))
        if shared and index > 0:
            k = torch.cat([keys[0].expand(count, -1, -1, -1), k], dim=2)
            v = torch.cat([values[0].expand(count, -1, -1, -1), v], dim=2)
        mask = pack_.mask(first, sliding_window)
        if softcap is None:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling)
        else:
            weights = q @ k.transpose(-1, -2) * (scaling if scaling is not None else q.shape[-1] ** -0.5)
            weights = softcap * torch.tanh(weights / softcap)
            if mask is None:
                mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
            out = weights.masked_fill(~mask, float("-inf")).softmax(-1, dtype=torch.float32).to(v.dtype) @ v
        # (rows, heads, length, d) -> (1, rows x length, heads, d)
        outputs.append(out.transpose(1, 2).reshape(1, -1, out.shape[1], out.shape[3]))
    return torch.cat(outputs, dim=1), None


def _stack(part: Tensor, count: int) -> Tensor:
    """(1, heads, count x length, d) -> (count, heads, length, d)."""
    _, heads, tokens, width = part.shape
    return part.view(heads, count, tokens // count, width).transpose(0, 1)


AttentionInterface.register(IMPLEMENTATION, _attend)


@contextmanager
def packed_attention(model: nn.Module, pack_: Pack) -> Iterator[None]:
    """Within the block the model's attention runs family by family over this pack.

    Keep it open until backward is done where activations are recomputed.
    """
    configs = {id(c): c for module in model.modules() if (c := getattr(module, "config", None)) is not None}
    before = {key: getattr(config, "_attn_implementation", None) for key, config in configs.items()}
    _active.append(pack_)
    try:
        for config in configs.values():
            config._attn_implementation = IMPLEMENTATION
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
        _active.pop()
