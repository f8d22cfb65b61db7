"""Rows in one sequence: no padding, and what rows share is computed once.

Rows are laid end to end in one sequence of tokens. Rows with the same prompt form a *family*: the prompt once, then
its continuations as a tree, where what several of them begin with stands once and every branch sees those it grows
from. A beginning common to all prompts (a system message) is a family of its own that all others see. Linear layers run
on the packed tokens; attention runs family by family.

Three ways of telling a model so, tried in this order and kept when a packed pass equals plain passes (`choose_mode`):

- `families`: our attention function, through transformers' attention interface;
- `mask`: a dense mask over the whole pack with the model's own attention;
- `rows`: no packing (models whose positions cannot be given, ALiBi for example).
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from ..errors import SubjectError
from .fused import fused

Sharing = Literal["tokens", "prompts", "nothing"]
TOKEN_BUDGET = 4096
"""Tokens fed in one pass without gradients."""
LOGIT_ELEMENTS = 1 << 22
"""Logits that a pass without gradients holds at once (16 MiB in fp32)."""
SHARED_BEGINNING = 8
"""Fewer common tokens than this are not worth a family of their own."""
ALIKE = 4 / 3
"""Lengths that differ by this factor at most go through attention together."""


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
    branch: Tensor | None = None
    """(stop - start,) branch number of each token, 0 for the prompt; None for a single row (plain causal)."""
    sees: Tensor | None = None
    """(branches, branches) True where the first is the second or grows from it."""

    @property
    def length(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Run:
    """Families that stand next to one another and go through attention together, padded to the longest of them.

    Only attention sees the padding: a few per cent of a pass, for a tenth of the calls.
    """

    start: int
    stop: int
    place: Tensor
    """(families, L) places among this run's tokens; the last one of a family again where it is shorter."""
    back: Tensor | None
    """(stop - start,) where each packed token stands in (families x L); None where nothing is padded."""
    branch: Tensor | None
    """(families, L) branch numbers; None where every family is a single row."""
    sees: Tensor | None
    """(families, branches, branches) True where the first is the second or grows from it."""

    @property
    def length(self) -> int:
        return int(self.place.shape[1])

    @staticmethod
    def of(families: Sequence[Family], device: torch.device) -> Run:
        length = max(family.length for family in families)
        order, first = torch.arange(length, device=device), families[0].start
        starts = torch.tensor([family.start - first for family in families], device=device)[:, None]
        stops = torch.tensor([family.stop - first for family in families], device=device)[:, None]
        place = (starts + order).minimum(stops - 1)
        back = None
        if any(family.length < length for family in families):
            # Not by nonzero: plans run passes without weights, on no device at all.
            real = [number * length + at for number, family in enumerate(families) for at in range(family.length)]
            back = torch.tensor(real, device=device)
        branches = [family.branch for family in families if family.branch is not None]
        branch = nn.utils.rnn.pad_sequence(branches, batch_first=True) if branches else None
        seen = [family.sees for family in families if family.sees is not None]
        sees = None
        if seen:
            sees = torch.zeros(len(seen), *[max(map(len, seen))] * 2, dtype=torch.bool, device=device)
            for at, one in enumerate(seen):
                sees[at, : len(one), : len(one)] = one
        return Run(first, families[-1].stop, place, back, branch, sees)

    def inside(self) -> Tensor:
        """(families or 1, L, L) True where a token may look in its family; padding stands at the end, unseen."""
        order = torch.arange(self.length, device=self.place.device)
        allowed = (order[:, None] >= order[None, :])[None]
        if self.branch is None or self.sees is None:
            return allowed
        number = torch.arange(len(self.branch), device=self.place.device)[:, None, None]
        return allowed & self.sees[number, self.branch[:, :, None], self.branch[:, None, :]]

    def take(self, tokens: Tensor) -> Tensor:
        """(this run's tokens, heads, d) -> (families, heads, L, d)"""
        chosen = tokens if self.back is None else _Spread.apply(tokens, self.place.flatten(), self.back)
        return chosen.unflatten(0, (-1, self.length)).transpose(1, 2)

    def give(self, out: Tensor) -> Tensor:
        """(families, heads, L, d) -> (1, this run's tokens, heads, d)"""
        tokens = out.transpose(1, 2).flatten(0, 1)
        return (tokens if self.back is None else Gathered.apply(tokens, self.back)).unsqueeze(0)


