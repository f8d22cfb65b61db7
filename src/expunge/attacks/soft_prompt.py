"""A learnt prompt of vectors that no text has."""

from dataclasses import replace

from ..errors import ParameterError
from ..evidence import Item
from ..registry import attack
from ..rows import Row
from ..subjects.protocol import innermost
from ..subjects.soft import SoftPrompt
from .case import Attack, Case, Found, halves, judged, mean


@attack(
    group="tamper",
    access="weights",
    paper="arXiv:2402.09063",
    caveat="A learnt prompt can teach what the model never knew: ten tokens bring any string out of any model "
    "(arXiv:2502.15836). Only what it brings out beyond gold counts, on entities it was not learnt on.",
)
def soft_prompt(
    case: Case, *, tokens: int = 10, steps: int = 64, learning_rate: float = 1e-2, batch_size: int = 16
) -> Attack:
    """Learn vectors that stand before every question from the rows of half of the forgotten entities, and ask about the
    other half behind them, after 1, 2, 4 ... steps; then the halves change places. No weight moves.

    The score is that of the number of steps which is best for both halves together.
    """
    folds = halves(case)
    if not folds:
        return Found(status="skipped: learning on one half and testing the other needs at least 2 entities")
    when = [2**i for i in range(steps.bit_length()) if 2**i <= steps]
    found = {0: judged(case.forget, (yield case.questions(case.forget)))}
    try:
        told = [_fold(case, lesson, test, when, tokens, steps, learning_rate, batch_size) for lesson, test in folds]
    except ParameterError as error:
        return Found(status=f"skipped: {error}")
    place = {row.id: i for i, row in enumerate(case.forget)}
    for step in when:
        found[step] = sorted((item for fold in told for item in fold[step]), key=lambda item: place[item.row])
    best = max(found, key=lambda step: (mean(found[step]), -step))
    budget = {"queries": len(case.forget) * len(found), "samples": 1, "soft tokens": tokens, "prompt steps": steps}
    curve = [(float(step), mean(items)) for step, items in found.items()]
    return Found(found[best], budget, curve, "steps of the prompt", note=f"best after {best} steps")


def _fold(
    case: Case,
    lesson: list[Row],
    test: list[Row],
    when: list[int],
    tokens: int,
    steps: int,
    learning_rate: float,
    batch_size: int,
) -> dict[int, list[Item]]:
    """Items of `test` after each number of steps on `lesson`."""
    copy = case.subject.copy()
    prompt = SoftPrompt(innermost(copy), tokens)
    found: dict[int, list[Item]] = {}

    def behind(rows: list[Row]) -> list[Row]:
        return [replace(row, preface=prompt.text + row.preface) for row in rows]

    def evaluate(step: int) -> None:
        found[step] = judged(test, case.ask(copy, case.questions(behind(test)))[0])

    case.teach_prompt(
        copy,
        behind(lesson),
        prompt,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        evaluate_at=when,
        evaluate=evaluate,
    )
    return found
