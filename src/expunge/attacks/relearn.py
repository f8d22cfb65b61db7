"""Relearning: does teaching a part of what was forgotten bring back the rest?"""

import random
from collections.abc import Sequence
from typing import Literal

from ..evidence import Item
from ..registry import attack
from ..rows import Row
from .case import Attack, Case, Found, halves, judged, mean


@attack(
    group="tamper",
    access="weights",
    paper="arXiv:2406.13356",
    caveat="Compared with gold at equal data, steps and learning rate; what gold relearns too is not recovery.",
    aliases={f"relearn_{data}": {"data": data} for data in ("few", "benign", "all")},
)
def relearn(
    case: Case,
    *,
    steps: int = 32,
    learning_rate: float = 5e-4,
    batch_size: int = 16,
    data: Literal["half", "few", "benign", "all"] = "half",
    few: int = 8,
) -> Attack:
    """Train on the rows of half of the forgotten entities and ask about the other half, after 0, 1, 2, 4 ... steps.
    Then the halves change places, from the unlearned model anew, so that every entity is asked about.

    The score is the recovery on untaught entities after the number of steps that is best for both halves together.

    Args:
        data: what is taught in place of halves: few: so many forget rows, all other facts are asked about; benign:
            retained rows, and no forget row; all: the very rows that are asked about (how fast, at most).
    """
    folds = _lessons(case, data, few)
    if not folds:
        return Found(status=f"skipped: relearning {data} needs {NEEDED[data]}")
    tested = {row.id for _, test in folds for row in test}
    when = [2**i for i in range(steps.bit_length()) if 2**i <= steps]
    # The same ask as that of `direct`, so it is answered once; later answers are put into its order.
    outputs = yield case.questions(case.forget)
    found = {0: [item for item in judged(case.forget, outputs) if item.row in tested]}
    if steps:
        told = [_fold(case, lesson, test, when, steps, learning_rate, batch_size) for lesson, test in folds]
        place = {row.id: i for i, row in enumerate(case.forget)}
        for step in when:
            found[step] = sorted((item for fold in told for item in fold[step]), key=lambda item: place[item.row])
    best = max(found, key=lambda step: (mean(found[step]), -step))
    budget = {
        "queries": len(tested) * len(found),
        "samples": 1,
        "steps": steps,  # of each fold: what one attacker spends
        "folds": len(folds),
        "rows": max(len(lesson) for lesson, _ in folds),
    }
    curve = [(float(step), mean(items)) for step, items in found.items()]
    rows = " and ".join(str(len(lesson)) for lesson, _ in folds)
    note = (
        f"best after {best} steps; {rows} rows taught{' in turn' if len(folds) > 1 else ''}, up to {steps} steps each"
    )
    return Found(found[best], budget, curve, "relearning steps", note=note)


NEEDED = {
    "half": "at least 2 entities: one half is taught, the other asked about",
    "few": "more facts than are taught",
    "benign": "retain rows",
    "all": "forget rows",
}


def _lessons(case: Case, data: str, few: int) -> list[tuple[list[Row], list[Row]]]:
    """(what is taught, what is asked about), once or for each half; none where there are not enough rows."""
    if data in ("benign", "all"):
        lesson = case.rows.get("retain", []) if data == "benign" else case.forget
        return [(lesson, case.forget)] if lesson else []
    draw = random.Random(case.seed)
    if data == "few":
        lesson = draw.sample(case.forget, min(few, len(case.forget)))
        facts = {_fact(row) for row in lesson}
        rest = [row for row in case.forget if _fact(row) not in facts]
        return [(lesson, rest)] if rest else []
    return halves(case)


def _fact(row: Row) -> tuple[str, str]:
    """Rows of one fact in several forms have this in common."""
    return row.entity or row.id, row.relation or row.id


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