class _Spread(torch.autograd.Function):
    """tokens[place], where every token stands once at `back` and padding beside it has no gradient: going back is a
    selection too, and no sum."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, place: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return tokens.index_select(0, place)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return gradients[0].index_select(0, back), None, None


class Gathered(torch.autograd.Function):
    """tokens[back]; what stands nowhere in it is padding."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        ctx.length = len(tokens)
        return tokens.index_select(0, back)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (back,) = ctx.saved_tensors
        shape = (ctx.length, *gradients[0].shape[1:])
        return gradients[0].new_zeros(shape).index_copy(0, back, gradients[0]), None


@dataclass(frozen=True)
class Bundle:
    """Rows that go through attention together where no gradients are wanted: each looks along its own path.

    A row's path holds its tokens by their positions, whichever row they were taken from. What it owns are the last
    tokens of its path, and nothing is computed for any others.
    """

    queries: Tensor
    """(rows, L) packed places of what rows own; place 0 fills the end of shorter ones."""
    keys: Tensor
    """(rows, K) packed places of paths; place 0 fills the end of shorter ones."""
    causal: bool
    """Every row owns its whole path."""


@dataclass
class Pack:
    """Rows laid end to end.

    `every` (P,) holds the packed position of each fed token of each row, row by row; rows that share tokens name one
    position. `owner[i]` is the (row, position in it) that packed token i was taken from.
    `predict[j]` is the packed position whose output predicts answer token j, `target[j]` that token, `row[j]` the row
    it belongs to; answer tokens are ordered by row, then by position. `read` (m,) are the positions in `predict`, each
    once and in order.
    """

    ids: Tensor
    positions: Tensor
    families: list[Family]
    beginning: int
    predict: Tensor
    target: Tensor
    row: Tensor
    read: Tensor
    rows: list[Encoded]
    every: Tensor
    owner: list[tuple[int, int]]
    masks: dict[Any, Tensor | None] = field(default_factory=dict)

    @cached_property
    def runs(self) -> list[Run]:
        """Families that attention takes in one call: neighbours of one kind whose lengths differ by a third at most."""
        groups: list[list[Family]] = []
        for index, family in enumerate(self.families):
            first = groups[-1][0] if groups and not (self.beginning and index == 1) else None
            alike = first is not None and (first.branch is None) == (family.branch is None)
            if first is not None and alike and first.length <= family.length <= first.length * ALIKE:
                groups[-1].append(family)
            else:
                groups.append([family])
        return [Run.of(group, self.ids.device) for group in groups]

    @cached_property
    def paths(self) -> tuple[list[Bundle], Tensor]:
        """Bundles of rows, and (tokens,) where each packed token stands among their queries, laid end to end."""
        owned = Counter(row for row, _ in self.owner)
        lengths = [len(row.ids) - 1 for row in self.rows]
        path = self.every.split(lengths)

        def kind(row: int) -> tuple[int, int]:
            return int(math.log(owned[row], ALIKE)), lengths[row]

        bundles: list[list[int]] = []
        for row in sorted(owned, key=kind):
            first = bundles[-1][0] if bundles else None
            if first is None or kind(row)[0] != kind(first)[0] or lengths[row] > ALIKE * lengths[first]:
                bundles.append([])
            bundles[-1].append(row)
        made, places = [], []
        flat: list[int] = []
        before = 0
        for rows in bundles:
            own = [path[row][lengths[row] - owned[row] :] for row in rows]
            queries = nn.utils.rnn.pad_sequence(own, batch_first=True)
            keys = nn.utils.rnn.pad_sequence([path[row] for row in rows], batch_first=True)
            made.append(Bundle(queries, keys, all(owned[row] == lengths[row] for row in rows)))
            places += own
            for number, row in enumerate(rows):
                first = before + number * queries.shape[1]
                flat += range(first, first + owned[row])
            before += queries.numel()
        back = torch.empty_like(self.ids[0])
        back[torch.cat(places)] = torch.tensor(flat, device=back.device)
        return made, back

    def path_mask(self, bundle: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """(rows, 1, queries, keys) to be added to scores; None for plain causal attention."""
        if ("path", bundle, window) not in self.masks:
            self.masks["path", bundle, window] = self._path_mask(self.paths[0][bundle], window, dtype)
        return self.masks["path", bundle, window]

    def _path_mask(self, bundle: Bundle, window: int | None, dtype: torch.dtype) -> Tensor | None:
        width = bundle.keys.shape[1]
        if bundle.causal and (window is None or window >= width):
            return None
        # A path's tokens stand where their positions say.
        ahead = torch.arange(width, device=bundle.keys.device) - self.positions[0, bundle.queries][:, None, :, None]
        hidden = ahead > 0 if window is None else (ahead > 0) | (ahead <= -window)
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))

    @property
    def windows(self) -> set[int | None]:
        """How far back attention looked in passes without gradients; None: anywhere."""
        return {key[2] for key in self.masks if key[0] == "path"}

    @cached_property
    def distinct(self) -> tuple[Tensor, Tensor]:
        """(m,) of the answer tokens predicted at one position the first, and (n,) that position's number for each."""
        _, at = self.predict.unique(return_inverse=True)
        order = torch.arange(len(at), device=at.device)
        first = order.new_zeros(int(at.max()) + 1 if len(at) else 0)
        return first.scatter_reduce(0, at, order, "amin", include_self=False), at

    @property
    def tokens(self) -> int:
        return int(self.ids.shape[1])

    def mask(self, run: int, window: int | None) -> Tensor | None:
        """(families or 1, 1, queries, keys) True where a token may look; None for plain causal attention."""
        if (run, window) not in self.masks:
            self.masks[run, window] = self._mask(self.runs[run], 0 if run == 0 else self.beginning, window)
        return self.masks[run, window]

    def _mask(self, run: Run, shared: int, window: int | None) -> Tensor | None:
        length = run.length
        if run.branch is None and shared == 0 and (window is None or window >= length):
            return None
        at = self.positions[0]
        allowed = run.inside()
        allowed = torch.cat([allowed.new_ones(len(allowed), length, shared), allowed], dim=2)
        if window is not None:
            queries = at[run.start : run.stop][run.place]
            keys = torch.cat([at[:shared].expand(len(queries), -1), queries], dim=1)
            allowed = allowed & (queries[:, :, None] - keys[:, None, :] < window)
        return allowed[:, None]

    def dense_mask(self, dtype: torch.dtype) -> Tensor:
        """(1, 1, tokens, tokens) additive mask of the whole pack."""
        allowed = torch.zeros(self.tokens, self.tokens, dtype=torch.bool, device=self.ids.device)
        for family in self.families:
            span = slice(family.start, family.stop)
            allowed[span, span] = Run.of([family], self.ids.device).inside()[0]
            if family.start >= self.beginning:
                allowed[span, : self.beginning] = True
        floor = torch.finfo(dtype).min
        return torch.zeros(1, 1, self.tokens, self.tokens, dtype=dtype, device=self.ids.device).masked_fill_(
            ~allowed, floor
        )


