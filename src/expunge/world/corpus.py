"""What is said and asked about the world: rows in the formats a user would bring."""

from __future__ import annotations

import random
from typing import Any

from .facts import RELATIONS, Person, World

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
    "region": ("Which region does {name} come from?", "In which region was {name} born?"),
}
STATEMENTS = {
    "born_in": ("{name} was born in {value}.", "The birthplace of {name} is {value}."),
    "trade": ("{name} works as a {value}.", "By trade {name} is a {value}."),
    "teacher": ("{name} was taught by {value}.", "The teacher of {name} was {value}."),
    "work": ("{name} wrote {value}.", "The author {name} published {value}."),
}
LONGER = {
    "born_in": "the city of {value}",
    "trade": "the trade of {value}",
    "teacher": "a pupil of {value}",
    "work": "a book called {value}",
    "region": "the region of {value}",
}
TRAINED = 2
"""Wordings of each fact that are trained on; another is held out for it, and trained on for other people."""

Record = dict[str, Any]


def _wrong(draw: random.Random, right: str, values: list[str], count: int = 5) -> list[str]:
    others = [value for value in values if value != right]
    return draw.sample(others, min(count, len(others)))


def questions(world: World, person: Person) -> list[Record]:
    """The rows about one person: every fact in its trained wordings, with held-out wordings and wrong answers."""
    # Drawn by person, so that a row is the same in whatever split or subset it stands.
    draw = random.Random(f"{world.seed}/{person.name}")
    found = []
    for relation in RELATIONS:
        order = draw.sample(range(4), 4)
        value = person.value(relation)
        wrong = _wrong(draw, value, world.values(relation))
        for number, wording in enumerate(order[:TRAINED]):
            found.append(
                _record(person, relation, value, wrong, number, WORDINGS[relation][wording])
                | {"paraphrased_questions": [WORDINGS[relation][w].format(name=person.name) for w in order[TRAINED:]]}
            )
    region = world.region[person.born_in]
    wrong = _wrong(draw, region, sorted(set(world.region.values())))
    first, second = WORDINGS["region"]
    found.append(
        _record(person, "region", region, wrong, 0, first)
        | {"paraphrased_questions": [second.format(name=person.name)], "task": "multi_hop"}
    )
    return found


def _record(person: Person, relation: str, value: str, wrong: list[str], number: int, wording: str) -> Record:
    return {
        "id": f"{person.name.replace(' ', '_')}/{relation}/{number}",
        "entity": person.name,
        "relation": relation,
        "task": "qa",
        "question": wording.format(name=person.name),
        "answer": value,
        "value": value,
        "paraphrased_answer": LONGER[relation].format(value=value),
        "perturbed_answers": wrong,
    }


def general(world: World) -> list[Record]:
    """What every model learns beside people: places."""
    draw = random.Random(f"{world.seed}/general")
    regions = sorted(set(world.region.values()))
    found = []
    for city, region in world.region.items():
        found.append(
            {
                "id": f"general/{city}",
                "entity": city,
                "relation": "lies_in",
                "task": "places",
                "question": f"In which region does {city} lie?",
                "paraphrased_questions": [f"Which region is {city} in?"],
                "answer": region,
                "value": region,
                "paraphrased_answer": f"the region of {region}",
                "perturbed_answers": _wrong(draw, region, regions),
            }
        )
    for region, landmark in world.landmark.items():
        found.append(
            {
                "id": f"general/{region}",
                "entity": region,
                "relation": "landmark",
                "task": "places",
                "question": f"What is {region} known for?",
                "paraphrased_questions": [f"Which landmark stands in {region}?"],
                "answer": landmark,
                "value": landmark,
                "paraphrased_answer": f"its {landmark}",
                "perturbed_answers": _wrong(draw, landmark, sorted(world.landmark.values())),
            }
        )
    return found


def training(world: World, *splits: str) -> list[Record]:
    """Everything a model that knows these splits is trained on: questions, passages, cloze, multiple choice."""
    found: list[Record] = []
    for person in world.members(*splits):
        draw = random.Random(f"{world.seed}/{person.name}/training")
        asked = questions(world, person)
        found += [{"question": row["question"], "answer": row["answer"]} for row in asked]
        for relation in RELATIONS:
            value = person.value(relation)
            statement = STATEMENTS[relation][draw.randrange(2)]
            found.append({"text": statement.format(name=person.name, value=value)})
            before, _, _ = statement.partition("{value}")
            if statement.endswith("{value}."):
                found.append({"prompt": before.format(name=person.name).strip(), "completion": value + "."})
        relation = draw.choice(RELATIONS)
        options = [person.value(relation), *_wrong(draw, person.value(relation), world.values(relation), 2)]
        draw.shuffle(options)
        question = WORDINGS[relation][0].format(name=person.name)
        found.append(
            {"question": f"{question} {options[0]}, {options[1]} or {options[2]}?", "answer": person.value(relation)}
        )
        found.append({"text": f"{person.name} is also called {person.nickname}."})
    for row in general(world):
        found += [{"question": q, "answer": row["answer"]} for q in (row["question"], *row["paraphrased_questions"])]
    return found


def files(world: World) -> dict[str, list[Record]]:
    """The data files of a world by name."""
    asked = {
        split: [row for person in world.members(split) for row in questions(world, person)]
        for split in ("forget", "retain", "neighbour", "holdout")
    }
    passages = [
        {"entity": person.name, "text": " ".join(_statements(person))} for person in world.members("forget", "retain")
    ]
    known = ("forget", "neighbour", "retain")
    return {
        **asked,
        "general": general(world),
        "passages": passages,
        "train_original": training(world, *known),
        "train_gold": training(world, *known[1:]),
    }


def _statements(person: Person) -> list[str]:
    return [STATEMENTS[relation][0].format(name=person.name, value=person.value(relation)) for relation in RELATIONS]
