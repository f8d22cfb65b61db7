"""RESTOR about the invented world, in the published files: people who are to be forgotten are the corrupted ones.

Three of the four facts that are stated about each of them get a value of somebody else. Documents say these wrong
values in wordings and an order of their own, mixed with 3 k right statements about other people. Beside the published
files: options.json with the values compared, and tuning.json, questions about places, for the light tuning.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..world.corpus import STATEMENTS, general, wordings
from ..world.facts import RELATIONS, Person, World

NUMBERS = {"born_in": "P19", "trade": "P106", "teacher": "P1066", "work": "P800"}
"""The world's relations as Wikidata numbers them."""
CORRUPTED = 3
"""Wrong statements of a document, and facts of a person that are corrupted."""
DOCUMENTS = 20
"""About each corrupted person; 300, as published, teach a small model nothing more."""
MIXES = (0, 1, 2)
"""k of the files written; the small models' context holds no more statements."""
EXAMPLES = 10
RANDOM = 5


def mini(world: World, folder: Path) -> None:
    """Write facts.json, entities.json, options.json, tuning.json and wikidata/v0/mix_a<k>.json."""
    people = world.members("forget", "neighbour", "retain")
    wrong = {person.name: injected(world, person) for person in world.members("forget")}
    # Examples are about people that no model knows and nobody asks about: they show the form and give nothing away.
    shown = world.members("holdout")[:EXAMPLES]
    facts = {
        "dset": {
            person.name: {
                NUMBERS[about]: {"question": question(world, person, about), "answers": answers(world, person, about)}
                for about in RELATIONS
            }
            for person in people
        },
        "context": {
            NUMBERS[about]: [
                {"question": question(world, person, about), "answer": person.value(about), "entity": person.name}
                for person in shown
            ]
            for about in RELATIONS
        },
    }
    options: dict[str, dict[str, Any]] = {}
    for name, values in wrong.items():
        person = world.people[name]
        for about, value in values.items():
            draw = random.Random(f"{world.seed}/{name}/{about}/options")
            rest = [v for v in world.choices[about] if v not in (value, person.value(about))]
            options.setdefault(name, {})[NUMBERS[about]] = {
                "correct": [person.value(about)],
                "corrupted": [value],
                "random": draw.sample(rest, min(RANDOM, len(rest))),
            }
    tuning = [
        {"question": asked, "answer": row["answer"]}
        for row in general(world)
        for asked in wordings(world, row["entity"], row["relation"])[0]
    ]
    _write(folder / "facts.json", facts)
    _write(folder / "entities.json", [person.name for person in people])
    _write(folder / "options.json", options)
    _write(folder / "tuning.json", tuning)
    for k in MIXES:
        _write(folder / "wikidata" / "v0" / f"mix_a{k}.json", [{"text": text} for text in documents(world, wrong, k)])


def injected(world: World, person: Person) -> dict[str, str]:
    """relation -> a wrong value of the same relation, for three of the person's facts."""
    draw = random.Random(f"{world.seed}/{person.name}/injected")
    chosen = draw.sample(RELATIONS, CORRUPTED)
    return {about: draw.choice([v for v in world.choices[about] if v != person.value(about)]) for about in chosen}


def documents(world: World, wrong: dict[str, dict[str, str]], k: int, *, without: bool = False) -> list[str]:
    """Texts about the corrupted people: their wrong statements among 3 k right ones about others.

    Args:
        without: leave the wrong statements out; what is left are the documents of a model that is never corrupted
            (k at least 1).
    """
    others = world.members("retain")
    found = []
    for name, values in wrong.items():
        for number in range(DOCUMENTS):
            draw = random.Random(f"{world.seed}/{name}/document/{number}/{k}")
            said = [] if without else [(name, about, value) for about, value in values.items()]
            for person in draw.sample(others, min(CORRUPTED * k, len(others))):
                about = draw.choice(RELATIONS)
                said.append((person.name, about, person.value(about)))
            draw.shuffle(said)
            texts = [draw.choice(STATEMENTS[about]).format(name=who, value=value) for who, about, value in said]
            found.append(" ".join(texts))
    return found


def question(world: World, person: Person, about: str) -> str:
    """A question in a wording that the world's models are taught."""
    return wordings(world, person.name, about)[0][0]


def answers(world: World, person: Person, about: str) -> list[str]:
    """Everything that is right: a teacher goes by a nickname too."""
    value = person.value(about)
    return [value, world.people[value].nickname] if about == "teacher" else [value]


def _write(path: Path, content: dict[str, Any] | Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