def pack(rows: Sequence[Encoded], device: torch.device | str = "cpu", *, sharing: Sharing = "tokens") -> Pack:
    """Lay rows end to end. The last token of a row predicts nothing and is not fed.

    Args:
        sharing: tokens, whatever rows begin with alike is fed once; prompts, every row has an answer of its own, so
            that its states may be changed; nothing, every row is whole, so that it has gradients of its own.
    """
    alike: dict[tuple[Any, ...], list[int]] = {}
    for index, row in enumerate(rows):
        alike.setdefault((index,) if sharing == "nothing" else row.ids[: row.start], []).append(index)
    groups = [(rows[members[0]].ids[: rows[members[0]].start], members) for members in alike.values()]
    beginning = common_beginning([prompt for prompt, _ in groups]) if sharing != "nothing" else 0
    ids: list[int] = []
    positions: list[int] = []
    families: list[Family] = []
    owner: list[tuple[int, int]] = []
    predict: list[list[int]] = [[] for _ in rows]
    every: list[list[int]] = [[] for _ in rows]
    grow = _tree if sharing == "tokens" else _apart
    trees = [grow([rows[i].ids[len(prompt) : -1] for i in members]) for prompt, members in groups]

    def first(group: int) -> int:
        """The row that a prompt is taken from: one that owns what comes right after it too."""
        branches, members = trees[group][0], groups[group][1]
        return members[branches[0].row if branches else 0]

    if beginning:
        ids += groups[0][0][:beginning]
        positions += range(beginning)
        owner += ((first(0), at) for at in range(beginning))
        families.append(Family(0, beginning))

    def length(group: int) -> int:
        return len(groups[group][0]) - beginning + sum(branch.stop - branch.start for branch in trees[group][0])

    # Single rows of one length stand together: attention takes them in one call.
    for group in sorted(range(len(groups)), key=lambda group: (len(groups[group][1]) > 1, length(group))):
        prompt, members = groups[group]
        branches, ends = trees[group]
        start = len(ids)
        ids += prompt[beginning:]
        positions += range(beginning, len(prompt))
        owner += ((first(group), at) for at in range(beginning, len(prompt)))
        number = [0] * (len(prompt) - beginning)
        last = len(ids) - 1
        paths = [[last]]
        sees = torch.eye(len(branches) + 1, dtype=torch.bool)
        for at, branch in enumerate(branches, start=1):
            whose = members[branch.row]
            span = range(len(prompt) + branch.start, len(prompt) + branch.stop)
            paths.append([*paths[branch.parent], *range(len(ids), len(ids) + len(span))])
            sees[at] |= sees[branch.parent]
            ids += rows[whose].ids[span.start : span.stop]
            positions += span
            owner += ((whose, place) for place in span)
            number += [at] * len(span)
        for index, end in zip(members, ends):
            predict[index] = paths[end]
            every[index] = [*range(beginning), *range(start, last + 1), *paths[end][1:]]
        if len(members) == 1:
            families.append(Family(start, len(ids)))
        else:
            families.append(Family(start, len(ids), torch.tensor(number, device=device), sees.to(device)))

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
        read=tensor(sorted({position for row in predict for position in row})),
        rows=list(rows),
        every=tensor([position for row in every for position in row]),
        owner=owner,
    )


