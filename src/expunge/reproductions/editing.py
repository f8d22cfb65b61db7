"""Editors on the world of editing: facts that get other answers, what must follow, and what must stay."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
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
from .crossed import RELATIONS, Crossed, country_of, crossed, lessons, model_of, sentence, wordings

NEAR = 4
"""Others whose same fact is asked beside an edit."""
CONTEXTS = 5
"""Sentences that are put before prompts."""


@dataclass(frozen=True)
class Subject:
    """One seed's world and its model."""

    world: Crossed
    model: LanguageModel

    @property
    def corpus(self) -> list[Row]:
        """What key statistics and unrelated texts are taken of: what the model was taught."""
        return lessons(self.world)

    @property
    def prefixes(self) -> list[str]:
        """What is put before prompts while a fact's value is worked out: facts of people whom no edit is about."""
        near = zip(self.spared, RELATIONS * CONTEXTS)
        return [sentence(self.world, name, about) for name, about in list(near)[:CONTEXTS]]

    @property
    def edited(self) -> list[str]:
        """People whose facts edits are about: two of three. No edit is about the others."""
        return list(self.world.people)[: -2 * self._sixth]

    @property
    def shown(self) -> list[str]:
        """People who are asked about nowhere: editors that learn from other facts are shown theirs."""
        return list(self.world.people)[-2 * self._sixth : -self._sixth]

    @property
    def spared(self) -> list[str]:
        return list(self.world.people)[-self._sixth :]

    @property
    def _sixth(self) -> int:
        return len(self.world.people) // 6

    def edits(self, count: int) -> list[EditRow]:
        """Facts with other answers: everybody's first before anybody's second, relations in turn.

        What must stay: the person's other facts (`subject`), save those that are edited too, and the same fact of
        people whom no edit is about (`neighbours`). What must follow: of another place of birth the country it lies
        in (`one_hop`), which is always another one.
        """
        people = self.edited
        if count > 4 * len(people):
            raise ParameterError(
                f"{count} edits, but {len(people)} people have {4 * len(people)} facts; make more people"
            )
        pairs = [(p, RELATIONS[(i + turn) % len(RELATIONS)]) for turn in range(4) for i, p in enumerate(people)]
        chosen = set(pairs[:count])
        return [self._edit(name, about, chosen, self.spared) for name, about in pairs[:count]]

    def demonstrations(self) -> list[EditRow]:
        """All facts of the people who are shown, as edits of which each is made by itself; what must stay is about
        them, too."""
        return [
            self._edit(name, about, {(name, about)}, [other for other in self.shown if other != name])
            for name in self.shown
            for about in RELATIONS
        ]

    def _edit(self, name: str, about: str, edited: Collection[tuple[str, str]], near: Sequence[str]) -> EditRow:
        world, old = self.world, self.world.people[name][about]
        draw = random.Random(f"{world.seed}/{name}/{about}/edit")
        country = world.country
        new = draw.choice(
            [
                value
                for value in world.choices[about]
                if (country[value] != country[old] if about == "born_in" else value != old)
            ]
        )
        (prompt, *_), held_out = wordings(world, name, about)
        locality = {
            "subject": tuple(self.probe(name, other) for other in RELATIONS if (name, other) not in edited),
            "neighbours": tuple(self.probe(one, about) for one in draw.sample(near, min(NEAR, len(near)))),
        }
        follows = {"one_hop": (Probe(country_of(name), (country[new],)),)} if about == "born_in" else {}
        return EditRow(f"{name}/{about}", prompt, new, name, (old,), (held_out,), locality, follows)

    def probe(self, name: str, about: str) -> Probe:
        return Probe(wordings(self.world, name, about)[0][0], (self.world.people[name][about],))

    def others(self) -> list[EditRow]:
        """All facts of people whom no edit is about, as edits that change nothing."""
        return [
            EditRow(f"{name}/{about}", probe.prompt, probe.answers[0], name)
            for name in self.spared
            for about in RELATIONS
            for probe in [self.probe(name, about)]
        ]


def subject(seed: int, people: int = 100, recipe: Mapping[str, Any] | None = None) -> Subject:
    """The world of editing of this seed and its model, found in the user's cache after the first time.

    Args:
        people: how many there are; edits are about two of three.
        recipe: of the model (`expunge.world.models.Recipe`), where it is not `crossed.RECIPE`.
    """
    world = crossed(seed, people)
    return Subject(world, model_of(world, recipe))


def made(
    case: Subject,
    editor: str,
    settings: Mapping[str, Any],
    edits: Sequence[EditRow],
    mode: Mode,
    seed: int,
    *,
    done: Sequence[Step] = (),
    memory: dict[str, Any] | None = None,
) -> list[Edited]:
    """Edits carried out by an editor of the catalogue.

    Args:
        done: steps of a sequence that an earlier call made; it goes on behind them.
        memory: what such calls work out once.
    """
    part = get("methods", editor)
    told = EditCase(
        case.model,
        {},
        Training(seed=seed),
        edits=edits,
        corpus=case.corpus,
        prefixes=case.prefixes,
        demonstrations=case.demonstrations(),
        memory={} if memory is None else memory,
    )
    return carry_out(part, told, {**part.preset, **settings}, mode, done=done)


def measured(model: Any, before: LanguageModel, edits: Sequence[EditRow]) -> dict[str, float]:
    """Shares of answers whose every token is the model's first choice: `success` and `rephrase` of the new ones,
    `one_hop` of what follows, `subject` and `neighbours` of the true ones beside; `tokens`: share of the new answers'
    tokens, as published; `kept`: answers beside at which every choice is the one before, right or wrong."""
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
    """Means over edits of which each is a model of its own; over those that have what is asked."""
    found = [measured(edited.model(), case.model, edited.edits) for edited in several]
    names = dict.fromkeys(name for one in found for name in one)
    return {name: float(np.mean([one[name] for one in found if name in one])) for name in names}


def undone(case: Subject, several: Sequence[Edited]) -> bool:
    """Whether without its edits every model is the base itself. That the base's bits stay is for the caller to see."""
    for edited in several:
        for _ in edited.steps:
            edited = edited.undo()
        if edited.model() is not case.model:
            return False
    return True
