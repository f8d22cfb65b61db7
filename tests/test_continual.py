"""Continual forgetting: tasks, the H-mean by hand, and sequences served by methods of several kinds."""

import json
import random

import numpy as np
import pytest

from expunge.bench import bench
from expunge.benchmarks.continual_data import TaskFile, figures, h_mean, prepare, read, splits, write
from expunge.errors import ParameterError, RowError
from expunge.world.pictures.draw import digits
from expunge.world.pictures.models import Recipe, untrained

CLASSES = [str(i) for i in range(10)]


@pytest.fixture(scope="module")
def rows():
    found = digits(8)
    return {"train": found["train"][:150], "test": found["test"][:120]}


@pytest.fixture(scope="module")
def vit():
    return untrained(CLASSES, Recipe(kind="vit", side=8, widths=(8,)), 0)


def test_tasks_take_classes_from_the_end_of_a_shuffled_order():
    names = [f"{i:02}" for i in range(100)]
    tasks = splits(TaskFile(first=80, per_task=20, tasks=4), names)
    order = list(names)
    random.Random(1337).shuffle(order)
    assert [task.forget for task in tasks] == [tuple(order[a : a + 20]) for a in (80, 60, 40, 20)]
    assert set(tasks[2].old) == set(order[60:])
    assert {name for task in tasks for name in task.forget} | set(tasks[-1].retain) == set(names)
    assert all(not set(task.forget) & set(task.retain) for task in tasks)
    missing = splits(TaskFile(first=8, per_task=2, tasks=3, missing_classes=2), CLASSES)
    assert all(task.missing == task.retain[:2] for task in missing)
    assert missing[0].missing == missing[2].missing


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ({"first": 8, "per_task": 3, "tasks": 2}, r"expected first \+ per_task to be the 10 classes"),
        ({"first": 8, "per_task": 2, "tasks": 5}, "at least one class to be left"),
        ({"first": 8}, "expected either `forget`, or all of"),
        ({"forget": [["3"]], "first": 8, "per_task": 2, "tasks": 1}, "expected either"),
        ({"forget": [["3"], ["ten"]]}, "task 2: there is no class 'ten'"),
        ({"forget": [["3"], []]}, "task 2 forgets 0 classes"),
        ({"forget": [CLASSES[:8]], "missing_classes": 2}, "leaves 2, of which 2 without rows"),
    ],
)
def test_tasks_that_do_not_fit_are_refused(file, sentence):
    with pytest.raises(RowError, match=sentence):
        splits(TaskFile(**file), CLASSES)


def test_rows_are_few_and_a_class_may_have_none(rows):
    case = prepare(rows, TaskFile(forget=[["3"], ["3", "7"]], few_shot=2, missing_classes=1))
    assert len(case.rows["train"]) == 20
    assert case.notes == ["Task 2 asks for 3, which an earlier one has taken away already."]
    request = case.request(case.tasks[1])
    assert sorted(row.answer for row in request["forget"]) == ["3", "3", "7", "7"]
    assert len(request["retain"]) == 14
    assert case.tasks[0].missing[0] not in {row.answer for row in request["retain"]}
    share = prepare(rows, TaskFile(forget=[["3"]], data_ratio=0.3))
    own = [sum(row.answer == name for row in some) for name in CLASSES for some in (rows["train"], share.rows["train"])]
    assert own[1::2] == [max(1, round(0.3 * n)) for n in own[::2]]
    with pytest.raises(RowError, match="few_shot is 500, but class"):
        prepare(rows, TaskFile(forget=[["3"]], few_shot=500))


def test_a_task_file_is_read_and_its_mistakes_are_named(rows, tmp_path):
    write(rows, TaskFile(first=8, per_task=2, tasks=3), tmp_path)
    assert [len(task.forget) for task in read(tmp_path).tasks] == [2, 2, 2]
    (tmp_path / "tasks.json").write_text(json.dumps({"first": 8, "per_tasks": 2}))
    with pytest.raises(RowError, match=r"tasks\.json: per_tasks: Extra inputs"):
        read(tmp_path)
    (tmp_path / "tasks.json").write_text(json.dumps({"forget": [["3"]], "classes": ["3", "x"]}))
    with pytest.raises(RowError, match="classes: "):
        read(tmp_path)


def test_the_h_mean_by_hand():
    assert float(h_mean(0.9, 0.6)) == pytest.approx(0.72)
    assert float(h_mean(0.0, 0.0)) == 0
    assert float(h_mean(0.9, -0.1)) == 0
    assert h_mean(np.array([1.0, 0.5]), np.array([1.0, 0.5])).tolist() == [1.0, 0.5]


def test_figures_are_accuracies_of_each_kind_of_class():
    task = splits(TaskFile(forget=[["a"], ["b"]], missing_classes=1), ["a", "b", "c", "d"])[1]
    labels = ["a", "b", "b", "c", "c", "d", "d"]
    before = np.array([1.0, 1, 1, 1, 1, 1, 1])
    after = np.array([0.0, 1, 0, 1, 0, 1, 1])
    found = figures(task, labels, before, after)
    assert found == {"before": 1.0, "forget": 0.5, "retain": 0.75, "old": 0.0, "missing": 0.5, "h": pytest.approx(0.6)}
    assert figures(splits(TaskFile(forget=[["a"]]), ["a", "b", "c", "d"])[0], labels, before, after)["old"] is None


@pytest.mark.parametrize("method", ["gs_lora", "neggrad_plus", "ssd", "retrain"])
def test_any_method_serves_a_sequence_and_a_killed_command_goes_on(rows, vit, tmp_path, monkeypatch, method):
    write(rows, TaskFile(forget=[["3"], ["7"]], data_ratio=0.3), tmp_path / "data")
    settings = {"method": method, "training": {"steps": 2, "batch_size": 8, "learning_rate": 1e-2}}
    if method == "gs_lora":
        settings["per_task"] = {"beta": [0.2, 0.4]}
    if method == "retrain":
        settings["settings"] = {"epochs": 1.0}
    card = bench("continual_forgetting", vit, data=str(tmp_path / "data"), out=tmp_path / "out", settings=settings)
    (table,) = card.tables
    assert [line[1] for line in table.rows] == ["3", "7"]
    assert table.rows[0][5] == ""
    assert table.rows[1][5] != ""
    assert 0 <= card.value("h_mean") <= 1
    means = [float(line[table.columns.index("H")]) for line in table.rows]
    assert card.value("h_mean") == pytest.approx(np.mean(means) / 100, abs=1e-3)
    assert {one.metric for one in card.measured} == {"h_mean", "retain_accuracy", "forgotten_accuracy"}
    assert (table.rows[0][table.columns.index("active")] != "") == (method == "gs_lora")
    monkeypatch.setattr("expunge.benchmarks.served.serve", None)
    again = bench("continual_forgetting", vit, data=str(tmp_path / "data"), out=tmp_path / "out", settings=settings)
    assert again.tables[0].rows == table.rows


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"per_task": {"beta": [0.2]}}, "beta has 1 values for 2 tasks"),
        ({"training": {"stepz": 2}}, "training has no field .stepz"),
        ({"training": {"steps": "many"}}, "training.steps"),
        ({"method": "idk"}, "idk changes no weights of image classifiers"),
    ],
)
def test_settings_that_cannot_be_are_refused(rows, vit, tmp_path, settings, sentence):
    write(rows, TaskFile(forget=[["3"], ["7"]]), tmp_path / "data")
    with pytest.raises(ParameterError, match=sentence):
        bench("continual_forgetting", vit, data=str(tmp_path / "data"), out=tmp_path / "out", settings=settings)