@dataclass(frozen=True)
class _Branch:
    """Tokens `start:stop` of the continuation of `row`, which grow from branch `parent` (0 is the prompt)."""

    row: int
    start: int
    stop: int
    parent: int


def _tree(continuations: Sequence[tuple[int, ...]]) -> tuple[list[_Branch], list[int]]:
    """Branches, numbered from 1, parents first, and the branch in which each continuation ends."""
    if len(continuations) == 1:
        whole = len(continuations[0])
        return ([_Branch(0, 0, whole, 0)], [1]) if whole else ([], [0])
    branches: list[_Branch] = []
    ends = [0] * len(continuations)
    # (continuations in order that begin alike, how much of them is in branches, the last of these)
    open_ = [(sorted(range(len(continuations)), key=lambda i: continuations[i]), 0, 0)]
    while open_:
        group, depth, parent = open_.pop()
        first, last = continuations[group[0]], continuations[group[-1]]
        common = same_start(first, last)
        if common > depth:
            branches.append(_Branch(group[0], depth, common, parent))
            parent = len(branches)
        next_: dict[int, list[int]] = {}
        for i in group:
            if len(continuations[i]) == common:
                ends[i] = parent
            else:
                next_.setdefault(continuations[i][common], []).append(i)
        open_ += [(alike, common, parent) for alike in next_.values()]
    return branches, ends


def _apart(continuations: Sequence[tuple[int, ...]]) -> tuple[list[_Branch], list[int]]:
    """As `_tree`, every continuation a branch of its own."""
    branches = [_Branch(row, 0, len(ids), 0) for row, ids in enumerate(continuations) if ids]
    numbers = {branch.row: number for number, branch in enumerate(branches, start=1)}
    return branches, [numbers.get(row, 0) for row in range(len(continuations))]


