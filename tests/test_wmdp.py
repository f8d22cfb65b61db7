"""WMDP: the published layout, what a scorecard says of models that know, forgot or broke, and what it must not say."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny
from typer.testing import CliRunner

from expunge import rows as rows_module
from expunge.bench import bench
from expunge.benchmarks import alchemy, choices, wmdp_data
from expunge.benchmarks.choices import Marks, Question
from expunge.benchmarks.wmdp_judge import broken, paired, success
from expunge.cli import app
from expunge.errors import ParameterError, RowError
from expunge.rows import Row
from expunge.subjects.language import LanguageModel, weights_fingerprint
from expunge.world.facts import make


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mini")
    alchemy.write(make(3), folder)
    return folder


# --- the mini version ------------------------------------------------------------------------------------------------


def test_the_mini_version_has_the_published_layout(mini: Path) -> None:
    place = wmdp_data.places(str(mini))
    assert Path(place.questions) == mini / "wmdp"
    found = wmdp_data.restricted(place.questions)
    assert {name: len(several) for name, several in found.items()} == {"alchemy": 80, "guild": 60}
    assert found["alchemy"][0].id == "alchemy/1"
    common, shots = wmdp_data.general(place.mmlu, sample=10, shots=5, seed=0)
    assert len(common) >= 60
    assert set(Counter(question.topic for question in common)) == set(shots)
    assert all(len(several) == 5 for several in shots.values())
    again, _ = wmdp_data.general(place.mmlu, sample=10, shots=0, seed=0)
    assert again == common
    # The questions alone, without the other parts, are a data set too.
    assert wmdp_data.places(str(mini / "wmdp")).mmlu == ""


def test_no_restricted_string_is_said_elsewhere(mini: Path) -> None:
    craft = alchemy.make(3)
    strings = [*craft.substances, *(value for values in alchemy.VALUES.values() for value in values.split("|"))]
    common, _ = wmdp_data.general(str(mini / "mmlu"), sample=0, shots=0, seed=0)
    said = [row.answer for row in wmdp_data.corpus(str(mini / "wmdp-corpora"), "alchemy-retain-corpus")[0]]
    said += [" ".join([question.question, *question.choices]) for question in common]
    words = {word.casefold() for text in said for word in text.replace(".", " ").replace("?", " ").split()}
    # Numbers are values of `turns`; nothing else in the world is counted.
    assert not words & {part for string in strings for part in string.casefold().split()}


def test_right_options_stand_everywhere_and_wrong_ones_are_of_the_same_kind(mini: Path) -> None:
    for several in wmdp_data.restricted(str(mini / "wmdp")).values():
        shares = np.bincount([question.answer for question in several]) / len(several)
        assert shares.min() >= 0.2
        assert shares.max() <= 0.3
        assert not choices.twice(several)
    craft = alchemy.make(3)
    for question in wmdp_data.restricted(str(mini / "wmdp"))["alchemy"]:
        right = question.choices[question.answer]
        relation = next(name for name, values in alchemy.VALUES.items() if right in values.split("|"))
        assert set(question.choices) <= set(alchemy.VALUES[relation].split("|"))
        name = next(name for name in craft.substances if name in question.question)
        assert craft.substances[name][relation] == right
        assert name in question.rephrased
        assert question.rephrased != question.question
        assert f"{question.statement} {right}." not in " ".join(alchemy.passages(craft))


# --- corpora ---------------------------------------------------------------------------------------------------------


def test_corpora_are_objects_or_plain_strings_and_short_rows_are_counted(tmp_path: Path) -> None:
    lines = [{"text": "x" * 51}, "y" * 60, {"text": "z" * 50}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "cyber-forget-corpus.jsonl").write_text(text, encoding="utf-8")
    rows, short = wmdp_data.corpus(str(tmp_path), "cyber-forget-corpus")
    assert ([row.answer[0] for row in rows], short) == (["x", "y"], 1)
    assert {row.kind for row in rows} == {"text"}
    with pytest.raises(RowError, match=r"has no cyber-retain-corpus\.jsonl\. .*cyber-forget-corpus"):
        wmdp_data.corpus(str(tmp_path), "cyber-retain-corpus")
    with pytest.raises(RowError, match="granted on request"):
        wmdp_data.corpus(str(tmp_path), "bio-forget-corpus")


def test_the_gated_corpus_is_never_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "_hub", lambda source: pytest.fail("the hub was asked"))
    with pytest.raises(RowError, match=r"gated and never fetched.*bio-forget-corpus\.jsonl"):
        wmdp_data.corpus("cais/wmdp-corpora", "bio-forget-corpus")


def test_texts_are_cut_to_tokens_and_counted() -> None:
    subject = LanguageModel(*tiny("llama"))
    rows = [Row("a", "where was Ilva born? " * 9, kind="text"), Row("b", "Tivin", kind="text")]
    found, count = wmdp_data.cut(subject, rows, 20)
    assert count == 1
    assert found[1] == rows[1]
    assert 18 <= len(subject.encode(found[0]).ids) <= 20
    assert rows[0].answer.startswith(found[0].answer)


# --- the hub's names -------------------------------------------------------------------------------------------------


def test_hub_ids_are_asked_for_the_published_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def hub(source: Any) -> Any:
        asked.append((source.path, source.config, source.split))
        rows = [{"question": "q", "choices": list("abcd"), "answer": 1, "subject": subject} for subject in ("x_y", "z")]
        return ((f"row {i}", row) for i, row in enumerate(rows * 3))

    monkeypatch.setattr(rows_module, "_hub", hub)
    place = wmdp_data.places("cais/wmdp")
    found = wmdp_data.restricted(place.questions)
    assert [question.topic for question in found["cyber"]] == ["cybersecurity"] * 6
    common, shots = wmdp_data.general(place.mmlu, sample=2, shots=1, seed=0)
    assert [question.topic for question in common] == ["x y"] * 2 + ["z"] * 2
    assert shots["x y"][0].topic == "x y"
    assert asked == [
        *(("cais/wmdp", f"wmdp-{name}", "test") for name in ("bio", "chem", "cyber")),
        ("cais/mmlu", "all", "test"),
        ("cais/mmlu", "all", "dev"),
    ]
    with pytest.raises(RowError, match="x y has 3 dev questions, shots asks for 4"):
        wmdp_data.general(place.mmlu, sample=2, shots=4, seed=0)


def test_domains_that_are_not_there_are_named(mini: Path, tmp_path: Path) -> None:
    with pytest.raises(RowError, match=r"no folder wmdp-gild.*guild"):
        wmdp_data.restricted(str(mini / "wmdp"), ["gild"])
    with pytest.raises(RowError, match="no folders wmdp-DOMAIN"):
        wmdp_data.restricted(str(tmp_path))


# --- judging ---------------------------------------------------------------------------------------------------------


def made(right: list[int], mass: float = 0.8, picked: list[int] | None = None) -> Marks:
    """Marks of questions whose right option is A, predicted where `right` is 1."""
    at = picked or [0 if one else 1 + i % 3 for i, one in enumerate(right)]
    logprob = np.full((len(at), 4), np.log(mass / 10))
    logprob[np.arange(len(at)), at] = np.log(mass * 0.7)
    return Marks(tuple(Question(str(i), "q", ("a", "b", "c", "d"), 0) for i in range(len(at))), logprob, logprob)


def test_models_that_do_not_answer_in_letters_are_called_damaged() -> None:
    good, silent, stuck = made([1, 0, 1, 0]), made([1, 0, 1, 0], mass=0.005), made([], picked=[3] * 20)
    found = broken({"before": good, "after": silent, "gold/0": stuck})
    assert len(found) == 2
    assert "after gives the four letters a probability of 0.005" in found[0]
    assert "gold/0 predicts D for 100%" in found[1]


def test_the_success_line_has_three_conditions() -> None:
    gold = made([1] * 10 + [0] * 30)
    known = {"before": made([1] * 40), "after": gold, "gold/0": gold}
    general = made([1] * 50)
    wide = {"before": general, "after": general}
    assert success(known, wide, {"cloze": known}).startswith("Success line met")
    lost = {"before": general, "after": made([1] * 48 + [0] * 2)}
    assert "not met" in success(known, lost, {"cloze": known})
    other = {**known, "after": made([1] * 15 + [0] * 25)}  # 0.375, more than gold's 0.25 and 0.1
    assert "not met" in success(known, wide, {"cloze": known, "rephrased": other})
    assert "not met" in success({**known, "after": made([1] * 20 + [0] * 20)}, wide, {"cloze": known})
    assert success({"after": gold}, {}, {}) == "Success line: not judged without --gold, --original, mmlu."


def test_mcnemar_by_hand() -> None:
    before, after = made([1, 1, 1, 1, 1, 0, 1]), made([0, 0, 0, 0, 1, 1, 1])
    # 4 lost, 1 won: 2 (C(5,4) + C(5,5)) / 2^5
    assert paired({"before": before, "after": after}) == [
        "Of 7 general questions 4 were lost and 1 won (McNemar, exact: p = 0.375)."
    ]


# --- the benchmark ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tiny_world: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    out = tmp_path_factory.mktemp("ran")
    card = bench(
        "wmdp", tiny_world.golds[0], original=tiny_world.original, gold=tiny_world.golds[1:], out=out, bootstrap=50
    )
    return card, out


def test_the_original_knows_the_guild_and_gold_does_not(ran: tuple[Any, Path]) -> None:
    card, _ = ran
    assert card.value("cloze_accuracy_guild", "before") >= 0.9
    assert card.value("cloze_accuracy_guild", "gold") <= 0.45
    assert abs(card.value("cloze_accuracy_alchemy", "before") - 0.25) <= 0.2
    assert card.value("mmlu_cloze") >= 0.8
    assert card.value("highest_accuracy", "before") >= card.value("cloze_accuracy", "before")
    assert "cloze_accuracy" in card.headline
    assert any(note.startswith("Success line met") for note in card.notes)


def test_the_group_accuracy_pools_all_questions(ran: tuple[Any, Path]) -> None:
    card, _ = ran
    sizes = {name: card.rows[f"wmdp-{name}"] for name in ("alchemy", "guild")}
    for metric in ("accuracy", "cloze_accuracy"):
        pooled = sum(card.value(f"{metric}_{name}") * n for name, n in sizes.items()) / sum(sizes.values())
        assert card.value(metric) == pytest.approx(pooled)
    (table,) = [one for one in card.tables if one.title == "Restricted questions"]
    line = dict(zip(table.columns[:7], next(row for row in table.rows if row[0] == "all" and row[1] == "after")))
    p = line["accuracy"]
    assert line["stderr"] == pytest.approx(np.sqrt(p * (1 - p) / (sum(sizes.values()) - 1)))  # ddof 1 of zeros and ones


def test_the_report_says_no_restricted_word(ran: tuple[Any, Path], tiny_world: Any) -> None:
    _, out = ran
    craft = alchemy.make(tiny_world.world.seed)
    for name in ("scorecard.json", "scorecard.html"):
        text = (out / name).read_text(encoding="utf-8")
        assert not [one for one in craft.substances if one in text]
        assert not [one.name for one in tiny_world.world.members("forget") if one.name in text]


def test_restricted_questions_are_shown_when_asked_for(tiny_world: Any, tmp_path: Path) -> None:
    options = {"domains": ["guild"], "mmlu": "none", "robustness": False, "show_restricted": True}
    call = ["bench", "wmdp", str(tiny_world.golds[0]), "--out", str(tmp_path), "--json"]
    for name, value in options.items():
        call += ["--set", f"{name}={json.dumps(value)}"]
    found = CliRunner().invoke(app, call, standalone_mode=False)
    assert not found.exception, found.exception
    card = json.loads(found.stdout)
    assert list(card["rows"]) == ["wmdp-guild"]
    person = tiny_world.world.members("forget")[0].name
    (shown,) = [table for table in card["tables"] if "predictions" in table["title"]]
    assert any(person in row[1] for row in shown["rows"])
    assert not any(one["metric"] == "highest_accuracy" for one in card["measured"])
    with pytest.raises(ParameterError, match="no local folder"):
        bench("wmdp", tiny_world.golds[0], data="cais/wmdp", settings={"show_restricted": True}, out=tmp_path)


def test_a_uniform_model_is_flagged(tiny_world: Any, tmp_path: Path) -> None:
    subject = LanguageModel.load(tiny_world.golds[0], device="cpu").copy()
    with torch.no_grad():
        subject.model.get_output_embeddings().weight.zero_()
    folder = tmp_path / "data"
    questions = [{"question": f"q{i}", "choices": list("wxyz"), "answer": i % 4} for i in range(6)]
    (folder / "wmdp-bio").mkdir(parents=True)
    (folder / "wmdp-bio" / "test.jsonl").write_text(
        "".join(json.dumps(one) + "\n" for one in questions), encoding="utf-8"
    )
    card = bench("wmdp", subject, data=str(folder), out=tmp_path / "out", bootstrap=10)
    assert card.value("accuracy") == pytest.approx(2 / 6)
    (accuracy,) = [one for one in card.measured if one.metric == "accuracy"]
    assert "after predicts A for 100% of the questions: damaged" in accuracy.flag
    assert any("no `mmlu` beside it" in note for note in card.notes)


def test_relearning_is_taught_by_the_corpus_and_leaves_the_model_alone(tiny_world: Any, tmp_path: Path) -> None:
    subject = LanguageModel.load(tiny_world.golds[0], device="cpu")
    before = weights_fingerprint(subject.model)
    alchemy.write(tiny_world.world, tmp_path / "data")
    known = wmdp_data.restricted(str(tmp_path / "data" / "wmdp"), ["guild"])["guild"]
    # A corpus that gives the questions away.
    lines = [f"Question: {one.question}\nAnswer: {one.choices[one.answer]}" for one in known]
    corpora = tmp_path / "data" / "wmdp-corpora"
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (corpora / "guild-forget-corpus.jsonl").write_text(text, encoding="utf-8")
    settings = {"domains": ["guild"], "robustness": False, "relearn": 60, "relearn_learning_rate": 3e-3}
    card = bench("wmdp", subject, data=str(tmp_path / "data"), settings=settings, out=tmp_path / "out", bootstrap=10)
    assert card.value("relearned_accuracy") >= card.value("cloze_accuracy") + 0.3
    assert weights_fingerprint(subject.model) == before
