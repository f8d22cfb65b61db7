"""Reproductions about pictures: their criteria on figures made up so that the verdict is known."""

import numpy as np
import pytest
import torch

from expunge.reproductions import concept_poisoning, corrective, gs_lora, iau, image_baselines, ssd
from expunge.reproductions.pictures import CLASSES, Kept, answers
from expunge.subjects.image import ImageClassifier, Preparation
from expunge.world.pictures.draw import digits

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


# --- iau --------------------------------------------------------------------------------------------------------------


def iau_rows(**changes):
    plain = dict.fromkeys(iau.METHODS, (0.95, 0.55, 0.02, 0.1))
    plain |= {"original": (0.95, 0.57, 0.04, 0.0), "retrained": (0.95, 0.52, 0.0, 3.0)}
    plain |= {"iau": (0.948, 0.54, 0.02, 0.01), "influence": (0.94, 0.54, 0.1, 0.4), "SSD": (0.9, 0.6, 0.2, 0.02)}
    plain |= {"iau, gradient, rate 0.3": (0.93, 0.55, 0.1, 0.01)}
    plain |= {"iau, gradient, rate 0.3, no correction": (0.91, 0.55, 0.1, 0.01), **changes}
    return [
        {"model": model, "seed": seed, "test": t, "forget": 1.0, "auc": a, "kl": k, "seconds": s}
        for model, (t, a, k, s) in plain.items()
        for seed in SEEDS
    ]


def odd_rows(**changes):
    found = []
    for weight in iau.RESTRICTIONS:
        values = {"largest": 28.0, "forget_gradient": 4.0, "before": 0.95, "after": 0.77, "seconds": 2.0}
        if weight == 0.1:
            values |= {"largest": 21.0, "after": 0.85, **changes}
        found += [{"restriction": weight, "seed": seed, **values} for seed in SEEDS]
    return found


@pytest.mark.parametrize(
    ("changes", "odd", "place"),
    [
        ({"iau": (0.95, 0.54, 0.035, 0.01)}, {}, 0),
        ({"iau": (0.93, 0.53, 0.02, 0.01)}, {}, 0),
        ({"iau": (0.948, 0.54, 0.02, 0.2)}, {}, 1),
        ({"influence": (0.94, 0.54, 0.01, 0.4)}, {}, 2),
        ({"SSD": (0.95, 0.52, 0.01, 0.001)}, {}, 3),
        ({"iau, gradient, rate 0.3, no correction": (0.935, 0.55, 0.1, 0.01)}, {}, 4),
        ({}, {"largest": 27.0}, 5),
        ({}, {"after": 0.80}, 5),
        ({}, {"before": 0.90}, 5),
    ],
)
def test_each_criterion_of_iau_can_fail(changes, odd, place):
    assert [claim.holds for claim in iau.judge(iau_rows(), odd_rows())] == [True] * 6
    assert not iau.judge(iau_rows(**changes), odd_rows(**odd))[place].holds


def test_ranks_share_the_places_of_ties():
    rows = iau_rows(**dict.fromkeys(iau.RANKED, (0.95, 0.52, 0.0, 1.0)))
    assert set(iau._ranks(rows).values()) == {3.5}
    rows = iau_rows(**{name: (0.95, 0.52 + 0.01 * i, 0.0, 1.0 + i) for i, name in enumerate(iau.RANKED)})
    assert iau._ranks(rows)["iau"] == (3.5 + 1 + 1) / 3


# --- image baselines --------------------------------------------------------------------------------------------------


