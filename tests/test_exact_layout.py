"""Orders of slices, layouts, and how many deletions they serve: hand-computed cases, brute force, theory."""

import itertools
import math

import numpy as np
import pytest

from expunge.errors import ParameterError, RowError
from expunge.methods.exact.capacity import (
    _first_hits,
    compared,
    harmonic,
    leading_term,
    retraining_share,
    simulate,
    until_all_out,
    until_one_out,
)
from expunge.methods.exact.layout import cells, groups, row_passes
from expunge.methods.exact.orders import cyclic, live, matching, orders, prefixes, score, until_all


def test_rotations_put_every_slice_at_every_position_once():
    for slices in range(1, 7):
        found = cyclic(slices, slices)
        for position in range(slices):
            assert sorted(order[position] for order in found) == list(range(slices))


def test_every_budget_gives_distinct_orders_spread_over_first_slices():
    for slices in (3, 4):
        for budget in range(1, math.factorial(slices) + 1):
            found = cyclic(slices, budget)
            assert len(set(found)) == len(found) == budget
            assert all(sorted(order) == list(range(slices)) for order in found)
            firsts = [sum(order[0] == s for order in found) for s in range(slices)]
            if budget >= slices:
                assert max(firsts) - min(firsts) <= 1
    assert set(cyclic(4, 24)) == set(itertools.permutations(range(4)))
    assert cyclic(4, 2) == [(0, 1, 2, 3), (1, 2, 3, 0)]


def test_the_score_of_a_prefix_by_hand():
    assert score((0, 1), (0.5, 0.25), 1) == pytest.approx(1 * 0.5 + 2 * 0.25)
    assert score((1, 0), (0.5, 0.25), 2) == pytest.approx(1 * 0.75**2 + 2 * 0.25**2)


@pytest.mark.parametrize(
    ("chances", "requests", "matched", "rotated"),
    [((0.4, 0.3, 0.2, 0.1), 10, 0.6037, 0.5511), ((0.05, 0.05, 0.3, 0.6), 3, 5.7715, 4.9465)],
)
def test_matching_beats_rotations_by_what_the_reference_gives(chances, requests, matched, rotated):
    for found, expected in ((matching(chances, 4, requests), matched), (cyclic(4, 4), rotated)):
        assert sum(score(order, chances, requests) for order in found) == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("seed", range(6))
def test_every_round_of_matching_is_the_best_bijection(seed):
    slices = 3 + seed % 2
    chances = np.random.default_rng(seed).dirichlet(np.ones(slices)).tolist()
    found = matching(chances, slices, 4)
    for position in range(slices):
        assert sorted(order[position] for order in found) == list(range(slices))
        begun = [order[:position] for order in found]
        best = max(
            sum(score((*b, s), chances, 4) for b, s in zip(begun, chosen))
            for chosen in itertools.permutations(range(slices))
            if not any(s in b for b, s in zip(begun, chosen))
        )
        assert sum(score(order[: position + 1], chances, 4) for order in found) == pytest.approx(best)


def test_matching_with_even_chances_is_decided_by_slice_numbers():
    assert matching((0.25,) * 4, 4, 100)[0] == (0, 1, 2, 3)
    assert [order[0] for order in matching((0.1,) * 5, 5)] == [0, 1, 2, 3, 4]
    few = matching((0.4, 0.3, 0.2, 0.1), 2, 10)
    every = matching((0.4, 0.3, 0.2, 0.1), 4, 10)
    assert set(few) == set(sorted(every, key=lambda o: -score(o, (0.4, 0.3, 0.2, 0.1), 10))[:2])


def test_random_orders_are_distinct_and_decided_by_the_seed():
    found = orders("random", 4, 20, seed=3)
    assert len(set(found)) == 20
    assert found == orders("random", 4, 20, seed=3) != orders("random", 4, 20, seed=4)
    assert len(orders("all", 4, 1)) == 24


def test_orders_that_cannot_be_are_refused():
    with pytest.raises(ParameterError, match="budget is 0 for 3 slices; expected 1 to 6"):
        orders("cyclic", 3, 0)
    with pytest.raises(ParameterError, match="budget is 7"):
        orders("random", 3, 7)
    with pytest.raises(ParameterError, match="one for each of the 3 slices"):
        orders("matching", 3, 3)
    with pytest.raises(ParameterError, match="matching gives 3 orders"):
        orders("matching", 3, 4, probabilities=(0.2, 0.2, 0.2))


def test_what_is_left_of_an_order():
    assert [live((2, 0, 1), hit) for hit in ({2}, {0}, {1}, set(), {0, 1})] == [0, 1, 2, 3, 1]
    assert prefixes([(0, 1), (1, 0), (0, 1)]) == [(0,), (1,), (0, 1), (1, 0)]
    assert len(prefixes(list(itertools.permutations(range(4))))) == 4 + 12 + 24 + 24


# --- capacity ---------------------------------------------------------------------------------------------------------


def test_the_collector_of_unequal_things():
    assert until_all([0.1] * 4) == pytest.approx(10 * float(harmonic(4)))
    p, q = 0.5, 0.2
    assert until_all([p, q]) == pytest.approx(1 / p + 1 / q - 1 / (p + q))


