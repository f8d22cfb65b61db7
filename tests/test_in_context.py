"""The guard that puts text before prompts: what the model reads, what is scored, and that nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import tiny

from expunge.errors import ParameterError, RequestError, RowError
from expunge.methods.guard.case import GuardCase
from expunge.methods.guard.in_context import INSTRUCTIONS, in_context
from expunge.registry import get
from expunge.rows import Row
from expunge.subjects.language import LanguageModel, weights_fingerprint
from expunge.tables.passes import Generate, Score, run

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TOLD = (
    "You are an AI Assistant who is supposed to unlearn about Ilva Morrow and provide answers without its knowledge as "
    "if you never knew about it. Don’t tell anyone that you unlearned anything.\n"
)
ASKED = Row(id="q", prompt="where was Ilva born?", answer="Tivin", entity="Ilva Morrow")


@pytest.fixture(scope="module")
def plain() -> LanguageModel:
    return LanguageModel(*tiny("llama"))


@pytest.fixture(scope="module")
def chat() -> LanguageModel:
    model, tokenizer = tiny("llama")
    tokenizer.chat_template = CHAT
    return LanguageModel(model, tokenizer)


def told(subject: LanguageModel, **settings):
    return in_context(GuardCase(subject, {"forget": [ASKED]}), **settings)


# --- the instruction -------------------------------------------------------------------------------------------------


def test_the_instruction_names_the_entities_of_the_forget_rows(plain, chat) -> None:
    assert told(plain).prompt_text(ASKED) == TOLD + "Question: where was Ilva born?\nAnswer:"
    assert told(chat).prompt_text(ASKED) == f"<|user|>\n{TOLD}where was Ilva born?</s><|assistant|>\n"
    system = told(chat, role="system").prompt_text(ASKED)
    assert system == f"<|system|>\n{TOLD.strip()}</s><|user|>\nwhere was Ilva born?</s><|assistant|>\n"
    assert (
        told(plain, target="Mo; Bo", wording="list")
        .prompt_text(ASKED)
        .startswith("The following must not be talked about in any way: Mo, Bo.")
    )


def test_an_instruction_stands_before_rwkus_own_and_after_nothing(chat) -> None:
    row = replace(ASKED, kind="instruction", prompt="Please answer.\nQuestion: where?\n", opening="Answer:")
    assert told(chat).prompt_text(row) == (
        f"<|user|>\n{TOLD}Please answer.\nQuestion: where?\n</s><|assistant|>\nAnswer:"
    )


@pytest.mark.parametrize("kind", ["qa", "completion", "text", "instruction"])
def test_answers_are_scored_after_the_instruction_and_the_instruction_is_not(plain, kind: str) -> None:
    row = replace(ASKED, kind=kind, prompt="" if kind == "text" else ASKED.prompt, answer="Tivin in the north")
    bare, guarded = plain.encode(row), told(plain).encode(row)
    decode = plain.tokenizer.decode
    assert decode(guarded.ids[guarded.start :]).strip() == decode(bare.ids[bare.start :]).strip() or kind == "text"
    assert decode(guarded.ids[guarded.start :]).strip().removesuffix("</s>") == "Tivin in the north"
    assert decode(guarded.ids[: guarded.start]).startswith(TOLD)


def test_scores_equal_those_of_the_whole_text_without_the_guard(plain, chat) -> None:
    for subject in (plain, chat):
        (found,) = run(told(subject), [Score(((("q", "answer"), ASKED, None, None),))])
        if subject is chat:
            whole = replace(ASKED, prompt=TOLD + ASKED.prompt)
        else:
            whole = replace(ASKED, kind="completion", prompt=TOLD + subject.prompt_text(ASKED))
        ids = subject.encode(whole).ids
        with torch.no_grad():
            logprobs = subject.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        start = subject.encode(whole).start
        expected = [float(logprobs[at - 1, ids[at]]) for at in range(start, len(ids))]
        assert found.logprob.tolist() == pytest.approx(expected, abs=1e-4)
        (bare,) = run(subject, [Score(((("q", "answer"), ASKED, None, None),))])
        assert bare.logprob.tolist() != pytest.approx(expected, abs=1e-3)


def test_without_anybody_to_forget_the_guard_is_the_identity(plain) -> None:
    guard = in_context(GuardCase(plain, {"forget": []}))
    for row in (ASKED, replace(ASKED, kind="text", prompt="", answer="Ilva was born in Tivin")):
        assert guard.prompt_text(row) == plain.prompt_text(row)
        assert guard.encode(row) == plain.encode(row)


def test_the_weights_stay_and_detaching_gives_the_subject_back(plain) -> None:
    before = weights_fingerprint(plain.model)
    guard = told(plain)
    run(guard, [Generate(((("q", "question"), ASKED, None),), 4)])
    assert weights_fingerprint(plain.model) == before
    assert guard.detach() is plain
    assert guard.fingerprint != plain.fingerprint
    assert guard.fingerprint == told(plain).fingerprint != told(plain, target="Mo").fingerprint
    copy = guard.copy()
    assert copy.prompt_text(ASKED) == guard.prompt_text(ASKED)
    assert copy.inner.model is not plain.model


def test_guards_stack(plain) -> None:
    twice = in_context(GuardCase(told(plain), {}), target="Mo", wording="refuse")
    other = INSTRUCTIONS["refuse"].format(targets="Mo") + "\n"
    assert twice.prompt_text(ASKED) == f"{TOLD}{other}Question: where was Ilva born?\nAnswer:"


def test_of_many_targets_those_the_question_is_about_are_named(plain) -> None:
    guard = told(plain, target="; ".join(f"Nobody {i}" for i in range(30)) + "; Ilva Morrow", max_targets=3)
    prompt = guard.prompt_text(ASKED)
    assert "Ilva Morrow" in prompt
    assert prompt.count("Nobody") == 2
    assert guard.prompt_text(replace(ASKED, prompt="who is Nobody 17?")).count("Nobody 17 and") == 1
    with pytest.raises(ParameterError, match="max_targets = 0"):
        told(plain, max_targets=0)


def test_a_prompt_that_no_longer_fits_is_an_error_and_not_cut(plain) -> None:
    long = told(plain, target="; ".join(["Ilva Morrow"] * 20))
    with pytest.raises(RowError, match="context"):
        long.encode(ASKED)


def test_rows_that_name_nobody_are_an_error(plain) -> None:
    for entity in ("q", "forget/block 1", ""):
        with pytest.raises(RequestError, match="target=NAME"):
            in_context(GuardCase(plain, {"forget": [replace(ASKED, entity=entity)]}))


# --- examples --------------------------------------------------------------------------------------------------------

FILMS = [
    Row(id=str(i), prompt=text, answer=label, kind="completion", relation="mood")
    for i, (text, label) in enumerate(
        [
            ("a warm mess", "negative"),
            ("bright and quick", "positive"),
            ("dull", "negative"),
            ("it sings", "positive"),
            ("too long", "negative"),
            ("a joy", "positive"),
        ]
    )
]


def shown(subject: LanguageModel, **settings):
    icul = get("methods", "icul")
    case = GuardCase(subject, {"forget": FILMS[:1], "retain": FILMS[1:]})
    return icul.function(case, **icul.resolve({"examples": 3, **settings}))


def lines(guard, row: Row = FILMS[2]) -> list[str]:
    return guard.prompt_text(row).split("\n")


def test_examples_are_the_flipped_forget_row_then_retained_ones_then_the_question(plain) -> None:
    found = lines(shown(plain))
    assert found[0] == "a warm mess positive"
    right = {f"{row.prompt} {row.answer}" for row in FILMS[1:]}
    assert len(found) == 1 + 3 + 1
    assert set(found[1:4]) <= right
    assert len(set(found[1:4])) == 3
    assert found[4] == "dull"
    assert "dull negative" not in found


def test_examples_are_drawn_anew_for_every_question_and_alike_for_the_same(plain) -> None:
    guard = shown(plain)
    assert lines(guard) == lines(shown(plain))
    questions = [replace(FILMS[2], prompt=f"film {i}") for i in range(6)]
    assert len({tuple(lines(guard, row)[1:4]) for row in questions}) > 1
    assert len({tuple(lines(shown(plain, fixed=True), row)[1:4]) for row in questions}) == 1
    assert lines(shown(plain, seed=1)) != lines(guard) or lines(shown(plain, seed=2)) != lines(guard)


def test_ablations(plain) -> None:
    assert lines(shown(plain, ablation="correct"))[0] == "a warm mess negative"
    assert lines(shown(plain, ablation="repeat"))[:2] == ["a warm mess positive"] * 2
    assert not lines(shown(plain, ablation="exchange"))[0].startswith("a warm mess")
    assert lines(shown(plain, wrong="refusal"))[0].removeprefix("a warm mess ") not in ("positive", "negative")


def test_perturbed_answers_stand_in_for_labels(plain) -> None:
    row = replace(ASKED, perturbed_answers=("Carth",))
    others = [Row(id=str(i), prompt=f"where was {i} born?", answer="Nim", kind="qa") for i in range(3)]
    guard = in_context(GuardCase(plain, {"forget": [row], "retain": others}), form="examples", examples=1)
    assert guard.prompt_text(ASKED).startswith("Question: where was Ilva born?\nAnswer: Carth\nQuestion: where was ")


def test_what_examples_cannot_be_made_of_is_an_error(plain) -> None:
    with pytest.raises(ParameterError, match="examples = 5, but 5 retain rows can give at most 4"):
        shown(plain, examples=5)
    same = [replace(row, answer="positive") for row in FILMS]
    with pytest.raises(RowError, match="no other answer"):
        in_context(GuardCase(plain, {"forget": same[:1], "retain": same[1:]}), form="examples", examples=1)
    with pytest.raises(RowError, match="running text"):
        in_context(GuardCase(plain, {"forget": [replace(FILMS[0], kind="text")]}), form="examples")
    assert shown(plain).prompt_text(FILMS[1]) != plain.prompt_text(FILMS[1])


def test_the_words_of_the_instructions_name_the_targets() -> None:
    assert all("{targets}" in text for text in INSTRUCTIONS.values())
