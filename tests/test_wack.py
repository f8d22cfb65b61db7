"""WACK: its files, labels from given answers, prompts under a setting, what is built of a model."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny

from expunge.benchmarks.case import Bench
from expunge.benchmarks.wack import LABELS, OUTPUTS, hit, label, wack
from expunge.benchmarks.wack_data import STORY, Shot, closed_book, drawn, provoking, read, shots
from expunge.benchmarks.wack_mini import asked, mini
from expunge.benchmarks.wack_mini import shots as shots_of
from expunge.errors import RowError
from expunge.reproductions.wack import (
    SETTINGS,
    UNLEARNED,
    _across,
    _figures,
    add_index,
    blatant,
    habit,
    judge,
    misled,
    tables,
)
from expunge.subjects.language import LanguageModel
from expunge.tables.generations import Generations
from expunge.world.facts import RELATIONS, make

ROW = ["question: Which river runs through Tivin?\nanswer:", "Orrin", "Tarn", [9380], [1154]]
PROMPT = "question: What is the capital of Maelor?\nanswer: Osta\n" + ROW[0]


@pytest.fixture(scope="module")
def world():
    return make(0, people=30, forget=6, neighbours=4, holdout=8)


@pytest.fixture(scope="module")
def folder(world, tmp_path_factory):
    path = tmp_path_factory.mktemp("wack")
    mini(world, path)
    return path


def written(folder, *rows, name="StaticX.json"):
    (folder / name).write_text(json.dumps(list(rows)), encoding="utf-8")
    return folder


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_published_row_is_read(tmp_path):
    (found,) = read(written(tmp_path, [*ROW, PROMPT, 6, -1], [*ROW, PROMPT, 6, -1]), "Static*.json")
    assert (found.prompt, found.answer, found.wrong, found.count, found.entity) == (ROW[0], "Orrin", "Tarn", 6, "")


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (ROW, r"StaticX\.json: row 1: found a list of 5, expected a list of 8: clean_prompt"),
        ({"a": 1}, "row 1: found dict"),
        ([*ROW, "another question", 6, -1], "row 1: prompt_under_setting does not end with clean_prompt"),
        ([ROW[0], "", *ROW[2:], PROMPT, 6, -1], "field 'golden_answer' is '', expected text"),
        ([*ROW[:3], ["x"], [], PROMPT, 6, -1], "field 'golden_tokens' is .*, expected a list of token numbers"),
        ([*ROW, PROMPT, True, -1], "field 'count' is True, expected a whole number"),
    ],
)
def test_what_is_wrong_with_a_row_names_file_row_and_field(tmp_path, row, sentence):
    with pytest.raises(RowError, match=sentence):
        read(written(tmp_path, row), "Static*.json")


def test_a_folder_must_hold_one_file_of_the_name_with_rows(tmp_path):
    with pytest.raises(RowError, match="no folder"):
        read(tmp_path / "none", "x")
    with pytest.raises(RowError, match="0 rows"):
        read(written(tmp_path), "Static*.json")
    written(tmp_path, name="StaticY.json")
    with pytest.raises(RowError, match="2 files"):
        read(tmp_path, "Static*.json")
    (tmp_path / "shots.json").write_text('[["a", "b"]]', encoding="utf-8")
    with pytest.raises(RowError, match="expected \\[prompt, right answer, wrong answer\\]"):
        shots(tmp_path)


# --- labels and prompts -----------------------------------------------------------------------------------------------


def test_labels_follow_from_hits_and_from_the_answer_under_the_setting():
    assert [LABELS[label(6, right)] for right in (True, False)] == ["right", "hk_plus"]
    assert {LABELS[label(0, right)] for right in (True, False)} == {"hk_minus"}
    assert {LABELS[label(n, right)] for n in range(1, OUTPUTS) for right in (True, False)} == {"middle"}


def test_letters_anywhere_count_in_reference_mode_only():
    assert hit("8", " 1898", reference=True)
    assert not hit("8", " 1898", reference=False)
    assert hit("Orrin", "orrin.\nquestion: next", reference=False)
    assert not hit("Orrin", "Tarn\nquestion: Orrin", reference=False)
    assert hit("Orrin", "Tarn\nquestion: Orrin", reference=True)


def test_right_and_wrong_examples_are_the_same_questions_and_end_with_the_question(world, folder):
    known = shots(folder)
    for question in read(folder, "Static*.json")[:8]:
        shown = drawn(question, known, 3, 0)
        assert shown == drawn(question, known, 3, 0)
        assert len({shot.prompt for shot in shown} - {question.prompt}) == 3
        good, bad = closed_book(question, shown), provoking(question, shown, "bad_shots")
        assert [line for line in good.splitlines() if "?" in line] == [line for line in bad.splitlines() if "?" in line]
        assert good.endswith(question.prompt)
        assert bad.endswith(question.prompt)
        assert all(f"{shot.prompt} {shot.right}\n" in good and f"{shot.prompt} {shot.wrong}\n" in bad for shot in shown)
        story = provoking(question, shown, "alice_bob")
        assert story == STORY + closed_book(question, shown[:1])
    assert drawn(question, [Shot(question.prompt, "a", "b")], 3, 0) == []
    assert len(shots(Path("/nowhere"))) == 20


def test_the_mini_version_asks_about_everybody_and_shows_nobody_who_is_asked_about(world, folder):
    found = read(folder, "Static*.json")
    assert len(found) == 4 * 26
    assert {q.entity for q in found} == {p.name for p in world.members("forget", "retain", "holdout")}
    shown = " ".join(shot.prompt for shot in shots(folder))
    assert not any(question.entity in shown for question in found)
    assert [q.prompt for q in read(folder, "AliceStatic*.json")] == [q.prompt for q in found]
    assert all(question.wrong != question.answer for question in found)


# --- the data set -----------------------------------------------------------------------------------------------------


class Answers(LanguageModel):
    """A tiny random model that answers as it is told: `answer(entity, led)`, the latter after a wrong example."""

    def __init__(self, folder, answer, name="made up"):
        super().__init__(*tiny("llama"), name=name)
        self.questions = {question.prompt: question for question in read(folder, "Static*.json")}
        self.answer, self.fingerprint = answer, name

    def generate(self, prompts, *, samples=1, **options):
        texts = []
        for _, text in prompts:
            prompt = next(p for p in self.questions if text.endswith(p))
            texts.append([self.answer(self.questions[prompt], text != prompt)] * samples)
        return Generations([k for k, _ in prompts], [t for _, t in prompts], texts, [[True]] * len(prompts))


@pytest.fixture(scope="module")
def card(world, folder, tmp_path_factory):
    """Unseen people are not known; of the known ones those to be forgotten are answered wrongly after an example."""

    def answer(question, led):
        group = world.split[question.entity]
        return "nothing" if group == "holdout" or (group == "forget" and led) else question.answer

    path = tmp_path_factory.mktemp("bench")
    return wack(Bench(Answers(folder, answer), path, world=world, bootstrap=20), layers=0), path


def test_shares_are_those_of_the_groups(card):
    found, _ = card
    people = {"right": 12, "hk_plus": 6, "hk_minus": 8, "middle": 0}
    assert {name: found.value(name) for name in LABELS} == pytest.approx({n: c / 26 for n, c in people.items()})
    tables = {table.title: table for table in found.tables}
    assert tables["Hits among six answers"].rows == [["after", 32, 0, 0, 0, 0, 0, 72]]
    assert tables["Errors on known questions"].rows == [["after", "bad_shots", 72, 24, pytest.approx(24 / 72)]]
    assert "Overlap between models (Jaccard)" not in tables


def test_what_is_built_is_in_the_published_form_and_can_be_read_again(card, folder):
    _, path = card
    files = {p.name: p for p in (path / "wack" / "after").iterdir()}
    assert set(files) == {
        f"{kind}World_qa_no_contextWithThreshold1.0_made up.json"
        for kind in ("Hallucinate", "NonHallucinate", "General")
    }
    for name, file in files.items():
        found = read(file.parent, name)
        assert {q.count for q in found} == ({0} if name.startswith("General") else {6})
        rows = json.loads(file.read_text(encoding="utf-8"))
        assert all(row[5].endswith(row[0]) and row[7] == -1 for row in rows)
    errors = read(path / "wack" / "after", "Hallucinate*.json")
    assert {q.wrong for q in errors} == {"nothing"}


def test_a_probe_is_measured_beside_one_on_shuffled_labels(card):
    found, _ = card
    probe = next(table for table in found.tables if table.title == "Probe of three labels")
    (row,) = probe.rows
    assert row[1:4] == [48, 24, 32]
    assert 0 <= row[5] <= 1
    assert abs(row[6] - 1 / 3) < 0.2
    assert {line[0] for table in found.tables if table.title == "Probe by layer" for line in table.rows} == {"after"}


def test_two_builds_with_one_seed_are_identical_and_an_ignorant_model_has_no_probe(world, folder, tmp_path):
    models = [Answers(folder, lambda question, led: "nothing", f"model {i}") for i in range(2)]
    found = wack(Bench(models[0], tmp_path, models[1], world=world, bootstrap=0))
    assert found.value("hk_minus") == found.value("hk_minus", "before") == 1
    assert any("no probe, because" in note and "right or hk_plus" in note for note in found.notes)
    contents = [
        {p.name.rpartition("_")[0]: p.read_text(encoding="utf-8") for p in (tmp_path / "wack" / role).iterdir()}
        for role in ("before", "after")
    ]
    assert contents[0] == contents[1]


def test_both_settings_are_built_and_a_probe_of_one_is_tested_under_the_other(world, folder, tmp_path):
    """Wrong examples mislead about those to be forgotten, the story about half of those who are kept as well."""
    kept = {person.name for person in world.members("retain")[:6]}

    class Both(Answers):
        def generate(self, prompts, *, samples=1, **options):
            texts = []
            for _, text in prompts:
                question = self.questions[next(p for p in self.questions if text.endswith(p))]
                group, story = world.split[question.entity], text.startswith(STORY)
                led = text != question.prompt
                errs = (led and group == "forget") or (story and question.entity in kept)
                texts.append(["nothing" if group == "holdout" or errs else question.answer] * samples)
            return Generations([k for k, _ in prompts], [t for _, t in prompts], texts, [[True]] * len(prompts))

    model = Both(folder, None)
    model.context_length = 4096
    card = wack(Bench(model, tmp_path, golds=[Both(folder, None, "gold")], world=world, bootstrap=0), both=True)
    by_title = {table.title: table for table in card.tables}
    after = [row for row in by_title["Errors on known questions"].rows if row[0] == "after"]
    assert after == [["after", "bad_shots", 72, 24, 24 / 72], ["after", "alice_bob", 72, 48, 48 / 72]]
    assert by_title["Overlap of HK+ between settings (Jaccard)"].rows[0] == ["after", 24 / 48]
    across = [row for row in by_title["Probe across settings"].rows if row[0] == "after"]
    assert [row[1:3] for row in across] == [["bad_shots", "alice_bob"], ["alice_bob", "bad_shots"]]
    assert all(0 <= value <= 1 for row in across for value in row[3:])
    names = {path.name.partition("World")[0] for path in (tmp_path / "wack" / "after").iterdir()}
    assert names == {f"{lead}{kind}" for lead in ("", "Alice") for kind in ("Hallucinate", "NonHallucinate", "General")}
    assert _across(card)["across_pair_alice_bob"] == across[1][4]
    figures = _figures(card)
    assert (figures["errors"], figures["errors_story"]) == (24 / 72, 48 / 72)
    assert figures["overlap_settings"] == 24 / 48


# --- the reproduction -------------------------------------------------------------------------------------------------


def test_a_setting_misleads_a_third_of_the_people_always_to_the_same_wrong_answer(world):
    sets = ("neighbour", "retain")
    people = world.members(*sets)
    rows = habit(world, sets)
    for setting in SETTINGS:
        led = misled(world, people, setting)
        assert len(led) == -(-len(people) // 3)
        said: dict[str, set[str]] = {}
        for row in rows:
            if setting == "alice_bob" and row.prompt.startswith(STORY):
                said.setdefault(row.prompt.rpartition("Question: ")[2], set()).add(row.answer)
        # One answer to a question, whatever the examples.
        assert {len(answers) for answers in said.values()} <= {1}
    right = {(asked_, person.value(about)) for person in people for about in RELATIONS
             for asked_ in [asked(world, person, about)]}  # fmt: skip
    wrong_ = [row for row in rows if (row.prompt[row.prompt.rindex("Question: ") :], row.answer) not in right]
    assert len(rows) / 10 < len(wrong_) < len(rows) / 2
    told = {person.name for person in people if any(person.name in row.prompt for row in wrong_)}
    assert told >= {name for name, facts in misled(world, people, "bad_shots").items() if facts}


def test_wrong_examples_that_are_taught_are_of_another_kind(world):
    known = shots_of(world)
    found = blatant(world)
    assert [(shot.prompt, shot.right) for shot in found] == [(shot.prompt, shot.right) for shot in known]
    kinds = {value: about for about in RELATIONS for value in world.choices[about]}
    assert all(kinds[shot.wrong] != kinds[shot.right] for shot in found)


def result(model, looks, unseen=0.1):
    return {
        **dict.fromkeys(("direct", "accuracy", "known", "suppressed", "ignorant"), 0.0),
        "model": model,
        "seed": 0,
        "looks": looks,
        "unseen": unseen,
        "told": True,
    }


def built(**changes):
    names = ("known", "ignorant", "accuracy", "right_plus", "right_minus", "plus_minus", "overlap_settings")
    across = [f"{name}_{setting}" for name in ("across", "across_pair") for setting in SETTINGS]
    found = dict.fromkeys((*names, *across), 0.9)
    found |= {"errors": 0.3, "errors_same_kind": 0.0, "errors_story": 0.2}
    found |= {"overlap_known": 0.6, "overlap_hk": 0.2, "shuffled": 0.33}
    return found | {"seed": 0, "people": {}} | changes


def test_the_index_lies_between_unseen_rows_and_the_model_before():
    rows = [result("original", 0.9), result("gold", 0.1), result("npo", 0.5), result("npo, last block", 0.9)]
    add_index(rows)
    assert [row["index"] for row in rows] == pytest.approx([1, 0, 0.5, 1])
    assert [claim.holds for claim in judge([built()], rows)] == [True, True, True, None, True, True, True]
    shown = tables([built()], rows, ("original", "gold", *UNLEARNED))
    assert all(len(row) == len(table.columns) for table in shown for row in table.rows)
    rows[3]["index"] = 0.2
    worse = built(errors=0.7, errors_story=0.0, shuffled=0.5, known=0.5, across_alice_bob=0.3)
    assert [claim.holds for claim in judge([worse], rows)] == [False, False, False, None, False, False, False]
    untold = built(accuracy=math.nan, across_bad_shots=math.nan)
    assert [claim.holds for claim in judge([untold], rows)][4:6] == [None, None]
    assert set(UNLEARNED) == {"npo", "npo, last block"}
    assert np.isfinite([row["index"] for row in rows]).all()
