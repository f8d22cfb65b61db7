"""The verdict as a classifier: that the trial judges every model, and that each claim can fail."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from conftest import RECIPE, SIZES

from expunge.reproductions import verdict

TINY = {**SIZES, "recipe": RECIPE}
NAMES = ("original", "gold 0", "gold 1", "relearned gold", *verdict.GUARDS, *verdict.METHODS)


def test_every_model_of_a_tiny_world_is_judged(tiny_world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict, "GOLDS", SIZES["gold_seeds"])
    monkeypatch.setattr(verdict, "METHODS", {"npo": verdict.METHODS["npo"]})
    found = verdict.trial(0, relearned=60, attacks=["direct", "logit_lens"], training={"epochs": 1}, world=TINY)
    models = found["models"]
    assert set(models) == {"original", "gold 0", "gold 1", "relearned gold", *verdict.GUARDS, "npo"}
    assert models["original"]["verdict"] == models["relearned gold"]["verdict"] == "not_forgotten"
    assert models["gold 0"]["scores"]["direct"] < 0.3 < models["original"]["scores"]["direct"]
    assert models["output_filter"]["by"] == ["logit_lens"]
    assert models["original"]["self_test"] is not None
    assert models["gold 0"]["self_test"] is None


def row(seed: int) -> dict[str, Any]:
    def one(found: str, score: float, flags: tuple[str, ...] = ()) -> dict[str, Any]:
        scores = {"direct": score}
        return {"verdict": found, "by": [], "flags": list(flags), "retain": 1.0, "scores": scores, "self_test": True}

    models = {name: one("suppressed", 0.5) for name in NAMES}
    models |= {"original": one("not_forgotten", 1.0), "relearned gold": one("not_forgotten", 0.9)}
    models |= {"gold 0": one(verdict.REMOVED, 0.1), "gold 1": one("inconclusive", 0.2)}
    models |= {"npo": one("inconclusive", 0.1, ("damaged",)), "grad_diff": one(verdict.REMOVED, 0.0)}
    return {"seed": seed, "models": models}


def test_claims_hold_where_every_known_model_is_judged_right() -> None:
    assert all(claim.holds for claim in verdict.claims([row(0), row(1)]))


@pytest.mark.parametrize(
    ("model", "judged", "broken"),
    [
        ("original", "inconclusive", {0}),
        ("relearned gold", verdict.REMOVED, {1, 4}),
        ("gold 1", "suppressed", {2}),
        ("output_filter", "inconclusive", {3}),
        ("icu_prefix", verdict.REMOVED, {3, 4}),
    ],
)
def test_one_wrong_judgement_breaks_its_claims(model: str, judged: str, broken: set[int]) -> None:
    wrong = copy.deepcopy(row(1))
    wrong["models"][model]["verdict"] = judged
    assert {i for i, claim in enumerate(verdict.claims([row(0), wrong])) if not claim.holds} == broken


def test_methods_that_neither_hide_nor_damage_break_the_last_claim() -> None:
    wrong = row(0)
    wrong["models"]["npo"]["flags"] = []
    assert not verdict.claims([wrong])[5].holds


def test_areas_compare_with_gold_of_all_seeds() -> None:
    table = verdict._areas([row(0), row(1)])
    assert table.rows == [["direct", "1.00", "1.00", "0.56"]]  # (1 + 1 + 0.25 + 0) / 4
