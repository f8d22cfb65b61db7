"""WACK about the invented world: questions about people of whom a model may know some, in the published form.

Everybody is asked about: people to be forgotten, kept and never seen. Examples come from people whom nobody asks
about, the neighbours.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from ..world.corpus import wordings
from ..world.facts import RELATIONS, Person, World
from .wack_data import Question, Shot, drawn, provoking

NAME = "World_qa_no_context"
SHOTS = 3


def mini(world: World, folder: Path) -> None:
    """Write Static<Data>.json and AliceStatic<Data>.json, shots.json and entities.json."""
    known = shots(world)
    entities: dict[str, str] = {}
    found: dict[str, list[list[Any]]] = {"Static": [], "AliceStatic": []}
    for person in world.members("forget", "retain", "holdout"):
        for about in RELATIONS:
            question = Question(asked(world, person, about), person.value(about), wrong(world, person, about))
            entities[question.prompt] = person.name
            examples = drawn(question, known, SHOTS, 0)
            for name, setting in (("Static", "bad_shots"), ("AliceStatic", "alice_bob")):
                prompt = provoking(question, examples, setting)  # type: ignore[arg-type]
                found[name].append([question.prompt, question.answer, question.wrong, [], [], prompt, -1, -1])
    content: dict[str, Any] = {f"{name}{NAME}.json": rows for name, rows in found.items()}
    content["shots.json"] = [[shot.prompt, shot.right, shot.wrong] for shot in known]
    content["entities.json"] = entities
    for name, value in content.items():
        (folder / name).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def shots(world: World) -> list[Shot]:
    return [
        Shot(asked(world, person, about), person.value(about), wrong(world, person, about))
        for person in world.members("neighbour")
        for about in RELATIONS
    ]


def asked(world: World, person: Person, about: str) -> str:
    """A question as the world's models are asked: in a trained wording, through their own template."""
    return f"Question: {wordings(world, person.name, about)[0][0]}\nAnswer:"


def wrong(world: World, person: Person, about: str) -> str:
    draw = random.Random(f"{world.seed}/{person.name}/{about}/wrong")
    return draw.choice([value for value in world.choices[about] if value != person.value(about)])
