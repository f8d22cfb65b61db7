"""Reproductions about pictures: their criteria on figures made up so that the verdict is known."""

import pytest

from expunge.reproductions import corrective, ssd

SEEDS = (0, 1, 2)


def ssd_rows(**changes):
    plain = {
        "original": (0.99, 0.98, 0.0),
        "retrained": (0.0, 0.98, 9.0),
        "adaptive": (0.02, 0.97, 1.0),
        "alpha 20": (0.0, 0.95, 1.0),
        "alpha 1": (0.0, 0.2, 1.0),
        **changes,
    }
    return [
        {"model": model, "label": label, "seed": seed, "forget": f, "retain": r, "seconds": s, "membership": 0.1}
        for model, (f, r, s) in plain.items()
        for label in ssd.ASKED
        for seed in SEEDS
    ]


def side(sibling=0.3, loss=2.0):
    sub = {"original": {"forget": 1.0, "sibling": 1.0}, "adaptive": {"forget": 0.05, "sibling": sibling}}
    single = {
        "original": {"forget": 1.0, "loss": 1.0, "test": 0.98},
        "adaptive": {"forget": 1.0, "loss": loss, "test": 0.975},
    }
    return [{"seed": seed, "sub": sub, "single": single} for seed in SEEDS]


ROW_WISE = [{"row_wise": {"largest": 7.0, "bound": 10.0, "selected": 0.0}}]


def test_ssd_holds_but_for_the_sub_class():
    found = [claim.holds for claim in ssd.judge(ssd_rows(), ROW_WISE, side())]
    assert found == [True, True, True, True, False, True]
    assert ssd.judge(ssd_rows(), ROW_WISE, side(sibling=0.95))[4].holds


@pytest.mark.parametrize(
    ("changes", "claim"),
    [
        ({"adaptive": (0.06, 0.97, 1.0)}, 0),
        ({"adaptive": (0.0, 0.94, 1.0)}, 0),
        ({"adaptive": (0.0, 0.97, 3.5)}, 1),
        ({"alpha 1": (0.0, 0.6, 1.0)}, 2),
        ({"alpha 20": (0.2, 0.97, 1.0)}, 3),
    ],
)
def test_each_criterion_of_ssd_can_fail(changes, claim):
    assert not ssd.judge(ssd_rows(**changes), ROW_WISE, side())[claim].holds


def test_single_rows_must_lose_something():
    assert not ssd.judge(ssd_rows(), ROW_WISE, side(loss=0.9))[5].holds


def corrective_rows():
    plain = {
        "manipulated": 0.05,
        "oracle": 0.98,
        "retrain": 0.1,
        "fine-tune": 0.1,
        "SCRUB": 0.1,
        "bad teacher": 0.1,
        "SSD, search": 0.9,
        "SSD, best": 0.9,
    }
    cells = {
        ("poison", 0.1): {},
        ("poison", 1.0): {"retrain": 0.95},
        ("confusion", 0.8): {"retrain": 0.95, "SSD, best": 0.6},
    }
    return [
        {"model": model, "manipulation": name, "share": share, "seed": seed, "corrected": value, "retain": 0.98}
        for (name, share), own in cells.items()
        for model, value in {**plain, **own}.items()
        for seed in SEEDS
    ]


def test_each_half_of_corrective_can_fail_by_itself():
    assert [claim.holds for claim in corrective.judge(corrective_rows())] == [True] * 4
    cases = [
        (("poison", 0.1), {"SSD, search": 0.7}, 0),
        (("poison", 0.1), {"SCRUB": 0.4}, 1),
        (("poison", 1.0), {"retrain": 0.8}, 2),
        (("confusion", 0.8), {"SSD, best": 0.85}, 3),
    ]
    for cell, change, place in cases:
        found = [claim.holds for claim in corrective.judge(_with(cell, change))]
        assert found == [i != place for i in range(4)]


def _with(cell, change):
    rows = corrective_rows()
    return [
        {**row, "corrected": change[row["model"]]}
        if (row["manipulation"], row["share"]) == cell and row["model"] in change
        else row
        for row in rows
    ]


def test_tables_have_a_line_for_every_model():
    assert len(corrective._table(corrective_rows()).rows) == 8
    assert len(ssd._table(ssd_rows()).rows) == 5
