"""What follows from stated facts: a forgotten fact that retained ones imply cannot be removed alone (taxonomy 3.6).

A rule composes relations: `implies: region, by: [born_in, lies_in]` says that whoever was born in a city that lies in a
region comes from that region.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Fact = tuple[str, str, str]
"""(subject, relation, object)"""


@dataclass(frozen=True)
class Rule:
    """(a, by[0], b), (b, by[1], c) ... imply (a, implies, z)."""

    implies: str
    by: tuple[str, ...]


def closure(facts: Iterable[Fact], rules: Sequence[Rule]) -> dict[Fact, tuple[Fact, ...]]:
    """Every fact that is stated or follows, with the facts that it follows from directly; none for stated ones.

    Rules are applied until nothing new follows, so what is implied may imply more.
    """
    found: dict[Fact, tuple[Fact, ...]] = dict.fromkeys(facts, ())
    index: dict[tuple[str, str], list[Fact]] = {}
    for fact in found:
        index.setdefault(fact[:2], []).append(fact)
    before = -1
    while len(found) > before:
        before = len(found)
        for rule in rules:
            chains: list[tuple[Fact, ...]] = [(fact,) for fact in found if fact[1] == rule.by[0]]
            for relation in rule.by[1:]:
                chains = [(*chain, then) for chain in chains for then in index.get((chain[-1][2], relation), ())]
            for chain in chains:
                fact = (chain[0][0], rule.implies, chain[-1][2])
                if fact not in found:
                    found[fact] = chain
                    index.setdefault(fact[:2], []).append(fact)
    return found


def implied(
    forgotten: Mapping[str, Fact], kept: Mapping[str, Fact], rules: Sequence[Rule]
) -> dict[str, tuple[str, ...]]:
    """Forgotten facts that follow from kept ones: id of the row to the ids of the kept rows that imply it.

    Args:
        forgotten, kept: row id to fact.
    """
    stated: dict[Fact, str] = {}
    for row, fact in kept.items():
        stated.setdefault(fact, row)
    known = closure(stated, rules)

    def premises(fact: Fact) -> tuple[str, ...]:
        if fact in stated:
            return (stated[fact],)
        return tuple(dict.fromkeys(row for premise in known[fact] for row in premises(premise)))

    return {row: premises(fact) for row, fact in forgotten.items() if fact in known}
