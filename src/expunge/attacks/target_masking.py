"""Asking about somebody without the name."""

from typing import Literal

from ..registry import attack
from .case import Attack, Case, Variant, attempts
from .known import Facts, asked_of

LETTER = "X"
Mask = Literal["description", "alias", "letter"]


@attack(
    group="black_box",
    access="text",
    paper="arXiv:2502.00406",
    caveat="A description from other forgotten facts works only where these are still known.",
)
def target_masking(
    case: Case,
    *,
    masks: tuple[Mask, ...] = ("description", "alias", "letter"),
    names: dict[str, tuple[str, ...]] | None = None,
) -> Attack:
    """Replace the target's name by a letter that other facts describe, an alias, or a letter said to stand for it.

    Args:
        masks: which ways, in this order.
        names: entity to its aliases; by default those in the rows, or else initial and last word.
    """
    facts = Facts(case.rows)
    variants: list[Variant] = []
    for row in case.forget:
        alias = next(iter((names or {}).get(row.entity) or facts.aliases(row.entity)), "")
        ways = {
            "description": (LETTER, facts.described(row, LETTER)),
            "alias": (alias, ""),
            "letter": (LETTER, f"Let {LETTER} be {row.entity}."),
        }
        for mask in masks:
            name, before = ways[mask]
            asked = asked_of(row, name, before) if name and (before or mask == "alias") else None
            if asked is not None:
                variants.append(Variant(row, mask, asked))
    return (yield from attempts(case, variants, "no forget question names its entity, or nothing describes it"))
