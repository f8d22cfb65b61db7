"""The whole road on a small trained world: change, audit, report, ledger; killed and resumed; refused when unusable."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from expunge.audit import audit
from expunge.deltas import Delta
from expunge.errors import MismatchError, OutputError, RequestError, ScopeError, TrainingError
from expunge.evidence import Evidence
from expunge.ledger import Ledger
from expunge.request import load, read_data
from expunge.run import audit_model, load_subject, run

QUICK = {
    "training.steps": 8,
    "training.learning_rate": 1e-3,
    "audit.bootstrap": 200,
    "audit.attacks": ["direct", "paraphrase", "logit_lens", {"relearn": {"steps": 4}}],
}


@pytest.fixture
def request_(tiny_world):
    return load(tiny_world.request, QUICK)


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "ledger.sqlite")


def test_a_run_leaves_delta_tables_evidence_and_report_and_is_in_the_ledger(request_, ledger, tmp_path):
    seen = []
    evidence = run(request_, out=tmp_path / "run", ledger=ledger, progress=lambda *a: seen.append(a))
    folder = tmp_path / "run"
    for name in ("request.json", "run.json", "method.json", "evidence.json", "report.html", "report.md"):
        assert (folder / name).is_file(), name
    assert not (folder / "checkpoint").exists()
    assert Delta.load(folder / "delta").result == evidence.models[1]["fingerprint"]
    assert [entry.event for entry in ledger.list()] == ["request_received", "started", "finished"]
    assert ledger.verify()[0]
    assert {phase for phase, _, _ in seen} >= {"change: npo", "ask: before", "attack: after", "self-test"}
    again = Evidence.load(folder / "evidence.json")
    spent = again.cost["change"]
    assert 0 < spent["machine_share"] < 1
    assert spent["flop_per_second"] == pytest.approx(spent["machine_share"] * spent["machine_flop_per_second"])
    assert list(again.method["log"]["flop_per_second"]) == [str(step) for step in range(2, 9)]
    assert "FLOP/s" in (folder / "report.html").read_text(encoding="utf-8")
    assert again.verdict == evidence.verdict
    assert again.request["rows"]["forget"] == len(read_data(request_)["forget"])
    limits = " ".join(evidence.limits)
    for phrase in ("Tested:", "Gold:", "reintroduction", "retained ones", "legal conclusion", "open to the attacker"):
        assert phrase in limits


@pytest.mark.parametrize(
    ("method", "settings", "phases"),
    [("needle", {"count": 2}, {"needle"}), ("task_vector", {"epochs": 1.0}, {"reinforce", "task_vector"})],
)
def test_an_edit_runs_to_its_report_and_tells_its_phases(tiny_world, ledger, tmp_path, method, settings, phases):
    request = load(tiny_world.request, {**QUICK, "audit.attacks": ["direct"], "audit.self_test": False})
    evidence = run(request, out=tmp_path / "run", ledger=ledger, method=method, settings=settings)
    assert set(evidence.method["phases"]) == phases
    assert Delta.load(tmp_path / "run" / "delta").result == evidence.models[1]["fingerprint"]


def test_running_text_is_asked_for_from_its_beginning(tiny_world, ledger, tmp_path):
    known = read_data(load(tiny_world.request))["forget"]
    path = tmp_path / "texts.jsonl"
    lines = [{"text": f"{row.prompt} {row.answer}", "value": row.value, "entity": row.entity} for row in known]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    changes = {
        "data.forget": str(path),
        "audit.attacks": ["direct"],
        "audit.metrics": ["loss"],
        "audit.self_test": False,
    }
    evidence = run(load(tiny_world.request, {**QUICK, **changes}), out=tmp_path / "run", ledger=ledger)
    (direct,) = [probe for probe in evidence.probes if probe.attack == "direct"]
    assert 0 <= direct.after <= 1
    assert any("running text" in warning for warning in evidence.warnings)


def test_nothing_personal_reaches_the_ledger(request_, ledger, tmp_path):
    run(request_, out=tmp_path / "run", ledger=ledger)
    raw = (tmp_path / "ledger.sqlite").read_bytes()
    for rows in read_data(request_).values():
        for row in rows:
            assert row.entity.encode() not in raw
            assert row.prompt.encode() not in raw
    assert str(tmp_path).encode() not in raw


def test_a_finished_run_is_not_repeated(request_, ledger, tmp_path, monkeypatch):
    first = run(request_, out=tmp_path / "run", ledger=ledger)
    from expunge import run as module

    monkeypatch.setattr(module._Job, "_change", None)
    assert run(request_, out=tmp_path / "run", ledger=ledger).verdict == first.verdict


def test_another_request_in_the_same_folder_is_refused(request_, ledger, tmp_path):
    run(request_, out=tmp_path / "run", ledger=ledger)
    with pytest.raises(OutputError, match=r"holds another run \(method npo\)"):
        run(request_, out=tmp_path / "run", ledger=ledger, settings={"beta": 0.2})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"not empty and holds no run \(thesis.txt\)"):
        run(request_, out=tmp_path / "other", ledger=ledger)
    assert [p.name for p in (tmp_path / "other").iterdir() if not p.name.startswith(".")] == ["thesis.txt"]
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(OutputError, match="damaged"):
        run(request_, out=tmp_path / "run", ledger=ledger)


def test_known_models_come_out_right(request_, tiny_world, ledger, tmp_path):
    golds = [str(gold) for gold in tiny_world.golds]
    original = audit_model(
        str(tiny_world.original), request=request_, gold=golds, out=tmp_path / "original", ledger=ledger
    )
    assert original.verdict.verdict == "not_forgotten"
    assert original.self_test.passed, original.self_test
    filtered = run(request_, method="output_filter", out=tmp_path / "filter", ledger=ledger)
    assert filtered.verdict.verdict == "suppressed"
    assert filtered.verdict.by == ["logit_lens"]
    assert "keeps_forget_data" in filtered.verdict.flags
    held_out = audit_model(golds[0], request=request_, gold=golds[1:], out=tmp_path / "gold", ledger=ledger)
    assert held_out.verdict.verdict not in ("suppressed", "not_forgotten")


def test_without_gold_or_original_less_is_said(request_, ledger, tmp_path):
    evidence = run(request_.model_copy(update={"gold": []}), out=tmp_path / "run", ledger=ledger)
    assert "removed" not in evidence.verdict.verdict
    assert any("Gold: none" in line for line in evidence.limits)
    data = read_data(request_)
    alone = audit(load_subject(request_), before=None, data=data, folder=tmp_path / "alone", bootstrap=200)
    assert alone.verdict.verdict == "not_forgotten"
    assert "utility_unknown" in alone.verdict.flags
    with pytest.raises(RequestError, match="nothing to judge"):
        audit(load_subject(request_), before=None, data={"retain": data["retain"]}, folder=tmp_path / "none")


def test_gold_with_another_tokenizer_is_refused(request_, ledger, tmp_path):
    from tiny import tiny

    from expunge.subjects.language import LanguageModel

    LanguageModel(*tiny("llama")).save(tmp_path / "stranger")
    request = request_.model_copy(update={"gold": [str(tmp_path / "stranger")]})
    with pytest.raises(MismatchError, match="another tokenizer"):
        run(request, out=tmp_path / "run", ledger=ledger)


def test_the_guard_of_one_folder_keeps_a_second_process_out(request_, ledger, tmp_path):
    import fcntl

    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another process is writing"):
            run(request_, out=tmp_path / "run", ledger=ledger)


# --- kill -9 ---------------------------------------------------------------------------------------------------------


def command(request, out, extra=()):
    options = [f"{name}={json.dumps(value)}" for name, value in QUICK.items() if "." in name]
    sets = [part for option in options for part in ("--set", option)]
    return [sys.executable, "-m", "expunge", "run", str(request), "--out", str(out), *sets, "--json", *extra]


def outcome(folder):
    delta = Delta.load(folder / "delta")
    evidence = json.loads((folder / "evidence.json").read_text())
    return delta.result, evidence["verdict"], [p["recovery"] for p in evidence["probes"]]


@pytest.mark.slow
def test_killed_at_ten_random_moments_the_same_command_finishes_with_the_same_result(tiny_world, tmp_path):
    environment = {**os.environ, "EXPUNGE_LEDGER": str(tmp_path / "ledger.sqlite"), "OMP_NUM_THREADS": "1"}
    extra = ("--set", "training.checkpoint_seconds=0", "--set", "training.steps=40")

    def go(out, kill_after=None):
        process = subprocess.Popen(
            command(tiny_world.request, out, extra), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        if kill_after is None:
            _, errors = process.communicate(timeout=280)
            assert process.returncode == 0, errors.decode()[-2000:]
            return
        time.sleep(kill_after)
        process.send_signal(signal.SIGKILL)
        process.wait()

    began = time.monotonic()
    go(tmp_path / "whole" / "run")
    length = time.monotonic() - began
    expected = outcome(tmp_path / "whole" / "run")
    draw = random.Random(0)
    for number in range(10):
        folder = tmp_path / f"killed-{number}" / "run"
        go(folder, kill_after=draw.uniform(0.1, 0.95) * length)
        go(folder)
        assert outcome(folder) == expected, number
        leftovers = list(folder.rglob("*.partial"))
        assert not leftovers or all(p.name.startswith(".") for p in leftovers)
        shutil.rmtree(folder)
    assert Ledger(tmp_path / "ledger.sqlite").verify()[0]


def test_a_run_killed_between_its_phases_goes_on(request_, ledger, tmp_path, monkeypatch):
    whole = run(request_, out=tmp_path / "a" / "run", ledger=ledger)
    from expunge import run as module

    real = module._Job._audit
    monkeypatch.setattr(module._Job, "_audit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        run(request_, out=tmp_path / "b" / "run", ledger=ledger)
    assert ledger.list()[-1].event == "interrupted"
    monkeypatch.setattr(module._Job, "_audit", real)
    resumed = run(request_, out=tmp_path / "b" / "run", ledger=ledger)
    assert resumed.verdict == whole.verdict
    assert [e.event for e in ledger.list()][-2:] == ["resumed", "finished"]


def test_what_cannot_run_leaves_no_trace(request_, ledger, tmp_path):
    for method in ("npo", "task_vector"):
        with pytest.raises(ScopeError, match="not within"):
            run(request_, method=method, out=tmp_path / "run", ledger=ledger, scope="layers:99")
    assert not ledger.path.exists()
    assert not (tmp_path / "run").exists()


def test_a_failure_is_recorded_by_its_code_only(request_, ledger, tmp_path):
    broken = request_.model_copy(update={"training": request_.training.model_copy(update={"learning_rate": 1e30})})
    with pytest.raises(TrainingError, match="the loss is"):
        run(broken, out=tmp_path / "run", ledger=ledger)
    assert ledger.list()[-1].event == "failed"
    assert ledger.list()[-1].body["error"] == "E400"
    # The corrected request may use the same folder: the failed one had made nothing.
    assert run(request_, out=tmp_path / "run", ledger=ledger).verdict
