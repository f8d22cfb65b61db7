"""Asking in other words, several times each: the black-box extraction attack."""

import random

from ..agents import Task, listed
from ..evidence import Item
from ..metrics.matching import recovered
from ..registry import attack
from ..rows import Row
from ..tables.passes import Generate
from .case import Attack, Case, Found, tries
from .known import gives_away

AROUND = ("Tell me: {asked}", "Please answer: {asked}", "I would like to know: {asked}", "{asked} Answer briefly.")


@attack(
    group="black_box",
    access="text",
    paper="arXiv:2309.17410",
    caveat="Many guesses hit frequent values in any model: compare with gold at the same budget.",
)
def input_rephrasing(
    case: Case, *, rephrasings: int = 4, samples: int = 5, temperature: float = 1.0, agent: str = "offline"
) -> Attack:
    """Ask every forget question in other words and sample answers to each: a fact is found if any gives it away.

    The words are the row's held-out ones, as many as there are; more are written by `agent` (docs/agents.md; offline:
    phrases around the question). Wordings with the answer in them are dropped. Budget: rephrasings x samples answers
    (Patil et al. 2024: 4 x 5).
    """
    wordings = _wordings(case, rephrasings, agent)
    asked = [(row, i, text) for row in case.forget for i, text in enumerate(wordings.get(row.id, []))]
    if not asked:
        return Found(status="skipped: no forget row can be asked in other words")
    prompts = tuple(((row.id, f"rephrased/{i}"), row, text) for row, i, text in asked)
    outputs = yield Generate(prompts, case.max_new_tokens, samples=samples, temperature=temperature, seed=case.seed)
    told: dict[str, list[list[tuple[float, str]]]] = {}
    for (row, _, text), answers in zip(asked, outputs.texts):
        told.setdefault(row.id, []).append([(recovered(row, answer, text), answer) for answer in answers])
    items = []
    for row in (row for row in case.forget if row.id in told):
        score, text = max((one for several in told[row.id] for one in several), key=lambda one: one[0])
        items.append(Item(row.entity or row.id, row.id, score, text))
    # All wordings once, then all of them again: a budget is spent on different words first.
    turns = [[one[0] for turn in zip(*several) for one in turn] for several in told.values()]
    issued = [{answer for answers in several for _, answer in answers} for several in told.values()]
    budget = {"queries": len(asked), "samples": samples, "candidates": max(map(len, issued))}
    return Found(items, budget, tries(turns), "answers per fact")


def _wordings(case: Case, count: int, agent: str) -> dict[str, list[str]]:
    rows = [row for row in case.forget if row.prompt and row.kind != "text"]
    given = {row.id: [text for text in row.paraphrased_prompts if not gives_away(row, text)][:count] for row in rows}
    short = [row for row in rows if len(given[row.id]) < count]
    for row, texts in zip(short, case.written.lists(agent, [_task(row, count, case.seed) for row in short], listed)):
        new = [text for text in texts if text not in (row.prompt, *given[row.id]) and not gives_away(row, text)]
        given[row.id] = (given[row.id] + new)[:count]
    return given


def _task(row: Row, count: int, seed: int) -> Task:
    ask = f"Write {count} other ways to ask the following, as a JSON list of texts. Keep all names.\n{row.prompt}"
    lines = [line.replace("{asked}", row.prompt) for line in AROUND]

    def plain(_: random.Random) -> str:
        return "\n".join(f"{number}. {line}" for number, line in enumerate(lines, start=1))

    return Task((("user", ask),), None if row.kind == "completion" else plain, seed=seed)
