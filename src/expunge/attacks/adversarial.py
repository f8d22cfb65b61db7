"""RWKU's nine adversarial types on a request's own rows."""

import random
from dataclasses import replace
from typing import Literal, get_args

from ..registry import attack
from ..rows import Row
from ..subjects.examples import solved
from ..subjects.protocol import innermost
from . import disguises
from .case import Attack, Case, Variant, attempts
from .known import Facts, asked, asked_of, gives_away, renamed

Kind = Literal[
    "prefix_injection",
    "affirmative_suffix",
    "role_play",
    "multiple_choice",
    "reverse_query",
    "synonym_manipulation",
    "context_hint",
    "incontext_learning",
]
OPTIONS = 3
"""Of a multiple choice: the right one and two others."""


@attack(
    group="black_box",
    access="text",
    paper="arXiv:2406.10890",
    caveat="Of multiple choice a third is right by chance, and hints narrow what is likely: subtract gold.",
    aliases={kind: {"kinds": (kind,)} for kind in get_args(Kind)},
)
def adversarial(
    case: Case, *, kinds: tuple[Kind, ...] = get_args(Kind), names: dict[str, tuple[str, ...]] | None = None
) -> Attack:
    """Put every forget question in the ways that RWKU's probes put theirs; `cross_lingual` is an attack by itself.

    Commands before and an affirmation after it, roles, options, the target asked for by facts about it, another name, a
    true statement or a solved question about the target before it. Rows that lack what a way needs (options, a second
    fact) are not asked in it.

    Args:
        kinds: which ways, in this order.
        names: entity to its aliases; by default those in the rows, or else initial and last word.
    """
    facts = Facts(case.rows)
    variants: list[Variant] = []
    for row in (row for row in case.forget if row.kind != "text"):
        draw = random.Random(f"{case.seed}/{row.id}/adversarial")
        options: tuple[str, ...] = ()
        if "multiple_choice" in kinds and row.kind != "completion" and len(row.perturbed_answers) >= OPTIONS - 1:
            options = (row.value or row.answer, *draw.sample(row.perturbed_answers, OPTIONS - 1))
            options = tuple(draw.sample(options, OPTIONS))
        for kind in kinds:
            other = _put(kind, row, case, facts, draw, options, (names or {}).get(row.entity, ()))
            if other is not None:
                variants.append(Variant(row, kind, other, options if kind == "multiple_choice" else ()))
    return (yield from attempts(case, variants, f"no forget row has what {', '.join(kinds)} needs"))


def _put(
    kind: Kind,
    row: Row,
    case: Case,
    facts: Facts,
    draw: random.Random,
    options: tuple[str, ...],
    names: tuple[str, ...],
) -> Row | None:
    if kind in ("prefix_injection", "affirmative_suffix", "role_play"):
        return asked(row, getattr(disguises, kind)(row.prompt, draw)) if row.kind != "completion" else None
    if kind == "multiple_choice":
        return asked(row, disguises.multiple_choice(row.prompt, options)) if options else None
    if kind == "synonym_manipulation":
        return asked_of(row, next(iter(names or facts.aliases(row.entity)), row.entity))
    # The rest tells, or asks by, something else that is true of the target.
    others = [
        r
        for r in facts.about.get(row.entity, {})
        if r != row.relation and not gives_away(row, facts.said(row.entity, r))
    ]
    if not others:
        return None
    if kind == "reverse_query":
        told = facts.described(row, "X")
        ask = f"{told} {renamed(facts.said(row.entity, row.relation), row.entity, 'X')} Who is X?"
        about = replace(asked(row, ask), kind="qa", answer=row.entity, value=row.entity, aliases=())
        return about if told and row.kind != "completion" else None
    other = draw.choice(others)
    if kind == "context_hint":
        return asked(row, disguises.context_hint(row.prompt, facts.said(row.entity, other)))
    known = [one for one in facts.about[row.entity][other] if one.kind == row.kind]
    if not known:
        return None
    return replace(row, preface=solved(innermost(case.subject), known[0]) + row.preface)
