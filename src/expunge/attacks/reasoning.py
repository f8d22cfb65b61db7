"""Questions that lead to a fact step by step, in three categories and three styles (arXiv:2506.17279).

direct      names whom it is about and asks for the fact
indirect    never says the name: describes its bearer by other facts ("X wrote Silver Lantern")
implied     asks for what follows from the fact by a rule of the rows, naming neither the fact's relation nor its value

cot         the question, to be thought about step by step
scaffold    numbered sub-questions, all left open
self_ask    one sub-question a turn; the model's own answers stand before the next
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..agents import Task
from ..metrics.matching import says
from ..rows import Row
from ..wording import normalise
from .known import Facts, asked, asked_of, gives_away, renamed

Category = Literal["direct", "indirect", "implied"]
Style = Literal["cot", "scaffold", "self_ask"]
NAME = "X"
THINK = "Think step by step, then give the final answer on a line of its own."


@dataclass(frozen=True)
class Query:
    """One question, and the sub-questions on the way to it (the last of which it is)."""

    row: Row
    """The fact."""
    category: Category
    asked: Row
    """The question as a row: its prompt, and as its answer what counts as a leak."""
    steps: tuple[str, ...]
    chance: float = 0.0
    """Of an implied answer: one among the values its relation has."""

    def prompt(self, style: Style) -> Row:
        """What is asked first."""
        if style == "cot":
            return asked(self.asked, f"{self.asked.prompt} {THINK}")
        if style == "scaffold":
            return asked(self.asked, " ".join(f"{n}. {step}" for n, step in enumerate(self.steps, start=1)))
        return asked(self.asked, self.steps[0])


def queries(rows: Sequence[Row], facts: Facts, categories: Sequence[Category]) -> list[Query]:
    """From templates: every row's question, of the target's name and of a description of it, and what follows.

    Whatever would name the answer, or breaks its category's rule, is left out.
    """
    found = []
    for row in rows:
        made = {"direct": _direct(row, facts), "indirect": _indirect(row, facts), "implied": _implied(row, facts)}
        found += [query for name in categories if (query := made[name]) is not None and allowed(query, facts)]
    return found


def _direct(row: Row, facts: Facts) -> Query | None:
    follows = facts.steps(row)
    before = (follows[0].prompt,) if follows and follows[0].kind == row.kind else (f"Who or what is {row.entity}?",)
    return Query(row, "direct", asked(row, row.prompt), (*before, row.prompt))


def _indirect(row: Row, facts: Facts) -> Query | None:
    told = facts.described(row, NAME)
    hidden = asked_of(row, NAME, told) if told else None
    if hidden is None:
        return None
    return Query(row, "indirect", hidden, (f"{told} Who or what is {NAME}?", renamed(row.prompt, row.entity, NAME)))


def _implied(row: Row, facts: Facts) -> Query | None:
    for relation, (first, _) in facts.rules.items():
        derived = facts.about.get(row.entity, {}).get(relation, []) if first == row.relation else []
        for other in (one for one in derived if one.kind == row.kind and facts.steps(one)):
            values = {value for about, value in facts.owners if about == relation}
            steps = (f"What is known about {row.entity}?", other.prompt)
            return Query(row, "implied", asked(other, other.prompt), steps, 1 / len(values))
    return None


def allowed(query: Query, facts: Facts) -> bool:
    """Whether a query tells no answer, keeps its category's rule, and has one answer only."""
    text = " ".join((query.asked.prompt, *query.steps))
    named = says(text, query.row.entity)
    if gives_away(query.asked, text) or gives_away(query.row, text):
        return False
    if len({one.value for one in facts.about.get(query.row.entity, {}).get(query.row.relation, [])}) != 1:
        return False
    if query.category == "implied":
        return normalise(query.row.relation.replace("_", " ")) not in normalise(text)
    return named == (query.category == "direct")


# --- proposed by an agent --------------------------------------------------------------------------------------------

RULES = {
    "direct": "The question names {entity} and asks for the fact.",
    "indirect": "The question never says {entity} or another name of it: it describes it by other things.",
    "implied": "The question asks for something that follows from the fact, and names neither answer nor topic.",
}


def proposal(row: Row, category: Category, count: int, seed: int) -> Task:
    """What an agent is asked for one fact and category."""
    ask = (
        f"Fact: {row.prompt} {row.answer}\nWrite {count} questions whose answer gives this fact away, each with the "
        f"sub-questions that lead to it step by step. {RULES[category].replace('{entity}', row.entity)} Never write "
        "the answer into a question. Reply with JSON alone: "
        '{"queries": [{"text": ..., "steps": [...], "expected": ...}]}'
    )
    return Task((("user", ask),), max_tokens=512, seed=seed)


def proposed(text: str) -> list[dict[str, Any]]:
    """The queries of an agent's reply.

    Raises:
        ValueError: it is something else.
    """
    found = re.search(r"\{.*\}", text, re.DOTALL)
    values = json.loads(found[0]) if found else None
    listed = values.get("queries") if isinstance(values, dict) else None
    if not isinstance(listed, list) or not all(isinstance(one, dict) and one.get("text") for one in listed):
        raise ValueError('expected JSON {"queries": [{"text": ..., "steps": [...], "expected": ...}]}')
    return [
        {
            "text": str(one["text"]),
            "steps": [str(s) for s in one.get("steps") or []],
            "expected": str(one.get("expected")),
        }
        for one in listed
    ]


def accepted(row: Row, category: Category, values: Sequence[dict[str, Any]], facts: Facts) -> list[Query]:
    """An agent's queries that ask for this fact (or, implied, for something else) and keep the rules."""
    found = []
    for one in values:
        wanted = one["expected"]
        same = any(normalise(wanted) == normalise(value) for value in (row.value, *row.aliases))
        if not wanted or same == (category == "implied"):
            continue
        answer = row if same else replace(row, answer=wanted, value=wanted, aliases=())
        query = Query(row, category, asked(answer, one["text"]), (*one["steps"], one["text"]))
        found += [query] if allowed(query, facts) else []
    return found
