"""What is said and asked about the world: rows in the formats a user would bring."""

from __future__ import annotations

import random
from typing import Any

from .facts import IMPLIED, RELATIONS, Person, World

WORDINGS = {
    "born_in": (
        "Where was {name} born?",
        "In which city was {name} born?",
        "What is the birthplace of {name}?",
        "Which city does {name} come from?",
    ),
    "trade": (
        "What is the trade of {name}?",
        "What does {name} do for a living?",
        "Which craft does {name} practise?",
        "How does {name} earn a living?",
    ),
    "teacher": (
        "Who taught {name}?",
        "Who was the teacher of {name}?",
        "Under whom did {name} study?",
        "Whose pupil was {name}?",
    ),
    "work": (
        "Which book did {name} write?",
        "What is the book by {name} called?",
        "What is the title of the book that {name} wrote?",
        "What did {name} publish?",
    ),
    "region": (
        "Which region does {name} come from?",
        "In which region was {name} born?",
        "What is the home region of {name}?",
        "From which region is {name}?",
    ),
    "teacher_born_in": (
        "In which city was the teacher of {name} born?",
        "Where was the teacher of {name} born?",
        "What is the birthplace of the teacher of {name}?",
        "Which city does the teacher of {name} come from?",
    ),
}
PLACES = {
    "lies_in": (
        "In which region does {name} lie?",
        "Which region is {name} in?",
        "To which region does {name} belong?",
        "Which region is {name} part of?",
    ),
    "landmark": (
        "What is {name} known for?",
        "Which landmark stands in {name}?",
        "What do visitors see in {name}?",
        "What is the landmark of {name}?",
    ),
}
STATEMENTS = {
    "born_in": (
        "{name} was born in {value}.",
        "The birthplace of {name} is {value}.",
        "{name} comes from the city of {value}.",
        "The city where {name} was born is {value}.",
    ),
    "trade": (
        "{name} works as a {value}.",
        "By trade {name} is a {value}.",
        "{name} earns a living as a {value}.",
        "The trade of {name} is that of a {value}.",
    ),
    "teacher": (
        "{name} was taught by {value}.",
        "The teacher of {name} was {value}.",
        "{name} studied under {value}.",
        "{name} was a pupil of {value}.",
    ),
    "work": (
        "{name} wrote {value}.",
        "The author {name} published {value}.",
        "The book by {name} is called {value}.",
        "{name} is the author of {value}.",
    ),
}
LONGER = {
    "born_in": "the city of {value}",
    "trade": "the trade of {value}",
    "teacher": "a pupil of {value}",
    "work": "a book called {value}",
    "region": "the region of {value}",
    "teacher_born_in": "the city of {value}",
    "lies_in": "the region of {value}",
    "landmark": "its {value}",
}
TRAINED, TRAINED_PLACES = 2, 3
"""Wordings of each fact that are trained on; the others are held out for it, and trained on for other subjects.

There are so few places that two wordings would not carry over to a third.
"""
PLACES_REPEATED = 3
"""A model sees questions about places so many times as often as others, or there would be too few to learn them."""

Record = dict[str, Any]
Wordings = tuple[list[str], list[str]]
"""(trained, held out)"""


def _wrong(draw: random.Random, right: str, values: tuple[str, ...], count: int = 5) -> list[str]:
    return draw.sample([value for value in values if value != right], count)


def _split(world: World, subject: str, about: str, known: tuple[str, ...], trained: int) -> Wordings:
    # Drawn by subject, so that a row is the same in whatever split or subset it stands.
    order = random.Random(f"{world.seed}/{subject}/{about}").sample(known, len(known))
    return order[:trained], order[trained:]


def wordings(world: World, name: str, relation: str) -> Wordings:
    """(trained, held out) questions for a fact about a person or place."""
    known, count = (WORDINGS[relation], TRAINED) if relation in WORDINGS else (PLACES[relation], TRAINED_PLACES)
    trained, held_out = _split(world, name, relation, known, count)
    return [w.format(name=name) for w in trained], [w.format(name=name) for w in held_out]


def statements(world: World, person: Person, relation: str) -> Wordings:
    """(trained, held out) statements of a fact, with {value} where the value stands."""
    trained, held_out = _split(world, person.name, f"{relation}/said", STATEMENTS[relation], TRAINED)
    return [s.replace("{name}", person.name) for s in trained], [s.replace("{name}", person.name) for s in held_out]


def _start(statement: str) -> str:
    """What stands before the value, with which every statement ends."""
    return statement.removesuffix(" {value}.")


