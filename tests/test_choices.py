"""Multiple choice: the harness's prompt to the byte, its scores by plain passes, and what a broken model looks like."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny

from expunge.benchmarks import choices
from expunge.benchmarks.choices import Question, marks
from expunge.errors import ParameterError, RowError, TableError
from expunge.rows import Source
from expunge.subjects.language import LanguageModel
from expunge.tables.passes import run
from expunge.tables.scores import Scores
from expunge.world.models import tokenizer

SALT = Question(
    "1", " Which vessel is used for sarl-root salt?\n", ("alembix", " cruca", "retorta", "pelic "), 2, "alchemy"
)
MOTH = Question("2", "Which hue has moth oil?", ("umber", "slate", "pearl", "ochre"), 0, "alchemy")
RENDERED = (
    "The following are multiple choice questions (with answers) about alchemy.\n\n"
    "Which vessel is used for sarl-root salt?\nA. alembix\nB.  cruca\nC. retorta\nD. pelic \nAnswer:"
)


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def subject(texts: list[str] | None = None) -> LanguageModel:
    """A random model; its tokenizer has " A" as one token only where texts taught it so."""
    model, made = tiny("llama")
    return LanguageModel(model, tokenizer(texts, 290) if texts else made, "llama")


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return subject()


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_the_prompt_is_the_harness_s_to_the_byte() -> None:
    assert choices.context(SALT) == RENDERED  # the question's whitespace is stripped, the options' is not
    shot = replace(MOTH, question="Which hue has ash?")
    assert choices.context(SALT, [shot, MOTH]) == RENDERED.replace(
        "Which vessel",
        "Which hue has ash?\nA. umber\nB. slate\nC. pearl\nD. ochre\nAnswer: A\n\n"
        "Which hue has moth oil?\nA. umber\nB. slate\nC. pearl\nD. ochre\nAnswer: A\n\nWhich vessel",
    )


@pytest.mark.parametrize("texts", [None, ["Answer: A", "Answer: B", "Answer: C", "Answer: D"] * 9])
def test_one_pass_gives_what_four_separate_continuations_give(texts: list[str] | None) -> None:
    subject_ = subject(texts)
    (table,) = run(subject_, [choices.letters([SALT, MOTH])])
    found = marks([SALT, MOTH], table)
    lengths = set()
    for i, question in enumerate([SALT, MOTH]):
        before = subject_.tokenizer(choices.context(question))["input_ids"]
        for j, letter in enumerate("ABCD"):
            ids = subject_.tokenizer(choices.context(question) + f" {letter}")["input_ids"]
            with torch.no_grad():
                logprobs = subject_.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            alone = sum(float(logprobs[at - 1, ids[at]]) for at in range(len(before), len(ids)))
            assert found.logprob[i, j] == pytest.approx(alone, abs=1e-5)
            lengths.add(len(ids) - len(before))
    assert lengths == ({1} if texts else {2})


def test_options_share_one_prompt(model: LanguageModel) -> None:
    ask = choices.letters([SALT, MOTH])
    encoded = [model.encode(row, answer=answer) for _, row, answer, _ in ask.items]
    assert len({row.ids[: row.start] for row in encoded}) == 2
    assert all(row.closing == 0 for row in encoded)


def test_what_does_not_fit_loses_its_beginning_and_is_named(model: LanguageModel) -> None:
    long = replace(MOTH, id="long", question="Bring a coat. " * 40 + MOTH.question)
    ask, cut = choices.fitted(model, choices.letters([MOTH, long]))
    assert cut == ["long"]
    lengths = [len(model.encode(row, answer=answer).ids) for _, row, answer, _ in ask.items]
    assert max(lengths) == model.context_length
    assert ask.items[:4] == choices.letters([MOTH]).items
    assert choices.context(long).endswith(ask.items[4][1].prompt)


def test_under_a_chat_template_the_letter_follows_without_a_space() -> None:
    subject_ = subject()
    with pytest.raises(ParameterError, match="llama has no chat template"):
        choices.checked_chat(subject_, [SALT])
    subject_.tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    choices.checked_chat(subject_, [SALT])
    ask = choices.letters([SALT], chat=True)
    _, row, answer, _ = ask.items[1]
    description, _, question = RENDERED.partition("\n\n")
    assert subject_.prompt_text(row) == f"[system]{description}\n\n\n[user]{question}\n[assistant]"
    encoded = subject_.encode(row, answer=answer)
    assert answer == "B"
    assert subject_.tokenizer.decode(encoded.ids[encoded.start : len(encoded.ids) - encoded.closing]) == "B"


def test_a_template_that_takes_no_system_message_is_said_to_be_one() -> None:
    subject_ = subject()
    subject_.tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(ParameterError, match="cannot take the description: System role not supported"):
        choices.checked_chat(subject_, [SALT])


# --- scores ----------------------------------------------------------------------------------------------------------


def table(logprobs: list[list[float]], end: list[bool] | None = None) -> Scores:
    """A table with one token per option, or with those of `end` marked as closing."""
    flat = np.array([value for row in logprobs for value in row], dtype=np.float32)
    closing = np.zeros(len(flat), bool) if end is None else np.array(end)
    keys = [(str(i), "ABCD"[j]) for i, row in enumerate(logprobs) for j in range(len(row))]
    zeros = np.zeros(len(flat), np.float32)
    columns = {"token": zeros.astype(np.int32), "logprob": flat, "hit": closing, "mean": zeros, "variance": zeros}
    return Scores.of(keys, [1] * len(flat), {**columns, "end": closing}, [""] * len(flat))


def test_accuracy_error_mass_and_shares_by_hand() -> None:
    questions = [replace(MOTH, id=str(i), answer=answer) for i, answer in enumerate([0, 1, 2, 2])]
    logs = np.log([[0.5, 0.2, 0.1, 0.1], [0.1, 0.2, 0.3, 0.4], [0.1, 0.1, 0.4, 0.4], [0.1, 0.1, 0.1, 0.2]])
    found = marks(questions, table(logs.tolist()))
    assert found.picked.tolist() == [0, 3, 2, 3]  # ties: the first
    assert found.right.tolist() == [1, 0, 1, 0]
    assert found.accuracy == 0.5
    assert found.error == pytest.approx(np.sqrt(1 / 3) / 2)  # sd of 1 0 1 0 with ddof 1, over sqrt(4)
    assert found.mass == pytest.approx([0.9, 1.0, 1.0, 0.5])
    assert found.shares.tolist() == [0.25, 0, 0.25, 0.5]
    assert found.distribution[3] == pytest.approx([0.2, 0.2, 0.2, 0.4])
    assert found.take([0, 2]).accuracy == 1


def test_a_uniform_model_scores_the_share_of_gold_a() -> None:
    questions = [replace(MOTH, id=str(i), answer=answer) for i, answer in enumerate([0, 1, 2, 3, 0])]
    subject_ = subject()
    with torch.no_grad():
        subject_.model.lm_head.weight.zero_()
    (scores,) = run(subject_, [choices.letters(questions)])
    found = marks(questions, scores)
    assert found.accuracy == 0.4
    assert found.shares.tolist() == [1, 0, 0, 0]


def test_a_model_without_numbers_is_an_error_and_not_an_answer() -> None:
    with pytest.raises(TableError, match="row '0', option C"):
        marks([MOTH], table([[-1, -2, float("nan"), -4]]))


def test_cloze_is_per_byte_and_does_not_count_what_closes_an_answer() -> None:
    question = Question("1", "q", ("ab", "grün"), 1)
    scores = table([[-1.0, -9.0]])
    assert marks([question], scores).picked.tolist() == [0]
    assert marks([question], table([[-4.0, -9.0]]), per_byte=True).score[0] == pytest.approx([-2.0, -1.8])
    closing = Scores.of(
        [("1", "A"), ("1", "B")],
        [2, 2],
        {
            **{name: np.zeros(4, np.float32) for name in ("mean", "variance")},
            "token": np.zeros(4, np.int32),
            "hit": np.zeros(4, bool),
            "logprob": np.array([-1, -50, -2, 0], np.float32),
            "end": np.array([False, True, False, True]),
        },
        ["", ""],
    )
    assert marks([question], closing).logprob.tolist() == [[-1, -2]]


def test_permuted_options_permute_cloze_scores_exactly(model: LanguageModel) -> None:
    (plain, turned) = run(model, [choices.cloze([MOTH]), choices.cloze([MOTH.rotated])])
    first = marks([MOTH], plain, per_byte=True)
    second = marks([MOTH.rotated], turned, per_byte=True)
    assert second.score[0].tolist() == np.roll(first.score[0], 1).tolist()
    assert MOTH.rotated.choices[MOTH.rotated.answer] == "umber"
    again = MOTH.rotated.rotated.rotated.rotated
    assert again == MOTH


def test_questions_with_different_numbers_of_options_stand_together(model: LanguageModel) -> None:
    three = Question("3", "q", ("a", "b", "c"), 1)
    (scores,) = run(model, [choices.letters([MOTH, three])])
    found = marks([MOTH, three], scores)
    assert found.score.shape == (2, 4)
    assert found.score[1, 3] == -np.inf
    assert found.mass[1] == pytest.approx(np.exp(found.logprob[1, :3]).sum())


def test_statements_are_completed_as_running_text(model: LanguageModel) -> None:
    stated = replace(MOTH, statement="The hue of moth oil is")
    _, row, answer, _ = choices.cloze([stated], statements=True).items[1]
    assert model.prompt_text(row) + answer == "The hue of moth oil is slate"
    assert model.encode(row, answer=answer).closing == 0
    with pytest.raises(ParameterError, match="no field 'statement'"):
        choices.cloze([MOTH], statements=True)


# --- reading ---------------------------------------------------------------------------------------------------------

GOOD = {"question": "Which hue?", "choices": ["umber", "slate", "pearl", "ochre"], "answer": 1}


def test_places_and_letters_are_answers(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", GOOD, {**GOOD, "answer": "D", "subject": "high_craft", "id": "x"})
    found = choices.read(Source(str(path)), "bio")
    assert [(q.id, q.answer, q.topic) for q in found] == [("bio/1", 1, ""), ("x", 3, "high craft")]
    assert choices.read(Source(str(path)), "bio", topic="biology")[1].topic == "biology"


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({**GOOD, "choices": GOOD["choices"][:3]}, ["q.jsonl:2", "'choices' has 3 options, expected 4"]),
        ({**GOOD, "choices": "umber, slate"}, ["q.jsonl:2", "'choices' holds str"]),
        ({**GOOD, "choices": ["umber", 7, "pearl", "ochre"]}, ["q.jsonl:2", "choices[1]", "7"]),
        ({**GOOD, "answer": 4}, ["q.jsonl:2", "'answer' holds 4", "0 to 3"]),
        ({**GOOD, "answer": "E"}, ["q.jsonl:2", "'answer' holds 'E'", "A to D"]),
        ({**GOOD, "answer": True}, ["q.jsonl:2", "'answer' holds True"]),
        ({**GOOD, "question": " "}, ["q.jsonl:2", "'question' holds ' '"]),
        ({"question": "q", "answer": 1, "choice": []}, ["q.jsonl:2", "'choices' is missing", "choice"]),
        ({**GOOD, "id": "t/1"}, ["q.jsonl:2", "'t/1' was used in", "q.jsonl:1"]),
    ],
)
def test_what_is_wrong_with_a_question_is_said_with_row_and_field(
    tmp_path: Path, record: dict, words: list[str]
) -> None:
    path = write(tmp_path / "q.jsonl", GOOD, record)
    with pytest.raises(RowError) as caught:
        choices.read(Source(str(path)), "t")
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_file_without_questions_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RowError, match="0 questions"):
        choices.read(Source(str(write(tmp_path / "q.jsonl"))), "t")


def test_options_that_say_the_same_are_found() -> None:
    assert choices.twice([MOTH, replace(MOTH, id="9", choices=("a", "b", "a", "c"))]) == ["9"]


# --- the harness itself, where it is installed -----------------------------------------------------------------------


@pytest.mark.parametrize("shots", [0, 1])
def test_the_harness_gives_the_same_scores(tmp_path: Path, shots: int) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    subject_ = subject()
    questions = [
        replace(q, id=f"t/{i + 1}") for i, q in enumerate([SALT, MOTH, SALT.rotated, MOTH.rotated, SALT, MOTH])
    ]
    records = [{"question": q.question, "choices": q.choices, "answer": q.answer} for q in questions]
    files = {
        name: str(write(tmp_path / f"{name}.jsonl", *some))
        for name, some in (("test", records), ("dev", records[::-1]))
    }
    task = {
        "task": "alchemy",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "test_split": "test",
        "fewshot_split": "dev",
        "fewshot_config": {"sampler": "first_n"},
        "description": "The following are multiple choice questions (with answers) about alchemy.\n\n",
        "output_type": "multiple_choice",
        # As in lm_eval/tasks/wmdp and mmlu.
        "doc_to_text": "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\n"
        "C. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:",
        "doc_to_choice": ["A", "B", "C", "D"],
        "doc_to_target": "answer",
        "num_fewshot": shots,
        "metric_list": [{"metric": "acc"}],
    }
    theirs = simple_evaluate(
        model=HFLM(pretrained=subject_.model, tokenizer=subject_.tokenizer), tasks=[task], log_samples=True
    )
    mine = marks(questions, run(subject_, [choices.letters(questions, shots={"alchemy": questions[::-1][:shots]})])[0])
    samples = sorted(theirs["samples"]["alchemy"], key=lambda sample: sample["doc_id"])
    logprobs = [[float(one[0]) for one in sample["filtered_resps"]] for sample in samples]
    assert mine.logprob == pytest.approx(np.array(logprobs), abs=1e-4)
    assert samples[0]["arguments"][0][0] == choices.context(questions[0], questions[::-1][:shots])
    assert theirs["results"]["alchemy"]["acc,none"] == pytest.approx(mine.accuracy)
    assert theirs["results"]["alchemy"]["acc_stderr,none"] == pytest.approx(mine.error)
