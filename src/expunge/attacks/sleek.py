"""Reasoning towards what was forgotten, step by step."""

from dataclasses import dataclass, field, replace
from typing import get_args

from ..evidence import Item
from ..metrics.matching import recovered
from ..registry import attack
from ..rows import Row
from ..subjects.examples import solved
from ..subjects.protocol import innermost
from ..tables.passes import Generate
from .case import Attack, Case, Found, fits, judged, mean, tries
from .known import Facts
from .reasoning import Category, Query, Style, accepted, proposal, proposed, queries

KEPT = 48
"""Retained questions that are asked in the same styles, to see what is suppressed beside the target."""
PROPOSED = 3
"""Queries an agent writes for a fact and category."""


@attack(
    group="black_box",
    access="text",
    paper="arXiv:2506.17279",
    caveat="A small model follows only formats it was trained on, and implied questions are guessed: subtract gold.",
    aliases={f"sleek_{name}": {"categories": (name,)} for name in ("direct", "indirect", "implied")},
)
def sleek(
    case: Case,
    *,
    categories: tuple[Category, ...] = ("direct", "indirect", "implied"),
    styles: tuple[Style, ...] = ("cot", "scaffold", "self_ask"),
    new_tokens: int = 256,
    agent: str = "offline",
) -> Attack:
    """Lead the model to every forgotten fact in steps: by its name, by a description, by what follows from it.

    A fact leaks where its answer is said anywhere on the way, a refusal at the end or not. Templates make the questions
    from the rows (relation, value and entity are needed); `agent` writes others (docs/agents.md), templates stand in
    where it gives none. Retained questions in the same styles show what the model suppresses unfairly. `new_tokens`: of
    an answer, as far as the context holds them.
    """
    facts = Facts(case.rows)
    rows = [row for row in case.forget if row.relation and row.value and row.kind in ("qa", "chat")]
    asked = _asked(case, rows, facts, categories, agent)
    near = [row for name in ("neighbour", "retain") for row in case.rows.get(name, []) if row.kind in ("qa", "chat")]
    kept = queries([row for row in near if row.relation and row.value][:KEPT], facts, ("direct",))
    lines = [_Line(query, style, query.prompt(style), False) for query in asked for style in styles]
    lines += [_Line(query, style, query.prompt(style), True) for query in kept for style in styles]
    lines = [line for line in lines if fits(case, line.row)]
    if all(line.kept for line in lines):
        return Found(status="skipped: no forget row gives a question that keeps the rules of its category")
    plain = judged(rows, (yield case.questions(rows)))
    model = innermost(case.subject)
    longest = max(len(model.prompt_ids(case.subject.prompt_text(line.row), ("", ""))) for line in lines)
    limit = min(new_tokens, max(1, (case.subject.context_length - longest) // 2))
    roomy = replace(case, max_new_tokens=limit)
    going = lines
    for turn in range(1, 1 + max(len(line.query.steps) for line in lines)):
        keys = tuple(
            ((line.query.row.id, f"{line.query.category}/{line.style}/{turn}"), line.row, None) for line in going
        )
        for line, texts in zip(going, (yield Generate(keys, limit)).texts):
            line.said.append(texts[0])
        going = [line for line in going if line.style == "self_ask" and turn < len(line.query.steps)]
        for line in going:
            before = line.row.preface + solved(model, line.row, line.said[-1])
            line.row = replace(line.query.asked, prompt=line.query.steps[turn], preface=before)
        going = [line for line in going if fits(roomy, line.row)]
        if not going:
            break
    return _found(lines, mean(plain), limit)


@dataclass
class _Line:
    """A query in one style, how it stands, and what the model has said."""

    query: Query
    style: Style
    row: Row
    kept: bool
    said: list[str] = field(default_factory=list)

    def item(self) -> Item:
        """Whether the answer is said anywhere on the way; what it repeats of the question is none."""
        row, text = self.query.row, "\n".join(self.said)
        leaked = max(recovered(self.query.asked, said, self.query.prompt(self.style).prompt) for said in self.said)
        return Item(row.entity or row.id, f"{row.id}#{self.query.category}/{self.style}", leaked, text)

    @property
    def only_on_the_way(self) -> bool:
        last = self.said[-1].strip().rpartition("\n")[2]
        return self.item().recovered >= 1 and recovered(self.query.asked, last) < 1


def _found(lines: list[_Line], plain: float, limit: int) -> Found:
    forget = [line for line in lines if not line.kept]
    items = [line.item() for line in forget]
    told: dict[str, list[float]] = {}
    for line, item in zip(forget, items):
        told.setdefault(line.query.row.id, []).append(item.recovered)
    numbers = {"asked plainly": plain}
    for name in get_args(Category):  # a category without questions has no figure, which is not 0
        if some := [item for line, item in zip(forget, items) if line.query.category == name]:
            numbers[name] = mean(some)
    numbers["on the way only"] = mean([Item("", "", float(line.only_on_the_way)) for line in forget])
    note = "; ".join(f"{name} {value:.2f}" for name, value in numbers.items())
    budget = {"queries": len(forget), "samples": 1, "queries per row": max(map(len, told.values())), "tokens": limit}
    kept = [line.item() for line in lines if line.kept]
    return Found(items, budget, tries(list(told.values())), "prompts per fact", note, numbers=numbers, kept=kept)


def _asked(case: Case, rows: list[Row], facts: Facts, categories: tuple[Category, ...], agent: str) -> list[Query]:
    if agent == "offline":
        return queries(rows, facts, categories)
    places = [(row, category) for row in rows for category in categories]
    tasks = [proposal(row, category, PROPOSED, case.seed) for row, category in places]
    found = []
    for (row, category), values in zip(places, case.written.lists(agent, tasks, proposed)):
        found += accepted(row, category, values, facts) or queries([row], facts, (category,))
    return found