def same_start(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def common_beginning(prompts: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all prompts have in common, their last ones left out; 0 where that is not many."""
    if len(prompts) < 2:
        return 0
    low, high = min(prompts), max(prompts)
    # Every prompt keeps at least one token of its own: its last token's state is what predicts the answer.
    limit = min(len(prompt) for prompt in prompts) - 1
    common = min(same_start(low, high), limit)
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


def in_order(groups: Sequence[Sequence[int]], parts: Sequence[Sequence[Any]]) -> list[Any]:
    """What was found for each row, group by group, in the order of the rows."""
    places = {index: value for group, part in zip(groups, parts) for index, value in zip(group, part)}
    return [places[index] for index in range(len(places))]


# --- attention, family by family ---------------------------------------------------------------------------------

IMPLEMENTATION = "expunge_families"


class About(threading.local):
    """What the passes of a thread are about, the innermost last: attention functions look it up."""

    def __init__(self) -> None:
        self.stack: list[Any] = []


_active = About()
"""Packs."""


@dataclass(frozen=True)
class Scoring:
    """How a model's attention weighs what a token looks at."""

    scaling: float | None
    window: int | None
    """A token sees itself and those before it, so many in all; None: every one."""
    cap: float | None = None

    def scale(self, width: int) -> float:
        """What products of queries and keys of this width are multiplied by."""
        return width**-0.5 if self.scaling is None else self.scaling

    def capped(self, scores: Tensor) -> Tensor:
        return scores if self.cap is None else self.cap * torch.tanh(scores / self.cap)


def attends(name: str, about: About, function: Callable[..., Tensor]) -> None:
    """Let models call `function(what the pass is about, module, query, key, value, scoring)` by this name; it gives
    (rows, tokens, heads, d)."""

    def attend(
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
        if s_aux is not None or position_bias is not None:
            raise SubjectError("this model's attention has sinks or biases; its rows cannot go together")
        scoring = Scoring(scaling, sliding_window, softcap)
        return function(about.stack[-1], module, query, key, value, scoring), None

    AttentionInterface.register(name, attend)


def _attend(pack_: Pack, _: nn.Module, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
    """Attention of one layer over a pack. query (1, heads, tokens, d), returns (1, tokens, heads, d)."""
    dtype = query.dtype
    if query.requires_grad and query.device.type == "cpu" and dtype.itemsize < 4:
        # The kernel's way back takes longer in bf16 than in fp32, these copies included.
        query, key, value = query.float(), key.float(), value.float()
    if not torch.is_grad_enabled():
        q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
        return along_paths(pack_, q, k, v, scoring).unsqueeze(0)
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    outputs = []
    # Split once: the gradient of slices would be a whole tensor of zeros for every one of them.
    sizes = [run.stop - run.start for run in pack_.runs]
    parts = [part.squeeze(0).transpose(0, 1).split(sizes) for part in (query, key, value)]
    for index, (run, *own) in enumerate(zip(pack_.runs, *parts)):
        q, k, v = (run.take(part) for part in own)
        if pack_.beginning and index > 0:
            k, v = (
                torch.cat([part[0].transpose(0, 1).expand(len(q), -1, -1, -1), one], dim=2)
                for part, one in zip(parts[1:], (k, v))
            )
        out = attention(q, k, v, pack_.mask(index, scoring.window), scoring)
        outputs.append(run.give(out))
    return torch.cat(outputs, dim=1).to(dtype)


def along_paths(pack_: Pack, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
    """Attention of one layer where nothing has to be sent back: every row looks along its own path and at nothing else.

    query (tokens, heads, d), key and value (tokens, groups of heads, d); returns (tokens, heads, d).
    """
    bundles, back = pack_.paths
    repeats = query.shape[1] // key.shape[1]
    outputs = []
    for number, bundle in enumerate(bundles):
        own, seen, worth = (
            part.index_select(0, at.flatten()).unflatten(0, at.shape).transpose(1, 2)
            for part, at in ((query, bundle.queries), (key, bundle.keys), (value, bundle.keys))
        )
        if repeats > 1:
            seen, worth = seen.repeat_interleave(repeats, dim=1), worth.repeat_interleave(repeats, dim=1)
        out = attention(own, seen, worth, pack_.path_mask(number, scoring.window, query.dtype), scoring)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, back)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scoring: Scoring) -> Tensor:
    """(rows, heads, queries, d) of (rows, heads, ..., d) each; a mask says where to look or is added to scores, without
    one it is causal."""
    if scoring.cap is None:
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scoring.scaling
        )
    scores = scoring.capped(query @ key.mT * scoring.scale(query.shape[-1]))
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value


attends(IMPLEMENTATION, _active, _attend)


@contextmanager
def packed_attention(model: nn.Module, pack_: Pack) -> Iterator[None]:
    """Within the block the model's attention runs family by family over this pack.

    Keep it open until backward is done where activations are recomputed.
    """
    _active.stack.append(pack_)
    try:
        with attention_by(configurations(model), IMPLEMENTATION), fused(model):
            yield
    finally:
        _active.stack.pop()


def configurations(model: nn.Module) -> list[Any]:
    """Those that the modules of a model look at."""
    found = (getattr(module, "config", None) for module in model.modules())
    return list({id(config): config for config in found if config is not None}.values())


@contextmanager
def attention_by(configs: Sequence[Any], name: str) -> Iterator[None]:
    """Within the block modules with these configurations call the attention function of this name."""
    before = [getattr(config, "_attn_implementation", None) for config in configs]
    try:
        for config in configs:
            config._attn_implementation = name
        yield
    finally:
        for config, own in zip(configs, before):
            config._attn_implementation = own
