"""Measuring all models at once: intervals, golds among themselves, notes instead of silence."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from metric_tables import answers, generations, view

from expunge.errors import CardError, ParameterError, TableError, UnknownNameError
from expunge.metrics import measure
from expunge.metrics.bootstrap import Bootstrap, interval
from expunge.metrics.values import Units, Values, mean_of
from expunge.rows import Row
from expunge.tables.view import View

SETS = {"forget": 24, "retain": 10, "neighbour": 8, "holdout": 12, "general": 8}


def model(strength: float, seed: int) -> View:
    """A model whose right answers have about this probability, on all sets."""
    generator = np.random.default_rng(seed)
    lists = {name: (strength * generator.uniform(0.5, 1, (n, 3)) * [1, 0.3, 0.3]).tolist() for name, n in SETS.items()}
    tables = view(lists)
    texts = {name: generations(rows, [f"the answer of {seed}"] * len(rows)) for name, rows in tables.rows.items()}
    return replace(tables, generations=texts)


def by_name(measured: list, name: str, rows: str = "forget"):
    return next(one for one in measured if one.metric == name and one.rows == rows)


def test_everything_is_measured_on_all_models_and_fits_into_evidence():
    before, after, golds = model(0.9, 0), model(0.3, 1), [model(0.3, 2), model(0.3, 3)]
    measured, notes = measure.measure_all(before, after, golds)
    # Tables that nobody asked for are named, with the metrics that read them.
    missing = {"extraction_likelihood", "leak_at_k", "mia_gradnorm", "unlearning_depth"}
    assert {note.split()[0] for note in notes} == missing
    assert measure.more_tables() == {"continuations", "samples", "gradients", "patched"}
    assert measure.more_tables(["rouge", ("privleak", {"by": "gradnorm"})]) == {"gradients"}
    assert {one.metric for one in measured} >= {"forget_quality", "model_utility", "mia_zlib", "rouge", "gold_distance"}
    for one in measured:
        for role in (one.before, one.after, one.gold):
            assert role.low <= role.value <= role.high
        assert one.sentence
        assert one.ideal
        assert one.direction
        assert one.n > 0
        assert one.extra["entities"] > 0
        assert "settings" in one.extra
    probability = by_name(measured, "answer_probability")
    assert probability.before.value > probability.after.value
    assert len(probability.extra["each"]["gold"]) == probability.n == 24
    assert probability.extra["entities"] == 12
    assert by_name(measured, "mia_loss", "forget + holdout").extra["before"][0]["auc_gold"] is not None
    assert len(by_name(measured, "model_utility", "retain + neighbour + general").extra["after"][0]["parts"]) == 9
    json.dumps([asdict(one) for one in measured], allow_nan=False)


def test_default_metrics_reach_the_other_sets():
    measured, _ = measure.measure_all(model(0.9, 0), model(0.3, 1), [])
    found = {(one.metric, one.rows) for one in measured}
    assert {("rouge", name) for name in SETS} <= found
    assert {("answer_probability", name) for name in SETS} <= found


def test_golds_are_compared_with_one_another():
    golds = [model(0.3, 2), model(0.3, 3), model(0.3, 4)]
    measured, _ = measure.measure_all(model(0.9, 0), golds[0], golds[1:], metrics=["forget_quality"])
    assert len(measured[0].extra["gold"]) == 2
    assert measured[0].gold.value == pytest.approx(measured[0].extra["gold"][0]["per_gold"][0]["log10_p"])
    # Gold's value is symmetric here: two golds, each against the other.
    assert measured[0].extra["gold"][0]["D"] == measured[0].extra["gold"][1]["D"]


def test_a_single_gold_cannot_be_compared_and_is_noted():
    measured, notes = measure.measure_all(model(0.9, 0), model(0.3, 1), [model(0.3, 2)], metrics=["forget_quality"])
    assert measured[0].gold is None
    assert measured[0].after is not None
    assert notes == [
        "forget_quality was not measured for gold: gold 0 has no other model to be compared with that was trained "
        "without the forget rows (gold)"
    ]


def test_what_does_not_apply_is_reported_by_name():
    tables = answers({"a": [-1.0], "b": [-2.0]})
    measured, notes = measure.measure_all(tables, tables, [])
    assert {one.metric for one in measured} == {
        "answer_probability", "loss", "exact_memorization", "extraction_strength",
    }  # fmt: skip
    told = " ".join(notes)
    for name in ("truth_ratio", "forget_quality", "model_utility", "rouge", "mia_loss", "mia_zlib", "mia_min_k",
                 "mia_min_k_plus_plus", "gold_distance", "perplexity", "ngram_entropy"):  # fmt: skip
        assert f"{name} was not measured: " in told
    assert "truth_ratio was not measured: no forget row has perturbed_answers" in told


def test_without_a_model_before_only_after_is_measured():
    measured, _ = measure.measure_all(None, answers({"a": [-1.0]}), [], metrics=["loss"])
    assert measured[0].before is None
    assert measured[0].gold is None
    assert measured[0].after.value == pytest.approx(1.0)


def test_settings_are_checked_and_kept():
    tables = model(0.5, 0)
    measured, _ = measure.measure_all(tables, tables, [], metrics=[("truth_ratio", {"form": "arithmetic"}), "loss"])
    assert measured[0].extra["settings"]["form"] == "arithmetic"
    with pytest.raises(ParameterError, match="metric truth_ratio has no parameter 'shape'"):
        measure.measure_all(tables, tables, [], metrics=[("truth_ratio", {"shape": 1})])
    with pytest.raises(UnknownNameError, match="Did you mean truth_ratio"):
        measure.measure_all(tables, tables, [], metrics=["truth_ration"])


def test_models_with_other_rows_are_refused():
    mine, gold = answers({"a": [-1.0], "b": [-2.0]}), answers({"a": [-1.0], "c": [-2.0]})
    with pytest.raises(TableError, match=r"gold 0 table has 2 forget rows, after has 2: missing b \(1\), surplus c"):
        measure.measure_all(mine, mine, [gold])
    turned = answers({"b": [-2.0], "a": [-1.0]})
    with pytest.raises(TableError, match="before has the forget rows in another order"):
        measure.measure_all(turned, mine, [])


def test_a_broken_table_stops_the_audit_rather_than_being_noted():
    with pytest.raises(TableError, match=r"after, forget rows: row 'a' .* no usable numbers"):
        measure.measure_all(answers({"a": [-1.0]}), answers({"a": [np.nan]}), [], metrics=["loss"])


def test_flags_say_whose_value_is_suspicious():
    before = model(0.9, 0)
    silent = replace(before, generations={n: generations(r, [""] * len(r)) for n, r in before.rows.items()})
    measured, _ = measure.measure_all(before, silent, [], metrics=["rouge"])
    assert measured[0].flag == "after: 24 of 24 outputs are empty"


# --- intervals -----------------------------------------------------------------------------------------------


def test_the_bootstrap_draws_entities_not_rows():
    # Two entities of many equal rows: a resample holds one, the other or both, never a mixture of rows.
    units = Units.of(("forget", [Row(id=str(i), answer="", entity="ab"[i % 2]) for i in range(20)]))
    each = np.array([0.0, 1.0] * 10)
    drawn = Bootstrap(500, 0).distribution(Values(units, mean_of(each), each))
    assert set(drawn) == {0.0, 0.5, 1.0}
    assert np.mean(drawn == 0.5) == pytest.approx(0.5, abs=0.08)


def test_both_sides_of_an_auc_are_drawn_on_their_own():
    rows = [Row(id=str(i), answer="") for i in range(5)]
    for weights in Bootstrap(50, 3).weights(Units.of(("forget", rows[:2]), ("holdout", rows[2:]))):
        assert (weights[:, :2].sum(axis=1) == 2).all()
        assert (weights[:, 2:].sum(axis=1) == 3).all()


def test_intervals_depend_on_the_seed_and_not_on_the_order_of_rows():
    tables = answers({str(i): [-float(i)] for i in range(12)})
    turned = replace(tables, rows={"forget": tables.rows["forget"][::-1]})
    first = measure.measure("loss", tables, seed=1)
    second = measure.measure("loss", turned, seed=1)
    assert (second.low, second.value, second.high) == pytest.approx((first.low, first.value, first.high))
    assert measure.measure("loss", tables, seed=2).low != first.low


def test_the_interval_of_a_mean_has_the_textbook_width():
    generator = np.random.default_rng(0)
    losses = generator.exponential(1.0, 200)
    found = measure.measure("loss", answers({str(i): [-value] for i, value in enumerate(losses)}), bootstrap=4000)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * losses.std() / np.sqrt(200), rel=0.07)
    assert found.low < losses.mean() < found.high


def test_blocks_of_draws_do_not_change_what_is_drawn(monkeypatch: pytest.MonkeyPatch):
    from expunge.metrics import bootstrap

    units = Units.of(("forget", [Row(id=str(i), answer="") for i in range(7)]))
    whole = np.concatenate(list(Bootstrap(100, 0).weights(units)))
    monkeypatch.setattr(bootstrap, "BLOCK", 30)
    assert np.array_equal(np.concatenate(list(Bootstrap(100, 0).weights(units))), whole)


def test_no_draws_give_no_bounds():
    found = measure.measure("loss", answers({"a": [-1.0]}), bootstrap=0)
    assert found.value == pytest.approx(1.0)
    assert np.isnan(found.low)
    with pytest.raises(ParameterError, match="bootstrap = -1"):
        Bootstrap(-1)


def test_an_interval_holds_its_value():
    found = interval(0.0, np.linspace(0.1, 0.5, 100))
    assert found.low == 0.0


def test_a_metric_must_return_values():
    from expunge.registry import Part, get

    part = get("metrics", "loss")
    with pytest.raises(CardError, match="metric loss returned float"):
        measure.values(Part(part.room, lambda view, **_: 1.0, part.card, part.parameters), answers({"a": [-1.0]}))
