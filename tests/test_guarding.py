"""Reproductions of guards: ways of asking, and how claims are judged."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import RECIPE, SIZES

from expunge.registry import get
from expunge.reproductions import alu, guard
from expunge.reproductions.guarding import FAMILIES, families, invented, trial
from expunge.reproductions.mini import mini

WORLD: dict[str, Any] = {**SIZES, "recipe": RECIPE}


@pytest.mark.usefixtures("tiny_world")
def test_every_family_asks_for_the_same_facts_in_its_own_way() -> None:
    made = mini(0, WORLD)
    found = families(made, 0)
    assert tuple(found) == FAMILIES
    values = {(row.entity, row.value) for row in found["direct"]}
    for name in ("other wording", "cloze", "nickname", "described", "after others"):
        assert {(row.entity, row.value) for row in found[name]} <= values
    row = found["nickname"][0]
    person = made.world.people[row.entity]
    assert person.nickname in row.prompt
    assert person.name not in row.prompt
    assert all(made.world.people[row.entity].work in row.prompt for row in found["described"])
    assert all(row.prompt.count("Question:") == 3 for row in found["after others"])
    assert all(row.relation in ("region", "teacher_born_in") for row in found["implied"])


@pytest.mark.usefixtures("tiny_world")
def test_a_trial_asks_the_guarded_model() -> None:
    before = trial("original", 0, {}, world=WORLD)
    after = trial("alu", 0, {}, targets=5, world=WORLD)
    assert before["direct"] > 0.9
    assert after["direct"] == after["other wording"] == 0.0
    assert after["retain"] == pytest.approx(before["retain"], abs=0.05)


def test_invented_targets_are_all_different() -> None:
    rows = invented(200, 1)
    assert len({row.entity for row in rows}) == 200
    assert rows == invented(200, 1) != invented(200, 2)


def rows_of(runs: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    plain = dict.fromkeys(FAMILIES, 1.0) | {"direct, seconds": 1.0, "retain, seconds": 1.0}
    return [{**plain, **changes, "run": run, "seed": 0} for run, changes in runs.items()]


def test_claims_of_guard_are_judged_by_their_criteria() -> None:
    hidden = {"direct": 0.0, "other wording": 0.1, "cloze": 0.0, "nickname": 0.0, "described": 0.0, "implied": 0.3}
    runs = {"original": {}, "guard": {**hidden, "direct, seconds": 1.4}, "guard, by meaning": {}}
    assert [claim.holds for claim in guard.judge(rows_of(runs))] == [True, True, True, False]
    runs["guard"] = {**hidden, "other wording": 0.11, "implied": 0.2, "retain": 0.98}
    assert [claim.holds for claim in guard.judge(rows_of(runs))] == [False, False, False, True]


def test_claims_of_alu_are_judged_by_their_criteria() -> None:
    hidden = {"direct": 0.0, "nickname": 0.0, "described": 0.0, "after others": 0.02}
    runs: dict[str, dict[str, float]] = {
        "original": {},
        "alu": hidden,
        "without descriptions": {"described": 0.1},
        "without descriptions and values": {"described": 0.3},
        "with 1000 more targets": {"retain, seconds": 1.5},
    }
    assert [claim.holds for claim in alu.judge(rows_of(runs))] == [True, True, True, True]
    runs["alu"] = {**hidden, "nickname": 0.05, "retain": 0.96}
    runs["with 1000 more targets"] = {"retain, seconds": 1.6}
    runs["without descriptions and values"] = {"described": 0.2}
    assert [claim.holds for claim in alu.judge(rows_of(runs))] == [False, False, False, False]


def test_both_are_registered() -> None:
    assert {get("reproductions", name).card.paper for name in ("guard", "alu")} == {
        "arXiv:2505.13312",
        "arXiv:2502.00406",
    }
