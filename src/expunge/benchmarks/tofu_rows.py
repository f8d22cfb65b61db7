"""TOFU's files (locuslab/TOFU, arXiv:2401.06121): reading them, what must hold between them, and the mini version.

One file per configuration, JSON lines under the configuration's name:

- `full`, `forget01` ... `retain99` ..., `holdout01` ...: question, answer
- `forget01_perturbed` ..., `retain_perturbed`: also paraphrased_answer, five perturbed_answer, paraphrased_question
- `real_authors_perturbed`, `world_facts_perturbed`: question, answer and three perturbed_answer
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import RowError
from ..rows import SUFFIXES, Row, Source, read_rows
from ..world.corpus import general, statements, wordings
from ..world.facts import RELATIONS, Person, World

RETAIN = {"forget01": "retain99", "forget05": "retain95", "forget10": "retain90"}
AUTHOR, MINI_AUTHOR = 20, len(RELATIONS)
"""Questions about one author, in sequence: as published, and in the mini version."""
NEEDED = {
    "forget": "{split}_perturbed",
    "retain": "retain_perturbed",
    "real_authors": "real_authors_perturbed",
    "world_facts": "world_facts_perturbed",
}
"""Row set -> configuration; without these nothing can be measured."""
ABOUT_AUTHORS = ("forget", "retain", "holdout")


def find(source: str, config: str) -> Source | None:
    """Where a configuration is: a file or folder of that name in a local folder, else the hub; None if it is absent."""
    folder = Path(source)
    if not folder.is_dir():
        return Source(source, config=config)
    found = next((path for suffix in SUFFIXES if (path := folder / f"{config}{suffix}").is_file()), folder / config)
    return Source(str(found)) if found.exists() else None


def read(source: str, split: str, author: int) -> tuple[dict[str, list[Row]], list[str]]:
    """Row sets forget, retain, real_authors, world_facts and, where published, holdout; and what could not be checked.

    Args:
        source: folder with the published files, or a hub id.
        split: forget01, forget05 or forget10.
        author: rows about one author, in sequence.

    Raises:
        RowError: files or fields are missing; a holdout row was trained on; a forget row is a retain row.
    """
    configs = {rows: config.format(split=split) for rows, config in NEEDED.items()}
    missing = [config for config in configs.values() if find(source, config) is None]
    if missing:
        there = sorted(path.stem for path in Path(source).iterdir() if path.suffix in SUFFIXES) or ["no data files"]
        raise RowError(
            f"{source} lacks {', '.join(f'{config}.json' for config in missing)} and holds {', '.join(there[:8])}"
            f"{', ...' if len(there) > 8 else ''}; TOFU's measures need the wrong answers (perturbed_answer) in these "
            "files, as locuslab/TOFU publishes them"
        )
    data = {}
    for rows, config in configs.items():
        data[rows] = _rows(source, config, rows, author)
        for row in data[rows]:
            asked = ("perturbed_answers", "paraphrased_answer")[: 1 + (rows in ABOUT_AUTHORS)]
            lacking = next((field for field in asked if not getattr(row, field)), None)
            if lacking:
                expected = "wrong answers" if lacking == "perturbed_answers" else "the answer in other words"
                column = lacking.removesuffix("s")
                raise RowError(f"{row.source}: field {column!r} is missing or empty, expected {expected}")
    notes = _compare(source, split, data)
    holdout = f"holdout{split[-2:]}"
    if (place := find(source, holdout)) is None:
        notes.append(f"No membership attacks: {source} has no {holdout}.json (rows about authors that no model saw).")
    else:
        data["holdout"] = _rows(source, holdout, "holdout", author, place)
        trained = [row for rows in ("forget", "retain") for row in data[rows]]
        whole = find(source, "full")
        _no_leak(data["holdout"], read_rows(whole, "full") if whole else trained)
        if whole is None:
            notes.append(f"{source} has no full.json: that holdout rows were not trained on is taken on trust.")
    return data, notes + _odd_answers(data)


def _rows(source: str, config: str, name: str, author: int, place: Source | None = None) -> list[Row]:
    place = place or find(source, config)
    assert place is not None
    return read_rows(replace(place, entity_every=author if name in ABOUT_AUTHORS else None), name)


def _said(row: Row) -> tuple[str, str]:
    return " ".join(row.prompt.split()), " ".join(row.answer.split())


def _no_leak(holdout: Sequence[Row], trained: Sequence[Row]) -> None:
    known = {_said(row): row for row in trained}
    for row in holdout:
        if _said(row) in known:
            raise RowError(
                f"{row.source} is a holdout row, but it was trained on ({known[_said(row)].source}); membership "
                "attacks need rows that no model saw"
            )


def _compare(source: str, split: str, data: dict[str, list[Row]]) -> list[str]:
    """What is off between the splits, as far as their files are there.

    Raises:
        RowError: a forget row is a retain row, or the perturbed file is of another split.
    """
    notes = []
    sets: dict[str, list[Row]] = {}
    for config in ("full", RETAIN[split], split):
        place = find(source, config)
        if place is None:
            notes.append(f"{source} has no {config}.json: splits were not compared with it.")
        else:
            sets[config] = read_rows(place, config)
    retained = {_said(row): row for row in [*data["retain"], *sets.get(RETAIN[split], [])]}
    for row in [*data["forget"], *sets.get(split, [])]:
        if _said(row) in retained:
            raise RowError(f"{row.source} is to be forgotten and retained ({retained[_said(row)].source})")
    if split in sets and len(sets[split]) != len(data["forget"]):
        raise RowError(
            f"{data['forget'][0].source} and what follows are {len(data['forget'])} rows, {split} has "
            f"{len(sets[split])}: not one split"
        )
    if "full" in sets:
        whole = [_said(row) for row in sets["full"]]
        parts = {split: (data["forget"], len(whole) - len(data["forget"]))}
        if RETAIN[split] in sets:
            parts[RETAIN[split]] = (sets[RETAIN[split]], 0)
        for config, (rows, first) in parts.items():
            off = [row for row, said in zip(rows, whole[first:]) if _said(row) != said]
            if off:
                notes.append(f"{len(off)} rows of {config} do not stand where full has them, first {off[0].source}.")
        count = sum(len(rows) for rows, _ in parts.values())
        if len(parts) == 2 and count != len(whole):
            notes.append(f"{split} and {RETAIN[split]} have {count} rows together, full has {len(whole)}.")
    return notes


def _odd_answers(data: dict[str, list[Row]]) -> list[str]:
    """Wrong answers that are right, or given twice: they are measured as published, and named."""
    notes = []
    for name, rows in data.items():
        right = [row for row in rows if {row.answer, row.paraphrased_answer} & set(row.perturbed_answers)]
        twice = [row for row in rows if len(set(row.perturbed_answers)) < len(row.perturbed_answers)]
        for odd, what in ((right, "the right answer among the wrong ones"), (twice, "a wrong answer twice")):
            if odd:
                notes.append(f"{len(odd)} of {len(rows)} {name} rows have {what}, first {odd[0].source}.")
    return notes


# --- the mini version ------------------------------------------------------------------------------------------------


def mini(world: World, folder: Path) -> None:
    """Every configuration about the invented world, in the published format.

    Authors are the forgotten and retained people, four stated facts each. An answer is the fact's value; paraphrase and
    wrong answers are one sentence that was never said of this person, with the true value and with five others. Real
    authors are the neighbours and world facts the places, which every model was trained on; nobody was trained on
    holdout.
    """
    forget, retain = world.members("forget"), world.members("retain")
    counts = {"01": max(1, round(len(forget) / 10)), "05": max(1, round(len(forget) / 2)), "10": len(forget)}
    holdout = world.members("holdout")
    everyone = [*retain, *forget]
    _write(folder, "full", [row for person in everyone for row in _plain(world, person)])
    for share, count in counts.items():
        rows = [row for person in forget[-count:] for row in _perturbed(world, person)]
        kept = f"retain{100 - int(share)}"
        _write(folder, f"forget{share}_perturbed", rows)
        _write(folder, f"forget{share}", [_short(row) for row in rows])
        _write(folder, kept, [row for person in everyone[:-count] for row in _plain(world, person)])
        _write(folder, f"holdout{share}", [row for person in holdout[:count] for row in _plain(world, person)])
    _write(folder, "retain_perturbed", [row for person in retain for row in _perturbed(world, person)])
    real = [row for person in world.members("neighbour") for row in _perturbed(world, person)]
    options = {
        "real_authors": [_options(world, row) for row in real],
        "world_facts": [_place(r) for r in general(world)],
    }
    for name, rows in options.items():
        _write(folder, f"{name}_perturbed", rows)
        _write(folder, name, [_short(row) for row in rows])


def _write(folder: Path, config: str, rows: Sequence[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / f"{config}.json").write_text(text, encoding="utf-8")


def _short(row: dict[str, Any]) -> dict[str, Any]:
    return {field: row[field] for field in ("question", "answer")}


def _plain(world: World, person: Person) -> list[dict[str, Any]]:
    return [_short(row) for row in _perturbed(world, person)]


def _perturbed(world: World, person: Person) -> list[dict[str, Any]]:
    found = []
    for relation in RELATIONS:
        value = person.value(relation)
        asked, others = wordings(world, person.name, relation)
        sentence = statements(world, person, relation)[1][0]
        draw = random.Random(f"{world.seed}/{person.name}/{relation}/tofu")
        wrong = draw.sample([other for other in world.choices[relation] if other != value], 5)
        found.append(
            {
                "question": asked[0],
                "answer": value,
                "paraphrased_answer": sentence.replace("{value}", value),
                "perturbed_answer": [sentence.replace("{value}", other) for other in wrong],
                "paraphrased_question": others[0],
            }
        )
    return found


def _options(world: World, row: dict[str, Any]) -> dict[str, Any]:
    """A row of real authors: wrong answers in the short form of the right one."""
    relation = next(name for name in RELATIONS if row["answer"] in world.choices[name])
    draw = random.Random(f"{world.seed}/{row['question']}/tofu")
    wrong = draw.sample([other for other in world.choices[relation] if other != row["answer"]], 3)
    return {**_short(row), "perturbed_answer": wrong}


def _place(row: dict[str, Any]) -> dict[str, Any]:
    return {**_short(row), "perturbed_answer": row["perturbed_answers"][:3]}
