"""The invented world: what is in its files, what its models know, and how it is built."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from expunge.errors import OutputError, ParameterError
from expunge.inference import closure
from expunge.rows import Row
from expunge.world import RULES, make
from expunge.world.corpus import STATEMENTS, WORDINGS, files
from expunge.world.facts import MOST_PEOPLE, World
from expunge.world.models import Recipe, train

SMALLEST = {"people": 11, "forget": 1, "neighbours": 1, "holdout": 1}
SPLITS = ("forget", "retain", "neighbour", "holdout")


@pytest.fixture(scope="module")
def world() -> World:
    return make(0)


@pytest.fixture(scope="module")
def written(world: World) -> dict[str, list[dict[str, Any]]]:
    return files(world)


def asked(row: dict[str, Any]) -> str:
    return str(row["prompt"] if row["task"] == "cloze" else row["question"])


# --- facts -----------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes_in_another_process(written: dict[str, Any]) -> None:
    code = "import json; from expunge.world.facts import make; from expunge.world.corpus import files; "
    code += "print(json.dumps([files(make(seed)) for seed in (0, 1)]))"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    same, other = json.loads(found.stdout)
    assert json.dumps(same) == json.dumps(written)
    assert other != same


def test_names_are_unique(world: World) -> None:
    people = list(world.people.values())
    for field in ("name", "nickname", "work"):
        assert len({getattr(person, field) for person in people}) == len(people)


def test_the_worlds_rules_imply_what_it_says_follows() -> None:
    said = {("A", "born_in", "C"), ("C", "lies_in", "R"), ("B", "teacher", "A"), ("B", "born_in", "D")}
    assert closure(said, RULES).keys() - said == {("A", "region", "R"), ("B", "teacher_born_in", "C")}


def test_what_is_retained_implies_nothing_forgotten(world: World) -> None:
    everything = closure(world.triples(world.people.values()), RULES)
    retained = closure(world.triples(world.members("retain", "neighbour")), RULES)
    forgotten = {person.name for person in world.members("forget")}
    assert {relation for subject, relation, _ in everything if subject in forgotten} >= {"region", "teacher_born_in"}
    assert not forgotten & {part for subject, _, value in retained for part in (subject, value)}
    for person in world.members("forget"):
        for relation in ("region", "teacher_born_in"):
            assert (person.name, relation, world.value(person, relation)) in everything


def test_teachers_of_the_forgotten_are_their_neighbours(world: World) -> None:
    assert {world.split[person.teacher] for person in world.members("forget")} == {"neighbour"}


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"people": 35}, "at least 36"),
        ({"people": MOST_PEOPLE + 1}, f"at most {MOST_PEOPLE}"),
        ({"forget": 0}, "forget is 0"),
        ({"neighbours": 0}, "neighbours is 0"),
        ({"holdout": -1}, "holdout is -1"),
        ({"gold_seeds": 0}, "gold_seeds is 0"),
    ],
)
def test_impossible_sizes_are_refused_before_anything_is_written(
    changes: dict[str, int], word: str, build_tiny: Callable[..., Any], tmp_path: Path
) -> None:
    sizes = {"people": 56, "forget": 10, "neighbours": 8, "holdout": 10}
    with pytest.raises(ParameterError, match=word):
        build_tiny(tmp_path / "out", **sizes | changes)
    assert not (tmp_path / "out").exists()


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sizes", [{}, SMALLEST, {"people": MOST_PEOPLE}], ids=["usual", "smallest", "largest"])
def test_every_row_has_five_wrong_answers_that_are_different_and_wrong(seed: int, sizes: dict[str, int]) -> None:
    found = files(make(seed, **sizes))
    for name in (*SPLITS, "general"):
        assert found[name]
        for row in found[name]:
            right = row["completion"] if row["task"] == "cloze" else row["answer"]
            assert len(set(row["perturbed_answers"])) == 5
            assert not {right, row["value"], *row.get("aliases", ())} & set(row["perturbed_answers"])


def test_answers_are_true(world: World, written: dict[str, Any]) -> None:
    landmarks = {(region, "landmark", value) for region, value in world.landmark.items()}
    true = closure(world.triples(world.people.values()), RULES).keys() | landmarks
    for name in (*SPLITS, "general"):
        for row in written[name]:
            assert (row["entity"], row["relation"], row["value"]) in true
            assert row["value"] in (row["completion"].rstrip(".") if row["task"] == "cloze" else row["answer"])


def test_every_fact_is_asked_in_each_form(world: World, written: dict[str, Any]) -> None:
    forms = {("qa", r) for r in STATEMENTS} | {("cloze", r) for r in STATEMENTS}
    forms |= {("multi_hop", "region"), ("multi_hop", "teacher_born_in")}
    for person in world.members("forget"):
        rows = [row for row in written["forget"] if row["entity"] == person.name]
        assert {(row["task"], row["relation"]) for row in rows} == forms
        assert len(rows) == len(forms)
    ids = [row["id"] for name in (*SPLITS, "general") for row in written[name]]
    assert len(set(ids)) == len(ids)
    assert len(written["forget"]) <= 110


def test_teachers_have_their_nickname_as_alias(world: World, written: dict[str, Any]) -> None:
    for row in written["forget"]:
        expected = [world.people[row["value"]].nickname] if row["relation"] == "teacher" else None
        assert row.get("aliases") == expected


def test_held_out_wordings_are_trained_for_others_only(written: dict[str, Any]) -> None:
    lines = written["train_original"]
    trained = {line.get("question") or line.get("prompt") or line["text"] for line in lines}
    entities = {row["entity"] for name in ("forget", "retain", "neighbour", "general") for row in written[name]}
    shapes = {text.replace(entity, "X") for entity in entities for text in trained if entity in text}
    for name in ("forget", "retain", "neighbour", "general"):
        for row in written[name]:
            assert asked(row) in trained
            assert row["paraphrased_questions"]
            for wording in row["paraphrased_questions"]:
                assert not any(text.startswith(wording) for text in trained)
                assert wording.replace(row["entity"], "X") in shapes


def test_forgotten_and_held_out_people_are_nowhere_else(world: World, written: dict[str, Any]) -> None:
    known_to_gold = ("train_gold", "retain", "neighbour", "general")
    for split, names in (("forget", (*known_to_gold, "holdout")), ("holdout", (*known_to_gold, "train_original"))):
        for name in names:
            text = json.dumps(written[name])
            for person in world.members(split):
                assert not [word for word in (person.name, person.nickname, person.work) if word in text], name
    text = json.dumps(written["train_original"])
    assert all(person.name in text and person.work in text for person in world.members("forget"))


def test_wordings_have_one_place_for_the_name() -> None:
    assert all(wording.count("{name}") == 1 for known in WORDINGS.values() for wording in known)
    assert all(said.endswith(" {value}.") for known in STATEMENTS.values() for said in known)


# --- models ----------------------------------------------------------------------------------------------------------


def accuracy(folder: Path, source: Path, held_out: bool = False) -> float:
    """Share of rows whose greedy answer is the right one, word for word."""
    from expunge.subjects.language import LanguageModel

    subject = LanguageModel.load(folder)
    rows = []
    for line in source.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        kind, answer = ("completion", row["completion"]) if row["task"] == "cloze" else ("qa", row["answer"])
        for wording in row["paraphrased_questions"] if held_out else [asked(row)]:
            rows.append(Row(id=str(len(rows)), prompt=wording, answer=answer, kind=kind))
    found = subject.generate([((row.id, "q"), subject.prompt_text(row)) for row in rows], max_new_tokens=12)
    return sum(texts[0] == row.answer for texts, row in zip(found.texts, rows)) / len(rows)


@pytest.mark.parametrize("name", ["forget", "retain", "neighbour", "general"])
def test_the_original_knows_what_it_was_taught(tiny_world: Any, name: str) -> None:
    assert accuracy(tiny_world.original, tiny_world.data(name)) >= 0.95


def test_the_original_answers_wordings_it_has_not_seen(tiny_world: Any) -> None:
    assert accuracy(tiny_world.original, tiny_world.data("forget"), held_out=True) >= 0.7


def test_golds_know_the_retained_people_and_not_the_forgotten(tiny_world: Any) -> None:
    assert [gold.name for gold in tiny_world.golds] == ["gold-0", "gold-1"]
    for gold in tiny_world.golds:
        assert accuracy(gold, tiny_world.data("forget")) <= 0.3
        assert accuracy(gold, tiny_world.data("retain")) >= 0.9


def test_nobody_knows_the_held_out_people(tiny_world: Any) -> None:
    assert accuracy(tiny_world.original, tiny_world.data("holdout")) <= 0.3


def test_training_is_reproducible(tmp_path: Path, written: dict[str, Any]) -> None:
    rows, texts = tmp_path / "rows.jsonl", tmp_path / "texts.json"
    rows.write_text("".join(json.dumps(line) + "\n" for line in written["train_gold"][:40]), encoding="utf-8")
    texts.write_text(json.dumps([line["question"] for line in written["forget"] if "question" in line]))
    recipe = Recipe(hidden_size=16, intermediate_size=16, layers=1, heads=2, steps=3, batch_size=8)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(rows, texts, recipe, seed, tmp_path / name, os.getppid())
    first, again, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert first == again
    assert first != other


# --- building --------------------------------------------------------------------------------------------------------


def test_a_rebuild_keeps_an_edited_request_and_removes_old_golds(
    tiny_world: Any, build_tiny: Callable[..., Any], tmp_path: Path
) -> None:
    out = tmp_path / "world"
    first = build_tiny(out)
    assert "gold-1" in first.request.read_text()
    inodes = {file.stat().st_nlink for file in out.rglob("*") if file.is_file()}
    assert inodes == {1}, "files are copies of their own"
    second = build_tiny(out, gold_seeds=1)
    assert [gold.name for gold in second.golds] == ["gold-0"]
    assert "gold-1" not in second.request.read_text()
    second.request.write_text("name: mine\n")
    (out / "models" / "original" / "stale.bin").write_text("")
    third = build_tiny(out)
    assert len(third.golds) == 2
    assert third.request.read_text() == "name: mine\n"
    assert not (out / "models" / "original" / "stale.bin").exists()
    third.request.unlink()
    assert build_tiny(out).request.read_text() == tiny_world.request.read_text()


def test_other_folders_are_left_alone(build_tiny: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(OutputError, match="holds no world"):
        build_tiny(tmp_path)
    with pytest.raises(OutputError, match="is a file"):
        build_tiny(tmp_path / "mine.txt")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "world.json").write_text("{")
    with pytest.raises(OutputError, match="damaged"):
        build_tiny(tmp_path / "half")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half", "mine.txt"]


BUILDER = """
import sys
from expunge.world import build
from expunge.world.models import Recipe
recipe = Recipe(hidden_size=16, intermediate_size=16, layers=1, heads=2, steps=int(sys.argv[2]), batch_size=4)
build(sys.argv[1], people=11, forget=1, neighbours=1, holdout=1, gold_seeds=1, recipe=recipe)
"""


def test_a_killed_builder_leaves_no_process_and_is_resumed(tmp_path: Path) -> None:
    environment = {**os.environ, "EXPUNGE_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", BUILDER, str(tmp_path / "out")]
    # So many steps that nothing is finished before the kill.
    builder = subprocess.Popen([*command, "100000"], env=environment)
    try:
        until(lambda: bool(psutil.Process(builder.pid).children()))
        children = psutil.Process(builder.pid).children()
    finally:
        builder.kill()
        builder.wait()
    until(lambda: not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children))
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("cache/world/*/models/*/config.json"))

    subprocess.run([*command, "2"], env=environment, check=True)
    (original,) = tmp_path.glob("cache/world/*/models/original/model.safetensors")
    (gold,) = tmp_path.glob("cache/world/*/models/gold-0/config.json")
    before = original.stat().st_mtime_ns
    gold.unlink()  # as if the builder had been killed between the two
    subprocess.run([*command, "2"], env=environment, check=True)
    assert gold.is_file()
    assert original.stat().st_mtime_ns == before


def until(done: Callable[[], bool], seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < limit, "waited too long"
        time.sleep(0.1)
