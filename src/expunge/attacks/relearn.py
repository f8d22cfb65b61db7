"""Relearning: does teaching a part of what was forgotten bring back the rest?"""

import random

from ..methods.optimise.loop import fit
from ..registry import attack
from .case import Attack, Case, Found, judged, mean


@attack(
    group="tamper",
    access="weights",
    paper="arXiv:2406.13356",
    caveat="Compared with gold at equal data, steps and learning rate; what gold relearns too is not recovery.",
)
def relearn(case: Case, *, steps: int = 32, learning_rate: float = 5e-4, batch_size: int = 16) -> Attack:
    """Train on the rows of half of the forgotten entities and ask about the other half, after 0, 1, 2, 4 ... steps.

    The score is the recovery on the untaught half after the best number of steps.
    """
    entities = sorted({row.entity or row.id for row in case.forget})
    if len(entities) < 2:
        return Found(status="skipped: relearning one half and testing the other needs at least 2 entities")
    random.Random(case.seed).shuffle(entities)
    taught = set(entities[: len(entities) // 2])
    lesson = [row for row in case.forget if (row.entity or row.id) in taught]
    test = [row for row in case.forget if (row.entity or row.id) not in taught]
    outputs = yield case.questions(test)
    found = {0: judged(test, outputs)}
    copy = case.subject.copy()
    when = [2**i for i in range(steps.bit_length()) if 2**i <= steps]

    def evaluate(step: int) -> None:
        if step:
            found[step] = judged(test, case.ask(copy, case.questions(test))[0])

    if steps:
        fit(
            getattr(copy, "inner", copy),
            [case.subject.encode(row) for row in lesson],
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=case.seed,
            evaluate_at=when,
            evaluate=evaluate,
        )
    best = max(found, key=lambda step: (mean(found[step]), -step))
    budget = {"queries": len(test) * len(found), "samples": 1, "steps": steps, "rows": len(lesson)}
    curve = [(float(step), mean(items)) for step, items in found.items()]
    return Found(found[best], budget, curve, "relearning steps", note=f"best after {best} steps")
