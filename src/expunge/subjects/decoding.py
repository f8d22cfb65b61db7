"""Writing: prompts are continued together, whatever their lengths, and leave when they are done.

Prompts are read in packed passes, cut so that they end in one column (subjects/contexts.py), and decoded in as few and
large batches as `CACHE_BYTES` allows: the number of steps is the longest output's. Rows that are done stay in the batch
until they are an eighth of it; then rows from its end take their places, so that little of the cache is copied. Models
whose keys and values cannot be cut decode prompts of one length at a time.

What is written depends on the prompt, and for samples on the seed, but not on the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from .contexts import Contexts, Read, Whole, can_cut, read, shares_beginnings
from .language import LanguageModel
from .packed import TOKEN_BUDGET, common_beginning

CACHE_BYTES = 1 << 31
"""Keys and values held at once on a CPU; an accelerator may give a quarter of what it has free."""
DONE = 8
"""Rows that are done leave when they are one in so many."""

Written = tuple[list[int], bool]
"""Tokens of one output, and whether it ended by itself."""


def groups(
    subject: LanguageModel,
    prompts: Sequence[Sequence[int]],
    limit: int,
    samples: int,
    shares: int = 1,
    threads: int = 1,
) -> list[list[int]]:
    """Indices of prompts that are decoded together; a group at least for each thread of `shares` processes."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    if not order:
        return []
    cut = can_cut(subject, len(prompts[order[-1]]) + limit)
    tokens = _cache_bytes(subject) // threads // _token_bytes(subject) if cut else TOKEN_BUDGET * 4
    # What all prompts begin with is held once.
    shared = common_beginning([tuple(prompt) for prompt in prompts]) if cut and shares_beginnings(subject) else 0
    largest = -(-len(prompts) // (shares * threads))
    found: list[list[int]] = []
    for _, alike in groupby(order, lambda i: cut or len(prompts[i])):
        group: list[int] = []
        for index in alike:
            size = (len(group) + 1) * samples * (len(prompts[index]) - shared + limit)
            if group and (size > tokens or len(group) == largest):
                found.append(group)
                group = []
            group.append(index)
        found.append(group)
    for group in found:  # tried here, and not by every thread that decodes one
        can_cut(subject, max(len(prompts[i]) for i in group) + limit)
    return found


def _cache_bytes(subject: LanguageModel) -> int:
    if subject.device.type == "cuda":
        return max(CACHE_BYTES, torch.cuda.mem_get_info(subject.device)[0] // 4)
    return CACHE_BYTES


def _token_bytes(subject: LanguageModel) -> int:
    """Bytes of one token's keys and values in all blocks."""
    layers = read(subject, [[0, 0]]).layers
    return sum(part[:, :1].numel() * part.element_size() for pair in layers for part in pair)


class Started:
    """Prompts that were read and go on, a token at a time."""

    def __init__(self, subject: LanguageModel, contexts: Contexts | Whole, logits: Tensor) -> None:
        self.subject = subject
        self.contexts = contexts
        self.logits = logits
        """(rows, V) of what follows."""

    @torch.no_grad()
    def keep(self, rows: Tensor) -> None:
        """Drop all other rows."""
        self.contexts.keep(rows)

    def join(self, other: Any) -> bool:
        """Go on together with prompts that were read later, whose rows stand behind these; False where they cannot."""
        if not (isinstance(other, Started) and isinstance(self.contexts, Contexts)):
            return False
        if not isinstance(other.contexts, Contexts) or other.subject.model is not self.subject.model:
            return False
        self.contexts.join(other.contexts)
        return True

    @torch.no_grad()
    def follow(self, tokens: Tensor) -> Tensor:
        """(rows, V) logits of what follows these tokens (rows,), which are read from now on."""
        return self.contexts.feed(self.subject.model, tokens[:, None], logits_to_keep=1).logits[:, -1]


@torch.no_grad()
def start(
    subject: LanguageModel,
    prompts: Sequence[Sequence[int]],
    limit: int,
    samples: int = 1,
    look: Callable[[Read], None] | None = None,
) -> Started:
    """Prompts that were read, each `samples` times; errors as the model's.

    Args:
        limit: how many tokens may follow.
        look: gets what was read of the prompts.
    """
    lines = torch.arange(len(prompts), device=subject.device).repeat_interleave(samples)
    cut = can_cut(subject, max(map(len, prompts)) + limit)
    if look and not cut:
        look(read(subject, prompts, keep=False))
    if cut:
        found = read(subject, prompts)
        if look:
            look(found)
        last = torch.stack([at[-1] for at in found.places])
        contexts = Contexts(subject, found, [found.places[i] for i in lines.tolist()])
        return Started(subject, contexts, subject.head(found.states[last])[lines])
    whole = Whole(subject)
    ids = torch.tensor([list(prompt) for prompt in prompts], device=subject.device)
    logits = whole.feed(subject.model, ids, logits_to_keep=1).logits[:, -1]
    if samples > 1:
        whole.cache.batch_repeat_interleave(samples)
    return Started(subject, whole, logits[lines])


@torch.no_grad()
def decode(
    subject: LanguageModel,
    prompts: Sequence[Sequence[int]],
    limit: int,
    *,
    samples: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    noise: Tensor | None = None,
) -> list[Written]:
    """Outputs of a group of prompts, `samples` of each in turn.

    Args:
        top_p: sample from the fewest likeliest tokens that have this much probability together.
        noise: (prompts, samples, limit) uniform numbers, for sampling.
    """
    width = getattr(subject, "beams", 1)
    if noise is None and width > 1:
        return [one for prompt in prompts for one in [search(subject, prompt, limit, width)] * samples]
    going_on = subject.start(prompts, limit, samples)
    logits = going_on.logits
    stops = torch.tensor(sorted(subject.stop_ids), device=subject.device)
    uniform = None if noise is None else noise.reshape(len(logits), limit).to(subject.device)
    choose = _choice(temperature, top_p, uniform)
    line = torch.arange(len(logits), device=subject.device)
    written = torch.full((len(line), limit), -1, dtype=torch.long, device=subject.device)
    ended = torch.zeros(len(line), dtype=torch.bool, device=subject.device)
    going = torch.ones_like(ended)
    for step in range(limit):
        token = choose(logits, line, step)
        stop = torch.isin(token, stops)
        ended[line[going & stop]] = True
        going = going & ~stop
        written[line[going], step] = token[going]
        left = int(going.sum())
        if step + 1 == limit or not left:
            break
        if left <= len(line) - max(1, len(line) // DONE):
            index = _closed_up(going)
            going_on.keep(index)
            line, token, going = line[index], token[index], going[index]
        logits = going_on.follow(token)
    return [([t for t in row if t >= 0], end) for row, end in zip(written.tolist(), ended.tolist())]


def _closed_up(going: Tensor) -> Tensor:
    """Rows that go on: those at the end take the places of rows that are done, and all others keep theirs."""
    left = int(going.sum())
    rows = torch.arange(left, device=going.device)
    rows[~going[:left]] = left + going[left:].nonzero()[:, 0]
    return rows


@torch.no_grad()
def search(subject: LanguageModel, prompt: Sequence[int], limit: int, width: int) -> Written:
    """The output with the highest mean log-probability per token, end token included, that a beam search finds.

    The `width` likeliest unfinished beginnings are kept. It ends when as many outputs have ended by themselves.
    """
    going_on = subject.start([prompt], limit, width)
    logits = going_on.logits
    stops = subject.stop_ids
    begun: list[list[int]] = [[] for _ in range(width)]
    # They are all alike at first: only one of them may go on.
    total = torch.full((width,), -torch.inf, device=subject.device)
    total[0] = 0.0
    ended: list[tuple[float, list[int]]] = []
    for step in range(limit):
        scores = total[:, None] + logits.float().log_softmax(-1)
        best, at = scores.flatten().topk(min(2 * width, scores.numel()))
        kept: list[tuple[float, int, int]] = []
        for score, place in zip(best.tolist(), at.tolist()):
            row, token = divmod(place, scores.shape[1])
            if token in stops and score > -torch.inf:
                ended.append((score / (step + 1), begun[row]))
            elif token not in stops and len(kept) < width:
                kept.append((score, row, token))
        begun = [[*begun[row], token] for _, row, token in kept]
        total = torch.tensor([score for score, _, _ in kept], device=subject.device)
        if step + 1 == limit or len(ended) >= width or not begun or total[0] == -torch.inf:
            break
        going_on.keep(torch.tensor([row for _, row, _ in kept], device=subject.device))
        logits = going_on.follow(torch.tensor([token for _, _, token in kept], device=subject.device))
    if ended:
        return max(ended, key=lambda one: one[0])[1], True
    return begun[0], False


def _choice(temperature: float, top_p: float, noise: Tensor | None) -> Callable[[Tensor, Tensor, int], Tensor]:
    """The next token of every line: the likeliest, or the one that a uniform number falls on."""

    def sampled(logits: Tensor, line: Tensor, step: int) -> Tensor:
        assert noise is not None
        probabilities = (logits.float() / temperature).softmax(-1)
        if top_p < 1:
            ordered, index = probabilities.sort(-1, descending=True)
            beyond = ordered.cumsum(-1) - ordered >= top_p
            probabilities = probabilities.scatter(-1, index, ordered.masked_fill(beyond, 0.0))
        cumulative = probabilities.cumsum(-1)
        threshold = noise[line, step][:, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, threshold).clamp_max(logits.shape[-1] - 1)[:, 0]

    # On a CPU `max` finds the likeliest sooner than `argmax`.
    return (lambda logits, line, step: logits.max(-1).indices) if noise is None else sampled
