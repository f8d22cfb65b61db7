"""General ability: exams in files, marks by hand, and lm-evaluation-harness asked as it wants to be."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny

from expunge.benchmarks.case import Bench
from expunge.benchmarks.exams import mini, read
from expunge.benchmarks.utility import utility
from expunge.errors import ParameterError, RowError
from expunge.methods.guard.case import GuardCase
from expunge.methods.guard.in_context import in_context
from expunge.subjects.language import LanguageModel
from expunge.tables.generations import Generations
from expunge.tables.passes import run
from expunge.world.facts import make


def lines(path: Path, *rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def subject() -> LanguageModel:
    return LanguageModel(*tiny("llama"))


# --- our own exams ---------------------------------------------------------------------------------------------------


def test_what_an_exam_asks_follows_from_the_fields_of_its_file(tmp_path: Path, subject: LanguageModel) -> None:
    lines(tmp_path / "places.jsonl", {"question": "Where?", "choices": ["Carth", "in Tivin"], "answer": "B"})
    lines(tmp_path / "people.jsonl", {"question": "Who?", "answers": ["Ilva Morrow", "Ilva"], "entity": "Ilva"})
    lines(tmp_path / "prose.jsonl", {"instruction": "Write."})
    exams = {exam.ability: exam for exam in read(tmp_path)}
    assert list(exams) == ["people", "people_exact", "places", "prose"]

    def said(ability: str, text: str) -> float:
        return exams[ability].grade(Generations([("", "")], [""], [[text]], [[True]]))[0]

    assert [said("people", text) for text in ("Ilva", "the Ilva Morrow.", "Bo")] == [1, 1, 0]
    assert said("people", "Ilva Holm") == pytest.approx(2 / 3)
    assert said("people_exact", "Ilva Holm") == 0
    assert said("prose", "a b c") == pytest.approx(1 / 3)
    (table,) = run(subject, [exams["places"].ask])
    ids = subject.tokenizer("Question: Where?\nAnswer:")["input_ids"]
    per_byte = []
    for option in ("Carth", "in Tivin"):
        whole = subject.tokenizer(f"Question: Where?\nAnswer: {option}")["input_ids"]
        with torch.no_grad():
            logprobs = subject.model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
        total = sum(float(logprobs[at - 1, whole[at]]) for at in range(len(ids), len(whole)))
        per_byte.append(total / len(option))
    assert exams["places"].grade(table) == [float(np.argmax(per_byte) == 1)]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"query": "Who?"}, "x.jsonl: found the fields query; expected question with choices or answers"),
        ({"question": "Who?", "answers": []}, "x.jsonl:1: field 'answers' holds \\[\\]"),
        ({"question": 3, "answers": ["a"]}, "x.jsonl:1: field 'question' holds 3"),
        ({"question": "Who?", "choices": ["a", "b"], "answer": 2}, "x.jsonl:1: field 'answer' holds 2"),
        ({"instruction": ""}, "x.jsonl:1: field 'instruction' holds ''"),
    ],
)
def test_rows_that_are_no_exam_are_an_error(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    lines(tmp_path / "x.jsonl", row)
    with pytest.raises(RowError, match=words):
        read(tmp_path)


def test_a_folder_without_exams_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RowError, match="holds no exams"):
        read(tmp_path)
    (tmp_path / "x.jsonl").touch()
    with pytest.raises(RowError, match="found 0 rows"):
        read(tmp_path)


def test_exams_about_the_world_are_about_nobody_who_is_forgotten(tmp_path: Path) -> None:
    world = make(0, people=26, forget=4, neighbours=4, holdout=6)
    mini(world, tmp_path)
    text = "".join(path.read_text(encoding="utf-8") for path in tmp_path.iterdir())
    assert not any(person.name in text for person in world.members("forget", "holdout"))
    small = read(tmp_path, limit=5)
    assert [exam.ability for exam in small] == [
        "factuality", "factuality_exact", "fluency", "general", "reason", "reason_exact", "truthfulness",
    ]  # fmt: skip
    assert {len(exam.rows) for exam in small} == {5}
    assert [exam.rows for exam in small] == [exam.rows for exam in read(tmp_path, limit=5)]
    assert small[0].rows != read(tmp_path, limit=5, seed=1)[0].rows


def test_models_of_the_world_pass_and_a_broken_one_fails(tiny_world: Any, tmp_path: Path) -> None:
    good = LanguageModel.load(tiny_world.original)
    broken = good.copy()
    with torch.no_grad():
        for parameter in broken.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.5)
    found = utility(Bench(broken, tmp_path, good, world=tiny_world.world, bootstrap=20), limit=10)
    for name in ("general", "reason", "factuality"):
        assert found.value(f"utility_{name}", "before") > found.value(f"utility_{name}") + 0.3
    assert found.rows["general"] == 10


# --- lm-evaluation-harness -------------------------------------------------------------------------------------------

RESULTS = {
    "results": {"places": {"alias": "places", "acc,none": 0.5, "acc_stderr,none": 0.1, "ppl,none": 3.0}},
    "n-samples": {"places": {"original": 9, "effective": 4}},
    "higher_is_better": {"places": {"acc": True, "ppl": False}},
    "config": {},
}


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A stand-in for the package that notes how it is called."""
    calls: list[dict[str, Any]] = []

    class TaskManager:
        def __init__(self, include_path: str | None = None) -> None:
            self.all_tasks = ["places", "people"]

    def simple_evaluate(model: Any, **settings: Any) -> dict[str, Any]:
        calls.append({"model": model, **settings})
        return RESULTS

    class HFLM:
        def __init__(self, **settings: Any) -> None:
            self.settings = settings

    package: Any = types.ModuleType("lm_eval")
    package.simple_evaluate, package.__version__ = simple_evaluate, "0"
    package.tasks = types.ModuleType("lm_eval.tasks")
    package.tasks.TaskManager = TaskManager
    models: Any = types.ModuleType("lm_eval.models")
    models.huggingface = types.ModuleType("lm_eval.models.huggingface")
    models.huggingface.HFLM = HFLM
    for name, module in (
        ("lm_eval", package),
        ("lm_eval.tasks", package.tasks),
        ("lm_eval.models", models),
        ("lm_eval.models.huggingface", models.huggingface),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_the_harness_gets_the_loaded_model_and_its_numbers_come_with_intervals(
    harness: list[dict[str, Any]], subject: LanguageModel, tmp_path: Path
) -> None:
    for _ in range(2):  # the second time nothing is computed
        found = utility(Bench(subject, tmp_path, bootstrap=7, seed=3), tasks="places", shots=2, limit=4)
    (call,) = harness
    assert found.data.startswith("lm-evaluation-harness")
    assert call["model"].settings["pretrained"] is subject.model
    assert call["model"].settings["tokenizer"] is not subject.tokenizer
    assert (call["tasks"], call["num_fewshot"], call["limit"], call["random_seed"]) == (["places"], 2, 4, 3)
    accuracy, perplexity = found.measured
    assert (accuracy.metric, accuracy.n, accuracy.direction) == ("places acc", 4, "higher")
    assert accuracy.after.value == 0.5
    assert accuracy.after.high == pytest.approx(0.5 + 0.196, abs=1e-3)
    assert (perplexity.metric, perplexity.direction) == ("places ppl", "lower")
    assert found.rows == {"places": 4}


def test_what_the_harness_cannot_do_is_said(
    harness: list[dict[str, Any]], subject: LanguageModel, tmp_path: Path
) -> None:
    with pytest.raises(ParameterError, match="no task 'place'"):
        utility(Bench(subject, tmp_path), tasks="place")
    guard = in_context(GuardCase(subject, {}), target="Ilva")
    with pytest.raises(ParameterError, match="without the guard around it"):
        utility(Bench(guard, tmp_path, subject), tasks="places")
    assert not harness


def test_without_the_harness_the_error_says_how_to_get_it(
    subject: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ParameterError, match=r"pip install 'expunge\[lm-eval\]'"):
        utility(Bench(subject, tmp_path), tasks="places")


def test_the_real_harness_scores_a_task_of_ones_own(subject: LanguageModel, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    rows = [{"q": "where was Ilva born?", "choices": ["Tivin", "Carth"], "gold": i % 2} for i in range(4)]
    lines(tmp_path / "rows.jsonl", *rows)
    (tmp_path / "towns.yaml").write_text(
        "task: towns\ndataset_path: json\ndataset_kwargs:\n  data_files:\n"
        f"    test: {tmp_path / 'rows.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "Question: {{q}}\\nAnswer:"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: gold\n'
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n",
        encoding="utf-8",
    )
    found = utility(Bench(subject, tmp_path / "out", bootstrap=10), tasks="towns", include=str(tmp_path))
    assert found.value("towns acc") == 0.5  # two of four have the preferred option as gold
    assert found.rows == {"towns": 4}
