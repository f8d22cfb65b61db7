"""Relearning a class: how few steps does it take until what was forgotten is back?"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from ..evidence import Item
from ..registry import attack
from ..rows import Row
from .case import Attack, Case, Found, halves, judged


@attack(
    group="tamper",
    access="weights",
    modality=("image",),
    paper="arXiv:2402.08787",
    caveat="Compared with gold at equal data, steps and learning rate: any network learns a class in the end.",
)
def relearn_speed(case: Case, *, steps: int = 16, learning_rate: float = 5e-4, batch_size: int = 16) -> Attack:
    """Train on the rows of half of the forgotten entities and as many retained rows, and ask about the other half after
    0, 1, 2, 4 ... steps; then the halves change places, from the unlearned model anew.

    A picture's score is the share of these moments at which it gets its class: 1 where it never left, near 0 where it
    comes back with the last steps only, as a class that is new to the model does. Retained rows stand beside because a
    model that is taught one class alone soon says it of everything.
    """
    folds = halves(case)
    if not folds:
        return Found(status="skipped: relearning needs 2 entities: one half is taught, the other asked about")
    when = [2**i for i in range(steps.bit_length()) if 2**i <= steps]
    outputs = yield case.questions(case.forget)
    back = {item.row: [item.recovered] for item in judged(case.forget, outputs)}
    for lesson, test in folds:
        for items in _taught(case, [*lesson, *_beside(case, len(lesson))], test, when, learning_rate, batch_size):
            for item in items:
                back[item.row].append(item.recovered)
    items = [Item(row.entity or row.id, row.id, _mean(back[row.id])) for row in case.forget]
    curve = [(float(step), _mean([values[i] for values in back.values()])) for i, step in enumerate((0, *when))]
    budget = {"queries": len(case.forget) * len(curve), "samples": 1, "steps": steps, "folds": len(folds)}
    note = f"{len(folds[0][0])} and {len(folds[1][0])} rows taught in turn beside as many retained ones"
    return Found(items, budget, curve, "relearning steps", note)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _beside(case: Case, count: int) -> list[Row]:
    retain = case.rows.get("retain", [])
    return random.Random(case.seed).sample(retain, min(count, len(retain)))


def _taught(
    case: Case, rows: Sequence[Row], test: Sequence[Row], when: Sequence[int], learning_rate: float, batch_size: int
) -> list[list[Item]]:
    """Items of `test` after each number of steps on `rows`."""
    copy = case.subject.copy()
    found: list[list[Item]] = []
    case.teach(
        copy,
        rows,
        steps=max(when, default=0),
        batch_size=batch_size,
        learning_rate=learning_rate,
        evaluate_at=when,
        evaluate=lambda _: found.append(judged(test, case.ask(copy, case.questions(test))[0])),
    )
    return found
