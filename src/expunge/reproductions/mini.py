"""The invented world as language-model reproductions use it: the models and rows of one seed."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..rows import Row, Source, read_rows
from ..subjects.language import LanguageModel
from ..world.build import build
from ..world.facts import World
from ..world.models import Recipe

SETS = ("forget", "retain", "neighbour", "holdout", "general")
Sizes = Mapping[str, Any]
"""Arguments of `expunge.world.build.build`, `recipe` as a mapping too; what is not named keeps its default."""


SMALL: Sizes = {
    "people": 26,
    "forget": 8,
    "neighbours": 4,
    "holdout": 6,
    "recipe": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "layers": 2,
        "steps": 200,
        "batch_size": 56,
        "learning_rate": 8e-3,
    },
}
"""A smaller world, whose models take a quarter of a minute of one core each."""


@dataclass(frozen=True)
class Mini:
    """One seed's world."""

    world: World
    original: LanguageModel
    """Trained on forget, retain, neighbour and general rows."""
    golds: list[LanguageModel]
    """Trained without the forget rows."""
    data: dict[str, list[Row]]
    """Rows of every one of `SETS`. Each of the forgotten facts is also asked in held-out wordings."""


def mini(seed: int, sizes: Sizes | None = None) -> Mini:
    """The world of this seed with one gold model, unless `sizes` says otherwise.

    Models are trained the first time and found in the user's cache afterwards; trials of one seed that start together
    wait for whichever builds it. A trial calls this itself, so that its settings stay plain values.
    """
    chosen = {"gold_seeds": 1, **(sizes or {})}
    if "recipe" in chosen:
        chosen["recipe"] = Recipe(**chosen["recipe"])
    with tempfile.TemporaryDirectory(prefix="expunge-mini-") as folder:
        made = build(f"{folder}/world", seed=seed, **chosen)
        data = {name: read_rows(Source(str(made.data(name))), name) for name in SETS}
        golds = [LanguageModel.load(path, device="cpu") for path in made.golds]
        return Mini(made.world, LanguageModel.load(made.original, device="cpu"), golds, data)
