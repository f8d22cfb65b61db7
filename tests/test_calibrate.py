"""Calibration: what a metric is worth follows from models whose truth is known."""

import json
from pathlib import Path

import pytest

from expunge.calibrate import Calibrated, calibrate, judge
from expunge.errors import RequestError


def rows(known: list[float], unknown: list[float], quantised: float, relearned: float) -> list[dict]:
    made = []
    for side, values in (("k", known), ("u", unknown)):
        for i, value in enumerate(values):
            model = f"{side}{i}"
            made += [
                {"model": model, "change": "none", "values": {"all": {"m": value}}},
                {"model": model, "change": "quantise", "values": {"all": {"m": value + quantised}}},
                {"model": model, "change": "relearn", "values": {"half before": {"m": 0}, "half": {"m": relearned}}},
            ]
    return made


def metrics(found: list[dict], known: set[str]) -> list[Calibrated]:
    return judge(found, known).metrics


def test_a_metric_that_separates_and_holds_still_is_trusted() -> None:
    (found,) = metrics(rows([4.0, 4.2], [1.0, 1.2], quantised=0.0, relearned=0.0), {"k0", "k1"})
    assert (found.faithfulness, found.quantisation, found.relearning, found.trust) == (1.0, 1.0, 1.0, 1.0)
    assert found.word == "trust"


def test_a_metric_that_falls_with_knowledge_is_turned_round() -> None:
    (found,) = metrics(rows([1.0], [4.0], 0.0, 0.0), {"k0"})
    assert found.faithfulness == 1.0


def test_movement_is_measured_in_gaps() -> None:
    (found,) = metrics(rows([4.0], [2.0], quantised=-0.5, relearned=1.5), {"k0"})
    assert (found.quantisation, found.relearning) == (0.75, 0.25)
    assert found.word == "with care"


def test_a_metric_that_cannot_tell_is_not_trusted() -> None:
    (found,) = metrics(rows([1.0, 3.0], [1.0, 3.0], 0.0, 0.0), {"k0", "k1"})
    assert (found.faithfulness, found.trust, found.word) == (0.5, 0.0, "do not trust")


def test_a_metric_that_some_model_lacks_is_left_out_with_the_reason() -> None:
    several = rows([4.0], [1.0], 0.0, 0.0)
    for row in several:
        for part in row["values"].values():
            part["n"] = 1.0
    several[3]["values"]["all"]["n"] = "there is no gold model"
    found = judge(several, {"k0"})
    assert [one.metric for one in found.metrics] == ["m"]
    assert found.left_out == {"n": "there is no gold model"}


def test_calibration_trusts_answer_probability_on_the_world_and_goes_on_where_it_stopped(
    tiny_world, tmp_path: Path
) -> None:
    options = {"variants": 1, "steps": 2, "workers": 1}
    result = calibrate(tiny_world.request, tmp_path, **options)
    found = {one.metric: one for one in result.metrics}
    # Its golds were trained from scratch: they do not share the original's space.
    assert "both must be trained from one base" in result.left_out["unlearning_depth"]
    assert found["answer_probability"].faithfulness == 1.0
    assert found["answer_probability"].known > found["answer_probability"].unknown
    assert found["forget_quality"].faithfulness == 1.0
    page = (tmp_path / "calibration.html").read_text(encoding="utf-8")
    assert "trust" in page
    assert "both must be trained from one base" in page
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "values").glob("*.json")}
    assert len(times) == 3 * 5
    assert calibrate(tiny_world.request, tmp_path, **options) == result
    assert {path: path.stat().st_mtime_ns for path in times} == times
    kept = json.loads((tmp_path / "calibration.json").read_text(encoding="utf-8"))
    assert len(kept["metrics"]) == len(found)


def test_calibration_needs_ignorant_models(tiny_world, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="never saw the forget rows"):
        calibrate(tiny_world.request, tmp_path, fields={"gold": []})
