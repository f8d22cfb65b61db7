"""Membership attacks: AUC, PrivLeak and what is suspicious about them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from metric_tables import scores
from sklearn.metrics import roc_auc_score
from tiny import tiny

from expunge.errors import ParameterError, TableError
from expunge.metrics import measure
from expunge.metrics.membership import auc_of
from expunge.metrics.mia_loss import mia_loss
from expunge.metrics.mia_min_k import mia_min_k
from expunge.metrics.mia_min_k_plus_plus import mia_min_k_plus_plus
from expunge.rows import Row
from expunge.subjects.language import LanguageModel
from expunge.tables.passes import ask_all
from expunge.tables.view import NotApplicable, View

ATTACKS = ("mia_loss", "mia_zlib", "mia_min_k", "mia_min_k_plus_plus")
SCORES = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=12)


def tables(forget: list[float], holdout: list[float]) -> View:
    """One token per answer, of these losses."""
    sides = {"forget": forget, "holdout": holdout}
    rows = {name: [Row(id=f"{name}{i}", answer="text") for i in range(len(side))] for name, side in sides.items()}
    return View(
        rows,
        {
            name: scores([(row.id, "answer", [-value]) for row, value in zip(rows[name], side)])
            for name, side in sides.items()
        },
    )


@pytest.mark.parametrize("attack", ATTACKS)
def test_auc_by_hand(attack: str):
    # Of four pairs the forget row is the more familiar one in three.
    assert measure.values(attack, tables([1, 3], [2, 4])).value == pytest.approx(0.75)
    assert measure.values(attack, tables([1, 1], [2, 2])).value == 1
    assert measure.values(attack, tables([2, 2], [2, 2])).value == 0.5


@given(SCORES, SCORES)
def test_auc_is_the_chance_that_a_member_scores_lower(members: list[float], others: list[float]):
    first, second = np.array(members), np.array(others)
    plain = np.mean((first[:, None] < second) + 0.5 * (first[:, None] == second))
    everyone = np.ones((1, len(first) + len(second)))
    assert auc_of(first, second)(everyone)[0] == pytest.approx(plain)
    assert auc_of(second, first)(everyone)[0] == pytest.approx(1 - plain)
    # A change that keeps the order changes nothing.
    assert auc_of(np.exp(first), np.exp(second))(everyone)[0] == pytest.approx(plain)


def test_auc_under_weights_equals_scikit_learns_on_repeated_rows():
    generator = np.random.default_rng(0)
    members, others = generator.integers(0, 5, 15).astype(float), generator.integers(1, 6, 9).astype(float)
    counts = generator.integers(0, 4, 24)
    repeated = np.repeat(np.concatenate([members, others]), counts)
    label = np.repeat(np.arange(24) < 15, counts)
    assert auc_of(members, others)(counts[None])[0] == pytest.approx(roc_auc_score(label, -repeated))


def test_privleak_by_hand():
    gold = tables([1, 3], [2, 2])  # AUC 0.5
    found = mia_loss(replace(tables([1, 3], [2, 4]), golds=[gold]))  # AUC 0.75
    assert found.extra["auc_gold"] == 0.5
    assert found.extra["auc_difference"] == pytest.approx(0.25)
    assert found.extra["privleak"] == pytest.approx(-50)
    assert found.extra["privacy"] == pytest.approx(0.5)


def test_privleak_is_relative_to_what_gold_leaves_and_not_symmetric():
    gold = tables([1, 3], [2, 4])  # AUC 0.75, so a = 0.25
    assert mia_loss(replace(tables([1, 1], [2, 2]), golds=[gold])).extra["privleak"] == pytest.approx(-100)
    found = mia_loss(replace(tables([2, 2], [2, 2]), golds=[gold]))
    assert found.extra["privleak"] == pytest.approx(100)
    assert found.extra["privacy"] == pytest.approx(2 / 3)


def test_gold_leaks_nothing_and_full_knowledge_is_minus_hundred():
    gold = tables([1, 3], [2, 2])
    assert mia_loss(replace(gold, golds=[gold])).extra["privleak"] == 0
    assert mia_loss(replace(tables([1, 1], [2, 2]), golds=[gold])).extra["privleak"] == -100


def test_privleak_as_a_metric_reads_the_auc_of_model_and_gold():
    gold = tables([1, 3], [2, 2])  # AUC 0.5
    view = replace(tables([1, 3], [2, 4]), golds=[gold])  # AUC 0.75
    for by in ("loss", "zlib", "min_k", "min_k_plus_plus"):
        found = measure.values("privleak", view, {"by": by})
        assert found.value == pytest.approx(-50)
        assert found.extra["auc_difference"] == pytest.approx(0.25)
        assert found.extra["highest"] == pytest.approx(100)
    assert measure.values("privleak", replace(gold, golds=[gold])).value == 0
    ruined = measure.values("privleak", replace(tables([8, 9], [1, 2]), golds=[gold]))
    assert ruined.value == pytest.approx(100)
    assert "over-forgotten" in ruined.flag


def test_privleak_needs_a_gold_that_leaves_something():
    view = tables([1, 3], [2, 4])
    with pytest.raises(NotApplicable, match="without the forget rows"):
        measure.values("privleak", view)
    with pytest.raises(NotApplicable, match="exactly 0 or 1"):
        measure.values("privleak", replace(view, golds=[tables([1, 1], [2, 2])]))


def test_privacy_score_is_the_harmonic_mean_over_four_attacks():
    gold = tables([1, 3], [2, 2])  # AUC 0.5
    found = measure.values("privacy_score", replace(tables([1, 3], [2, 4]), golds=[gold]))  # AUC 0.75 for all four
    assert found.extra["parts"] == pytest.approx(dict.fromkeys(("loss", "zlib", "min_k", "min_k_plus_plus"), 0.5))
    assert found.value == pytest.approx(0.5)
    assert measure.values("privacy_score", replace(gold, golds=[gold])).value == pytest.approx(1)
    assert measure.values("privacy_score", replace(tables([1, 1], [2, 2]), golds=[gold])).value == 0


def test_an_auc_that_is_too_good_is_flagged():
    ruined = tables([8, 9], [1, 2])
    assert ruined.golds == ()
    assert mia_loss(ruined).flag.startswith("AUC 0.00000: forget rows look far stranger")
    assert mia_loss(replace(ruined, golds=[tables([1, 3], [2, 2])])).flag.startswith("PrivLeak +100")
    assert mia_loss(tables([1, 3], [2, 4])).flag == ""


def test_holdout_rows_of_another_kind_are_flagged():
    gold = tables([1, 1], [2, 2])
    found = mia_loss(replace(tables([1, 3], [2, 4]), golds=[gold]))
    assert "not of the forget rows' kind" in found.flag
    assert found.extra["privleak"] is None


def test_min_k_takes_the_hardest_tokens_and_at_least_one():
    rows = {"forget": [Row(id="a", answer="t")], "holdout": [Row(id="b", answer="t")]}
    view = View(
        rows,
        {
            "forget": scores([("a", "answer", [-1.0, -4.0, -2.0, -3.0, -5.0, -9.0])], closing=1),
            "holdout": scores([("b", "answer", [-1.0, -9.0])], closing=1),
        },
    )
    assert mia_min_k(view).each == pytest.approx([4.5, 1.0])
    assert mia_min_k(view, k=0.2).each == pytest.approx([5.0, 1.0])
    assert mia_min_k(view, k=1.0).each == pytest.approx([3.0, 1.0])


def test_min_k_plus_plus_standardises_and_survives_a_variance_of_zero():
    rows = {"forget": [Row(id="a", answer="t")], "holdout": [Row(id="b", answer="t")]}
    table = {
        "forget": scores([("a", "answer", [-1.0, -5.0])], mean=-3.0, variance=4.0),
        "holdout": scores([("b", "answer", [-np.log(7)] * 3)], mean=-np.log(7), variance=0.0),
    }
    found = mia_min_k_plus_plus(View(rows, table))
    assert found.each == pytest.approx([1.0, 0.0])


def test_k_must_be_a_share():
    with pytest.raises(ParameterError, match=r"mia_min_k: parameter k = 0"):
        measure.values("mia_min_k", tables([1], [2]), {"k": 0})


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_need_holdout_rows(attack: str):
    view = tables([1, 2], [1])
    with pytest.raises(NotApplicable, match="there are no holdout rows"):
        measure.values(attack, replace(view, rows={"forget": view.rows["forget"]}))


def test_the_shared_pass_takes_moments_of_own_answers():
    subject = LanguageModel(*tiny("llama"))
    data = {
        rows: [
            # The second row's own answer is the first one's wrong one, at the same question: it is scored once.
            Row(id=f"{rows}0", prompt="where?", answer="Tivin", perturbed_answers=("in Carth",)),
            Row(id=f"{rows}1", prompt="where?", answer="in Carth", perturbed_answers=("Osk",)),
        ]
        for rows in ("forget", "holdout")
    }
    view = ask_all(subject, data, 0)
    for rows, members in data.items():
        own = view.candidate(rows, ids=[row.id for row in members])
        direct = subject.score([((row.id, "answer"), subject.encode(row)) for row in members])
        np.testing.assert_allclose(own.mean, direct.mean, rtol=1e-5)
        np.testing.assert_allclose(own.variance, direct.variance, rtol=1e-4)
        wrong = view.scores[rows].candidate("perturbed/0")
        assert np.isfinite(wrong.mean[: wrong.offsets[1]]).all()
        # Its first token is predicted where the own answer's is.
        assert np.isnan(wrong.mean[wrong.offsets[1] + 1 :]).all()
    assert 0 <= mia_min_k_plus_plus(view).value <= 1
    bare = replace(view.scores["forget"], mean=np.full_like(view.scores["forget"].mean, np.nan))
    with pytest.raises(TableError, match="forget: no moments"):
        mia_min_k_plus_plus(replace(view, scores={**view.scores, "forget": bare}))
