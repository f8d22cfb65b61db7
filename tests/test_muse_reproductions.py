"""Reproductions of MUSE: they run at a tiny budget, models hold what they should, and every claim can fail."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from expunge.reproductions import muse as six_ways
from expunge.reproductions import muse_baselines as one_by_one
from expunge.reproductions import muse_runs
from expunge.reproductions.case import Case
from expunge.reproductions.muse_runs import BASELINES, How, Subjects, degrees, subjects, trial

PEOPLE = {"people": 24, "forget": 4, "neighbours": 2, "holdout": 4}
RECIPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "layers": 1,
    "vocabulary": 700,
    "context": 192,
    "steps": 30,
    "batch_size": 16,
    "learning_rate": 1e-2,
}
TINY = {"people": PEOPLE, "recipe": RECIPE}


@pytest.fixture(scope="module")
def made() -> Subjects:
    return subjects(0, **TINY)


def test_models_are_trained_once_and_only_the_target_reads_what_is_forgotten(made, monkeypatch):
    def never(*_: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(muse_runs, "teach", never)
    again = subjects(0, **TINY)
    assert again.target.fingerprint == made.target.fingerprint != made.retrained.fingerprint
    with pytest.raises(AssertionError, match="trained again"):
        subjects(0, PEOPLE, {**RECIPE, "steps": 31})


def test_documents_of_the_retrained_model_name_nobody_forgotten(made):
    files = Path(made.place)
    content = {str(path.relative_to(files)): path.read_text("utf-8") for path in files.rglob("*.jsonl")}
    world = muse_runs.make(0, **PEOPLE)
    documents = {name: muse_runs._documents(world, content, name, 0) for name in ("target", "retrained")}
    stories = [json.loads(line)["text"] for line in content["raw/forget.jsonl"].splitlines()]
    assert set(stories) <= set(documents["target"])
    for person in world.members("forget"):
        assert any(person.name in text for text in documents["target"])
        assert not any(person.name in text for text in documents["retrained"])
    for person in world.members("holdout"):
        assert not any(person.name in text for texts in documents.values() for text in texts)


def test_a_gradient_method_goes_its_way_and_on_through_all_requests(made):
    found = trial("ga", 0, epochs=1, batch_size=2, learning_rate=3e-3, **TINY)
    assert found["degree"] == 1
    assert len(found["curve"]) == 1
    for kind, texts in (("scal", [4, 6, 8, 10]), ("sust", [4, 2, 2, 2])):
        assert [point["texts"] for point in found[kind]] == texts
        assert found[kind][0]["knowmem_r"] == found["knowmem_r"]
    assert found["sust"][-1]["stacked_knowmem_r"] == pytest.approx(found["sust"][-1]["knowmem_r"], abs=0.05)


@pytest.mark.parametrize("method", ["tv", "whp"])
def test_scaled_methods_move_away_from_the_texts_with_alpha(made, method, monkeypatch):
    monkeypatch.setattr(muse_runs, "ALPHAS", (1.0, 2.0, 4.0, 8.0))
    points, at = degrees(method, made, How(epochs=2, batch_size=2, learning_rate=3e-3), 0)
    assert [point.degree for point in points] == [1, 2, 4, 8]
    assert 0 <= at < len(points)
    rows = made.rows("raw", "forget")
    items = [((row.id, "answer"), made.target.encode(row)) for row in rows]
    start, weak, strong = (s.score(items).logprob.mean() for s in (made.target, points[0].subject, points[3].subject))
    assert start > weak > strong


# --- claims ----------------------------------------------------------------------------------------------------------


class Recorded(Case):
    """A case whose trials were made up."""

    def __init__(self, *tables: list[dict[str, Any]]) -> None:
        super().__init__(Path("nowhere"), seeds=(0, 1))
        self.tables = list(tables)

    def trials(self, function: Any, grid: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        wanted = [settings["method"] for settings in grid]
        rows = self.tables.pop(0)
        assert [row["method"] for row in rows[::2]] == wanted
        return rows


PUBLISHED = {
    # verbmem_f, knowmem_f, privleak, knowmem_r
    "target": (1.0, 1.0, -100.0, 1.0),
    "retrained": (0.2, 0.1, 0.0, 1.0),
    "ga": (0.0, 0.0, 52.0, 0.0),
    "ga_gdr": (0.1, 0.2, 93.0, 0.5),
    "ga_klr": (0.1, 0.1, 60.0, 0.4),
    "npo": (0.1, 0.1, -60.0, 0.3),
    "npo_gdr": (0.3, 0.6, -86.0, 0.9),
    "npo_klr": (0.3, 0.6, -90.0, 0.9),
    "tv": (0.2, 0.1, -99.0, 0.3),
    "whp": (0.9, 0.9, 5.0, 0.9),
}
WAYS = {
    "ga": [[1, 0.5, 0.5], [2, 0.0, 0.0]],
    "npo": [[1, 0.8, 0.8], [2, 0.6, 0.5]],
    "tv": [[1.0, 0.9, 0.95], [2.0, 0.1, 0.3]],
    "whp": [[1.0, 1.0, 1.0], [2.0, 0.9, 0.9]],
}


def texts(**changes: tuple[float, ...]) -> list[dict[str, Any]]:
    """Rows of two seeds that show the published pattern, with other scores of some methods."""
    rows = []
    for method, values in {**PUBLISHED, **changes}.items():
        row: dict[str, Any] = {"method": method, **dict(zip(six_ways.SCORES, values)), "repeating": 0.0, "empty": 0.0}
        if method in BASELINES:
            row |= {"curve": WAYS.get(method, [[1, 0.5, 0.5]]), "degree": 1 + (method in ("ga", "npo"))}
            fall = [{"texts": 8, "knowmem_r": 0.9 - 0.2 * k, "knowmem_f": 0.1} for k in range(4)]
            fall[-1]["stacked_knowmem_r"] = 0.25
            row |= {} if method == "whp" else {"scal": fall, "sust": fall}
        rows += [{**row, "seed": seed} for seed in (0, 1)]
    return rows


def test_six_ways_holds_on_the_published_pattern():
    findings = six_ways.muse(Recorded(texts()))
    assert [claim.holds for claim in findings.claims] == [True] * 7
    assert findings.tables[0].rows[2][:3] == ["ga", "2 (2 to 2)", "0 (0 to 0)"]
    assert findings.tables[1].columns[1:] == ["8 texts at once"] * 4
    assert "by at most 0.05." in findings.notes[-2]


@pytest.mark.parametrize(
    ("changes", "fails"),
    [
        ({"target": (1.0, 0.8, -100.0, 1.0)}, {0}),
        ({"retrained": (0.8, 0.6, 0.0, 1.0)}, {0}),
        ({"ga_gdr": (0.9, 0.9, 93.0, 0.5), "npo": (0.9, 0.9, -60.0, 0.3)}, {1}),
        ({"ga": (0.0, 0.0, 2.0, 0.0), "npo": (0.1, 0.1, 4.0, 0.3)}, {2}),
        (dict.fromkeys(("ga", "ga_gdr", "ga_klr"), (0.1, 0.1, -50.0, 0.3)), {3}),
        ({"npo_gdr": (0.3, 0.6, -86.0, 0.97)}, {4}),
    ],
)
def test_every_one_of_the_six_ways_can_fail(changes, fails):
    findings = six_ways.muse(Recorded(texts(**changes)))
    assert {i for i, claim in enumerate(findings.claims) if not claim.holds} == fails


def test_curves_that_stay_up_fail():
    rows = texts()
    for row in rows:
        if "scal" in row:
            row["scal"] = [{**point, "knowmem_r": 0.9} for point in row["scal"]]
    assert [claim.holds for claim in six_ways.muse(Recorded(rows)).claims] == [True] * 5 + [False, True]


def known(**changes: dict[str, float]) -> list[dict[str, Any]]:
    """Points of two seeds on facts: one alpha a method."""
    base = {
        "forget_accuracy": 0.1,
        "held_out_accuracy": 0.1,
        "forget_probability": 0.04,
        "holdout_probability": 0.03,
        "retain_accuracy": 0.97,
        "retain_nll": 0.1,
    }
    points = {
        "start": {"forget_accuracy": 1.0, "retain_accuracy": 1.0},
        "tv": {"retain_accuracy": 0.5},
        "whp": {"retain_accuracy": 0.9, "retain_nll": 3.0},
        "whp_trained": {},
        "whp_trained_alone": {"retain_accuracy": 0.4},
    }
    return [
        {"method": method, "seed": seed, "points": [{"alpha": 1.0, **base, **own, **changes.get(method, {})}]}
        for method, own in points.items()
        for seed in (0, 1)
    ]


def test_one_by_one_holds_on_the_published_pattern():
    findings = one_by_one.muse_baselines(Recorded(texts(), known()))
    assert [claim.holds for claim in findings.claims] == [True] * 10
    assert len(findings.tables[2].rows) == 5


@pytest.mark.parametrize(
    ("changes", "facts", "fails"),
    [
        ({"ga": (0.0, 0.5, 52.0, 0.0)}, {}, {0}),
        ({"ga_gdr": (0.1, 0.2, 93.0, 0.1)}, {}, {1}),
        ({"npo_klr": (0.3, 0.15, -90.0, 0.9)}, {}, {3}),
        ({"ga_klr": (0.1, 0.1, -60.0, 0.4)}, {}, {4}),
        ({"target": (1.0, 1.0, -100.0, 0.3)}, {}, {5}),
        ({}, {"tv": {"retain_accuracy": 0.95}}, {6}),
        ({}, {"whp": {"retain_nll": 0.5}}, {7}),
        ({}, {"whp_trained": {"held_out_accuracy": 0.3}}, {8}),
        ({}, {"whp_trained": {"forget_probability": 0.2}}, {8}),
        ({}, {"whp_trained_alone": {"retain_accuracy": 0.9}}, {9}),
    ],
)
def test_every_claim_about_one_method_can_fail(changes, facts, fails):
    findings = one_by_one.muse_baselines(Recorded(texts(**changes), known(**facts)))
    assert {i for i, claim in enumerate(findings.claims) if not claim.holds} == fails


def test_npo_that_is_as_fast_as_ascent_fails(monkeypatch):
    monkeypatch.setitem(WAYS, "npo", WAYS["ga"])
    assert one_by_one.muse_baselines(Recorded(texts(), known())).claims[2].holds is False


def test_facts_are_asked_at_several_scales():
    from conftest import RECIPE as recipe
    from conftest import SIZES

    world = {**SIZES, "gold_seeds": 1, "recipe": recipe}
    start, tv = (one_by_one.facts(m, 0, steps=4, world=world)["points"] for m in ("start", "tv"))
    assert len(tv) == 12
    assert start[0]["forget_accuracy"] > 0.9
    assert tv[-1]["forget_nll"] > tv[0]["forget_nll"] > start[0]["forget_nll"]
    for method in ("whp", "whp_trained"):
        points = one_by_one.facts(method, 0, steps=2, world=world)["points"]
        assert len(points) == (len(one_by_one.OFFSETS) if method == "whp" else 1)
