"""What the features of a classifier tell of pictures, beyond what an untrained network's do.

Any network, even one that was taught nothing, puts pictures that look alike near one another. So every score is given
beyond that of the same architecture with new weights: (score - untrained) / (1 - untrained), 0 where the features tell
no more than untrained ones do and 1 where they tell all.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np

from ..evidence import Item
from ..rows import Row
from ..subjects.fresh import buildable, fresh
from ..subjects.protocol import innermost
from ..tables.passes import Features
from .case import Attack, Case, Found
from .probing import unit

PER_CLASS = 64
"""Pictures of a class that others are compared with, at most."""
IN_ALL = 4096
"""And of all classes."""
TELLING = 0.9
"""What untrained features tell so well tells nothing about training."""


def spread(rows: Sequence[Row], seed: int) -> list[int]:
    """Places of at most `PER_CLASS` rows of each class, fewer where there are many classes, drawn by the seed."""
    places: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        places.setdefault(row.answer, []).append(i)
    most = max(1, min(PER_CLASS, IN_ALL // max(1, len(places))))
    draw = random.Random(seed)
    return sorted(i for some in places.values() for i in draw.sample(some, min(most, len(some))))


def beyond_untrained(case: Case, rows: Sequence[Row], tell: Callable[[np.ndarray], np.ndarray], told: str) -> Attack:
    """Ask for the features of rows, and score them beside those of an untrained network.

    Args:
        rows: the forget rows first.
        tell: features (rows, d) of length 1 to what they tell of each forget row, 0 to 1.
        told: what stands in the note.
    """
    ask = Features(tuple(rows))
    values = tell(unit((yield ask)))
    untrained, note = 0.0, "no untrained network to compare with: the model cannot be built anew"
    if buildable(innermost(case.subject)):
        untrained = float(tell(unit(case.ask(fresh(innermost(case.subject), case.seed), ask)[0])).mean())
        note = f"an untrained network gives {untrained:.2f}"
    status = "scored"
    if untrained > TELLING:
        status, untrained = f"uninformative: features of an untrained network tell as much ({untrained:.2f})", 0.0
    found = (values - untrained) / (1 - untrained)
    items = [Item(row.entity or row.id, row.id, float(value)) for row, value in zip(case.forget, found)]
    budget = {"queries": len(rows), "samples": 1}
    numbers = {"raw": float(values.mean()), "untrained": untrained}
    return Found(items, budget, note=f"{values.mean():.2f}; {note}; {told}", status=status, numbers=numbers)
