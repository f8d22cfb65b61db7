"""Curves beside a reproduction's page."""

import json
from dataclasses import asdict
from xml.etree import ElementTree

import pytest

from expunge.reproductions import page
from expunge.reproductions.case import Claim, Figure, Findings
from expunge.reproductions.figures import COLOURS, MARKS, figure, filled, svg

ROWS = [
    {"editor": editor, "seed": seed, "edits": edits, "success": value + seed / 10, "kept": 1.0}
    for editor, value in (("rome", 0.4), ("grace", 0.8), ("a_b & <c>", 0.0))
    for seed in (0, 1)
    for edits in (1, 10, 100)
]
PANELS = {"success": "success", "kept": "unchanged beside"}


def drawn(**words):
    return figure(
        ROWS,
        "curves",
        "Over edits",
        PANELS,
        run="editor",
        at="edits",
        x="edits made",
        y="share",
        logarithmic=True,
        **words,
    )


def texts(image):
    return [one.text for one in ElementTree.fromstring(image).iter("{http://www.w3.org/2000/svg}text")]


def test_points_are_means_and_ranges_over_seeds_of_the_rows_that_have_the_quantity():
    found = figure(
        [*ROWS, {"editor": "late", "edits": 3, "other": 2.0}],
        "n",
        "t",
        {"success": "s"},
        run="editor",
        at="edits",
        x="",
        y="",
    )
    assert found.panels["s"]["rome"] == [(n, pytest.approx(0.45), 0.4, 0.5) for n in (1, 10, 100)]
    assert list(found.panels["s"]) == ["rome", "grace", "a_b & <c>"]


def test_a_figure_is_an_svg_with_every_run_in_its_legend_and_every_place_on_its_axis():
    image = svg(asdict(drawn()))
    shown = texts(image)
    for name in ("rome", "grace", "a_b & <c>"):
        assert shown.count(name) == 1
    for title in PANELS.values():
        assert shown.count(title) == 1
    assert shown.count("edits made") == shown.count("share") == 2
    assert [shown.count(place) for place in ("10", "100", "0.25")] == [2, 2, 2]
    assert not any(one in image for one in ("<script", "href"))


def test_the_same_points_give_the_same_bytes_also_out_of_json():
    one = asdict(drawn())
    assert svg(one) == svg(asdict(drawn())) == svg(json.loads(json.dumps(one)))


def test_as_many_runs_as_there_are_editors_look_different():
    runs = [{"editor": f"editor {i}", "edits": 1, "success": 0.5} for i in range(len(MARKS))]
    image = svg(asdict(figure(runs, "n", "t", {"success": "s"}, run="editor", at="edits", x="", y="")))
    assert sum(f"editor {i}" in texts(image) for i in range(len(MARKS))) == len(MARKS)
    assert len(set(zip(COLOURS * 2, MARKS))) == len(MARKS)


def test_values_beyond_shares_stand_on_an_axis_of_their_own_and_panels_without_points_are_left_out():
    one = Figure("n", "t", "steps", "nats", {"a": {"x": [(0, -3.0, -4.0, -2.0), (5, 2.0, 2.0, 2.0)]}, "b": {"x": []}})
    assert list(filled(asdict(one))) == ["a"]
    shown = texts(svg(asdict(one)))
    assert "b" not in shown
    assert any(text.startswith("-") for text in shown)


def found(*figures):
    claims = [Claim("c", "p", "k", "m", True)]
    environment = {"date": "d", "expunge": "0", "torch": "2", "transformers": "5", "device": "cpu", "minutes": 1.0}
    about = {"name": "npo", "paper": "arXiv:1", "summary": "s", "changed": {}, "seeds": [0], "environment": environment}
    return {**about, **asdict(Findings(claims, figures=figures))}


def test_a_page_shows_its_figures_as_files_beside_it(tmp_path):
    path = page.write(found(drawn(note="About it.")), tmp_path)
    text = path.read_text(encoding="utf-8")
    assert "## Over edits\n\n![Over edits](npo-curves.svg)\n\nAbout it.\n" in text
    assert (tmp_path / "npo-curves.svg").read_text(encoding="utf-8") == svg(asdict(drawn()))


def test_without_a_point_there_is_no_figure(tmp_path):
    empty = figure([], "curves", "Over edits", PANELS, run="editor", at="edits", x="", y="")
    for one in (found(), found(empty)):
        text = page.write(one, tmp_path).read_text(encoding="utf-8")
        assert "![" not in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["npo.json", "npo.md"]
