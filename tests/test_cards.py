"""Every part describes itself completely, truthfully where a machine can tell, and is in the docs."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from expunge.cards import NEEDS, NOT_STUDIED, MethodCard
from expunge.errors import CardError
from expunge.registry import ROOMS, parts

DOCS = Path(__file__).parent.parent / "docs"
EVERY = [pytest.param(part, id=f"{room}-{part.name}") for room in ROOMS for part in parts(room)]
METHODS = [pytest.param(part, id=part.name) for part in parts("methods")]


def test_the_rooms_are_not_empty() -> None:
    assert {"npo", "grad_diff", "idk"} <= {part.name for part in parts("methods")}
    for room in ("methods", "attacks", "metrics", "subjects"):
        assert parts(room), f"no {room} found"


@pytest.mark.parametrize("part", EVERY)
def test_card_is_complete(part) -> None:
    card = part.card
    assert re.fullmatch(r"[a-z][a-z0-9_]*", card.name)
    assert len(card.summary.split()) >= 3, "the first paragraph of the docstring says what the part does"
    assert card.modality
    assert part.room in ("subjects", "metrics") or card.paper, "a metric may be older than papers about it"
    assert not card.paper.startswith("arXiv") or re.fullmatch(r"arXiv:\d{4}\.\d{4,5}", card.paper)
    part.resolve()


@pytest.mark.parametrize("part", EVERY)
def test_defaults_are_what_the_annotation_allows(part) -> None:
    assert part.resolve(part.resolve()) == part.resolve()


@pytest.mark.parametrize("part", METHODS)
def test_known_weaknesses_are_attacks_of_the_catalogue(part) -> None:
    attacks = {attack.name for attack in parts("attacks")}
    unknown = set(part.card.known_weaknesses) - attacks - {NOT_STUDIED}
    assert not unknown, f"{part.name} names {sorted(unknown)}; attacks: {sorted(attacks)}"


@pytest.mark.parametrize("part", METHODS)
def test_what_a_method_requires_agrees_with_what_it_needs(part) -> None:
    card = part.card
    sides = {need.split(".")[0] for need in card.needs}
    assert sides <= {"forget", "retain", "alternative", "edits", "demonstrations"}
    if any(need.endswith((".reference", ".reference_tokens", ".reference_hidden")) for need in card.needs):
        assert "reference_model" in card.requires
    if card.kind == "optimise":
        assert {"weights", "gradients"} <= set(card.requires)


@pytest.mark.parametrize("part", EVERY)
def test_every_part_is_in_the_reference(part) -> None:
    page = (DOCS / "reference" / f"{part.room}.md").read_text(encoding="utf-8")
    assert f"\n## {part.name}\n" in page


def card(**changes) -> MethodCard:
    plain = MethodCard(
        name="m",
        kind="optimise",
        paper="p",
        summary="Does it.",
        intention="removal",
        survey_class="parameter_optimisation",
        level="weights",
        modality=("language",),
        known_weaknesses=(NOT_STUDIED,),
    )
    return replace(plain, **changes)


IN_CONTEXT = {"survey_class": "in_context", "level": "decoding"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"kind": "optimize"}, "kind is 'optimize', expected one of optimise"),
        ({"kind": "guard", **IN_CONTEXT}, "its intention can only be suppression"),
        ({"kind": "exact"}, "guarantee exact_by_construction"),
        ({"kind": "exact", "guarantee": "exact_by_construction", "intention": "suppression"}, "intention removal"),
        (IN_CONTEXT, "in_context implies kind guard"),
        ({"level": "prompt"}, "nothing is removed at the level of prompt"),
        ({"known_weaknesses": ()}, "known_weaknesses is empty"),
        ({"requires": ("patience",)}, f"requires patience, which is not one of {NEEDS[0]}"),
        ({"summary": ""}, "no docstring"),
    ],
)
def test_inconsistent_cards_are_refused(changes: dict, sentence: str) -> None:
    card()
    with pytest.raises(CardError, match=re.escape(sentence)):
        card(**changes)