def test_theory_by_hand():
    assert until_all_out(1, 1, 1) == 1
    assert until_all_out(5, 6, 1) == pytest.approx(30 * (1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5))
    # SISA's first shard is out when any of m first slices of m L is hit.
    assert until_one_out(5, 6, 1) == pytest.approx(6)
    assert until_one_out(1, 4, 3) == pytest.approx(until_all_out(1, 4, 3))
    assert leading_term(5, 6, 6) == pytest.approx(30 * math.log(30))


@pytest.mark.parametrize(
    ("family", "shards", "slices", "budget"),
    [("cyclic", 5, 6, 1), ("cyclic", 5, 6, 3), ("random", 3, 4, 10), ("all", 3, 4, 1), ("cyclic", 4, 3, 5)],
)
def test_simulated_ensembles_live_as_long_as_theory_says(family, shards, slices, budget):
    many = orders(family, slices, budget, seed=1)
    firsts = len({order[0] for order in many})
    seen = simulate(many, shards, trials=2000, seed=2)
    for found, expected in (
        (seen.all_out, until_all_out(shards, slices, firsts)),
        (seen.one_out, until_one_out(shards, slices, firsts)),
    ):
        assert abs(found.mean() - expected) < 3.5 * found.std() / 2000**0.5


@pytest.mark.parametrize("rows", [None, 3])
def test_the_simulation_is_what_deleting_one_by_one_gives(rows):
    shards, slices, trials = 2, 3, 40
    many = cyclic(slices, 2)
    hit = _first_hits(np.random.default_rng(5), trials, shards * slices, rows).reshape(trials, shards, slices)
    seen = simulate(many, shards, trials=trials, requests=12, rows=rows, seed=5)
    for trial in range(trials):
        lengths = [
            [
                max(live(order, {s for s in range(slices) if hit[trial, k, s] <= t}) for order in many)
                for k in range(shards)
            ]
            for t in range(1, 200)
        ]
        assert seen.all_out[trial] == 1 + next(t for t, found in enumerate(lengths) if max(found) == 0)
        assert seen.one_out[trial] == 1 + next(t for t, found in enumerate(lengths) if min(found) == 0)
    after = [
        np.mean(
            [
                max(live(order, {s for s in range(slices) if hit[trial, k, s] <= 7}) for order in many) / slices
                for trial in range(trials)
                for k in range(shards)
            ]
        )
    ]
    assert seen.usable[7] == pytest.approx(after[0])
    assert seen.usable[0] == 1


def test_rows_deleted_once_each_are_never_more_than_there_are():
    seen = simulate(cyclic(3, 3), 2, trials=50, rows=1)
    assert seen.all_out.max() == 6
    assert (seen.all_out == 6).all()  # six slices of one row: all first slices are hit when all rows are gone


def test_plans_compare_budgets():
    one, six = compared(5, 6, [1, 6], requests=[1], trials=500)
    assert (one["passes"], six["passes"]) == (3.5, 21)
    assert one["usable_1"] < six["usable_1"]
    with pytest.raises(ParameterError, match="budget is 7; 3 slices have 6 orders"):
        compared(2, 3, [7], requests=[1])
    with pytest.raises(ParameterError, match="0 trials"):
        simulate(cyclic(2, 1), 1, trials=0)


def test_retraining_after_a_random_deletion_costs_two_thirds_and_a_bit():
    for slices in (1, 2, 5):
        sizes = [10] * slices
        order = range(slices)
        stages = [sum(sizes[: i + 1]) for i in order]
        again = [sum(stages[hit:]) for hit in order]
        # e = 2 e' / (L + 1) epochs a stage read as many rows as e' epochs over the shard.
        share = np.mean(again) * 2 / (slices + 1) / sum(sizes)
        assert share == pytest.approx(retraining_share(slices))
        assert row_passes(sizes, order) * 2 / (slices + 1) == pytest.approx(sum(sizes))


# --- layout -----------------------------------------------------------------------------------------------------------


def test_rows_fill_cells_evenly_whatever_they_say():
    where = cells(31, 3, 4, seed=7)
    counts = [where.count(cell) for cell in itertools.product(range(3), range(4))]
    assert sorted(set(counts)) == [2, 3]
    assert where == cells(31, 3, 4, seed=7) != cells(31, 3, 4, seed=8)
    # Rows drawn with the layout's own seed fall into any cell, not all into one.
    drawn = np.random.default_rng(7).permutation(600)[:60]
    assert len({cells(600, 3, 4, seed=7)[i] for i in drawn}) >= 10
    with pytest.raises(RowError, match="11 rows cannot fill 3 shards of 4 slices; expected at least 12"):
        cells(11, 3, 4, seed=0)


def test_unshuffled_rows_go_slice_by_slice():
    where = cells(8, 2, 2, seed=0, shuffle=False)
    assert where == [(0, 0), (0, 0), (1, 0), (1, 0), (0, 1), (0, 1), (1, 1), (1, 1)]


def test_groups_come_from_the_top_and_leave_the_lowest_blocks_out():
    assert groups(12, 5) == [[10, 11], [8, 9], [6, 7], [4, 5], [2, 3]]
    assert groups(3, 3) == [[2], [1], [0]]
    with pytest.raises(ParameterError, match="slices is 4, but the model has 3 blocks"):
        groups(3, 4)
