"""One road for questions and pictures: request file, run, audit, verdict, ledger, plan on image classifiers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from expunge import audit, forget, registry
from expunge.attacks.case import Case, carry_out
from expunge.audit import battery
from expunge.cli import main
from expunge.errors import RequestError, RowError
from expunge.ledger import Ledger
from expunge.methods.guard.case import GuardCase
from expunge.pictures import Picture, chosen, write_folder
from expunge.plan import plan
from expunge.request import load, read_data
from expunge.subjects.image import ImageClassifier
from expunge.tables.passes import Features, Generate, run
from expunge.world.pictures.draw import digits
from expunge.world.pictures.models import Recipe, trained, untrained

CLASSES = [str(i) for i in range(10)]
RECIPE = Recipe(side=16, widths=(8, 16, 32), epochs=8)
GONE = {"label": "3"}
REQUEST = {
    "name": "no-3",
    "model": "original",
    "gold": ["gold0", "gold1", "gold2"],
    "data": {
        "forget": {"path": "data", "split": "train", "where": GONE},
        "retain": {"path": "data", "split": "train", "unless": GONE},
        "holdout": {"path": "data", "split": "test", "where": GONE},
        "general": {"path": "data", "split": "test", "unless": GONE},
    },
    "method": "random_label",
    "training": {"steps": 24, "learning_rate": 1e-3, "guard": False},
    "device": "cpu",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with drawn digits, a classifier of them, three that never saw a 3, and a request to forget it."""
    folder = tmp_path_factory.mktemp("digits")
    drawn = digits(16)
    train, test = drawn["train"][:450], drawn["test"][:150]
    write_folder(train, folder / "data" / "train")
    write_folder(test, folder / "data" / "test")
    _, kept = chosen(train, GONE)
    trained(train, CLASSES, RECIPE, 0).save(folder / "original")
    for seed in range(3):
        trained(kept, CLASSES, RECIPE, seed + 1).save(folder / f"gold{seed}")
    (folder / "request.json").write_text(json.dumps(REQUEST))
    return folder


def asked(place, name="request.json", **changes):
    path = place / name
    path.write_text(json.dumps({**REQUEST, **changes}))
    return path


def by_name(evidence):
    return {probe.attack: probe for probe in evidence.probes}


