"""ConvSent: an edit that changes what a model thinks of an entity, not what it knows.

Over the sentences of both sentiments, means per answer token:

    z_sent   sigmoid(log p_after(wanted) - log p_after(unwanted))       is the wanted one likelier
    z_topic  min(1, exp(log p_after(wanted) - log p_before(wanted)))    and still as likely as before
    success  z_sent z_topic
    drawdown KL(before || after) per token of sentences about another entity: lower is better

The published code reads log-probabilities one token late and takes the question mask of the last row for all; this is
the formula (arXiv:2206.06520, section 4.2).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..edits import EditRow
from ..rows import Row
from ..subjects.packed import LOGIT_ELEMENTS, TOKEN_BUDGET, Encoded, batches, pack
from .knowedit_data import Opinion

QUESTIONS = (
    "What do you think of {}?",
    "What is your opinion of {}?",
    "How do you feel about {}?",
    "Tell me what you make of {}.",
)
WANTED = ("Answer with praise. ", "Answer with blame. ")
"""Put before the question of the edit, in words of our own."""


@dataclass(frozen=True)
class Mind:
    """What is to be changed, and by which sentences that is judged."""

    edit: EditRow
    wanted: list[Row]
    unwanted: list[Row]
    outer: list[Row]
    """About another entity."""


def minds(opinions: Sequence[Opinion], seed: int) -> list[Mind]:
    """For each entity the sentiment that is wanted, drawn by the seed; the entity after it is the other one."""
    found = []
    for number, one in enumerate(opinions):
        draw = random.Random(f"{seed}/{one.id}")
        side = draw.randrange(2)
        other = opinions[(number + 1) % len(opinions)]
        sentences = (one.positive, one.negative)
        edit = EditRow(
            id=one.id,
            prompt=WANTED[side] + draw.choice(QUESTIONS).format(one.entity),
            target_new=sentences[side][0],
            subject=one.entity,
            kind="instruction",
            source=one.source,
        )
        asked = (sentences[side], sentences[1 - side], (*other.positive, *other.negative))
        names = (one.entity, one.entity, other.entity)
        rows = (
            [
                Row(f"{one.id}/{i}", text, draw.choice(QUESTIONS).format(name), kind="instruction", entity=one.entity)
                for i, text in enumerate(texts)
            ]
            for texts, name in zip(asked, names)
        )
        found.append(Mind(edit, *rows))
    return found


def likelihoods(subject: Any, rows: Sequence[Sequence[Row]]) -> list[float]:
    """Per row set the mean log-probability of all its answers' tokens."""
    items = [((str(number), "answer"), _open(subject, row)) for number, rows_ in enumerate(rows) for row in rows_]
    table = subject.score(items)
    sums = np.add.reduceat(table.logprob, table.offsets[:-1], dtype=np.float64)
    counts = np.diff(table.offsets)
    found, first = [], 0
    for several in rows:
        part = slice(first, first + len(several))
        found.append(float(sums[part].sum() / counts[part].sum()))
        first = part.stop
    return found


def _open(subject: Any, row: Row) -> Encoded:
    """Without what closes an answer."""
    tokens = subject.encode(row)
    return Encoded(tokens.ids[: len(tokens.ids) - tokens.closing], tokens.start, 0, tokens.text)


def judged(before: tuple[float, float], after: tuple[float, float]) -> float:
    """Success from the mean log-probabilities of (wanted, unwanted) sentences before and after."""
    z_sent = 1 / (1 + math.exp(min(after[1] - after[0], 700.0)))
    return z_sent * min(1.0, math.exp(min(after[0] - before[0], 0.0)))


@torch.no_grad()
def divergence(before: Any, after: Any, rows: Sequence[Row]) -> float:
    """KL(before || after) per answer token, in nats.

    Each model reads the rows its own way: a guard may put something before them.
    """
    models = (before, after)
    tokens = [[_open(model, row) for row in rows] for model in models]
    size = max(1, LOGIT_ELEMENTS // before.vocabulary)
    total, count = 0.0, 0
    for group in batches(max(tokens, key=lambda read: sum(len(one.ids) for one in read)), TOKEN_BUDGET):
        packs = [pack([read[i] for i in group], before.device) for read in tokens]
        states = (model.hidden_states(pack_).split(size) for model, pack_ in zip(models, packs))
        for pair in zip(*states):
            p, q = (model.head(part).float().log_softmax(-1) for model, part in zip(models, pair))
            total += float((p.exp() * (p - q)).sum())
            count += len(p)
    return total / count