def baseline_rows(**changes):
    """changes: {model: {kind: {column: value}}}"""
    plain = {"forget_accuracy": 0.9, "retain_accuracy": 0.97, "gap": 0.01, "zrf": 0.5, "cost": 0.3}
    plain |= dict.fromkeys(("training_forget_accuracy", "training_retain_accuracy", "membership_confidence"), 0.9)
    own = {
        name: {"forget_accuracy": 0.1} for name in ("gradient ascent", "random label", "SCRUB", "bad teacher", "UNSIR")
    }
    own["gradient ascent"]["retain_accuracy"] = 0.7
    own["bad teacher"]["zrf"] = own["random label"]["zrf"] = 0.7
    own["Fisher forgetting"] = {"cost": 3.0}
    models = ["original", "retrained", "retrained, another seed", *image_baselines.METHODS]
    return [
        {
            **plain,
            **own.get(model, {}),
            **changes.get(model, {}).get(kind, {}),
            "model": model,
            "kind": kind,
            "seed": seed,
        }
        for kind in image_baselines.REQUESTS
        for model in models
        if image_baselines.ONLY.get(model, kind) == kind
        for seed in SEEDS
    ]


@pytest.mark.parametrize(
    ("model", "kind", "change", "place"),
    [
        ("fine-tune, 1 epoch", "class", {"forget_accuracy": 0.4}, 0),
        ("UNSIR", "class", {"forget_accuracy": 0.3}, 0),
        ("SalUn", "class", {"retain_accuracy": 0.93}, 1),
        ("gradient ascent", "class", {"retain_accuracy": 0.98}, 1),
        ("SalUn", "random", {"gap": 0.05}, 2),
        ("retrained, another seed", "sub-class", {"gap": 0.03}, 3),
        ("bad teacher", "random", {"zrf": 0.4}, 4),
        ("IAU", "random", {"cost": 20.0}, 5),
    ],
)
def test_each_criterion_of_the_baselines_can_fail(model, kind, change, place):
    assert [claim.holds for claim in image_baselines.judge(baseline_rows())] == [True] * 6
    found = [claim.holds for claim in image_baselines.judge(baseline_rows(**{model: {kind: change}}))]
    assert found == [i != place for i in range(6)]
    assert len(image_baselines._table(baseline_rows(), "class").rows) == 21
    assert len(image_baselines._table(baseline_rows(), "random").rows) == 20


def test_requests_are_what_they_are_called(monkeypatch):
    drawn = digits(8)
    monkeypatch.setattr(image_baselines, "digits", lambda side: drawn)
    for kind in image_baselines.REQUESTS:
        rows, classes = image_baselines.request(kind, 0)
        assert len(rows["forget"]) + len(rows["retain"]) == image_baselines.ROWS
        assert not {row.id for row in rows["forget"]} & {row.id for row in rows["retain"]}
        assert {row.answer for some in rows.values() for row in some} <= set(classes)
    rows, _ = image_baselines.request("sub-class", 0)
    assert {row.answer for row in rows["forget"]} == {"2-3"}
    assert any(row.answer == "2-3" for row in rows["retain"])
    true = {row.id: row.answer for row in drawn["train"]}
    rows, _ = image_baselines.request("random", 0)
    wrong = [row for row in (*rows["forget"], *rows["retain"]) if row.answer != true[row.id]]
    assert len(wrong) == 70
    assert rows["test_forget"] == []


def test_pixels_are_prepared_once_and_answers_are_distributions():
    asked = []

    class Counting(Preparation):
        def __call__(self, images, return_tensors="pt"):
            asked.append(1)
            return super().__call__(images, return_tensors)

    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))
    subject = ImageClassifier(model, CLASSES, Kept(Counting((8, 8))), "linear")
    rows = digits(8)["train"][:5]
    answers(subject, rows)
    found = answers(subject, rows)
    assert len(asked) == 6  # and one to find the head
    pixels = torch.stack([subject.encode(row).pixels for row in rows])
    assert np.allclose(found, model(pixels).detach().double().log_softmax(-1), atol=1e-6)


