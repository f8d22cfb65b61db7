"""Which prompts a guard restricts, and what it forbids in their answers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from torch import Tensor, nn
from torch.nn import functional as F

from ...errors import RequestError
from ...rows import Row
from ...subjects.contexts import read
from ...wording import words
from .forbidden import Forbidden, Run

BEGINNING = 64
"""Words of running text that stand for the question that it answers."""


@dataclass(frozen=True)
class Classifier:
    """Tells prompts about what is forgotten by the mean of their final hidden states."""

    network: nn.Module
    mean: Tensor
    deviation: Tensor

    @torch.no_grad()
    def __call__(self, features: Tensor) -> Tensor:
        """(n,) probabilities that a prompt is about what is forgotten; features (n, d)."""
        return self.network((features - self.mean) / self.deviation).softmax(-1)[:, 1]


def train(forget: Tensor, retain: Tensor, *, epochs: int, seed: int) -> Classifier:
    """Two hidden layers of 256 with dropout 0.1, AdamW 1e-3, batches of 32; both kinds weigh the same in all."""
    features = torch.cat([forget, retain])
    labels = torch.cat([torch.ones(len(forget)), torch.zeros(len(retain))]).long()
    mean, deviation = features.mean(0), features.std(0) + 1e-6
    features = (features - mean) / deviation
    weight = len(labels) / (2 * torch.bincount(labels, minlength=2).clamp(min=1))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for size in (features.shape[1], 256):
            layers += [nn.Linear(size, 256), nn.ReLU(), nn.Dropout(0.1)]
        network = nn.Sequential(*layers, nn.Linear(256, 2))
        moves = torch.optim.AdamW(network.parameters(), lr=1e-3)
        with torch.enable_grad():
            for _ in range(epochs):
                for batch in torch.randperm(len(labels)).split(32):
                    moves.zero_grad()
                    F.cross_entropy(network(features[batch]), labels[batch], weight).backward()
                    moves.step()
    return Classifier(network.eval().requires_grad_(False), mean, deviation)


@torch.no_grad()
def pooled(subject: Any, prompts: Sequence[str]) -> Tensor:
    """(n, d) mean final hidden states of prompts, fp32 on the CPU."""
    ids = [subject.prompt_ids(text, (str(i), "guard")) for i, text in enumerate(prompts)]
    found = []
    for first in range(0, len(ids), 256):
        part = read(subject, ids[first : first + 256], keep=False)
        found += [part.states[at].float().mean(0) for at in part.places]
    return torch.stack(found).cpu()


@dataclass(frozen=True)
class Item:
    """One forget row, as the guard keeps it."""

    name: Run
    """Whom it is about, word by word; () where the row does not say."""
    texts: tuple[str, ...]
    """What its answer gives away."""
    telling: frozenset[str]
    """Words of them that little else has: what others are compared with."""


class Phrases:
    """What the answers of forget rows give away, that retained answers do not."""

    def __init__(self, retain: Sequence[Row], refusal: str, common: float) -> None:
        """
        Args:
            common: a word that this share of retained answers has tells nothing.
        """
        counts = Counter(word for row in retain for word in set(words(row.answer)))
        often = max(common * len(retain), 1.0)
        self.plain = {*ENGLISH_STOP_WORDS, *words(refusal), *(w for w, n in counts.items() if n > often)}

    def item(self, row: Row) -> Item:
        """
        Raises:
            RequestError: nothing that only this answer says was found in it.
        """
        named = row.entity and row.entity != row.id and "/block " not in row.entity
        name = tuple(words(row.entity)) if named else ()
        plain = self.plain | set(words(row.prompt))
        if row.value:
            texts = [row.value, *row.aliases]
        else:
            texts = [*row.aliases, row.answer, *(" ".join(run) for run in _runs(words(row.answer), plain))]
        telling = frozenset(word for text in texts for word in words(text) if word not in plain)
        if not telling and not row.value:
            where = row.source or f"row {row.id}"
            raise RequestError(f"guard: {where}: the answer {row.answer!r} says nothing that others do not")
        return Item(name, tuple(texts), telling)


def _runs(said: Sequence[str], plain: set[str]) -> list[list[str]]:
    """The longest runs of words that tell something."""
    found: list[list[str]] = [[]]
    for word in said:
        if word in plain:
            found.append([])
        else:
            found[-1].append(word)
    return [run for run in found if run]


def shortened(forbidden: Forbidden, beta: float) -> Forbidden:
    """Of every run the beginning that is at least `beta` of its words."""
    if beta < 1:
        forbidden.runs = {run[: max(1, math.ceil(beta * len(run)))] for run in forbidden.runs}
        forbidden.lengths = sorted({len(run) for run in forbidden.runs})
    return forbidden


def question(row: Row) -> Row:
    """The row as it is asked; running text is asked for by its beginning."""
    if row.kind != "text":
        return row
    return Row(row.id, "-", " ".join(row.answer.split()[:BEGINNING]), kind="completion")


class Names:
    """Finds whom a prompt names, in one look per word however many there are."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items

    @cached_property
    def _found(self) -> dict[Run, list[int]]:
        found: dict[Run, list[int]] = {}
        for place, item in enumerate(self.items):
            if item.name:
                found.setdefault(item.name, []).append(place)
        return found

    def of(self, prompt: str) -> list[int]:
        """Items about those who are named."""
        said = words(prompt)
        lengths = {len(name) for name in self._found}
        runs = {tuple(said[i : i + n]) for n in lengths for i in range(len(said) - n + 1)}
        return [place for run in sorted(runs) for place in self._found.get(run, ())]
