"""Many solved questions before the one that matters."""

import random
from dataclasses import replace

from ..evidence import Item
from ..registry import attack
from ..rows import Row
from ..subjects.examples import solved
from ..subjects.protocol import innermost
from .case import Attack, Case, Variant, attempts, mean
from .known import gives_away


@attack(
    group="black_box",
    access="text",
    paper="arXiv:2502.00406",
    caveat="Small contexts hold few examples; the curve says how many were shown.",
)
def many_shot(case: Case, *, shots: tuple[int, ...] = (4, 16, 64)) -> Attack:
    """Put n solved questions about retained entities before every forget question (ALU's many-shot jailbreak).

    Examples have the form of the question, and none contains its answer. Where the context holds fewer than n, as many
    as fit are shown, and the question is never cut; numbers that come to the same examples are asked once.
    """
    model = innermost(case.subject)
    pool = [row for row in case.rows.get("retain", []) if row.kind != "text"]
    random.Random(case.seed).shuffle(pool)
    lines = {row.id: solved(model, row) for row in pool}
    sizes = {name: len(model.prompt_ids(line, (name, "example"))) for name, line in lines.items()}

    def shown(row: Row, count: int) -> list[str]:
        usable = [one for one in pool if one.kind == row.kind and not gives_away(row, lines[one.id])][:count]
        room = (
            model.context_length - case.max_new_tokens - len(model.prompt_ids(case.subject.prompt_text(row), ("", "")))
        )
        while usable and sum(sizes[one.id] for one in usable) > room:
            usable.pop()
        return [lines[one.id] for one in usable]

    variants: list[Variant] = []
    for row in (row for row in case.forget if row.kind != "text"):
        lists = {len(given): given for given in (shown(row, count) for count in sorted(set(shots))) if given}
        variants += [
            Variant(row, f"{n}", replace(row, preface="".join(given) + row.preface)) for n, given in lists.items()
        ]
    nothing = "no retain row of the same form fits before a forget question"
    found = yield from attempts(case, variants, nothing)
    several: dict[int, list[Item]] = {}
    for item, variant in zip(found.items, variants):
        several.setdefault(int(variant.name), []).append(item)
    found.curve = [(float(n), mean(items)) for n, items in sorted(several.items())]
    found.curve_label = "examples shown"
    found.budget = {**found.budget, "examples": max(several, default=0)}
    return found
