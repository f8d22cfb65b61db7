"""What a model writes, greedily, from every prefix of a text: f(x_<t) has T - t tokens, and an end token ends nothing.

Where the model's choice after x_<t is x_t itself, f(x_<t) = x_t ++ f(x_<t+1). So only prefixes after which it goes
wrong (misses) are continued, (1 - MA)(T - 1) of them at most. One pass over the texts finds them, and leaves the keys
and values of all prefixes behind: a miss starts from a slice of them, and misses of all texts are written together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

from ..tables.paths import Paths
from .contexts import Contexts, Read, Whole, can_cut, read
from .language import LanguageModel
from .packed import LOGIT_ELEMENTS, TOKEN_BUDGET
from .protocol import Progress

Text = tuple[int, ...]


@dataclass(frozen=True)
class Miss:
    """Text `row` of a group goes on with `choice` after its first `at` tokens."""

    row: int
    at: int
    choice: int
    steps: int
    """How many tokens follow `choice`."""


@torch.no_grad()
def paths(
    subject: LanguageModel,
    texts: Sequence[Text],
    *,
    starts: Sequence[int] | None = None,
    shortest: int = 1,
    progress: Progress | None = None,
) -> list[Paths]:
    """The continuations of all prefixes x_<t, t = 1 ... T - shortest, of each text, in the order of the texts.

    Args:
        texts: token ids, at least two of each.
        starts: per text the first t that is asked for, 1 by default.
        shortest: length of the shortest continuation asked for.
        progress: (texts done, texts).
    """
    found: dict[int, Paths] = {}
    cut = bool(texts) and can_cut(subject, max(map(len, texts)))
    for group in _groups(texts):
        rows = [texts[i] for i in group]
        choices, read_ = _read(subject, rows, cut)
        made = []
        misses = []
        for row, (ids, choice) in enumerate(zip(rows, choices)):
            hit = np.concatenate([[False], np.array(ids[1:]) == choice])
            path = Paths(np.array(ids), hit, {}, starts[group[row]] if starts else 1)
            made.append(path)
            wrong = {path.next_miss(t) for t in range(path.start, len(ids) - shortest + 1)} - {len(ids)}
            misses += [Miss(row, at, int(choice[at - 1]), len(ids) - at - 1) for at in wrong]
        for miss, tokens in _write(subject, rows, read_, misses):
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


def _read(subject: LanguageModel, texts: Sequence[Text], keep: bool) -> tuple[list[np.ndarray], Read]:
    """Per text (T - 1,) the model's choice after each prefix, and what it read."""
    found = read(subject, [text[:-1] for text in texts], keep=keep)
    size = max(1, LOGIT_ELEMENTS // subject.vocabulary)
    choices = torch.cat([subject.head(part).argmax(-1) for part in found.states.split(size)])
    return [choices[at].cpu().numpy() for at in found.places], found


# --- writing ---------------------------------------------------------------------------------------------------------


def _write(
    subject: LanguageModel, texts: Sequence[Text], found: Read, misses: Sequence[Miss]
) -> Iterator[tuple[Miss, list[int]]]:
    """At least `steps` tokens after each miss: in as few batches as fit, or those of one length together."""
    size = max(1, TOKEN_BUDGET * 4 // max(map(len, texts)))
    cut = bool(found.layers)
    order = sorted(misses, key=lambda miss: (-miss.steps if cut else miss.at, -miss.steps))
    for _, alike in groupby(order, lambda miss: cut or miss.at):
        group = list(alike)
        for batch in (group[first : first + size] for first in range(0, len(group), size)):
            places = [found.places[miss.row][: miss.at] for miss in batch]
            start = Contexts(subject, found, places) if cut else Whole(subject)
            feed = [[*(() if cut else texts[miss.row][: miss.at]), miss.choice] for miss in batch]
            yield from zip(batch, _continue(subject, start, feed, [miss.steps for miss in batch]))


def _continue(
    subject: LanguageModel, start: Contexts | Whole, feed: list[list[int]], steps: list[int]
) -> list[list[int]]:
    """Greedy tokens after `feed`; `steps` says how many each needs, in falling order."""
    written = torch.zeros(len(feed), steps[0], dtype=torch.long, device=subject.device)
    tokens = torch.tensor(feed, device=subject.device)
    for step in range(steps[0]):
        count = sum(needed > step for needed in steps)
        if count < len(tokens):
            start.keep(slice(count))
            tokens = tokens[:count]
        tokens = start.feed(subject.model, tokens, logits_to_keep=1).logits[:, -1:].argmax(-1)
        written[:count, step] = tokens[:, 0]
    return written.tolist()
