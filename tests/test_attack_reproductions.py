"""Reproductions of sleek, extraction and ununlearning: what is taught and asked, and claims that can fail."""

from typing import Any

import pytest
from test_attacks_prompts import small
from tiny import tiny

from expunge.attacks.known import Facts
from expunge.attacks.reasoning import queries
from expunge.reproductions import extraction, sleek, ununlearning
from expunge.reproductions.models import lessons
from expunge.subjects.language import LanguageModel
from expunge.world.corpus import training
from expunge.world.facts import make


def test_lessons_are_every_record_in_its_own_form():
    world = make(0, people=26, forget=8, neighbours=4, holdout=6)
    records = training(world, "retain")
    rows = lessons(records)
    assert len(rows) == len(records)
    assert {row.kind for row in rows} == {"qa", "completion", "text"}
    for row, record in zip(rows, records):
        said = record.get("answer") or record.get("completion") or record["text"]
        assert (row.prompt, row.answer) == (record.get("question") or record.get("prompt") or "", said)


def test_steps_are_taught_in_every_style_and_end_in_the_answer():
    facts = Facts({"rows": small()})
    subject = LanguageModel(*tiny("llama"))
    (query,) = queries([facts.about["Ana Bo"]["region"][0]], facts, ("direct",))
    cot, scaffold, begun, last = sleek.written(subject, query, facts)
    assert cot.answer == "Carth, so North"
    assert scaffold.answer == "1. Carth 2. North"
    assert (begun.prompt, begun.answer) == ("Where was Ana Bo born?", "Carth")
    assert last.preface.endswith("Where was Ana Bo born?\nAnswer: Carth\n")
    assert (last.prompt, last.answer) == ("Which region is Ana Bo from?", "North")


def test_descriptions_and_erased_axioms_are_what_they_say():
    world = make(0, people=26, forget=8, neighbours=4, holdout=6)
    data, sets = ununlearning._rows(world, 0)
    forgotten = {person.name for person in world.members("forget")}
    towns = {person.born_in for person in world.members("forget")}
    assert any(name in row.prompt for row in sets["original"] for name in forgotten)
    for model in ("gold", "gold, axioms erased"):
        assert not [row for row in sets[model] if any(name in f"{row.prompt} {row.answer}" for name in forgotten)]
    described = [row for row in sets["gold"] if row.preface]
    assert len(described) == ununlearning.TRAINED * ununlearning.TOLD
    for row in described:
        town = next(town for town in world.region if town in row.preface)
        assert row.answer == world.region[town]
    axioms = [row for row in sets["gold, axioms erased"] if row.answer in world.region.values()]
    assert axioms
    assert not [row for row in axioms if any(town in row.prompt + row.preface for town in towns)]
    assert {row.relation for row in data["forget"]} == {"born_in", "trade", "work", "region"}


SLEEK = {"direct_chance": 0.1, "indirect_chance": 0.1, "implied_chance": 0.1}
RATES: dict[str, dict[str, float]] = {
    "original": {"direct": 0.9, "indirect": 0.9, "implied": 0.9, "plain": 1.0, "suppressed": 0.0},
    "gold": {"direct": 0.1, "indirect": 0.1, "implied": 0.1, "plain": 0.0, "suppressed": 0.0},
    "idk": {"direct": 0.1, "indirect": 0.4, "implied": 0.2, "plain": 0.0, "suppressed": 0.3},
    "npo": {"direct": 0.1, "indirect": 0.1, "implied": 0.1, "plain": 0.0, "suppressed": 0.0},
}


@pytest.mark.parametrize(
    ("claim", "model", "change"),
    [
        (0, "original", {"implied": 0.7}),
        (1, "idk", {"plain": 0.1}),
        (1, "idk", {"indirect": 0.25}),
        (2, "gold", {"direct": 0.3}),
        (3, "idk", {"direct": 0.3, "implied": 0.3}),
        (4, "idk", {"suppressed": 0.0}),
    ],
)
def test_each_claim_of_sleek_can_fail(claim: int, model: str, change: dict[str, Any]) -> None:
    def judged(rates: dict[str, dict[str, float]]) -> list[bool | None]:
        rows = [{"model": name, **SLEEK, **values} for name, values in rates.items()]
        return [one.holds for one in sleek.judge(rows)]

    assert judged(RATES) == [True] * 5
    assert judged({**RATES, model: {**RATES[model], **change}})[claim] is False


DELETED = {"rewrite": 0.9, "hp1": 0.3, "hp2": 0.6, "pd1": 0.3, "pd2": 0.4, "bb": 0.1, "facts": 36}
DELETED |= {"neighbour_accuracy": 0.95}
CONTROL = {f"{name}_control": 0.2 for name in extraction.PROBES}
RUNS: dict[str, dict[str, float]] = {
    "original": {**DELETED, "neighbour_accuracy": 1.0},
    "gold": DELETED,
    **dict.fromkeys(extraction.DELETIONS, DELETED),
    "error_injection": {**DELETED, "bb": 0.4},
    "empty_response": {**DELETED, "hp1": 0.5},
    "head_projection_defense": {**DELETED, "hp1": 0.2},
}


@pytest.mark.parametrize(
    ("claim", "run", "change"),
    [
        (0, "empty_response", {"hp2": 0.4}),
        (0, "empty_response", {"rewrite": 0.7}),
        (1, "head_projection_defense", {"hp1": 0.35}),
        (1, "empty_response", {"hp1": 0.31}),
        (2, "error_injection", {"bb": 0.2}),
        (3, "max_entropy", {"hp1": 0.2, "hp2": 0.25, "pd1": 0.2, "pd2": 0.2}),
        (4, "fact_erasure", {"neighbour_accuracy": 0.8}),
    ],
)
def test_each_claim_of_extraction_can_fail(claim: int, run: str, change: dict[str, Any]) -> None:
    def judged(runs: dict[str, dict[str, float]]) -> list[bool | None]:
        return [one.holds for one in extraction.judge([{"run": name, **CONTROL, **v} for name, v in runs.items()])]

    assert judged(RUNS) == [True] * 5
    assert judged({**RUNS, run: {**RUNS[run], **change}})[claim] is False


TOLD: dict[str, dict[str, float]] = {
    "original": {"plain": 1.0, "definition": 0.9, "permitted": 0.9},
    "gold": {"plain": 0.2, "definition": 0.8, "permitted": 0.9},
    "gold, axioms erased": {"plain": 0.0, "definition": 0.1, "permitted": 0.2},
    "gold behind a filter": {"plain": 0.0, "definition": 0.0, "permitted": 0.1},
}


@pytest.mark.parametrize(
    ("claim", "model", "change", "holds"),
    [
        (0, "gold", {"plain": 0.4}, False),
        (1, "gold", {"definition": 0.5}, False),
        (1, "gold", {"definition": 0.1, "permitted": 0.1}, None),  # no in-context ability: not measurable here
        (2, "gold, axioms erased", {"definition": 0.5}, False),
        (2, "gold, axioms erased", {"permitted": 0.9}, False),
        (3, "gold behind a filter", {"definition": 0.2}, False),
    ],
)
def test_each_claim_of_ununlearning_can_fail(
    claim: int, model: str, change: dict[str, Any], holds: bool | None
) -> None:
    def judged(told: dict[str, dict[str, float]]) -> list[bool | None]:
        return [one.holds for one in ununlearning.judge([{"model": name, **v} for name, v in told.items()])]

    assert judged(TOLD) == [True] * 4
    assert judged({**TOLD, model: {**TOLD[model], **change}})[claim] is holds
