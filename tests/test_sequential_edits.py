"""The reproduction of long sequences: what is measured on the way, on a model that knows nothing, and its claims."""

from dataclasses import replace

import pytest
from test_editors import CORPUS, PREFIXES, subject
from test_sequences import edits
from test_serac import SHOWN

from expunge.edits import Probe
from expunge.reproductions import sequential_edits
from expunge.reproductions.case import Case

COUNTS = (1, 10, 100)

pytestmark = pytest.mark.usefixtures("own_cache")


class World:
    """As much of a world as a sequence asks for."""

    corpus = CORPUS
    prefixes = PREFIXES

    def __init__(self):
        self.model = subject()

    def edits(self, count):
        """What must stay of an edit is what the ninth is about, until that is edited."""
        beside = {"subject": (Probe("Ilva 8 was born in", ("Tivin",)),) if count < 9 else ()}
        beside["neighbours"] = (Probe("Mo 99 was born in", ("the north",)),)
        return [replace(one, rephrasings=(f"{one.subject} is from",), locality=beside) for one in edits(count)]

    def others(self):
        return [replace(one, subject="", prompt=f"Carth {i} is") for i, one in enumerate(edits(3))]

    def demonstrations(self):
        return SHOWN


@pytest.fixture
def world(monkeypatch):
    found = World()
    monkeypatch.setattr(sequential_edits, "subject", lambda seed, *_: found)
    return found


@pytest.mark.parametrize("editor", ["grace", "ft_m"])
def test_what_is_measured_on_the_way_is_what_a_sequence_of_that_length_gives(world, monkeypatch, editor):
    monkeypatch.setattr(sequential_edits, "ASKED", 3)
    settings = {"layer": 0, "steps": 2}
    long, short = (sequential_edits.trial(editor, settings, counts, 0, broken=0.0) for counts in ([1, 4, 9], [4]))
    assert [point["edits"] for point in long["points"]] == [1, 4, 9]
    assert long["restored"] is short["restored"] is True
    for one in (*long["points"], *short["points"]):
        assert one.pop(sequential_edits.COST) > 0
        assert set(sequential_edits.COLUMNS) <= set(one)
    assert short["points"] == long["points"][1:2]
    assert "subject" not in long["points"][2]


def test_a_sequence_ends_where_the_model_is_broken_and_is_undone_all_the_same(world, monkeypatch):
    asked = []

    def measured(model, before, edits):
        asked.append(len(edits))
        return {"success": 0.3 if len(asked) < 3 else 0.1, "rephrase": 0.0, "kept": 0.0}

    monkeypatch.setattr(sequential_edits, "measured", measured)
    settings = {"layer": 0, "steps": 1}
    found = sequential_edits.trial("ft_m", settings, [1, 2, 4], 0, broken=0.2)
    assert [point["edits"] for point in found["points"]] == [1, 2]
    assert found["restored"] is True
    asked.clear()
    found = sequential_edits.trial("ft_m", settings, [1, 2, 4], 0, broken=0.0)
    assert [point["edits"] for point in found["points"]] == [1, 2, 4]


def test_the_slowest_editors_stop_earlier_and_the_page_says_so(world, monkeypatch, tmp_path):
    quick = {name: {"layer": 0, "steps": 1} for name in ("ft_l", "rome", "grace", "wise")}
    monkeypatch.setattr(sequential_edits, "EDITORS", quick | {"alphaedit": {"layers": [0, 1], "steps": 1}})
    case = Case(tmp_path, seeds=(0,), workers=1)
    found = sequential_edits.sequential_edits(case, counts=(1, 2), shared=1, broken=0.0, slow=1)
    (first, *_) = found.tables
    assert [row[0] for row in first.rows if row[2] == "-"] == ["ft_l", "wise"]
    assert any("lora_edit, wise, ft_l) stop after 1 edits" in note for note in found.notes)
    assert first.note.endswith("-: not made; the notes say why.")


def test_what_an_ended_sequence_did_not_reach_is_a_dash_and_counts_as_it_was():
    rows = [row for row in points({}) if (row["editor"], row["edits"]) != ("rome", 100)]
    rows = [
        {**row, "success": 0.1, "others": 0.0} if (row["editor"], row["edits"]) == ("rome", 10) else row for row in rows
    ]
    assert sequential_edits._cell(rows, "success", "rome", 10) == "0.1"
    assert sequential_edits._cell(rows, "success", "rome", 100) == "-"
    claim, *_ = sequential_edits.judge(rows, True, 4, COUNTS)
    assert claim.holds
    assert claim.measured.endswith("0.1 / 0 after 10, where it ended")


def test_of_many_edits_a_sample_is_asked_about():
    few = edits(8)
    assert sequential_edits.sampled(few, 0) is few
    many = edits(1000)
    found = [[one.id for one in sequential_edits.sampled(many, seed)] for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert len(set(found[0])) == 200


def test_the_page_has_every_editors_curves(world, monkeypatch, tmp_path):
    quick = {name: {"layer": 0, "steps": 1} for name in ("ft_m", "grace", "rome", "wise")}
    monkeypatch.setattr(sequential_edits, "EDITORS", quick | {"alphaedit": {"layers": [0, 1], "steps": 1}})
    found = sequential_edits.sequential_edits(
        Case(tmp_path, seeds=(0, 1), workers=1), counts=(1, 2), shared=1, broken=0.0
    )
    (drawn,) = found.figures
    assert list(drawn.panels) == list(sequential_edits.COLUMNS.values())
    for each in drawn.panels.values():
        assert list(each) == list(sequential_edits.EDITORS)
        assert all([point[0] for point in points] == [1, 2] for points in each.values())
    (first, *_) = found.tables
    assert [row[0] for row in first.rows] == list(sequential_edits.EDITORS)
    assert "(" in first.rows[0][1]  # two seeds
    assert "(" not in first.rows[0][2]  # one
    assert found.claims[-1].measured == "10 runs, all restored"


def points(changes):
    good = {"success": 0.9, "rephrase": 0.6, "kept": 1.0, "others": 1.0}
    late = {"rome": {"success": 0.2, "others": 0.4}, "alphaedit": {"success": 0.5}, "grace": {}, "wise": {}}
    return [
        {**good, **({"rephrase": 0.1} if editor == "grace" else {}), **(late[editor] if n == 100 else {}), **more}
        | {"editor": editor, "edits": n}
        for editor in late
        for n in COUNTS
        for more in [changes.get((editor, n), {})]
    ]


@pytest.mark.parametrize(
    ("place", "changes"),
    [
        (0, {("rome", 1): {"success": 0.4}}),
        (1, {("alphaedit", 100): {"success": 0.25}}),
        (2, {("grace", 10): {"kept": 0.98}}),
        (2, {("grace", 100): {"rephrase": 0.3}}),
        (3, {("wise", 100): {"others": 0.9}}),
    ],
)
def test_each_claim_of_sequential_edits_can_fail(place, changes):
    assert [claim.holds for claim in sequential_edits.judge(points({}), True, 4, COUNTS)] == [True] * 5
    found = [claim.holds for claim in sequential_edits.judge(points(changes), True, 4, COUNTS)]
    assert found[place] is False
    assert sum(found) == 4
    assert sequential_edits.judge(points({}), False, 4, COUNTS)[4].holds is False