def gs_lora_rows(changes):
    """(data, way, name) to value; every claim holds but for what is changed."""
    plain = {"before": 0.96, "forget": 0.0, "retain": 0.96, "old": 0.01, "missing": None, "h": 0.96, "seconds": 2.0}
    adapted = {"share": 0.09, "active": 4, "of": 4}
    ways = {
        ("plain", "GS-LoRA"): {},
        ("plain", "GS-LoRA, proximal"): {"active": 2},
        ("plain", "fine-tune"): {"h": 0.5},
        ("plain", "retrain"): {"h": 0.8},
        ("few-shot", "GS-LoRA++"): {"retain": 0.95},
        ("few-shot", "bounded, all weights"): {"retain": 0.9, "h": 0.93},
        ("missing", "GS-LoRA"): {"missing": 0.8},
        ("missing", "GS-LoRA++"): {"missing": 0.85},
    }
    found = []
    for data, names in gs_lora.ASKED.items():
        for way in (*names, *gs_lora.LONGER.get(data, ())):
            own = {**plain, **(adapted if "LoRA" in way else {}), **ways.get((data, way), {})}
            own |= {name: value for (d, w, name), value in changes.items() if (d, w) == (data, way)}
            for task in (1, 2, 3):
                old = None if task == 1 else own["old"]
                found += [{"data": data, "way": way, "task": task, "seed": s, **own, "old": old} for s in SEEDS]
    return found


@pytest.mark.parametrize(
    ("change", "claim"),
    [
        ({("plain", "GS-LoRA", "old"): 0.06}, 0),
        ({("plain", "GS-LoRA", "retain"): 0.91}, 0),
        ({("plain", "retrain", "h"): 0.93}, 1),
        ({("plain", "bounded, all weights", "h"): 0.99}, 2),
        ({("plain", "GS-LoRA, proximal", "active"): 4}, 3),
        ({("plain", "GS-LoRA, proximal", "h"): 0.9}, 3),
        ({("few-shot", "GS-LoRA++", "retain"): 0.91}, 4),
        ({("missing", "GS-LoRA++", "missing"): 0.81}, 5),
    ],
)
def test_each_criterion_of_gs_lora_can_fail(change, claim):
    assert [one.holds for one in gs_lora.judge(gs_lora_rows({}))] == [True] * 6 + [None]
    found = [one.holds for one in gs_lora.judge(gs_lora_rows(change))]
    assert found == [*(i != claim for i in range(6)), None]


def test_the_tables_of_gs_lora_have_a_cell_for_every_column():
    for data in gs_lora.DATA:
        table = gs_lora._table(gs_lora_rows({}), data)
        assert len(table.rows) == len(gs_lora.ASKED[data]) + len(gs_lora.LONGER.get(data, ()))
        assert {len(row) for row in table.rows} == {len(table.columns)}


def poisoning(**changes):
    cells = {
        f"{place}, {labels}, {scope}" for place in concept_poisoning.PLACES for scope, labels in concept_poisoning.CELLS
    }
    plain = {name: (0.9 if "keep" in name else 0.0) for name in cells} | {"original": 1.0, "retrained": 0.0}
    plain |= {"localized, targeted, all": 0.5, **{k: v for k, v in changes.items() if k in cells}}
    flat = [
        {"model": model, "seed": seed, "target": target, "retained": 0.98, "refitted": changes.get("refitted", 0.7)}
        for model, target in plain.items()
        for seed in SEEDS
    ]
    places = {"integrated_gradients": {"median": changes.get("median", 2.0)}, "random": {"median": 9.0}}
    top = {"weight": 6, "integrated_gradients": changes.get("right", 5)}
    return concept_poisoning.judge([{"seed": s, "found": {"top": top, "places": places}} for s in SEEDS], flat)


@pytest.mark.parametrize(
    ("changes", "claim"),
    [
        ({"right": 4}, 0),
        ({"median": 3.5}, 1),
        ({"localized, targeted, role:head": 0.06}, 2),
        ({"center, keep, role:head": 0.7}, 3),
        ({"none, targeted, role:head": 0.06}, 4),
        ({"refitted": 0.4}, 5),
        ({"none, targeted, all": 0.45}, 6),
    ],
)
def test_each_criterion_of_concept_poisoning_can_turn(changes, claim):
    plain, found = ([c.holds for c in some] for some in (poisoning(), poisoning(**changes)))
    assert plain == [True, True, True, True, False, True, True]
    assert [i for i, (a, b) in enumerate(zip(plain, found)) if a != b] == [claim]
