"""`expunge bench`: models and worlds are found, scorecards are written and read, published data is taken as it is."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from expunge.bench import bench, read_world
from expunge.cli import app
from expunge.errors import RequestError, TableError
from expunge.evidence import Scorecard
from expunge.report import scorecard


def test_tdec_on_the_mini_world_tells_the_original_from_gold(tiny_world, tmp_path: Path) -> None:
    card = bench(
        "tdec",
        tiny_world.original,
        gold=tiny_world.golds[:1],
        settings={"n": 3},
        out=tmp_path / "bench",
        bootstrap=50,
    )
    assert card.value("memorisation_accuracy") > card.value("memorisation_accuracy", "gold") + 0.1
    assert card.rows["forget"] == len(tiny_world.world.members("forget"))
    saved = Scorecard.load(tmp_path / "bench" / "scorecard.json")
    assert saved.value("extraction_likelihood") == pytest.approx(card.value("extraction_likelihood"))
    page = (tmp_path / "bench" / "scorecard.html").read_text(encoding="utf-8")
    assert "memorisation accuracy" in page
    assert scorecard.table(saved).row_count == len(card.measured)
    with pytest.raises(TableError, match="extraction_likelihood"):
        card.value("extraction")


def test_the_world_around_a_model_is_the_one_the_mini_version_is_about(tiny_world) -> None:
    assert read_world(tiny_world.path) == tiny_world.world


def test_a_folder_without_a_world_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="holds no world"):
        read_world(tmp_path)


def test_the_command_line_runs_a_benchmark_on_own_data(tiny_world, tmp_path: Path) -> None:
    for name in ("forget", "holdout"):
        text = "doc_id,corpus,text\n" + f"1,Pile,{'the ' * 12}{name}\n"
        (tmp_path / f"{name}.csv").write_text(text, encoding="utf-8")
    call = ["bench", "tdec", str(tiny_world.original), "--data", str(tmp_path), "--set", "n=2", "--json"]
    found = CliRunner().invoke(app, [*call, "--out", str(tmp_path / "out")], standalone_mode=False)
    assert not found.exception, found.exception
    card = json.loads(found.stdout)
    assert card["rows"] == {"forget": 1, "holdout": 1}
    assert card["data"] == str(tmp_path)