def test_a_run_ends_in_a_delta_a_verdict_and_a_ledger_that_verifies(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EXPUNGE_LEDGER", str(tmp_path / "ledger.db"))
    evidence = forget(place / "request.json", out="run")
    # What random labels leave behind is known from papers: the class is no longer said, and comes back in a few steps.
    assert evidence.verdict.verdict == "suppressed"
    assert "relearn_speed" in evidence.verdict.by
    assert evidence.self_test.passed, evidence.self_test.note
    assert {case["model"] for case in evidence.self_test.cases} >= {"original", "output filter around the original"}
    assert by_name(evidence)["direct"].after < 0.1 < 0.9 < by_name(evidence)["direct"].before
    effects = {effect.name: effect for effect in evidence.side_effects}
    assert set(effects) == {"retain", "general"}  # nobody refuses, nothing is asked in words
    assert "pictures" in effects["retain"].sentence
    found = {(m.metric, m.rows) for m in evidence.metrics}
    assert {("accuracy", rows) for rows in ("forget", "retain", "holdout", "general")} < found
    assert ("mia_loss", "forget + holdout") in found
    assert (Path("run") / "delta" / "delta.json").is_file()
    entries = Ledger().list()
    assert [entry.event for entry in entries] == ["request_received", "started", "finished"]
    assert entries[-1].body["verdict"] == "suppressed"
    assert Ledger().verify()[0]
    page = (Path("run") / "report.html").read_text(encoding="utf-8")
    assert page.count('<img src="data:image/png;base64,') == len(evidence.examples) > 5
    assert {row["set"] for row in evidence.examples} == {"forget", "retain"}
    assert "base64" not in (Path("run") / "report.md").read_text(encoding="utf-8")  # a model card quotes nobody
    # Once more: nothing is computed, nothing is entered.
    assert forget(place / "request.json", out="run").verdict == evidence.verdict
    assert len(Ledger().list()) == 3


FEW = ["direct", "transformed", "linear_probe", "nearest_features", "relearn_speed"]


@pytest.fixture(scope="module")
def judge(place, tmp_path_factory):
    """What an audit finds of a model beside two golds; tables are shared."""
    folder = tmp_path_factory.mktemp("audits")

    def judged(model, **changes):
        path = asked(
            place, gold=["gold1", "gold2"], audit={"self_test": False, "metrics": [], "attacks": FEW}, **changes
        )
        return audit(model, request=path, out=folder / str(len(list(folder.iterdir()))))

    return judged


def test_the_original_has_not_forgotten_and_gold_has(place, judge):
    original = judge(str(place / "original"))
    assert original.verdict.verdict == "not_forgotten"
    assert all(probe.recovery.value == pytest.approx(1) for probe in original.probes if probe.informative)
    gold = judge(str(place / "gold0"))
    assert gold.verdict.verdict == "removed_under_tested_attacks"


def test_a_model_with_only_its_head_changed_is_suppressed(place, judge):
    silent = ImageClassifier.load(place / "original", device="cpu")
    with torch.no_grad():
        silent.linear_head.bias[3] -= 30
    found = judge(silent)
    assert found.verdict.verdict == "suppressed"
    assert {"linear_probe", "nearest_features"} <= set(found.verdict.by)
    assert by_name(found)["direct"].after == 0


def test_without_gold_features_count_beyond_an_untrained_network(place, tmp_path):
    path = asked(place, "alone.json", gold=[], audit={"attacks": ["direct", "linear_probe"], "self_test": False})
    found = audit(str(place / "gold0"), request=path, out=tmp_path / "out")
    assert by_name(found)["linear_probe"].after < 0.1 < 0.3 < by_name(found)["linear_probe"].before
    assert found.verdict.verdict in ("inconclusive", "no_recovery_found")


def test_parts_for_language_are_refused_by_name(place, tmp_path):
    for changes, words in (
        ({"method": "rmu"}, "rmu is for language models, .* is of modality image"),
        ({"audit": {"attacks": ["paraphrase"]}}, "paraphrase is for language models"),
        ({"audit": {"metrics": ["rouge"]}}, "rouge is for language models"),
        ({"data": {"forget": {"path": "data", "where": {"label": "33"}}}}, "no row has label = '33'. Did you mean 3"),
        ({"data": {"forget": {"path": "data", "entity_every": 3}}}, "entity_every is for questions"),
    ):
        with pytest.raises((RequestError, RowError), match=words):
            forget(asked(place, "wrong.json", **changes), out=tmp_path / "out")
    assert not (tmp_path / "out" / "run.json").exists()


def test_a_picture_that_is_forgotten_and_kept_is_named(place, tmp_path):
    same = np.full((8, 8, 3), 7, np.uint8)
    write_folder([Picture("a", same, "3"), Picture("b", same + 1, "3")], tmp_path / "forget")
    write_folder([Picture("c", same, "3")], tmp_path / "retain")
    changes = {"data": {name: str(tmp_path / name) for name in ("forget", "retain")}}
    with pytest.raises(RequestError, match=r"a\.png to be forgotten, but they say the same"):
        read_data(load(asked(place, "twice.json", **changes)))
    write_folder([Picture("c", same, "5")], tmp_path / "other")
    changes["data"]["retain"] = str(tmp_path / "other")
    assert len(read_data(load(asked(place, "twice.json", **changes)))["forget"]) == 2


def test_a_plan_counts_what_steps_cost_and_what_an_audit_asks(place):
    from torch.utils.flop_counter import FlopCounterMode

    made = plan(load(place / "request.json"))
    model = ImageClassifier.load(place / "original", device="cpu")
    model.model.requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        model.logits(model.example.repeat(5, 1, 1, 1)).sum().backward()
    assert made.flops["total"] == pytest.approx(made.tokens["fed"] / 5 * counter.get_total_flops())
    assert made.parameters["trainable"] == sum(p.numel() for p in model.model.parameters())
    assert made.audit["answers scored per model"] == 600
    assert made.audit["relearning steps per model"] == 32
    assert any("time is not estimated" in remark for remark in made.remarks)


def test_each_modality_has_its_own_battery():
    image, language = ({name for name, _ in battery("standard", m)} for m in ("image", "language"))
    assert {"direct", "quantise", "linear_probe", "relearn_speed", "transformed"} <= image
    assert {"logit_lens", "paraphrase", "relearn"} <= language
    assert not {"logit_lens", "paraphrase", "relearn"} & image
    assert not {"linear_probe", "nearest_features"} & language
    groups = {registry.get("attacks", name).card.group for name in image}
    assert groups == {"direct", "black_box", "latent", "tamper"}


def test_a_classifier_answers_with_the_name_of_its_likeliest_class():
    subject = untrained(CLASSES, Recipe(side=8, widths=(4, 8)), 0)
    rows = digits(8)["train"][:6]
    made, features = run(
        subject, [Generate(tuple(((row.id, "question"), row, None) for row in rows), 1), Features(tuple(rows))]
    )
    logits = subject.head(features.to(subject.dtype))
    assert [texts[0] for texts in made.texts] == [CLASSES[i] for i in logits.argmax(-1).tolist()]
    assert made.keys == [(row.id, "question") for row in rows]
    filtered = registry.get("methods", "output_filter").function(GuardCase(subject, {"forget": rows, "retain": []}))
    (hidden,) = run(filtered, [Generate(tuple(((row.id, "question"), row, None) for row in rows), 1)])
    shown = {row.answer for row in rows}
    assert all(
        (said == "I don't know.") == (CLASSES[i] in shown) for (said,), i in zip(hidden.texts, logits.argmax(-1))
    )


def test_membership_is_twice_the_area_less_one():
    subject = untrained(CLASSES, Recipe(side=8, widths=(4, 8)), 0)
    rows = digits(8)["train"]
    data = {"forget": rows[:20], "holdout": rows[20:50]}
    (found,) = carry_out(Case(subject, data), [("membership", {})])
    losses = [-subject.score([((r.id, "answer"), subject.encode(r)) for r in data[s]]).logprob for s in data]
    area = np.mean([(a < b) + 0.5 * (a == b) for a in losses[0] for b in losses[1]])
    assert found.score == pytest.approx(2 * area - 1, abs=1e-6)
    assert f"AUC {area:.3f}" in found.note
    (skipped,) = carry_out(Case(subject, {"forget": rows[:20]}), [("membership", {})])
    assert skipped.status.startswith("skipped: membership is told by holdout rows")


def test_a_sweep_over_pictures_and_a_comparison_of_its_runs(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EXPUNGE_LEDGER", str(tmp_path / "ledger.db"))
    asked(place, "few.json", audit={"attacks": ["direct", "linear_probe"], "metrics": [], "self_test": False})
    file = place / "sweep.yaml"
    file.write_text("request: few.json\nmethods: [random_label, {ssd: {alpha: 2.0}}]\nset: {training.steps: 12}\n")
    assert main(["sweep", str(file), "--out", str(tmp_path / "sweep"), "--workers", "1"]) == 0
    assert "leaderboard.html" in capsys.readouterr().out
    rows = json.loads((tmp_path / "sweep" / "results.json").read_text())["runs"]
    assert [row["method"] for row in rows] == ["random_label", "ssd"]
    assert all(0 <= row["stays_gone"] <= 1 and row["utility"] > 0 for row in rows)
    folders = [str(tmp_path / "sweep" / row["folder"]) for row in rows]
    assert main(["compare", *folders, "--out", str(tmp_path / "side")]) == 0
    assert "linear probe" in capsys.readouterr().out.lower()
    made = json.loads((tmp_path / "side" / "compare.json").read_text())
    assert [run["method"] for run in made["runs"]] == ["random_label", "ssd"]
    assert not made["differences"]
    assert any(run["on_frontier"] for run in made["runs"])
    assert "<svg" in (tmp_path / "side" / "compare.html").read_text()
    spent = json.loads((Path(folders[0]) / "method.json").read_text())["cost"]
    assert spent["flop_per_second"] > 0
    assert "machine_share" not in spent  # filters run at another rate than products
