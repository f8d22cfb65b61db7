"""Sweeps: every run once, results in one table, the search within its budget and reproducible."""

import json
from pathlib import Path

import pytest

from expunge import sweep as module
from expunge.errors import RequestError, UnknownNameError
from expunge.report import leaderboard
from expunge.sweep import Range, best, plan, read, sweep, trials

QUICK = """
request: {request}
methods: [gradient_ascent, {{npo: {{beta: 0.2}}}}]
seeds: [0, 1]
set:
  training.steps: 3
  training.learning_rate: 1.0e-3
  audit.attacks: [direct]
  audit.self_test: false
  audit.bootstrap: 100
"""


def file(folder: Path, text: str) -> Path:
    path = folder / "sweep.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_sweep_runs_everything_once_and_writes_one_table(tiny_world, tmp_path: Path, monkeypatch) -> None:
    path = file(tmp_path, QUICK.format(request=tiny_world.request) + "benchmarks: [{tdec: {n: 3}}]\n")
    results = sweep(path, tmp_path / "out", workers=1)
    assert [(row["method"], row["seed"]) for row in results["runs"]] == [
        ("gradient_ascent", 0),
        ("gradient_ascent", 1),
        ("npo", 0),
        ("npo", 1),
    ]
    for row in results["runs"]:
        assert (tmp_path / "out" / row["folder"] / "report.html").is_file()
        assert 0 <= row["tdec.memorisation_accuracy"] <= 1
    table = (tmp_path / "out" / "results.csv").read_text(encoding="utf-8").splitlines()
    assert len(table) == 5
    assert table[0].startswith("method,settings,scope,seed")
    page = (tmp_path / "out" / "leaderboard.html").read_text(encoding="utf-8")
    assert "gradient_ascent" in page
    assert leaderboard.table(results).row_count == 2
    # The same command does nothing again; a lost result is made again from its run's folder.
    monkeypatch.setattr(module, "one", None)
    again = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert again["runs"] == results["runs"]


def test_a_killed_sweep_does_not_repeat_finished_runs(tiny_world, tmp_path: Path) -> None:
    path = file(tmp_path, QUICK.format(request=tiny_world.request).replace("[0, 1]", "[0]"))
    first = sweep(path, tmp_path / "out", workers=1)
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "results").glob("*.json")}
    runs = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "runs").glob("*/evidence.json")}
    lost = next(iter(times))
    lost.unlink()
    assert sweep(path, tmp_path / "out", workers=1)["runs"] == first["runs"]
    assert {p: p.stat().st_mtime_ns for p in runs} == runs
    assert {p: p.stat().st_mtime_ns for p in times if p != lost} == {p: t for p, t in times.items() if p != lost}


SEARCH = """
request: {request}
methods: [npo, grad_diff]
search:
  trials: 4
  parameters:
    npo.beta: {{low: 0.01, high: 1.0}}
    retain_weight: [0.5, 2]
    training.learning_rate: {{low: 1.0e-4, high: 1.0e-3}}
  set: {{proof: quick}}
"""


def test_a_search_draws_its_budget_within_bounds_and_by_its_seed(tiny_world, tmp_path: Path) -> None:
    made = read(file(tmp_path, SEARCH.format(request=tiny_world.request)))
    runs = trials(made)
    assert len(runs) == 8
    assert runs == trials(made)
    for run in runs:
        assert run["fields"]["proof"] == "quick"
        assert 1e-4 <= run["fields"]["training.learning_rate"] <= 1e-3
        assert run["settings"]["retain_weight"] in (0.5, 2)
        assert ("beta" in run["settings"]) == (run["method"] == "npo")
    assert len({run["settings"]["beta"] for run in runs if run["method"] == "npo"}) == 4
    assert all("proof" not in run["fields"] for run in plan(made))


def test_the_best_trial_follows_the_stated_rule() -> None:
    rows = [
        {"method": "npo", "stays_gone": 0.9, "utility": 0.2},
        {"method": "npo", "stays_gone": 0.6, "utility": 0.7},
        {"method": "npo", "stays_gone": None, "utility": 0.9},
        {"method": "idk", "stays_gone": 0.1, "utility": 0.1},
    ]
    assert best(rows, "balance") == [rows[1], rows[3]]
    assert best(rows, "robust") == [rows[0], rows[3]]
    assert best(rows, "utility") == [rows[2], rows[3]]


def test_the_leaderboard_shows_every_trial_and_which_one_was_chosen(tmp_path: Path) -> None:
    def row(method: str, seed: int, gone: float, kept: float, **settings: float) -> dict:
        return {
            "request": "r", "method": method, "settings": settings, "scope": None, "seed": seed, "fields": {},
            "benchmarks": [], "folder": "f", "verdict": "suppressed", "flags": [], "direct": 1 - gone,
            "worst_probe": "relearn", "worst": 1 - gone, "stays_gone": gone, "utility": kept, "retain_change": 0.0,
            "seconds": 1.0, "tokens": 5,
        }  # fmt: skip

    search = [row("npo", 0, 0.2, 0.9, beta=0.1), row("npo", 0, 0.8, 0.8, beta=0.5)]
    search[1]["chosen"] = True
    runs = [row("npo", seed, 0.7 + seed / 10, 0.8, beta=0.5) for seed in (0, 1)] + [row("idk", 0, 0.1, 0.95)]
    path = leaderboard.write({"name": "s", "runs": runs, "search": search}, tmp_path, "balance")
    page = path.read_text(encoding="utf-8")
    assert page.count('title="chosen"') == 1
    assert "npo beta=0.1" in page
    assert "75% (70% to 80%)" not in page  # what comes back is shown, not what stays gone
    assert "25% (20% to 30%)" in page
    order = [line.name for line in leaderboard.lines(runs)]
    assert order == ["npo", "idk"]
    assert all(line.best for line in leaderboard.lines(runs))


def test_a_range_is_even_on_its_scale() -> None:
    assert Range(low=1e-4, high=1e-2).at(0.5) == 1e-3
    assert Range(low=0, high=10, log=False).at(0.25) == 2.5


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("methods", "metods"), "Did you mean 'methods'|methods"),
        (("[npo, grad_diff]", "[nop]"), "npo"),
        (("npo.beta", "npo.betta"), "no method has 'npo.betta'"),
        (("trials: 4", "trials: 0"), "search.trials"),
        (("{request}", "nowhere.yaml"), "is not a file"),
        (("low: 0.01", "low: 2.0"), "low must be below high"),
    ],
)
def test_what_a_sweep_file_cannot_say_is_one_sentence(tiny_world, tmp_path: Path, change, sentence) -> None:
    text = SEARCH.replace(*change).format(request=tiny_world.request)
    with pytest.raises((RequestError, UnknownNameError), match=sentence):
        trials(read(file(tmp_path, text)))
