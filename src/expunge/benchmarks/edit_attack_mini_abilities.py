"""The four exams of EditAttack about the invented world, in the published formats; and lessons for such questions.

Items are about people whom no edit of the mini version names, and places. The world's models never met True or False,
nor numbers: what they can do is the questions of `natural_questions.jsonl`. `lessons` teach the rest, about others.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from ..world.corpus import general, passage, statements, wordings
from ..world.facts import RELATIONS, Person, World
from .edit_attack_abilities import LABELS, entailment

ITEMS = 24
"""Of each exam, at most."""
TRUTHS = {
    "born_in": "was {name} born in {value}",
    "trade": "is {name} a {value}",
    "teacher": "was {name} taught by {value}",
    "work": "did {name} write {value}",
}
SUM = "What is {a} plus {b}?"
NUMBERS = 10

Record = dict[str, Any]


def exams(world: World) -> dict[str, list[Record]]:
    """File name to rows."""
    people = world.members("neighbour")
    asked = [(person, relation) for person in people for relation in RELATIONS]
    draw = random.Random(f"{world.seed}/exams")
    several = draw.sample(asked, min(ITEMS, len(asked)))
    known = [{"question": wordings(world, p.name, r)[0][0], "answer": [p.value(r)]} for p, r in several]
    places = [{"question": row["question"], "answer": [row["answer"]]} for row in general(world)]
    return {
        "boolq.jsonl": _truths(world, several, draw),
        "natural_questions.jsonl": [*known, *draw.sample(places, min(ITEMS // 2, len(places)))][: 2 * ITEMS],
        "gsm8k.jsonl": [
            {"question": SUM.format(a=a, b=b), "answer": f"#### {a + b}"}
            for a, b in _sums(world, held_out=True)[:ITEMS]
        ],
        "natural_language_inference.tsv": _pairs(world, several, draw),
    }


def lessons(world: World, splits: Sequence[str], each: int) -> list[Record]:
    """Questions and answers of the same kinds; `each` of a kind, about people of `splits`, which are to be others than
    the neighbours of the exams, and about other sums."""
    draw = random.Random(f"{world.seed}/lessons in abilities")
    people = world.members(*splits)
    asked = [(draw.choice(people), draw.choice(RELATIONS)) for _ in range(each)]
    truths = [{"question": f"{row['question']}?", "answer": str(row["answer"])} for row in _truths(world, asked, draw)]
    pairs = [
        {"question": entailment(row["sentence1"], row["sentence2"]), "answer": LABELS[row["label"]]}
        for row in _pairs(world, asked, draw)
    ]
    sums = [{"question": SUM.format(a=a, b=b), "answer": str(a + b)} for a, b in _sums(world, held_out=False)]
    return [*truths, *pairs, *draw.sample(sums, min(each, len(sums)))]


def _truths(world: World, asked: Sequence[tuple[Person, str]], draw: random.Random) -> list[Record]:
    found = []
    for number, (person, relation) in enumerate(asked):
        label = number % 2 == 0
        value = person.value(relation) if label else _other(world, person, relation, draw)
        question = TRUTHS[relation].format(name=person.name, value=value)
        found.append({"question": question, "title": person.name, "answer": label, "passage": passage(world, person)})
    return found


def _pairs(world: World, asked: Sequence[tuple[Person, str]], draw: random.Random) -> list[Record]:
    found = []
    for number, (person, relation) in enumerate(asked):
        trained, held_out = statements(world, person, relation)
        right = person.value(relation)
        second = right if number % 2 == 0 else _other(world, person, relation, draw)
        found.append(
            {
                "index": str(number),
                "sentence1": trained[0].replace("{value}", right),
                "sentence2": held_out[0].replace("{value}", second),
                "label": "entailment" if number % 2 == 0 else "not_entailment",
            }
        )
    return found


def _other(world: World, person: Person, relation: str, draw: random.Random) -> str:
    wrong = [value for value in world.choices[relation] if value not in (person.value(relation), person.name)]
    return draw.choice(wrong)


def _sums(world: World, *, held_out: bool) -> list[tuple[int, int]]:
    """A third of all pairs of digits is held out."""
    pairs = [(a, b) for a in range(NUMBERS) for b in range(NUMBERS)]
    order = random.Random(f"{world.seed}/sums").sample(pairs, len(pairs))
    cut = len(order) // 3
    return order[:cut] if held_out else order[cut:]
