"""Reproductions: what they measure, that they run at a tiny budget, and that their claims can fail."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import RECIPE, SIZES

from expunge.metrics.matching import recovered
from expunge.reproductions import loku, npo, rmu
from expunge.reproductions.case import Case, Claim, Spread
from expunge.reproductions.curves import gather, table
from expunge.reproductions.measures import held_out, knowledge, measure, refused, said
from expunge.reproductions.mini import Mini, mini
from expunge.rows import Row

TINY = {**SIZES, "gold_seeds": 1, "recipe": RECIPE}


@pytest.fixture(scope="module")
def world(tiny_world: Any) -> Mini:
    # `tiny_world` has trained the models; here they come out of the cache.
    return mini(0, TINY)


# --- measures --------------------------------------------------------------------------------------------------------


def test_a_value_is_known_where_greedy_decoding_says_it(world: Mini) -> None:
    rows = world.data["forget"] + world.data["holdout"]
    texts = said(world.original, rows)
    assert [bool(k) for k in knowledge(world.original, rows).known] == [
        text.strip().startswith(row.value) for row, text in zip(rows, texts)
    ]
    assert 0.5 < np.mean([recovered(row, text) for row, text in zip(rows, texts)]) < 1


def test_measures_tell_the_original_from_gold(world: Mini) -> None:
    before, gold = (measure(model, world.data) for model in (world.original, world.golds[0]))
    assert before["forget_accuracy"] > 0.9
    assert before["held_out_accuracy"] > 0.6
    assert gold["forget_accuracy"] < 0.2
    assert gold["held_out_accuracy"] < 0.2
    assert gold["retain_accuracy"] > 0.9
    assert gold["forget_nll"] > 10 * before["forget_nll"]
    assert gold["forget_value"] < before["forget_value"] < 0


def test_value_and_answer_are_what_scoring_them_alone_gives(world: Mini) -> None:
    row = Row(id="a", prompt="Who was it?", answer="It was Ilva of Tivin.", value="Ilva")
    found = knowledge(world.original, [row])
    table = world.original.score([(("a", "answer"), world.original.encode(row))])
    assert found.nll[0] == pytest.approx(-table.logprob.mean())
    assert found.tokens[0] == len(table.token)
    text, spans = world.original.spans(row)
    at, first = text.index("Ilva"), world.original.encode(row).start
    inside = [i - first for i, (start, stop) in enumerate(spans) if stop > at - 1 and start < at + 4]
    assert 0 < len(inside) < len(table.token)
    assert found.value[0] == pytest.approx(table.logprob[inside].sum())
    # Without a value that stands in it, the whole answer is the value; what closes it is not.
    whole = knowledge(world.original, [replace(row, value="")])
    assert whole.value[0] == pytest.approx(table.logprob[~table.end.astype(bool)].sum())


def test_held_out_wordings_are_rows_of_their_own(world: Mini) -> None:
    row = Row(id="a", prompt="p", answer="x", paraphrased_prompts=("q", "r"))
    assert [(r.id, r.prompt, r.answer) for r in held_out([row])] == [("a/0", "q", "x"), ("a/1", "r", "x")]
    assert "held_out_nll" not in measure(world.original, {"forget": [replace(row, paraphrased_prompts=())]})


def test_refusals_are_counted() -> None:
    assert refused(["I don't know.", "Tivin", "I have no information on that.", ""]) == 0.5


# --- trials at a tiny budget -----------------------------------------------------------------------------------------


def test_npo_measures_a_curve_and_pdu_follows_its_rule(world: Mini) -> None:
    settings = {**npo.DUAL, "warmup": 0.0}
    found = npo.trial("pdu", 0, settings, steps=6, at=(3, 6), world=TINY)
    assert [point["step"] for point in found["points"]] == [3, 6]
    assert found["points"][1]["forget_nll"] > found["points"][0]["forget_nll"]
    assert found["rule"]
    assert len(found["epoch_losses"]) == 1
    assert found["epoch_multipliers"] == [settings["multiplier"], pytest.approx(found["epoch_multipliers"][1])]
    assert npo.trial("gold", 0, {}, world=TINY)["points"][0]["forget_accuracy"] < 0.2


def test_a_multiplier_that_does_not_follow_its_rule_is_found() -> None:
    summary = {"training": {"batch_size": 16}, "log": {"nll": {"retain": [0.2, 0.2]}, "memory": {"multiplier": 2.5}}}
    settings = {"multiplier": 1.0, "rate": 5.0, "warmup": 0.0, "bound": 0.05}
    assert npo._dual(summary, settings, 16) == {
        "epoch_losses": [0.2, 0.2],
        "epoch_multipliers": [1.0, 1.75, 2.5],
        "rule": True,
    }
    summary["log"]["memory"]["multiplier"] = 1.0
    assert not npo._dual(summary, settings, 16)["rule"]


def test_loku_runs_in_full_scope_in_adapters_and_on_passages(world: Mini) -> None:
    whole = loku.trial("ihl", 0, steps=2, at=(2,), world=TINY)
    assert 0 <= whole["lowest"] <= whole["highest"] <= 2
    parts = loku.adapted("ihl", "fila", 0, 0, steps=2, world=TINY)
    assert parts["reached_step"] is None
    assert parts["step"] == 2
    assert parts["retain_accuracy"] > 0.5
    texts = loku.passages("ihl", 0, memorise=20, steps=1, world=TINY)
    assert texts["forget_ma_before"] > texts["holdout_ma_before"]
    assert texts["forget_el_before"] > texts["holdout_el_before"]
    assert texts["ended"] == 1
    # Nothing that learnt texts by heart is like unseen text before the first step.
    assert loku.passages("ihl", 0, memorise=20, steps=1, stop=True, world=TINY)["ended"] == 1


def test_rmu_measures_choice_and_is_audited(world: Mini) -> None:
    settings = {"layer": -1, "coefficient": "adaptive", "scale": 2.0, "retain_weight": 10.0}
    found = rmu.trial("rmu", 0, settings, steps=2, at=(2,), relearn=1, world=TINY)
    assert found["layer"] == 1
    assert found["coefficient"] > 0
    assert found["points"][0]["choice_accuracy"] > 0.8
    assert found["verdict"] == "not_forgotten"
    assert found["recovery"] > 0.8


# --- claims can fail -------------------------------------------------------------------------------------------------


def rows_of(runs: dict[str, dict[str, Any]], steps: tuple[int, ...]) -> list[dict[str, Any]]:
    """Rows of two seeds; a value may be a function of the step."""
    return [
        {"run": run, "seed": seed, "step": step} | {k: v(step) if callable(v) else v for k, v in values.items()}
        for run, values in runs.items()
        for seed in (0, 1)
        for step in (steps if run not in ("original", "gold") else (0,))
    ]


def verdicts(claims: list[Claim]) -> dict[str, bool | None]:
    found = {claim.claim: claim.holds for claim in claims}
    assert len(found) == len(claims)
    return found


def npo_runs() -> dict[str, dict[str, Any]]:
    def kept(retain_nll: float, value: float, forget_nll: float = 3.0) -> dict[str, Any]:
        return {
            "forget_accuracy": 0.0,
            "retain_accuracy": 0.95,
            "retain_nll": retain_nll,
            "forget_nll": forget_nll,
            "forget_value": value,
        }

    alone = {"forget_accuracy": 0.0, "retain_accuracy": 0.0, "forget_value": -60.0}
    return {
        "gold": {"forget_nll": 2.0, "forget_value": -8.0},
        "gradient_ascent": {**alone, "retain_nll": 20.0, "forget_nll": 20.0},
        "npo, beta 0.1": {**alone, "retain_nll": 10.0, "forget_nll": 10.0},
        "npo, beta 0.9": {**alone, "retain_nll": 10.0, "forget_nll": 10.0},
        "grad_diff": kept(0.5, -40.0, 20.0),
        "npo, beta 0.1 + nll": kept(0.2, -30.0, 8.0),
        "npo, beta 0.9 + nll": kept(0.2, -20.0, 8.0),
        "simnpo": kept(0.05, -9.0),
        "ihl": kept(0.05, -20.0),
        "wga": kept(0.05, -20.0),
        "ceu": kept(0.05, -20.0),
        "pdu": {"epoch_losses": [0.09, 0.1, 0.2, 0.04], "epoch_multipliers": [1, 1, 1, 2, 1.5], "rule": True},
        "idk": {"refused": 0.95, "forget_probability": 0.5, "verdict": "suppressed", "recovery": 0.6},
        "npo in lora(r=4)": kept(0.05, -20.0),
    }


SLOWER = "NPO alone leaves the start model far more slowly than gradient ascent"
ORDER = "Damage is ordered: SimNPO and IHL less than NPO, NPO less than GradDiff"
NEARER = "SimNPO needs no reference and ends nearer to a model that never knew than NPO, GradDiff, GA"


@pytest.mark.parametrize(
    ("claim", "run", "change"),
    [
        ("Gradient ascent alone", "gradient_ascent", {"retain_accuracy": 0.2}),
        ("Gradient ascent alone", "gold", {"forget_nll": 6.0}),
        (f"{SLOWER} (beta 0.1, 60", "npo, beta 0.1", {"retain_nll": 13.0}),
        (f"{SLOWER} (beta 0.9, 240", "npo, beta 0.9", {"forget_nll": 15.0}),
        ("With likelihood of retain rows", "ceu", {"forget_accuracy": 0.2}),
        ("With likelihood of retain rows", "ihl", {"retain_accuracy": 0.8}),
        (f"{ORDER} (beta 0.1)", "ihl", {"retain_nll": 0.3}),
        (f"{ORDER} (beta 0.9)", "grad_diff", {"retain_nll": 0.1}),
        ("GradDiff stays unbounded although retain loss holds accuracy (beta 0.1)", "grad_diff", {"forget_nll": 15.0}),
        (f"{NEARER} (beta 0.9)", "npo, beta 0.9 + nll", {"forget_value": -8.5}),
        ("PDU's multiplier", "pdu", {"epoch_losses": [0.09, 0.1, 0.2, 0.06]}),
        ("PDU's multiplier", "pdu", {"epoch_multipliers": [1, 1, 1, 2, 2.5]}),
        ("PDU's multiplier", "pdu", {"rule": False}),
        ("Fine-tuning on refusals gives", "idk", {"refused": 0.5}),
        ("Fine-tuning on refusals leaves", "idk", {"forget_probability": 0.1}),
        ("Fine-tuning on refusals suppresses", "idk", {"verdict": "inconclusive"}),
        ("NPO forgets in a part of the weights too: lora(r=4)", "npo in lora(r=4)", {"retain_accuracy": 0.5}),
    ],
)
def test_each_claim_of_npo_can_fail(claim: str, run: str, change: dict[str, Any]) -> None:
    steps = (30, 60, 120, 240)
    good = npo_runs()
    before = verdicts(npo.judge(rows_of(good, steps), 120, "beta 0.9"))
    assert all(before.values())
    after = verdicts(npo.judge(rows_of({**good, run: {**good[run], **change}}, steps), 120, "beta 0.9"))
    (name,) = [name for name in before if name.startswith(claim)]
    assert after[name] is False


def loku_rows() -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    whole = {
        "ihl": {"retain_nll": 0.1, "forget_nll": 5.0, "forget_accuracy": 0.0, "lowest": 0.0, "highest": 1.9},
        "grad_diff": {"retain_nll": 1.0, "forget_nll": 15.0, "forget_accuracy": 0.0, "lowest": -20.0, "highest": 0.0},
    }
    reached = {"default": 40, "fila": 20, "pissa": 25}
    parts = [
        {
            "method": method,
            "init": init,
            "seed": 0,
            "reached_step": reached[init],
            "reached_retain_accuracy": {"ihl": 0.9, "grad_diff": 0.5}[method],
        }
        for method in ("ihl", "grad_diff")
        for init in reached
    ]
    texts = {
        f"{name}_{what}": value
        for name, values in {
            "forget": (0.9, 0.1, 0.9, 0.0),
            "retain": (0.9, 0.9, 0.9, 0.9),
            "holdout": (0.1, 0.1, 0.0, 0.0),
        }.items()
        for what, value in zip(("ma_before", "ma_after", "el_before", "el_after"), values)
    }
    return (
        rows_of(whole, (60, 120)),
        parts,
        [{"seed": 0, "ended": 120, "stop": stop, **texts} for stop in (False, True)],
    )


def test_each_claim_of_loku_can_fail() -> None:
    whole, parts, texts = loku_rows()
    good = verdicts(loku.judge(whole, parts, texts, 120))
    assert list(good.values()) == [True] * 10

    def changed(rows: list[dict[str, Any]], where: dict[str, Any], **change: Any) -> list[dict[str, Any]]:
        return [row | change if all(row[key] == value for key, value in where.items()) else row for row in rows]

    cases = [
        (0, (changed(whole, {"run": "ihl", "step": 60}, retain_nll=0.3), parts, texts)),
        (1, (changed(whole, {"run": "ihl", "step": 120}, forget_nll=12.0), parts, texts)),
        (2, (changed(whole, {"run": "ihl"}, highest=2.1), parts, texts)),
        (3, (whole, changed(parts, {"method": "ihl", "init": "fila"}, reached_step=None), texts)),
        (4, (whole, changed(parts, {"method": "ihl", "init": "pissa"}, reached_step=20), texts)),
        (5, (whole, changed(parts, {"method": "grad_diff"}, reached_retain_accuracy=0.8), texts)),
        (6, (whole, parts, changed(texts, {"stop": False}, forget_el_after=0.2))),
        (6, (whole, parts, changed(texts, {"stop": False}, retain_ma_after=0.7))),
        (7, (whole, parts, changed(texts, {"stop": False}, forget_ma_after=0.02))),
        (8, (whole, parts, changed(texts, {"stop": True}, forget_el_after=0.2))),
        (9, (whole, parts, changed(texts, {"stop": True}, forget_ma_after=0.02))),
    ]
    for place, rows in cases:
        assert list(verdicts(loku.judge(*rows, 120)).values())[place] is False
    never = (whole, changed(parts, {"method": "grad_diff"}, reached_retain_accuracy=None, reached_step=None), texts)
    assert list(verdicts(loku.judge(*never, 120)).values())[5] is None


def rmu_runs() -> dict[str, dict[str, Any]]:
    good = {"forget_accuracy": 0.05, "held_out_accuracy": 0.05, "retain_accuracy": 0.95, "choice_accuracy": 0.2}
    return {
        "original": {"retain_accuracy": 1.0, "choice_accuracy": 1.0},
        "gold": {"choice_accuracy": 0.2},
        "adaptive, l = 2": {**good, "verdict": "suppressed", "recovery": 0.5},
        "adaptive, last": good,
        "c = 6.5, last": {**good, "forget_accuracy": 0.7},
        "scale 5, alpha 1": {**good, "retain_accuracy": lambda step: 0.4 if step == 60 else 0.7},
        "scale 5, alpha 100": {**good, "forget_accuracy": 1.0},
        "gradient_ascent": {**good, "retain_accuracy": 0.0},
    }


@pytest.mark.parametrize(
    ("place", "run", "change"),
    [
        (0, "adaptive, l = 2", {"forget_accuracy": 0.2}),
        (0, "adaptive, l = 2", {"held_out_accuracy": 0.2}),
        (0, "adaptive, l = 2", {"retain_accuracy": 0.8}),
        (1, "adaptive, l = 2", {"choice_accuracy": 0.4}),
        (2, "adaptive, last", {"retain_accuracy": 0.8}),
        (2, "c = 6.5, last", {"forget_accuracy": 0.3}),
        (3, "scale 5, alpha 1", {"retain_accuracy": 0.9}),
        (3, "scale 5, alpha 100", {"forget_accuracy": 0.8}),
        (4, "gradient_ascent", {"retain_accuracy": 0.6}),
        (5, "adaptive, l = 2", {"verdict": "removed_under_tested_attacks"}),
    ],
)
def test_each_claim_of_rmu_can_fail(place: int, run: str, change: dict[str, Any]) -> None:
    steps, good = (30, 60, 120, 240), rmu_runs()
    assert list(verdicts(rmu.judge(rows_of(good, steps), 240)).values()) == [True] * 6
    worse = rows_of({**good, run: {**good[run], **change}}, steps)
    assert list(verdicts(rmu.judge(worse, 240)).values())[place] is False


def test_rows_carry_run_and_point(tmp_path: Path) -> None:
    found = gather(Case(tmp_path, (0, 1), workers=1), two_points, {"a": {"x": 1}, "b": {"x": 2}})
    assert [(row["run"], row["seed"], row["step"], row["y"]) for row in found] == [
        (run, seed, step, x + step) for run, x in (("a", 1), ("b", 2)) for seed in (0, 1) for step in (5, 9)
    ]
    shown = table(found, "Title", columns={"y": "why"})
    assert shown.columns == ["run", "steps", "why"]
    assert shown.rows[0] == ["a", 5, "6 (6 to 6)"]


def two_points(x: int, seed: int) -> dict[str, Any]:
    return {"points": [{"step": step, "y": x + step} for step in (5, 9)]}


def test_a_seed_that_could_not_tell_a_quantity_is_left_out_and_counted():
    nan = float("nan")
    assert str(Spread((0.25, 0.75))) == "0.5 (0.25 to 0.75)"
    assert str(Spread((nan, 0.25, 0.75))) == "0.5 (0.25 to 0.75; 2 of 3 seeds)"
    assert str(Spread((nan, nan))) == "not measured"
