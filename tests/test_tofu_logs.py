"""TOFU's published evaluation logs: our metrics on their raw values give what they state."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ks_2samp

from expunge.benchmarks import tofu_logs
from expunge.errors import TableError
from expunge.metrics import measure
from expunge.metrics.quantities import log_truth_ratio
from expunge.metrics.texts import overlaps

DATA = Path(os.environ.get("EXPUNGE_TOFU", Path(__file__).parents[2] / "shared" / "data" / "tofu"))
MODELS = ("full", "retain90", "retain95", "retain99")


def published(model: str) -> Path:
    path = DATA / f"llama2-7b_{model}.eval_log_aggregated.json"
    if not path.is_file():
        pytest.skip(f"TOFU's published log {path.name} is not in {DATA} (set EXPUNGE_TOFU to its folder)")
    return path


def section(n: int, offset: int = 0, worse: float = 1.0) -> dict:
    """A section of n rows whose questions are numbered from `offset`."""
    keys = [str(i) for i in range(n)]
    wrong = [[worse, worse + 1, worse + 2] for _ in keys]
    columns = {
        "generated_text": [
            [f"[INST] question {offset + i} [/INST]", "one two", "one two three four"] for i in range(n)
        ],
        "avg_gt_loss": [0.5] * n,
        "num_token_gt": [4] * n,
        "avg_paraphrased_loss": [1.0 + i / 100 for i in range(n)],
        "average_perturb_loss": wrong,
        "truth_ratio": [float(np.exp(1.0 + i / 100 - worse - 1)) for i in range(n)],
        "rouge1_recall": [0.5] * n,
        "rougeL_recall": [0.5] * n,
    }
    return {name: dict(zip(keys, values)) for name, values in columns.items()}


def log(path: Path, *, forget: dict | None = None, **sections: object) -> Path:
    data = {name: section(4) for name in tofu_logs.SECTIONS.values()}
    data[tofu_logs.SECTIONS["forget"]] = section(6) if forget is None else forget
    path.write_text(json.dumps({**data, **sections}))
    return path


@pytest.mark.parametrize("model", MODELS)
def test_rouge_recomputed_from_the_logged_texts_is_what_is_logged(model: str):
    path = published(model)
    view, logged = tofu_logs.read(path), tofu_logs.columns(path)
    for rows in tofu_logs.SECTIONS:
        for kind in ("rouge1", "rougeL"):
            ours = overlaps(view, rows, view.of(rows), kind, "recall")
            assert np.abs(ours - logged[rows][f"{kind}_recall"]).max() <= 1e-6


@pytest.mark.parametrize("model", MODELS)
def test_truth_ratios_recomputed_from_the_logged_losses_are_what_is_logged(model: str):
    path = published(model)
    view, logged = tofu_logs.read(path), tofu_logs.columns(path)
    for rows in ("forget", "retain"):
        ours = np.exp(log_truth_ratio(view, rows, view.of(rows)))
        assert np.abs(ours - logged[rows]["truth_ratio"]).max() <= 1e-6
    # On short answers ratios reach 34 and were logged in single precision: 1e-6 of the ratio is what that holds.
    found = tofu_logs.differences(path)
    assert found["truth_ratio"] <= 1.1e-6
    assert found["options_loss"] <= 1e-12


def test_model_utility_and_the_order_of_forget_quality_are_the_published_ones():
    lines = {line["model"]: line for line in tofu_logs.figures([published(m) for m in MODELS], published("retain90"))}
    utility = [round(lines[f"llama2-7b_{model}"]["utility_geometric"], 3) for model in MODELS]
    assert utility == [0.623, 0.614, 0.601, 0.621]
    arithmetic = [round(lines[f"llama2-7b_{model}"]["utility_arithmetic"], 3) for model in MODELS]
    assert arithmetic == [0.586, 0.575, 0.561, 0.581]
    assert round(lines["llama2-7b_full"]["forget_truth_ratio"], 2) == 0.52
    quality = {model: lines[f"llama2-7b_{model}"]["forget_quality"] for model in MODELS}
    assert quality["retain90"]["log10_p"] == 0
    assert quality["retain95"]["p"] == pytest.approx(0.994, abs=5e-4)
    assert quality["full"]["p"] == pytest.approx(1.8e-21, rel=0.03)
    assert quality["full"]["paired_p"] < 0.001 < quality["retain95"]["paired_p"]
    assert quality["retain99"] is None
    assert "share no forget row" in lines["llama2-7b_retain99"]["reason"]


def test_forget_quality_is_the_published_test_on_equal_rows_too():
    views = {model: tofu_logs.read(published(model)) for model in MODELS}
    both = tofu_logs.shared(views["full"], views["retain95"])
    found = measure.values("forget_quality", both)
    ids = both.of("forget")
    ratios = [log_truth_ratio(view, "forget", ids) for view in (both, views["retain95"])]
    assert found.extra["n"] == 100
    assert found.value == pytest.approx(np.log10(ks_2samp(*ratios).pvalue))
    assert (
        found.value
        < -5
        < measure.values("forget_quality", tofu_logs.shared(views["retain99"], views["retain95"])).value
    )


def test_metrics_of_tokens_say_that_a_log_holds_means(tmp_path: Path):
    view = tofu_logs.read(log(tmp_path / "a.json"))
    measured, notes = measure.measure_all(None, view, [])
    assert {"loss", "truth_ratio", "rouge"} <= {one.metric for one in measured}
    for name in ("exact_memorization", "extraction_strength"):
        assert any(note.startswith(name) and "means over answers, not scores of tokens" in note for note in notes)


def test_a_log_becomes_a_view(tmp_path: Path):
    view = tofu_logs.read(log(tmp_path / "model.eval_log_aggregated.json"))
    assert view.name == "model"
    assert {name: len(rows) for name, rows in view.rows.items()} == {
        "forget": 6, "retain": 4, "real_authors": 4, "world_facts": 4,
    }  # fmt: skip
    assert measure.values("loss", view).value == pytest.approx(0.5)
    assert measure.values("rouge", view).value == pytest.approx(0.5)
    assert measure.values("truth_ratio", view).each[0] == pytest.approx(np.exp(-1.0))
    utility = measure.values("model_utility", view, tofu_logs.UTILITY)
    assert utility.extra["parts"]["retain probability"] == pytest.approx(np.exp(-0.5))
    option = 1 / (1 + np.exp(-0.5) + np.exp(-1.5) + np.exp(-2.5))
    assert utility.extra["parts"]["world_facts probability"] == pytest.approx(option)
    assert tofu_logs.differences(tmp_path / "model.eval_log_aggregated.json")["truth_ratio"] < 1e-12


def test_logs_of_different_splits_are_compared_on_the_rows_they_share(tmp_path: Path):
    first = tofu_logs.read(log(tmp_path / "a.json"))
    second = tofu_logs.read(log(tmp_path / "b.json", forget=section(5, offset=4)))
    common = tofu_logs.shared(first, second)
    assert [row.id for row in common.of("forget")] == ["[INST] question 4 [/INST]", "[INST] question 5 [/INST]"]
    assert measure.values("forget_quality", common).extra["n"] == 2
    with pytest.raises(TableError, match=r"b scores table of forget has 5 rows .* 4 of 6 are missing"):
        measure.values("forget_quality", replace(first, golds=[second]))
    apart = tofu_logs.read(log(tmp_path / "c.json", forget=section(5, offset=40)))
    with pytest.raises(TableError, match=r"logs of a \(6 rows\) and c \(5 rows\) share no forget row"):
        tofu_logs.shared(first, apart)


def test_the_table_names_what_cannot_be_compared(tmp_path: Path):
    first, apart = log(tmp_path / "a.json"), log(tmp_path / "c.json", forget=section(5, offset=40))
    lines = tofu_logs.table([first, apart], first).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| a |")
    assert "| 6 | 0.000 | 0.00 [0.00, 0.00] |" in lines[2]
    assert "no common rows" in lines[3]


def test_bad_logs_are_named(tmp_path: Path):
    with pytest.raises(TableError, match=r"none\.json cannot be read: No such file"):
        tofu_logs.read(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("loss 0.3")
    with pytest.raises(TableError, match=r"text\.json is not JSON"):
        tofu_logs.read(tmp_path / "text.json")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(TableError, match=r"list\.json holds list, expected an object of measures"):
        tofu_logs.read(tmp_path / "list.json")
    lacking = section(6)
    lacking["average_perturbed_loss"] = lacking.pop("average_perturb_loss")
    with pytest.raises(TableError, match=r"'average_perturb_loss' is missing\. Did you mean average_perturbed_loss"):
        tofu_logs.read(log(tmp_path / "lacking.json", forget=lacking))
    short = section(6)
    del short["avg_gt_loss"]["5"]
    with pytest.raises(TableError, match="'avg_gt_loss' has 5 rows, 'generated_text' has 6"):
        tofu_logs.read(log(tmp_path / "short.json", forget=short))
    twice = section(6)
    twice["generated_text"]["5"] = twice["generated_text"]["0"]
    with pytest.raises(TableError, match=r"question '\[INST\] question 0 \[/INST\]' occurs twice"):
        tofu_logs.read(log(tmp_path / "twice.json", forget=twice))


def test_the_script_prints_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    spec = importlib.util.spec_from_file_location("script", Path(__file__).parents[1] / "benchmarks" / "tofu_logs.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    with pytest.raises(SystemExit, match="name the gold log"):
        script.main(tmp_path)
    log(tmp_path / "full.eval_log_aggregated.json")
    log(tmp_path / "retain90.eval_log_aggregated.json", forget=section(6, worse=1.5))
    log(tmp_path / "retain99.eval_log_aggregated.json", forget=section(5, offset=40))
    script.main(tmp_path)
    printed = capsys.readouterr().out
    assert "Against retain90.eval_log_aggregated.json" in printed
    assert "| full, retain90 | 6 | 1.000 | -2.66 |" in printed
    assert "| full, retain99 | 0 | - | - | - |" in printed
    assert "- full.eval_log_aggregated.json: rouge1 0.0e+00" in printed