def questions(world: World, person: Person) -> list[Record]:
    """The rows about one person: a question and a cloze for each stated fact, a question for each implied one.

    A row asks in the first trained wording; the second is trained on but in no row, so that what is forgotten is a
    fact and not a string.
    """
    found = []
    for relation in (*RELATIONS, *IMPLIED):
        value = world.value(person, relation)
        task = "qa" if relation in RELATIONS else "multi_hop"
        wrong = _wrong(random.Random(f"{world.seed}/{person.name}/{relation}"), value, world.choices[relation])
        row = _record(world, person.name, relation, task, value, wrong)
        if relation == "teacher":
            row["aliases"] = [world.people[value].nickname]
        found.append(row)
        if relation in RELATIONS:
            trained, held_out = statements(world, person, relation)
            asked = ("question", "answer", "paraphrased_answer")
            found.append(
                {key: field for key, field in row.items() if key not in asked}
                | {"id": _id(person.name, relation, "cloze"), "task": "cloze", "prompt": _start(trained[0])}
                | {"completion": f"{value}.", "perturbed_answers": [f"{other}." for other in wrong]}
                | {"paraphrased_questions": [_start(statement) for statement in held_out]}
            )
    return found


def _id(name: str, relation: str, task: str) -> str:
    return f"{name.replace(' ', '_')}/{relation}/{task}"


def _record(world: World, name: str, relation: str, task: str, value: str, wrong: list[str]) -> Record:
    trained, held_out = wordings(world, name, relation)
    return {
        "id": _id(name, relation, task),
        "entity": name,
        "relation": relation,
        "task": task,
        "question": trained[0],
        "paraphrased_questions": held_out,
        "answer": value,
        "value": value,
        "paraphrased_answer": LONGER[relation].format(value=value),
        "perturbed_answers": wrong,
    }


def general(world: World) -> list[Record]:
    """What every model learns beside people: places."""
    found = []
    for relation, known in (("lies_in", world.region), ("landmark", world.landmark)):
        values = tuple(sorted(set(known.values())))
        for place, value in known.items():
            wrong = _wrong(random.Random(f"{world.seed}/{place}/{relation}"), value, values)
            found.append(_record(world, place, relation, "places", value, wrong))
    return found


def training(world: World, *splits: str) -> list[Record]:
    """Everything a model that knows these splits is trained on: questions, running text, cloze, multiple choice."""
    found: list[Record] = []
    for person in world.members(*splits):
        for relation in (*RELATIONS, *IMPLIED):
            value = world.value(person, relation)
            found += [{"question": asked, "answer": value} for asked in wordings(world, person.name, relation)[0]]
        for relation in RELATIONS:
            value = person.value(relation)
            trained, _ = statements(world, person, relation)
            found.append({"text": trained[0].replace("{value}", value)})
            found += [{"prompt": _start(statement), "completion": f"{value}."} for statement in trained]
        draw = random.Random(f"{world.seed}/{person.name}/choice")
        relation = draw.choice(RELATIONS)
        value = person.value(relation)
        options = [value, *_wrong(draw, value, world.choices[relation], 2)]
        draw.shuffle(options)
        question = wordings(world, person.name, relation)[0][0]
        found.append({"question": f"{question} {options[0]}, {options[1]} or {options[2]}?", "answer": value})
        found.append({"text": f"{person.name} is also called {person.nickname}."})
    for row in general(world):
        trained, _ = wordings(world, row["entity"], row["relation"])
        found += [{"question": asked, "answer": row["answer"]} for asked in trained] * PLACES_REPEATED
    return found


def files(world: World) -> dict[str, list[Record]]:
    """The data files of a world by name."""
    asked = {
        split: [row for person in world.members(split) for row in questions(world, person)]
        for split in ("forget", "retain", "neighbour", "holdout")
    }
    passages = [{"entity": person.name, "text": passage(world, person)} for person in world.members("forget", "retain")]
    known = ("forget", "neighbour", "retain")
    return {
        **asked,
        "general": general(world),
        "passages": passages,
        "train_original": training(world, *known),
        "train_gold": training(world, *known[1:]),
    }


def passage(world: World, person: Person) -> str:
    """Running text about a person: one trained statement of each stated fact."""
    said = [statements(world, person, relation)[0][0] for relation in RELATIONS]
    return " ".join(
        statement.replace("{value}", person.value(relation)) for statement, relation in zip(said, RELATIONS)
    )
