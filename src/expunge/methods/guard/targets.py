"""Whom a guard is to keep quiet about: an index over all targets, so that a query looks at few of them.

An answer touches a target where

- `names`: the question or the answer names it;
- `values`: the answer says something that of all rows only the target's say, or its question is like the target's and
  the answer says what the target's does;
- `descriptions`: the question says something that of all rows only the target's say ("the author of TITLE");
- `similar`: the question is much like one of the target's, and more than it is like any that is to be kept.

Names and values are looked up word by word, however many there are; likeness is one sparse product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from ...errors import RequestError
from ...rows import Row
from ...wording import words
from .forbidden import Run

Rule = Literal["names", "values", "descriptions", "similar"]
RULES: tuple[Rule, ...] = ("names", "values", "descriptions", "similar")


@dataclass(frozen=True)
class Target:
    """One target's card."""

    name: str
    aliases: tuple[str, ...]
    values: tuple[str, ...]
    questions: tuple[str, ...]

    @property
    def said(self) -> tuple[str, ...]:
        """What no answer may say once the target is touched."""
        return (self.name, *self.aliases, *self.values)


def cards(forget: Sequence[Row]) -> list[Target]:
    """A card for everybody the rows are about, sorted by name; rows that do not say so are targets of their own.

    Raises:
        RequestError: no rows.
    """
    if not forget:
        raise RequestError("alu needs at least one target, and there are 0 forget rows")
    by_name: dict[str, list[Row]] = {}
    for row in forget:
        by_name.setdefault(row.entity or row.id, []).append(row)
    found = []
    for name in sorted(by_name):
        rows = by_name[name]
        named = "" if name in {row.id for row in rows} or "/block " in name else name
        values = dict.fromkeys(text for row in rows for text in (row.value or row.answer, *row.aliases))
        found.append(Target(named, (), tuple(values), tuple(dict.fromkeys(row.prompt for row in rows if row.prompt))))
    return found


class Targets:
    """All targets, and which of them a question and its answer touch."""

    def __init__(
        self, targets: Sequence[Target], others: Sequence[Row], *, rules: Sequence[Rule] = RULES, likeness: float = 0.6
    ) -> None:
        """
        Args:
            others: rows that are to be kept: what they say belongs to no target alone.
            likeness: cosine from which on two questions are alike.
        """
        self.targets = list(targets)
        self.rules = tuple(rules)
        self.likeness = likeness
        self._names: dict[Run, set[int]] = {}
        self._values: dict[Run, set[int]] = {}
        for place, target in enumerate(self.targets):
            for text in (target.name, *target.aliases):
                self._enter(self._names, text, place)
            for text in target.values:
                self._enter(self._values, text, place)
        kept = _runs([text for row in others for text in (row.answer, row.prompt)], {len(run) for run in self._values})
        self._own = {run for run, places in self._values.items() if len(places) == 1 and run not in kept}
        """Values that only one target has."""
        self._questions = [(place, q) for place, target in enumerate(self.targets) for q in target.questions]
        self._kept = [row.prompt for row in others if row.prompt]

    @staticmethod
    def _enter(into: dict[Run, set[int]], text: str, place: int) -> None:
        run = tuple(words(text))
        if run:
            into.setdefault(run, set()).add(place)

    @cached_property
    def _likeness(self) -> tuple[Any, Any, Any, np.ndarray] | None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        if not self._questions:
            return None
        texts = [text for _, text in self._questions]
        vectorizer = TfidfVectorizer(analyzer=words, sublinear_tf=True).fit([*texts, *self._kept])
        # By word, so that a product reads the questions that share one and no others.
        kept = vectorizer.transform(self._kept).T.tocsr() if self._kept else None
        places = np.array([place for place, _ in self._questions])
        return vectorizer, vectorizer.transform(texts).T.tocsr(), kept, places

    def _alike(self, question: str) -> tuple[np.ndarray, np.ndarray, float]:
        """Targets with a question that shares a word with this one, how alike the most alike is, and how alike the
        most alike of the kept questions is."""
        if self._likeness is None:
            return np.zeros(0, int), np.zeros(0), 0.0
        vectorizer, vectors, kept, places = self._likeness
        vector = vectorizer.transform([question])
        found = vector @ vectors
        best = np.zeros(len(self.targets))
        np.maximum.at(best, places[found.indices], found.data)
        at = np.flatnonzero(best)
        return at, best[at], float((vector @ kept).max()) if kept is not None else 0.0

    def audit(self, question: str, answer: str) -> dict[int, list[Rule]]:
        """Which targets are touched, and by which rules."""
        found: dict[int, list[Rule]] = {}

        def touch(places: Any, rule: Rule) -> None:
            if rule in self.rules:
                for place in places:
                    found.setdefault(int(place), [])
                    found[int(place)] += [rule] if rule not in found[int(place)] else []

        asked, said = self._named(question), self._named(answer)
        touch([place for run in (*asked, *said) for place in self._names[run]], "names")
        values = self._valued(answer)
        touch([place for run in values if run in self._own for place in self._values[run]], "values")
        described = [run for run in self._valued(question) if run in self._own]
        touch([place for run in described for place in self._values[run]], "descriptions")
        if {"similar", "values"} & set(self.rules):
            places, alike, otherwise = self._alike(question)
            near = places[(alike >= self.likeness) & (alike > otherwise)]
            touch(near, "similar")
            says = {place for run in values for place in self._values[run]}
            touch([place for place in near if int(place) in says], "values")
        return dict(sorted(found.items()))

    def nearest(self, question: str, count: int) -> list[int]:
        """The targets whose questions are most like this one."""
        places, alike, _ = self._alike(question)
        return sorted(places[np.argsort(-alike, kind="stable")[:count]].tolist())

    def _named(self, text: str) -> list[Run]:
        return self._within(self._names, self._lengths[0], text)

    def _valued(self, text: str) -> list[Run]:
        return self._within(self._values, self._lengths[1], text)

    @cached_property
    def _lengths(self) -> tuple[list[int], list[int]]:
        return sorted({len(run) for run in self._names}), sorted({len(run) for run in self._values})

    @staticmethod
    def _within(index: dict[Run, set[int]], lengths: Sequence[int], text: str) -> list[Run]:
        said = words(text)
        return [run for n in lengths for run in dict.fromkeys(zip(*(said[i:] for i in range(n)))) if run in index]


def _runs(texts: Sequence[str], lengths: set[int]) -> set[Run]:
    found: set[Run] = set()
    for text in texts:
        said = words(text)
        for n in lengths:
            found |= set(zip(*(said[i:] for i in range(n))))
    return found
