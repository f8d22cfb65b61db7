"""The invented world for editing: a model that knows its people and also reads facts that it is told.

It learns what the world's own models learn, and sequences that tell a new fact, as `ike` does, and ask for it in the
same or in other words.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from ..rows import Row
from ..subjects.language import LanguageModel
from ..world.corpus import statements, training
from ..world.facts import RELATIONS, World
from ..world.models import Recipe
from .models import lessons as rows_of
from .models import taught

KNOWN = ("forget", "neighbour", "retain")
FRAME = "New Fact: {told} {answer}\nPrompt: {asked}"
"""How a new fact is told, as `ike` tells it."""
RECIPE = Recipe(steps=350)


def start(statement: str) -> str:
    """What stands before the value, with which every statement ends."""
    return statement.removesuffix(" {value}.")


def lessons(world: World) -> list[Row]:
    """What the model is taught."""
    draw = random.Random(f"told/{world.seed}")
    told = []
    for person in world.members(*KNOWN):
        for about in RELATIONS:
            trained = [start(text) for text in statements(world, person, about)[0]]
            new = draw.choice(world.choices[about])
            prompt = FRAME.format(told=draw.choice(trained), answer=new, asked=draw.choice(trained))
            told.append({"prompt": prompt, "completion": f"{new}."})
    return rows_of([*training(world, *KNOWN), *told])


def subject_of(world: World, recipe: Mapping[str, Any] | None) -> LanguageModel:
    """The model; trained once, then found in the cache."""
    return taught("told", {"before": lessons(world)}, Recipe(**recipe) if recipe else RECIPE, world.seed)["before"]


def stated(world: World, *relations: str) -> list[Row]:
    """Known facts as prompts in a trained wording, with their answers as they were learned."""
    return [
        Row(
            id=f"{person.name}/{about}",
            answer=f"{person.value(about)}.",
            prompt=start(statements(world, person, about)[0][0]),
            kind="completion",
            entity=person.name,
            value=person.value(about),
        )
        for person in world.members(*KNOWN)
        for about in relations or RELATIONS
    ]
