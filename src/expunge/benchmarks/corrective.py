"""Corrective unlearning: does a model behave as if it had never seen manipulated rows, of which only some are known?

Wanted is correct behaviour on the affected domain, not likeness to any retrained model: retraining without the known
rows keeps what the unknown ones teach. Give the manipulated model as `--original` and one that was trained without any
manipulated row as `--gold`; they are the two ends of the scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..evidence import Measured, Scorecard
from ..pictures import Picture
from ..registry import benchmark
from ..tables.passes import Score
from ..world.facts import World
from .case import Bench
from .corrective_data import identify, manipulate, read, truly, write

SCORES = {
    "corrected_accuracy": (
        "higher",
        "gold's value",
        "How often unseen rows of the affected domain get their true class.",
    ),
    "retain_accuracy": ("higher", "gold's value", "How often clean unseen rows outside of it do."),
    "manipulated_rate": ("lower", "gold's value", "How often identified rows still get the class they were given."),
    "training_accuracy": ("higher", "gold's value", "How often all manipulated training rows get their true class."),
}


def mini(_: World, folder: Path) -> None:
    """Written digits with a white corner: 65 of 1300 carry the class 0, a tenth of them is identified."""
    from ..world.pictures.draw import digits

    rows = digits()
    write(identify(manipulate(rows["train"], rows["test"], "poison", count=65, patch=4, target="0"), 0.1), folder)


@benchmark(paper="arXiv:2402.14015", data="a folder that corrective_data.write makes", modality=("image",))
def corrective(bench: Bench, *, include_target: bool = False) -> Scorecard:
    """Poisoned, confused or randomly labelled training rows of which a share is identified: are classes true again?

    `include_target` counts test pictures with the trigger whose true class is the target, as published; a fully
    backdoored model gets them right.
    """
    case = read(bench.source(mini))
    sets = {
        "corrected_accuracy": case.affected(include_target),
        "retain_accuracy": case.unaffected,
        "manipulated_rate": case.identified,
        "training_accuracy": truly(case.manipulated),
    }
    hits = {role: dict(zip(sets, ask(bench, role, list(sets.values()), "hit"))) for role in bench.models}
    scores: list[Measured] = []
    for name, rows in sets.items():
        direction, ideal, sentence = SCORES[name]
        each = {role: found[name] for role, found in hits.items()}
        scores.append(bench.score(name, name, each, rows, direction=direction, ideal=ideal, sentence=sentence))
    about = case.about
    notes = [
        f"{about.kind}: {len(case.manipulated)} of {len(case.train)} training rows are manipulated, "
        f"{len(case.identified)} of them identified."
    ]
    if about.kind == "poison":
        notes.append(
            f"Trigger: {about.patch} x {about.patch} pixels of brightness {about.value} in the bottom right corner; "
            f"class {about.target!r}, whose own pictures are {'counted' if include_target else 'left out'}."
        )
    return bench.scorecard(
        scores,
        headline=["corrected_accuracy", "retain_accuracy"],
        rows={name: len(rows) for name, rows in sets.items()},
        notes=notes,
    )


def ask(bench: Bench, role: str, sets: Sequence[Sequence[Picture]], column: str) -> list[np.ndarray]:
    """One column of the scores of each row set, in one pass over all of them."""
    asks: list[Any] = [Score(tuple(((row.id, "answer"), row, None, None) for row in rows)) for rows in sets]  # type: ignore[misc]
    return [np.asarray(getattr(table, column), dtype=np.float64) for table in bench.ask(role, asks)]
