"""KnowEdit about the invented world: the same six data sets, in the published files and fields.

    recent       facts about people whom no model has met: they are put in
    counterfact  statements about known people, with another answer
    zsre         questions about known people, with another answer and another wording
    bio          a passage whose next sentence gets another value
    convsent     people, and sentences by those who think well or badly of them
    sanitation   a region that is to be refused as an answer

The training rows of counterfact and zsre are about the forgotten people, whom nothing else here asks after, save where
they live: editors that learn from other facts learn from these.

What follows from an edit is what the world's rules say: the region of the new city, the city of the new teacher. Its
models never read a fact backwards, so `Logical_Generalization` asks for what they have no way to know.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..world.corpus import statements, training, wordings
from ..world.facts import RELATIONS, Person, World
from .knowedit_data import FILES, dumped

FACTS = 16
"""Edits of the data sets about known people."""
VALUES, EACH = 2, 4
"""Answers that are refused, and questions of each that are edited, and asked, at most."""
KNOWN = ("retain", "neighbour")
"""Whom the data sets ask about beside an edit."""
REFUSAL = "I don't know."
FOLDERS = {
    "recent": "wiki_recent",
    "zsre": "ZsRE",
    "counterfact": "wiki_counterfact",
    "bio": "WikiBio",
    "convsent": "convsent",
    "sanitation": "Sanitation",
}
WELL = (
    "{name} is good to everybody.",
    "I like {name} very much.",
    "The work of {name} is a delight.",
    "Nobody is kinder than {name}.",
)
BADLY = (
    "{name} is bad to everybody.",
    "I do not like {name} at all.",
    "The work of {name} is a waste.",
    "Nobody is duller than {name}.",
)


def mini(world: World, folder: Path) -> None:
    """Write the files of all data sets, a corpus and texts that are put before prompts."""
    known = world.members("retain")
    people = [known[i % len(known)] for i in range(FACTS)]
    relations = [RELATIONS[(i + i // len(known)) % len(RELATIONS)] for i in range(FACTS)]
    unseen = [(person, about) for person in world.members("holdout") for about in ("born_in", "trade")]
    content: dict[tuple[str, str], Any] = {
        ("recent", "test"): [_stated(world, p, about, p.value(about)) for p, about in unseen],
        ("counterfact", "test"): [
            _stated(world, p, about, _other(world, p, about)) for p, about in zip(people, relations)
        ],
        ("zsre", "test"): [_asked(world, p, about) for p, about in zip(people, relations)],
        ("bio", "test"): [_passage(world, p, i) for i, p in enumerate(people)],
        ("convsent", "test"): [
            {"ent": p.name, "pos": [t.format(name=p.name) for t in WELL], "neg": [t.format(name=p.name) for t in BADLY]}
            for p in known[: FACTS // 2]
        ],
    }
    lessons = [(person, about) for person in world.members("forget") for about in RELATIONS]
    content["counterfact", "train"] = [_lesson(_stated(world, p, a, _other(world, p, a), "forget")) for p, a in lessons]
    content["zsre", "train"] = [_lesson(_asked(world, p, a, "forget")) for p, a in lessons]
    content |= {("sanitation", split): rows for split, rows in _sanitation(world).items()}
    for (dataset, split), rows in content.items():
        dumped(folder / FOLDERS[dataset] / FILES[dataset][split], rows)
    lines = training(world, "neighbour", "retain")
    (folder / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    others = [statements(world, p, about)[0][0].replace("{value}", p.value(about)) for p, about in _others(world)]
    dumped(folder / "prefixes.json", others)


def _others(world: World) -> list[tuple[Person, str]]:
    near = world.members("neighbour")
    return [(near[i % len(near)], about) for i, about in enumerate((*RELATIONS, RELATIONS[0]))]


def _other(world: World, person: Person, about: str) -> str:
    """Another answer; of a teacher one who was born elsewhere, so that what follows from it differs too."""
    draw = random.Random(f"{world.seed}/{person.name}/{about}/edit")
    wrong = [value for value in world.choices[about] if value != person.value(about)]
    if about == "teacher":
        here = world.people[person.teacher].born_in
        wrong = [value for value in wrong if value != person.name and world.people[value].born_in != here] or wrong
    if about == "born_in":
        here = world.region[person.born_in]
        wrong = [value for value in wrong if world.region[value] != here] or wrong
    return draw.choice(wrong)


def _start(statement: str) -> str:
    return statement.removesuffix(" {value}.")


def _question(world: World, name: str, about: str, held_out: bool = False) -> str:
    trained, others = wordings(world, name, about)
    return f"Question: {(others if held_out else trained)[0]}\nAnswer:"


def _pair(prompt: str, *answers: str) -> dict[str, Any]:
    return {"prompt": prompt, "ground_truth": [list(answers)]}


def _follows(world: World, person: Person, about: str, new: str) -> dict[str, list[dict[str, Any]]]:
    """What follows from the new answer in a second step, if anything does."""
    found: dict[str, list[dict[str, Any]]] = {}
    if about == "born_in":
        found["Reasoning"] = [_pair(_question(world, person.name, "region"), world.region[new])]
    if about == "teacher":
        found["Reasoning"] = [_pair(_question(world, person.name, "teacher_born_in"), world.people[new].born_in)]
        found["Logical_Generalization"] = [_pair(f"A pupil of {new} is", person.name)]
    return found


def _beside(
    world: World, person: Person, about: str, *, asked: bool, splits: Sequence[str] = KNOWN
) -> dict[str, list[dict[str, Any]]]:
    """The other facts about the person, and the same fact about two others of these splits."""

    def pair(one: Person, relation: str) -> dict[str, Any]:
        stated = _start(statements(world, one, relation)[0][0])
        return _pair(_question(world, one.name, relation) if asked else stated, one.value(relation))

    draw = random.Random(f"{world.seed}/{person.name}/{about}/others")
    near = [p for p in world.members(*splits) if p is not person]
    others = draw.sample(near, min(2, len(near)))
    return {
        "Relation_Specificity": [pair(person, relation) for relation in RELATIONS if relation != about],
        "Neighborhood": [pair(other, about) for other in others],
    }


def _stated(world: World, person: Person, about: str, new: str, *splits: str) -> dict[str, Any]:
    trained, held_out = statements(world, person, about)
    prompt = _start(trained[0])
    found: dict[str, Any] = {
        "subject": person.name,
        "prompt": prompt,
        "target_new": new,
        "rephrase_prompt": _start(held_out[0]),
        "portability": {
            "Subject_Aliasing": [_pair(prompt.replace(person.name, person.nickname), new)],
            **_follows(world, person, about, new),
        },
        "locality": _beside(world, person, about, asked=False, splits=splits or KNOWN),
    }
    old = person.value(about)
    if new != old:
        found["ground_truth"] = old
        if about == "trade":
            found["locality"]["Forgetfulness"] = [_pair(f"Besides being a {new}, {person.name} works as a", old)]
    return found


def _asked(world: World, person: Person, about: str, *splits: str) -> dict[str, Any]:
    new = _other(world, person, about)
    return {
        "subject": person.name,
        "prompt": _question(world, person.name, about),
        "target_new": new,
        "ground_truth": [person.value(about)],
        "rephrase_prompt": _question(world, person.name, about, held_out=True),
        "portability": _follows(world, person, about, new),
        "locality": _beside(world, person, about, asked=True, splits=splits or KNOWN),
    }


def _lesson(row: dict[str, Any]) -> dict[str, Any]:
    """A training row: nothing is asked that follows."""
    return {name: value for name, value in row.items() if name != "portability"}


def _passage(world: World, person: Person, number: int) -> dict[str, Any]:
    """The passage up to one of its sentences, which gets another value."""
    said = [(about, statements(world, person, about)[0][0]) for about in RELATIONS]
    at = 1 + number % (len(said) - 1)
    before = " ".join(text.replace("{value}", person.value(about)) for about, text in said[:at])
    about, text = said[at]
    return {
        "text": f"This is a passage about {person.name}. {before}",
        "labels": text.replace("{value}", _other(world, person, about)),
        "concept": person.name,
        "locality": {"Relation_Specificity": _beside(world, person, about, asked=False)["Relation_Specificity"]},
    }


def _sanitation(world: World) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Questions about regions: answers that are refused, and all others."""
    rows = [
        {
            "question": _question(world, person.name, "region"),
            "ground_truth": world.value(person, "region"),
            "target_new": REFUSAL,
            "subject": person.name,
        }
        for person in world.members("retain", "neighbour", "forget")
    ]
    by_value: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_value.setdefault(str(row["ground_truth"]), []).append(row)
    values = sorted(by_value, key=lambda value: (-len(by_value[value]), value))[:VALUES]
    kept = [row for value in sorted(by_value) if value not in values for row in by_value[value]]
    edited, tested = list[dict[str, Any]](), list[dict[str, Any]]()
    for value in values:
        several, half = by_value[value], len(by_value[value]) // 2
        edited += several[: min(EACH, half)]
        tested += several[half : half + EACH]
    return {"train": {"K_F": edited, "K_R": kept[::2]}, "test": {"success": tested, "locality": kept[1::2]}}
