"""The reproduction of S3T: its criteria on figures made up so that the verdict is known."""

import pytest

from expunge.methods.exact.capacity import until_all_out
from expunge.reproductions import s3t

SEEDS = (0, 1, 2)


def counted(**changes):
    """Trials whose layouts live as long as theory says, times what `changes` says of a layout."""
    usable = {1: 0.1, 2: 0.2, 3: 0.3, 6: 0.4, 8: 0.5}
    layouts = [
        {
            "layout": list(layout),
            "rows": rows,
            "all_out": until_all_out(*layout) * changes.get(f"times_{layout[2]}", 1.0),
            "error": 0.5,
            "one_out": 1.0,
            "usable": [changes.get(f"usable_{layout[2]}", usable[layout[2]])] * 4,
        }
        for layout in s3t.LAYOUTS
        for rows in (None, 40)
    ]
    every = changes.get("every", until_all_out(3, 4, 4))
    return [
        {"seed": seed, "layouts": layouts, "every": every, "every_error": 0.1, "every_usable": [0.5] * 4}
        for seed in SEEDS
    ]


def taught(**changes):
    def value(name, plain):
        return changes.get(name, plain)

    curve = [0.8] * (s3t.REQUESTS + 1)
    streams = {"1": 0.4, "2": 0.5, "4": value("long", 0.6), "sisa": 0.5}
    return [
        {
            "seed": seed,
            "two": {"1": 0.6, "2": value("two", 0.7)},
            "before": {"1": 0.8, "2": value("before", 0.8)},
            "whole": value("whole", 0.82),
            "single": 0.85,
            "stream": {name: {"curve": curve, "area": area} for name, area in streams.items()},
            "cost": {
                "decided": value("decided", 1e-5),
                "deleted": value("deleted", 0.01),
                "retrained": 3.0,
                "retrained_passes": 6000.0,
                "retrained_accuracy": 0.84,
                "same_after_deletion": value("deletion", True),
                "same_after_retraining": value("retraining", True),
            },
            "single_cost": 6.0,
        }
        for seed in SEEDS
    ]


def test_capacity_is_judged_by_theory_and_its_leading_term_falls_short():
    assert [claim.holds for claim in s3t.judge_capacity(counted())] == [True, False, True, True, True]


@pytest.mark.parametrize(
    ("changes", "claim"),
    [({"times_2": 1.02}, 0), ({"times_6": 0.9}, 2), ({"every": 37.6}, 3), ({"usable_3": 0.2}, 4)],
)
def test_each_criterion_of_capacity_can_fail(changes, claim):
    assert not s3t.judge_capacity(counted(**changes))[claim].holds


def test_models_hold_where_they_do():
    assert [claim.holds for claim in s3t.judge_models(taught())] == [True] * 6


@pytest.mark.parametrize(
    ("changes", "claim"),
    [
        ({"deletion": False}, 0),
        ({"retraining": False}, 0),
        ({"two": 0.62}, 1),
        ({"before": 0.84}, 2),
        ({"whole": 0.86}, 3),
        ({"long": 0.52}, 4),
        ({"decided": 0.002}, 5),
        ({"deleted": 0.4}, 5),
    ],
)
def test_each_criterion_about_models_fails_alone(changes, claim):
    found = [claim.holds for claim in s3t.judge_models(taught(**changes))]
    assert found == [number != claim for number in range(6)]


def test_a_shard_answers_from_its_best_order_and_none_is_a_guess():
    many = [(0, 1, 2), (1, 2, 0)]
    assert [s3t.best(many, hit) for hit in ({0}, {1}, {2}, {0, 1}, set())] == [(1, 2), (0,), (0, 1), (), (0, 1, 2)]
    assert s3t.accuracy({}, [(), ()], [1, 2]) == s3t.GUESS


def test_simulations_give_what_the_tables_show():
    found = s3t.capacity(seed=0, trials=40)
    trial = [{**found, "seed": 0}]
    assert [len(table.rows) for table in (s3t._deletions(trial), s3t._usable(trial))] == [5, 5]
    assert [len(t.rows) for t in (s3t._accuracy(taught()), s3t._curve(taught()), s3t._costs(taught()))] == [6, 5, 4]
