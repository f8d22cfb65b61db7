"""Trials: results in order, kept by content, never run twice; reproductions and their pages on top of them."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from expunge.cli import app
from expunge.errors import ParameterError, TableError
from expunge.registry import load_plugin, parts
from expunge.reproductions.case import Case, spread
from expunge.trials import run_trials

CALLS: list[int] = []


def square(x: int, seed: int = 0) -> dict:
    CALLS.append(x)
    if x < 0:
        raise ValueError(f"{x} has no root")
    return {"y": x * x + seed}


def test_results_stand_in_the_order_of_the_grid_and_equal_settings_run_once(tmp_path: Path) -> None:
    CALLS.clear()
    grid = [{"x": 3}, {"x": 1}, {"x": 3}, {"x": 2}]
    assert [r["y"] for r in run_trials(square, grid, tmp_path, workers=1)] == [9, 1, 9, 4]
    assert sorted(CALLS) == [1, 2, 3]


def test_finished_trials_are_kept_when_another_one_fails(tmp_path: Path) -> None:
    CALLS.clear()
    with pytest.raises(ValueError, match="no root"):
        run_trials(square, [{"x": 5}, {"x": -1}, {"x": 6}], tmp_path, workers=1)
    assert [r["y"] for r in run_trials(square, [{"x": 5}, {"x": 6}], tmp_path, workers=1)] == [25, 36]
    assert CALLS == [5, -1, 6]


def test_another_version_runs_again(tmp_path: Path) -> None:
    CALLS.clear()
    for version in (1, 1, 2):
        run_trials(square, [{"x": 4}], tmp_path, version=version, workers=1)
    assert CALLS == [4, 4]


def test_processes_give_what_one_process_gives(tmp_path: Path) -> None:
    grid = [{"x": x, "seed": seed} for x in (1, 2) for seed in (0, 1)]
    several = run_trials(square, grid, tmp_path / "a", workers=2)
    assert several == run_trials(square, grid, tmp_path / "b", workers=1)


def test_ray_gives_what_one_process_gives_and_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("ray")  # an extra
    told: list[tuple[int, int]] = []
    first = run_trials(square, [{"x": 1}, {"x": 2}], tmp_path, engine="ray", progress=lambda *done: told.append(done))
    assert [result["y"] for result in first] == [1, 4]
    assert told == [(0, 2), (1, 2), (2, 2)]
    again = run_trials(square, [{"x": x} for x in range(4)], tmp_path, engine="ray", progress=lambda *d: told.append(d))
    assert [result["y"] for result in again] == [0, 1, 4, 9]
    assert told[3:] == [(2, 4), (3, 4), (4, 4)]


def test_an_unknown_engine_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="expected processes or ray"):
        run_trials(square, [{"x": 1}], tmp_path, engine="threads")


def test_the_time_of_a_reproduction_is_that_of_its_trials_whenever_they_ran(tmp_path: Path) -> None:
    for _ in range(2):
        case = Case(tmp_path, seeds=(0, 1), workers=1)
        case.trials(square, [{"x": 2}, {"x": 2}])
        kept = [json.loads(path.read_text())["seconds"] for path in (tmp_path / "trials").iterdir()]
        assert case.seconds == sum(kept)
        for number, path in enumerate((tmp_path / "trials").iterdir()):
            path.write_text(json.dumps({**json.loads(path.read_text()), "seconds": 1.5 + number}))
    assert case.seconds == 4.0


def test_rows_hold_settings_seeds_and_results(tmp_path: Path) -> None:
    rows = Case(tmp_path, seeds=(0, 3), workers=1).trials(square, [{"x": 2}, {"x": 5}])
    assert [(row["x"], row["seed"], row["y"]) for row in rows] == [(2, 0, 4), (2, 3, 7), (5, 0, 25), (5, 3, 28)]
    found = spread(rows, "y", x=2)
    assert (found.low, found.mean, found.high) == (4, 5.5, 7)
    with pytest.raises(TableError, match="no trial has"):
        spread(rows, "y", x=9)


PLUGIN = '''
"""A reproduction for tests."""
from expunge.evidence import Table
from expunge.registry import reproduction
from expunge.reproductions.case import Case, Claim, Findings

@reproduction(paper="arXiv:2404.05868", cost="none")
def doubling(case: Case, *, factor: int = 2) -> Findings:
    """That twice as much is more."""
    claims = [Claim("More is more", "2 > 1", "factor above 1", str(factor), factor > 1)]
    return Findings(claims, [Table("Factors", ["factor", "seeds"], [[factor, len(case.seeds)]])], ["Nothing | else."])
'''


def test_reproduce_prints_records_and_can_be_strict(tmp_path: Path) -> None:
    plugin = tmp_path / "doubling.py"
    plugin.write_text(PLUGIN, encoding="utf-8")
    load_plugin(plugin)
    try:
        call = ["reproduce", "doubling", "--out", str(tmp_path / "out"), "--strict"]
        runner = CliRunner()
        good = runner.invoke(app, [*call, "--record", str(tmp_path / "docs")], standalone_mode=False)
        assert good.return_value == 0
        assert "HOLDS: More is more" in good.stdout
        page = (tmp_path / "docs" / "doubling.md").read_text(encoding="utf-8")
        assert "| More is more | 2 > 1 | factor above 1 | 2 | holds |" in page
        found = json.loads((tmp_path / "docs" / "doubling.json").read_text(encoding="utf-8"))
        assert found["seeds"] == [0, 1, 2]
        bad = runner.invoke(app, [*call, "--set", "factor=1", "--seed", "4"], standalone_mode=False)
        assert bad.return_value == 3
        page = (tmp_path / "out" / "doubling.md").read_text(encoding="utf-8")
        assert "expunge reproduce doubling --set factor=1 --seed 4" in page
        assert "does not hold" in page
    finally:
        from expunge import registry

        registry._parts["reproductions"].pop("doubling")


def test_recorded_pages_are_what_their_figures_say() -> None:
    from expunge.reproductions.page import markdown

    docs = Path(__file__).parent.parent / "docs" / "reproductions"
    known = {part.name for part in parts("reproductions")}
    for path in docs.glob("*.json"):
        found = json.loads(path.read_text(encoding="utf-8"))
        assert found["name"] in known
        assert path.with_suffix(".md").read_text(encoding="utf-8") == markdown(found), f"{path} and its page differ"
