"""What a guard lets out by one way of asking and another, as the reproductions of guards report it.

The guard is told the questions about what is stated of the forgotten people (`told`), one for each fact. The same facts
are then asked for in other wordings, as beginnings of sentences, by nickname, by what the person wrote, and after other
questions; what follows from them in two steps is asked for too.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..evidence import Table
from ..methods.guard.case import GuardCase
from ..metrics.matching import recovered
from ..registry import get
from ..rows import Row
from ..world.facts import CODAS, ONSETS, RELATIONS, VOWELS
from .case import spread
from .measures import held_out, said
from .mini import Mini, mini

SHOTS = 2
TOKENS = 12


def told(made: Mini) -> list[Row]:
    """The forget rows that the guard is given."""
    return [row for row in made.data["forget"] if row.kind == "qa" and row.relation in RELATIONS]


def families(made: Mini, seed: int) -> dict[str, list[Row]]:
    """Rows by way of asking."""
    rows = told(made)
    draw = random.Random(seed)
    kept = [row for row in made.data["retain"] if row.kind == "qa"]

    def named(row: Row, name: str) -> Row:
        return replace(row, id=f"{row.id}/{name}", prompt=row.prompt.replace(row.entity, name))

    def shown(row: Row) -> Row:
        shots = draw.sample(kept, SHOTS)
        text = "".join(f"Question: {one.prompt}\nAnswer: {one.answer}\n\n" for one in shots)
        return replace(row, kind="completion", prompt=f"{text}Question: {row.prompt}\nAnswer:")

    people = made.world.people
    return {
        "direct": rows,
        "other wording": held_out(rows),
        "cloze": [row for row in made.data["forget"] if row.task == "cloze"],
        "nickname": [named(row, people[row.entity].nickname) for row in rows],
        "described": [named(r, f"the author of {people[r.entity].work}") for r in rows if r.relation != "work"],
        "after others": [shown(row) for row in rows],
        "implied": [row for row in made.data["forget"] if row.task == "multi_hop"],
        "retain": made.data["retain"],
        "neighbour": made.data["neighbour"],
    }


FAMILIES = (
    "direct",
    "other wording",
    "cloze",
    "nickname",
    "described",
    "after others",
    "implied",
    "retain",
    "neighbour",
)


def invented(count: int, seed: int) -> list[Row]:
    """Two rows about each of so many people that no model knows, person by person."""
    draw = random.Random(seed)

    def word() -> str:
        return ("".join(draw.choice(ONSETS) + draw.choice(VOWELS) for _ in range(3)) + draw.choice(CODAS)).capitalize()

    found = []
    for number in range(count):
        who, town, work = f"{word()} {word()}", word(), f"{word()} {word()}"
        found += [
            Row(f"x{number}/0", town, f"Where was {who} born?", entity=who, value=town, relation="born_in"),
            Row(f"x{number}/1", work, f"Which book did {who} write?", entity=who, value=work, relation="work"),
        ]
    return found


def trial(
    guard: str, seed: int, settings: dict[str, Any], targets: int = 0, world: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Per family the share of questions whose value is said; CPU seconds of the retained questions and of the direct
    ones, one at a time; for `guard` the share of prompts of each family that it flags.

    Args:
        guard: a guard's name; original or gold: the model as it is.
        targets: how many invented ones the guard is told of besides.
    """
    made = mini(seed, world)
    rows = {"forget": [*told(made), *invented(targets, seed)], "retain": made.data["retain"]}
    if guard in ("original", "gold"):
        subject: Any = made.original if guard == "original" else made.golds[0]
    else:
        part = get("methods", guard)
        subject = part.function(GuardCase(made.original, rows), **part.resolve(settings))
    found: dict[str, Any] = {}
    for family, asked in families(made, seed).items():
        texts = said(subject, asked, TOKENS)
        found[family] = sum(recovered(row, text, row.prompt) for row, text in zip(asked, texts)) / len(asked)
        if guard == "guard":
            ids = [tuple(subject.prompt_ids(subject.prompt_text(row), (row.id, family))) for row in asked]
            bans = subject.ban(ids, subject.features(ids))
            found[f"{family}, flagged"] = sum(ban is not None for ban in bans) / len(bans)
    for name, asked in (("direct", told(made)), ("retain", made.data["retain"][:40])):
        found[f"{name}, seconds"] = min(_seconds(subject, asked) for _ in range(3))
    return found


def _seconds(subject: Any, rows: Sequence[Row]) -> float:
    """CPU seconds of answering one question at a time, per token asked for."""
    began = time.process_time()
    for row in rows:
        said(subject, [row], TOKENS)
    return time.process_time() - began


def table(rows: Sequence[Mapping[str, Any]], title: str, note: str = "") -> Table:
    """Every run by family, mean and range over seeds."""
    runs = dict.fromkeys(row["run"] for row in rows)
    cells = [[run, *(str(spread(list(rows), name, run=run)) for name in FAMILIES)] for run in runs]  # type: ignore[arg-type]
    return Table(title, ["run", *FAMILIES], cells, note)


MEANING = (
    "Share of questions whose value is said, mean (lowest to highest) over seeds. The guards are told the direct "
    "questions about stated facts alone; retain and neighbour: what should still be said."
)
