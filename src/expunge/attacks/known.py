"""What an attacker knows beside the question: what rows state of whom, what follows from what, names nobody has."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import combinations

from ..metrics.matching import says
from ..rows import Row

SUPPORT = 3
"""Times that a rule must be seen to hold, and never to fail, before it counts as one."""


def renamed(text: str, name: str, other: str) -> str:
    """`text` with another name wherever the whole name stands."""
    return re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", lambda _: other, text) if name else text


def asked_of(row: Row, other: str, before: str = "") -> Row | None:
    """The row asked about another name, after a text; None where its prompt does not name whom it is about."""
    prompt = renamed(row.prompt, row.entity, other)
    return None if prompt == row.prompt else asked(row, f"{before} {prompt}".lstrip())


def asked(row: Row, prompt: str) -> Row:
    """The row with another prompt; of a chat the last turn."""
    turns = (*row.messages[:-1], (row.messages[-1][0], prompt)) if row.messages else ()
    return replace(row, prompt=prompt, messages=turns, paraphrased_prompts=())


def statement(row: Row) -> str:
    """The row as something said: a cloze with its value, or the question with its answer."""
    text = f"{row.prompt.rstrip()} {row.answer}".strip()
    return text if text[-1] in ".!?" else f"{text}."


def unused(names: Iterable[str], count: int, seed: int) -> list[str]:
    """Names that nobody has, made of parts that names have, so that no token of them is new to the model."""
    taken = sorted({name for name in names if name})
    words = [name.split(maxsplit=1) for name in taken if " " in name]
    letters = [[name[: -(-len(name) // 2)], name[-(-len(name) // 2) :]] for name in taken]
    for parts, glue in ((words, " "), (letters, "")):
        made = sorted({f"{first}{glue}{last}" for first, _ in parts for _, last in parts} - set(taken))
        if made:
            return random.Random(f"{seed}/names").sample(made, min(count, len(made)))
    return []


class Facts:
    """Rows by whom they are about and by relation. Rows without a relation or a value state nothing here."""

    def __init__(self, rows: Mapping[str, Sequence[Row]]) -> None:
        self.about: dict[str, dict[str, list[Row]]] = {}
        self.owners: dict[tuple[str, str], set[str]] = {}
        for row in (row for several in rows.values() for row in several if row.relation and row.value):
            self.about.setdefault(row.entity, {}).setdefault(row.relation, []).append(row)
            self.owners.setdefault((row.relation, row.value), set()).add(row.entity)

    def said(self, entity: str, relation: str) -> str:
        """A fact in words; a cloze where there is one, which reads as a sentence."""
        rows = self.about[entity][relation]
        return statement(next((row for row in rows if row.kind == "completion"), rows[0]))

    def value(self, entity: str, relation: str) -> str:
        return self.about.get(entity, {}).get(relation, [Row("", "")])[0].value

    def described(self, row: Row, name: str) -> str:
        """Other facts about whom the row is about, said of `name`, that hold of nobody else; "" where none do.

        Neither the row's answer nor the real name stands in it.
        """
        given = (row.relation, self.rules.get(row.relation, ("",))[0])  # from which the answer would follow
        usable = [
            relation
            for relation in self.about.get(row.entity, {})
            if relation not in given
            and renamed(self.said(row.entity, relation), row.entity, name) != self.said(row.entity, relation)
        ]
        for count in (1, 2):
            for several in combinations(usable, count):
                sets = [self.owners[relation, self.value(row.entity, relation)] for relation in several]
                text = " ".join(renamed(self.said(row.entity, relation), row.entity, name) for relation in several)
                if len(set.intersection(*sets)) == 1 and not gives_away(row, text):
                    return text
        return ""

    @cached_property
    def rules(self) -> dict[str, tuple[str, str]]:
        """relation -> (r1, r2) where (a, r1, b) and (b, r2, c) have (a, relation, c) follow, in all rows at hand."""
        held: dict[tuple[str, str, str], int] = {}
        failed: set[tuple[str, str, str]] = set()
        for entity, relations in self.about.items():
            for first in relations:
                middle = self.value(entity, first)
                for second, whole in ((s, w) for s in self.about.get(middle, {}) for w in relations if w != first):
                    if self.value(entity, whole) == self.value(middle, second):
                        held[whole, first, second] = held.get((whole, first, second), 0) + 1
                    else:
                        failed.add((whole, first, second))
        found: dict[str, tuple[str, str]] = {}
        for rule, times in held.items():
            if times >= SUPPORT and rule not in failed:
                found.setdefault(rule[0], rule[1:])
        return found

    def steps(self, row: Row) -> tuple[Row, Row] | None:
        """The two facts that the row follows from, the first about the same, the second about what that names."""
        first, second = self.rules.get(row.relation, ("", ""))
        middle = self.value(row.entity, first)
        if not middle or self.value(middle, second) != row.value:
            return None
        return self.about[row.entity][first][0], self.about[middle][second][0]

    def aliases(self, entity: str) -> tuple[str, ...]:
        """Other names: those that rows give, or else the last word with the first one's initial, and alone."""
        given = [
            row.aliases
            for several in self.about.values()
            for rows in several.values()
            for row in rows
            if row.value == entity and row.aliases
        ]
        words = entity.split()
        made = (f"{words[0][0]}. {words[-1]}", words[-1]) if len(words) > 1 else ()
        return given[0] if given else made


def gives_away(row: Row, text: str) -> bool:
    """Whether the answer, or an alias of it, stands in a text."""
    return any(says(text, wanted) for wanted in (row.value or row.answer, *row.aliases))
