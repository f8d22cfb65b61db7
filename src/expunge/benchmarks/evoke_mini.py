"""EVOKE about the invented world, in the published form: known people are to be born elsewhere.

The second hop is the region of the town; neighbours are people born in the same town; the subject's other facts are its
trade, teacher and book. `corpus.jsonl` holds what key statistics are taken of, `prefixes.json` sentences about others,
`demonstrations.jsonl` other facts: about neighbours, of whom only the birthplace is asked, and people nobody asks
after.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..world.corpus import statements, training, wordings
from ..world.facts import Person, World

NEIGHBOURS = 3
PREFIXES = 5
MAIN, SPECIFICITY = "evoke.json", "subject_specificity.json"


def mini(world: World, folder: Path) -> None:
    """Write evoke.json, subject_specificity.json, corpus.jsonl, demonstrations.jsonl and prefixes.json."""
    main, specificity = list[dict[str, Any]](), list[dict[str, Any]]()
    for number, person in enumerate(world.members("forget", "retain")):
        rewrite = rewritten(world, person)
        main.append(_record(world, person, number, rewrite))
        specificity += [
            {
                "case_id": f"{number}/{about}",
                "requested_rewrite": rewrite,
                "subject_specificity": {
                    "prompt": started(statements(world, person, about)[0][0]),
                    "answer": {"value": person.value(about)},
                },
            }
            for about in ("trade", "teacher", "work")
        ]
    others = world.members("neighbour")[:PREFIXES]
    before = [statements(world, person, "trade")[0][0].replace("{value}", person.trade) for person in others]
    for name, records in ((MAIN, main), (SPECIFICITY, specificity), ("prefixes.json", before)):
        (folder / name).write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = [json.dumps(row, ensure_ascii=False) for row in training(world, "forget", "neighbour", "retain")]
    (folder / "corpus.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    shown = [json.dumps(row, ensure_ascii=False) for row in _lessons(world)]
    (folder / "demonstrations.jsonl").write_text("\n".join(shown) + "\n", encoding="utf-8")


def _lessons(world: World) -> Iterator[dict[str, Any]]:
    """Facts that get other answers, none of which is asked after an edit; what must stay is about the same people."""
    about = ("trade", "teacher", "work")
    for person in world.members("neighbour", "holdout"):
        for one in about:
            draw = random.Random(f"{world.seed}/{person.name}/{one}/shown")
            trained, held_out = statements(world, person, one)
            yield {
                "id": f"{person.name}/{one}",
                "subject": person.name,
                "prompt": started(trained[0]),
                "target_new": draw.choice([v for v in world.choices[one] if v not in (person.value(one), person.name)]),
                "ground_truth": [person.value(one)],
                "rephrasings": [started(text) for text in (*trained[1:], *held_out)],
                "locality": {
                    "subject": [
                        {
                            "prompt": started(statements(world, person, other)[0][0]),
                            "ground_truth": [person.value(other)],
                        }
                        for other in about
                        if other != one
                    ]
                },
            }


def started(statement: str) -> str:
    """What stands before the value, with which every statement ends."""
    return statement.removesuffix(" {value}.")


def rewritten(world: World, person: Person) -> dict[str, Any]:
    """A town in another region, so that what follows changes too."""
    draw = random.Random(f"{world.seed}/{person.name}/evoke")
    old = person.born_in
    new = draw.choice([town for town in sorted(world.region) if world.region[town] != world.region[old]])
    prompt = started(statements(world, person, "born_in")[0][0]).replace(person.name, "{}")
    return {
        "prompt": prompt,
        "subject": person.name,
        "relation_id": "born_in",
        "target_new": {"str": new},
        "target_true": {"str": old},
    }


def _record(world: World, person: Person, number: int, rewrite: dict[str, Any]) -> dict[str, Any]:
    trained, held_out = statements(world, person, "born_in")
    new, old = rewrite["target_new"]["str"], rewrite["target_true"]["str"]
    near = [
        other
        for other in world.members("forget", "neighbour", "retain")
        if other.born_in == old and other is not person
    ]
    asked = [started(statements(world, other, "born_in")[0][0]) for other in near[:NEIGHBOURS]]
    return {
        "case_id": number,
        "requested_rewrite": rewrite,
        "paraphrase_prompts": [started(text) for text in (*trained[1:], *held_out)],
        "neighborhood_prompts": asked,
        "prefix_distraction": [f"{trained[0].replace('{value}', new)} {prompt}" for prompt in asked],
        "portability": {
            "New Question": wordings(world, person.name, "region")[0][0],
            "New Answer": world.region[new],
            "Original Answer": world.region[old],
        },
    }
