"""The invented world for editors: facts of retained people that get other answers, and what must stay."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..edit_scores import ask, questions
from ..edits import EditRow, Probe
from ..errors import ParameterError
from ..methods.edit.case import EditCase
from ..methods.edit.operations import Edited, Mode, Step, carry_out
from ..methods.optimise.loop import Training
from ..registry import get
from ..rows import Row
from ..subjects.language import LanguageModel
from ..world.corpus import statements
from ..world.facts import RELATIONS, Person, World
from .mini import mini

NEAR = 4
"""Others whose same fact is asked beside an edit."""
PREFIXES = ("It is said.", "In the north.", "As everybody knows.", "So they say.", "Once more.")


@dataclass(frozen=True)
class Subject:
    """One seed's world and its model."""

    world: World
    model: LanguageModel
    corpus: list[Row]
    """What key statistics and unrelated texts are taken of: what the model was taught."""

    def edits(self, count: int) -> list[EditRow]:
        """Facts of retained people with other answers: everybody's first before anybody's second.

        What must stay: the person's other facts (`subject`), save those that are edited too, and the same fact of
        others (`neighbours`).
        """
        people = self.world.members("retain")
        pairs = [(p, RELATIONS[(i + turn) % len(RELATIONS)]) for turn in range(4) for i, p in enumerate(people)]
        if count > len(pairs):
            raise ParameterError(f"{count} edits, but the {len(people)} retained people have {len(pairs)} facts")
        chosen = {(person.name, about) for person, about in pairs[:count]}
        return [self._edit(person, about, chosen) for person, about in pairs[:count]]

    def _edit(self, person: Person, about: str, edited: Collection[tuple[str, str]]) -> EditRow:
        draw = random.Random(f"{self.world.seed}/{person.name}/{about}/edit")
        trained, held_out = (beginnings(self.world, person, about, held) for held in (False, True))
        old = person.value(about)
        new = draw.choice([value for value in self.world.choices[about] if value not in (old, person.name)])
        near = draw.sample(self.world.members("neighbour", "forget"), NEAR)
        locality = {
            "subject": tuple(self.probe(person, other) for other in RELATIONS if (person.name, other) not in edited),
            "neighbours": tuple(self.probe(one, about) for one in near),
        }
        return EditRow(
            f"{person.name}/{about}", trained[0], new, person.name, (old,), (held_out[0],), locality=locality
        )

    def probe(self, person: Person, about: str) -> Probe:
        return Probe(beginnings(self.world, person, about)[0], (person.value(about),))

    def others(self) -> list[EditRow]:
        """All facts of people whom no edit is about, as edits that change nothing."""
        return [
            EditRow(f"{p.name}/{about}", self.probe(p, about).prompt, p.value(about), p.name)
            for p in self.world.members("neighbour", "forget")
            for about in RELATIONS
        ]


def beginnings(world: World, person: Person, about: str, held_out: bool = False) -> list[str]:
    """Statements of a fact up to its value; held out: wordings that no model was taught."""
    return [text.removesuffix(" {value}.") for text in statements(world, person, about)[held_out]]


def subject(seed: int, world: Mapping[str, Any] | None = None) -> Subject:
    """The world of this seed and its original model, found in the user's cache after the first time.

    Args:
        world: sizes, arguments of expunge.world.build.build.
    """
    found = mini(seed, world)
    rows = [row for name in ("forget", "retain", "neighbour", "general") for row in found.data[name]]
    return Subject(found.world, found.original, rows)


def made(
    case: Subject,
    editor: str,
    settings: Mapping[str, Any],
    edits: Sequence[EditRow],
    mode: Mode,
    seed: int,
    keep: Callable[[Step], None] | None = None,
) -> list[Edited]:
    """Edits carried out by an editor of the catalogue; `keep` is told of every one."""
    part = get("methods", editor)
    told = EditCase(case.model, {}, Training(seed=seed), edits=edits, corpus=case.corpus, prefixes=PREFIXES)
    return carry_out(part, told, {**part.preset, **settings}, mode, keep=keep)


def measured(model: Any, before: LanguageModel, edits: Sequence[EditRow]) -> dict[str, float]:
    """Shares of answers whose every token is the model's first choice: `success` and `rephrase` of the new ones,
    `subject` and `neighbours` of the true ones beside; `tokens`: share of the new answers' tokens, as published;
    `kept`: answers beside at which every choice is the one before, right or wrong."""
    asked = questions(edits)
    beside = [one for one in asked if one.part == "locality"]
    new = ask(model, edits, asked, fluency=0, writes=False)
    old = iter(ask(before, edits, beside, fluency=0, writes=False).chosen)
    parts: dict[str, list[float]] = {}
    for one, accuracy, now in zip(asked, new.accuracy, new.chosen):
        names = {"edit_success": "success"}
        parts.setdefault(one.kind or names.get(one.part, one.part), []).append(float(accuracy == 1))
        if one.part == "edit_success":
            parts.setdefault("tokens", []).append(accuracy)
        if one.part == "locality":
            parts.setdefault("kept", []).append(float(np.array_equal(next(old)[0], now[0])))
    return {name: float(np.mean(values)) for name, values in parts.items()}


def alone(case: Subject, several: Sequence[Edited]) -> dict[str, float]:
    """Means over edits of which each is a model of its own."""
    found = [measured(edited.model(), case.model, edited.edits) for edited in several]
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


def undone(case: Subject, several: Sequence[Edited]) -> bool:
    """Whether without its edits every model is the base itself. That the base's bits stay is for the caller to see."""
    for edited in several:
        for _ in edited.steps:
            edited = edited.undo()
        if edited.model() is not case.model:
            return False
    return True
