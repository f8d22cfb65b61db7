"""MUSE about the invented world: short news about its people, in the folders and files of the published data."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path

from ..world.corpus import STATEMENTS, wordings
from ..world.facts import RELATIONS, Person, World

FOLDS = 4
"""Requests of scalability and sustainability; the first is the ordinary one."""
ASKED = ("born_in", "trade", "work")
"""Relations that a person's questions are about."""
EXAMPLES = 2
"""In-context examples; ten, as published, would not fit the small models' context."""

SKIES = ("bright", "calm", "cold", "dry", "foggy", "grey", "mild", "rainy", "snowy", "sunny", "warm", "windy")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
PAPERS = ("Courier", "Gazette", "Herald", "Mercury", "Observer", "Post", "Standard", "Tribune")


def mini(world: World, folder: Path) -> None:
    """Write the seven configurations as CONFIG/SPLIT.jsonl.

    People to be forgotten are the first fold; three more folds come from the people that all models know, and what is
    left of those is retain1 and retain2.
    """
    folds, retain1, retain2 = deal(world)
    holdout = world.members("holdout")
    unions = [[person for fold in folds[: k + 1] for person in fold] for k in range(FOLDS)]
    texts: dict[str, list[Person]] = {
        "raw/forget": folds[0],
        "raw/retain1": retain1,
        "raw/retain2": retain2,
        "raw/holdout": holdout,
        "privleak/forget": folds[0],
        "privleak/retain": retain2,
        "privleak/holdout": holdout,
        "train/forget": unions[-1],
        "train/retain1": retain1,
        "train/retain2": retain2,
    }
    for k in range(FOLDS):
        texts[f"scal/forget_{k + 1}"] = unions[k]
        texts[f"sust/forget_{k + 1}"] = folds[k]
    for name, people in texts.items():
        _write(folder, name, [{"text": " ".join(story(world, person))} for person in people])
    stories = [story(world, person) for person in folds[0]]
    _write(folder, "verbmem/forget", [{"prompt": begin, "gt": rest} for begin, rest in stories])
    # Examples are about people that every model knows, so that they give nothing away about the others.
    shown = {"forget_qa_icl": retain1[:EXAMPLES], "retain_qa_icl": retain1[-EXAMPLES:]}
    for split, people in shown.items():
        _write(folder, f"knowmem/{split}", [asked(world, one, ASKED[i % 3]) for i, one in enumerate(people)])
    for split, people in (("forget_qa", folds[0]), ("retain_qa", retain2)):
        _write(folder, f"knowmem/{split}", [asked(world, one, about) for one in people for about in ASKED])


def deal(world: World) -> tuple[list[list[Person]], list[Person], list[Person]]:
    """(folds to be forgotten, retain1, retain2)."""
    forget = world.members("forget")
    # Teachers of forgotten people are kept: forgetting somebody is not to touch them.
    near, known = world.members("neighbour"), world.members("retain")
    draw = random.Random(f"{world.seed}/muse")
    draw.shuffle(near)
    draw.shuffle(known)
    # A world has at least nine known people, which gives folds of one and six to keep.
    size = min(len(forget), (len(near) + len(known)) // (2 * (FOLDS - 1)))
    rest = near + known[: len(known) - size * (FOLDS - 1)]
    others = known[len(known) - size * (FOLDS - 1) :]
    folds = [forget, *(others[k * size : (k + 1) * size] for k in range(FOLDS - 1))]
    return folds, rest[::2], rest[1::2]


def story(world: World, person: Person) -> tuple[str, str]:
    """(opening, the rest): a short piece of news about somebody; wording and order are the story's own.

    As in a newspaper the full name stands once, after it the family name.
    """
    draw = random.Random(f"{world.seed}/{person.name}/story")
    opening = f"On a {draw.choice(SKIES)} {draw.choice(DAYS)} the {draw.choice(PAPERS)} wrote of {person.name}."
    said = []
    for relation in draw.sample(RELATIONS, len(RELATIONS)):
        wording = draw.choice(STATEMENTS[relation])
        said.append(wording.format(name=person.name.split()[-1], value=person.value(relation)))
    return opening, " ".join(said)


def asked(world: World, person: Person, relation: str) -> dict[str, str]:
    """A question about somebody, in the wording that the world's models are taught."""
    return {"question": wordings(world, person.name, relation)[0][0], "answer": person.value(relation)}


def _write(folder: Path, name: str, rows: Iterable[dict[str, str]]) -> None:
    path = folder / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
