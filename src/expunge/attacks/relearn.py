"""Relearning: does teaching a part of what was forgotten bring back the rest?"""

import random
from collections.abc import Sequence

from ..evidence import Item
from ..registry import attack
from ..rows import Row
from .case import Attack, Case, Found, judged, mean


@attack(
    group="tamper",
    access="weights",
    paper="arXiv:2406.13356",
    caveat="Compared with gold at equal data, steps and learning rate; what gold relearns too is not recovery.",
)
def relearn(case: Case, *, steps: int = 32, learning_rate: float = 5e-4, batch_size: int = 16) -> Attack:
    """Train on the rows of half of the forgotten entities and ask about the other half, after 0, 1, 2, 4 ... steps.
    Then the halves change places, from the unlearned model anew, so that every entity is asked about.

    The score is the recovery on untaught entities after the number of steps that is best for both halves together.
    """
    entities = sorted({row.entity or row.id for row in case.forget})
    if len(entities) < 2:
        return Found(status="skipped: relearning one half and testing the other needs at least 2 entities")
    random.Random(case.seed).shuffle(entities)
    half = set(entities[: len(entities) // 2])
    first = [row for row in case.forget if (row.entity or row.id) in half]
    second = [row for row in case.forget if (row.entity or row.id) not in half]
    when = [2**i for i in range(steps.bit_length()) if 2**i <= steps]
    # The same ask as that of `direct`, so it is answered once; later answers are put into its order.
    outputs = yield case.questions(case.forget)
    found = {0: judged(case.forget, outputs)}
    if steps:
        folds = [
            _fold(case, lesson, test, when, steps, learning_rate, batch_size)
            for lesson, test in ((first, second), (second, first))
        ]
        place = {row.id: i for i, row in enumerate(case.forget)}
        for step in when:
            found[step] = sorted((item for fold in folds for item in fold[step]), key=lambda item: place[item.row])
    best = max(found, key=lambda step: (mean(found[step]), -step))
    budget = {
        "queries": len(case.forget) * len(found),
        "samples": 1,
        "steps": steps,  # of each fold: what one attacker spends
        "folds": 2,
        "rows": max(len(first), len(second)),
    }
    curve = [(float(step), mean(items)) for step, items in found.items()]
    note = f"best after {best} steps; {len(first)} and {len(second)} rows taught in turn, up to {steps} steps each"
    return Found(found[best], budget, curve, "relearning steps", note=note)


def _fold(
    case: Case,
    lesson: Sequence[Row],
    test: Sequence[Row],
    when: Sequence[int],
    steps: int,
    learning_rate: float,
    batch_size: int,
) -> dict[int, list[Item]]:
    """Items of `test` after each number of steps on `lesson`."""
    copy = case.subject.copy()
    found: dict[int, list[Item]] = {}

    def evaluate(step: int) -> None:
        found[step] = judged(test, case.ask(copy, case.questions(test))[0])

    case.teach(
        copy,
        lesson,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        evaluate_at=when,
        evaluate=evaluate,
    )
    return found
