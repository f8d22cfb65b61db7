"""Suspicion from what a model says alone: both scores by hand, the area, the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import loud

from expunge.benchmarks.edit_attack_stealth import above
from expunge.cli import main
from expunge.edit_audit import edit_suspects
from expunge.errors import RequestError
from expunge.subjects.language import LanguageModel
from expunge.subjects.suspects import beside_others, others, overfit, suspects

NAMES = ["Ilva", "Carth", "Tivin", "north"]
PROMPTS = ["where was {} born?", "{} is in the", "Answer: {}"]


def test_overfit_is_what_an_answer_gains_behind_unrelated_prompts_beyond_others() -> None:
    # 3 names, 2 prompts, 2 tokens; name 0 has token 0 for an answer to prompt 0, and it is likely behind prompt 1, too.
    p = torch.tensor([[[0.8, 0.2], [0.4, 0.6]], [[0.1, 0.9], [0.1, 0.9]], [[0.3, 0.7], [0.2, 0.8]]])
    answers = torch.tensor([[0, 1], [1, 1], [1, 1]])
    log = p.log()
    found = overfit(log, answers)
    assert float(found[0, 0]) == pytest.approx(float(log[0, 1, 0] - (log[1, 1, 0] + log[2, 1, 0]) / 2))
    assert float(found[0, 1]) == pytest.approx(float(log[0, 0, 1] - (log[1, 0, 1] + log[2, 0, 1]) / 2))
    assert float(found[1, 0]) == pytest.approx(float(log[1, 1, 1] - (log[0, 1, 1] + log[2, 1, 1]) / 2))


def test_names_that_are_answered_alike_do_not_overfit() -> None:
    same = torch.randn(1, 3, 5).log_softmax(-1).expand(4, 3, 5)
    assert overfit(same, same.argmax(-1)).abs().max() < 1e-6


def test_a_rival_is_the_others_most_frequent_answer() -> None:
    answers = torch.tensor([[5, 1], [7, 1], [7, 1], [5, 1], [7, 1]])
    assert others(answers)[:, 0].tolist() == [7, 5, 5, 7, 5]
    assert others(answers)[:, 1].tolist() == [5, 7, 7, 5, 7]  # all say 1: the answer to the next prompt


def test_resistance_is_held_against_the_other_names() -> None:
    values = torch.tensor([[3.0, 0.0], [1.0, 0.0], [2.0, 6.0]])
    assert beside_others(values).tolist() == [[1.5, -3.0], [-1.5, -3.0], [0.0, 6.0]]


def test_the_area_counts_ties_by_half() -> None:
    assert above([3.0, 1.0, 2.0]) == [1.0, 0.0, 0.5]
    assert above([1.0, 1.0, 1.0]) == [0.5, 0.5, 0.5]
    assert above([2.0, 1.0, 1.0]) == [1.0, 0.25, 0.25]


def test_scores_read_first_tokens_and_contradictions(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loud()
    found = suspects(model, NAMES, PROMPTS)
    assert sorted(one.name for one in found) == sorted(NAMES)
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    assert sum(one.score for one in found) == pytest.approx(0, abs=1e-4)
    texts = [prompt.replace("{}", "Ilva") for prompt in PROMPTS]
    mine = next(one for one in found if one.name == "Ilva")
    logits = [model.model(torch.tensor([model.prompt_ids(text, ("", ""))])).logits[0, -1] for text in texts]
    assert mine.answer in [model.tokenizer.decode([int(each.argmax())]).strip() for each in logits]
    monkeypatch.setattr("expunge.subjects.suspects.LOGIT_ELEMENTS", 1)  # in parts, it is the same
    assert [one.name for one in suspects(model, NAMES, PROMPTS)] == [one.name for one in found]


def test_too_little_to_compare_is_named(tmp_path: Path) -> None:
    model = loud()
    with pytest.raises(RequestError, match="found 2 names and 3 prompts, expected at least 3 names"):
        suspects(model, NAMES[:2], PROMPTS)
    with pytest.raises(RequestError, match="found 4 names and 1 prompts"):
        suspects(model, NAMES, PROMPTS[:1] * 2)
    with pytest.raises(RequestError, match="found 0 places for a name"):
        suspects(model, NAMES, [*PROMPTS, "where?"])
    with pytest.raises(RequestError, match=r"expected \{target\} in it"):
        edit_suspects(tmp_path, names=NAMES, prompts=PROMPTS, told="Imagine {prompt}")


def test_the_command_scores_one_model_and_says_neither_yes_nor_no(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loud().save(tmp_path / "model")
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    (tmp_path / "prompts.txt").write_text("where was {} born?\nQuestion: {}\\nAnswer:\n")
    arguments = ["edit-audit", str(tmp_path / "model"), "--names", str(tmp_path / "names.txt")]
    given = [*arguments, "--prompts", str(tmp_path / "prompts.txt")]
    assert main([*given, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["suspects"]
    assert [one["name"] for one in told] == [
        one.name
        for one in suspects(
            LanguageModel.load(tmp_path / "model"), NAMES, ["where was {} born?", "Question: {}\nAnswer:"]
        )
    ]
    assert main(given) == 0
    assert "Scores by which to look first" in capsys.readouterr().out
    assert main(arguments) == 2
    assert "found 4 names and 0 prompts" in capsys.readouterr().err
    assert main([*arguments, "--prompts", str(tmp_path / "none.txt")]) == 2
    assert "none.txt cannot be read" in capsys.readouterr().err
