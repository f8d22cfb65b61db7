"""Metrics that read gradients, patched states, samples and continuations: by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from metric_tables import scores
from scipy.stats import binomtest

from expunge.errors import TableError
from expunge.metrics import measure
from expunge.metrics.bootstrap import Bootstrap
from expunge.metrics.paired import paired, sign_test
from expunge.metrics.unlearning_depth import depth
from expunge.metrics.values import Units
from expunge.rows import Row
from expunge.tables.generations import Generations
from expunge.tables.gradients import Gradients
from expunge.tables.patched import Patched
from expunge.tables.paths import Continuations, Paths
from expunge.tables.view import NotApplicable, View


def sets(**counts):
    return {
        name: [
            Row(id=f"{name}{i}", answer="told Tivin", prompt="q", value="Tivin", entity=f"{name}{i}") for i in range(n)
        ]
        for name, n in counts.items()
    }


def losses(rows, **by_set):
    return {
        name: scores([(row.id, "answer", [-value]) for row, value in zip(rows[name], values)])
        for name, values in by_set.items()
    }


# --- membership ------------------------------------------------------------------------------------------------------


def pulled(forget, holdout):
    rows = sets(forget=len(forget), holdout=len(holdout))
    tables = {
        name: Gradients([(row.id, "answer") for row in rows[name]], ["a", "b"], np.array(norms, np.float32))
        for name, norms in (("forget", forget), ("holdout", holdout))
    }
    return View(rows, gradients=tables)


def test_gradient_norm_attack_by_hand():
    # Means over tensors: forget 2 and 4, holdout 3 and 5; of four pairs the forget row is smaller in three.
    view = pulled([[1, 3], [4, 4]], [[6, 0], [5, 5]])
    found = measure.values("mia_gradnorm", view)
    assert found.value == 0.75
    assert found.each.tolist() == [2, 4, 3, 5]


def test_a_tensor_that_a_row_does_not_use_is_left_out_of_its_mean():
    view = pulled([[1, np.nan]], [[1, 5]])
    assert measure.values("mia_gradnorm", view).each.tolist() == [1, 3]


def test_reference_attack_by_hand():
    rows = sets(forget=2, holdout=2)
    gold = View(rows, losses(rows, forget=[2, 4], holdout=[1, 1]), name="gold")
    model = View(rows, losses(rows, forget=[1, 4.5], holdout=[1, 1.25]), golds=[gold])
    # Minus the reference: forget -1 and 0.5, holdout 0 and 0.25; of four pairs two are right.
    found = measure.values("mia_reference", model)
    assert found.each.tolist() == [-1, 0.5, 0, 0.25]
    assert found.value == 0.5
    # A gold alone is its own reference: all scores are 0.
    assert found.extra["auc_gold"] == 0.5
    other = View(rows, losses(rows, forget=[4, 4], holdout=[1, 1]), name="other gold")
    assert measure.values("mia_reference", replace(model, golds=[gold, other])).each[0] == 1 - 3
    with pytest.raises(NotApplicable, match="no other model"):
        measure.values("mia_reference", replace(model, golds=[]))


def test_privleak_by_every_attack():
    rows = sets(forget=2, holdout=2)
    table = pulled([[1, 1], [2, 2]], [[1.5, 1.5], [3, 3]]).gradients
    gold = replace(
        View(rows, losses(rows, forget=[1, 3], holdout=[2, 4]), name="gold"),
        gradients=pulled([[2, 2], [3, 3]], [[2, 2], [3, 3]]).gradients,
    )
    model = View(rows, losses(rows, forget=[1, 1], holdout=[2, 2]), gradients=table, golds=[gold])
    # AUC 3/4 against gold's 1/2: (1/4 - 1/2) / (1/2).
    assert measure.values("privleak", model, {"by": "gradnorm"}).value == -50
    # Minus the reference's losses: forget 0 and -2, holdout 0 and -2: AUC 1/2, as of gold against itself.
    assert measure.values("privleak", model, {"by": "reference"}).value == 0


# --- depth -----------------------------------------------------------------------------------------------------------


def patched(rows, by_set):
    return {
        name: Patched([(row.id, "fact") for row in rows[name]], np.zeros(len(costs), np.float32), -np.array(costs))
        for name, costs in by_set.items()
    }


CONTROL = [[0.0, 0.01], [0.0, 0.0]]


def depths(model, gold, control=CONTROL):
    rows = sets(forget=len(gold), retain=2)
    one = View(rows, patched=patched(rows, {"forget": gold, "retain": control}), name="gold 0")
    return View(rows, patched=patched(rows, {"forget": model}), golds=[one])


def test_depth_by_hand():
    gold = [[0.04, 1.0, 3.0], [0.0, 2.0, 0.0], [0.0, 0.01, 0.0]]
    model = [[9.0, 0.5, 6.0], [0.0, -1.0, 5.0], [1.0, 1.0, 1.0]]
    # Row 0: blocks 1 and 2 know it, (1 x 0.5 + 3 x 1) / 4. Row 1: block 1, nothing gone. Row 2: gold knows it too.
    found = measure.values("unlearning_depth", depths(model, gold))
    assert found.each == pytest.approx([0.875, 0.0])
    assert found.value == pytest.approx(0.4375)
    assert found.extra["without_knowledge"] == 1
    assert found.extra["knowing_rows"] == [0, 2, 1]


def test_depth_of_the_model_before_is_0_and_of_gold_1():
    gold = [[0.2, 1.0], [0.6, 0.0]]
    assert measure.values("unlearning_depth", depths([[0.0, 0.0]] * 2, gold)).value == 0
    assert measure.values("unlearning_depth", depths(gold, gold)).value == 1
    assert depth(np.array(gold), np.array(gold) * 2, 0.05).tolist() == [1, 1]


def test_depth_is_refused_where_gold_is_not_aligned_or_knows_the_rows():
    with pytest.raises(NotApplicable, match="does not share the space"):
        measure.values("unlearning_depth", depths([[0.5, 0.5]], [[1.0, 1.0]], control=[[0.0, 0.0], [0.9, 0.0]]))
    with pytest.raises(NotApplicable, match="known to gold too"):
        measure.values("unlearning_depth", depths([[0.5, 0.5]], [[0.01, 0.0]]))
    rows = sets(forget=1)
    bare = View(rows, patched=patched(rows, {"forget": [[1.0]]}), name="gold 0")
    found = measure.values("unlearning_depth", View(rows, patched=bare.patched, golds=[bare]))
    assert found.value == 1
    assert "not controlled for" in found.flag


# --- samples and continuations ---------------------------------------------------------------------------------------


def test_leak_at_k_by_hand():
    rows = sets(forget=2)
    keys = [(row.id, "question") for row in rows["forget"]][::-1]
    texts = [["no", "no", "no", "Tivin!"], ["no", "no", "no", "no"]]
    view = View(rows, samples={"forget": Generations(keys, ["q", "q"], texts, [[True] * 4] * 2)})
    # forget1 leaks once in four: of two samples 1 - C(3, 2) / C(4, 2) = 1/2.
    found = measure.values("leak_at_k", view, {"k": 2})
    assert found.each.tolist() == [0, 0.5]
    assert found.extra["leaking"] == 1
    assert measure.values("leak_at_k", view, {"k": 4}).value == 0.5
    with pytest.raises(NotApplicable, match="4 samples"):
        measure.values("leak_at_k", view, {"k": 5})
    with pytest.raises(NotApplicable, match="has no samples"):
        measure.values("leak_at_k", View(rows))


def test_extraction_likelihood_by_hand(tmp_path):
    rows = sets(forget=3)
    # A question of tokens 7 8 and the answer 1 2 3 4; after "7 8 1" the model writes 9 3 4.
    answer = Paths(np.array([7, 8, 1, 2, 3, 4]), np.array([0, 0, 1, 0, 1, 1], bool), {3: np.array([9, 3, 4])}, start=2)
    known = Paths(np.array([7, 1, 2, 3]), np.ones(4, bool), {}, start=1)
    table = Continuations([("forget0", "answer"), ("forget2", "answer")], [answer, known], {"shortest": 2})
    table.save(tmp_path / "continue.arrow")
    for kept in (table, Continuations.load(tmp_path / "continue.arrow")):
        found = measure.values("extraction_likelihood", View(rows, continuations={"forget": kept}), {"n": 2})
        # Beginnings end before 1 (writes 1 9 3 4: of three pairs one), 2 (9 3 4: one of two) and 3 (3 4: one of one).
        assert found.each == pytest.approx([np.mean([1 / 3, 1 / 2, 1]), 1])
        assert found.extra["left_out"] == "1 of 3 forget rows: 2 tokens or fewer"
    with pytest.raises(NotApplicable, match="2 tokens or more, not 1"):
        measure.values("extraction_likelihood", View(rows, continuations={"forget": table}), {"n": 1})
    with pytest.raises(NotApplicable, match="more than 3 tokens"):
        measure.values(
            "extraction_likelihood", View(rows, continuations={"forget": table.take([1], table.keys[1:])}), {"n": 3}
        )


# --- pairs -----------------------------------------------------------------------------------------------------------


def test_pairs_by_hand():
    units = Units(("s",) * 6, tuple("abcdef"), tuple("abcdef"))
    found = paired([1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 1, 0], units, Bootstrap(200))
    assert (found.both, found.first, found.second, found.neither) == (1, 3, 1, 1)
    # Four coins: 3 to 1 or worse on either side, (1 + 4 + 4 + 1) / 16.
    assert found.p == pytest.approx(10 / 16)
    assert found.difference.value == pytest.approx(1 / 3)
    assert found.difference.low < 1 / 3 < found.difference.high
    same = paired([1, 0], [1, 0], Units(("s",) * 2, ("a", "b"), ("a", "b")), Bootstrap(50))
    assert (same.p, same.difference.low, same.difference.high) == (1, 0, 0)


def test_the_sign_test_is_scipys_exact_one():
    for first, second in ((0, 0), (1, 0), (7, 0), (5, 5), (12, 3), (40, 61), (900, 1000)):
        wanted = binomtest(first, first + second).pvalue if first + second else 1.0
        assert sign_test(first, second) == pytest.approx(wanted)


def test_the_interval_of_a_pair_draws_both_models_together():
    """Models that agree on every row but one differ by that row alone, however uncertain each share is."""
    units = Units(("s",) * 40, tuple(map(str, range(40))), tuple(map(str, range(40))))
    first = np.arange(40) % 2
    second = first.copy()
    second[1] = 0
    found = paired(first, second, units, Bootstrap(500)).difference
    assert found.value == pytest.approx(1 / 40)
    assert found.high - found.low < 0.11


def test_pairs_need_one_answer_a_row_of_both():
    units = Units(("s",) * 2, ("a", "b"), ("a", "b"))
    for first, second in (([1], [1, 0]), ([1, 0.5], [1, 0]), ([1, 0, 1], [1, 0, 1])):
        with pytest.raises(TableError, match="one 0 or 1 for each of 2 rows"):
            paired(first, second, units, Bootstrap(10))
