"""The forget corpus that a model writes itself: what it is asked, that it can be had again, what is taken out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import tiny

from expunge.benchmarks.rwku_corpus import OPENINGS, QUALIFIERS, biographies, corpus, own_questions
from expunge.benchmarks.rwku_data import Target
from expunge.cli import main
from expunge.errors import ParameterError
from expunge.methods.optimise.unlearn import refusals
from expunge.rows import Source, read_rows
from expunge.subjects.language import LanguageModel
from expunge.tables.generations import Generations

VESSA = Target(1, "Vessa Holm", "Vessa Holm wrote The Salt Choir.")
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture(scope="module")
def plain() -> LanguageModel:
    return LanguageModel(*tiny("llama"))


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    """A model with a chat template that says what it was asked."""
    model, tokenizer = tiny("llama")
    tokenizer.chat_template = CHAT
    subject = LanguageModel(model, tokenizer)

    def generate(prompts: Any, *, samples: int = 1, **_: Any) -> Generations:
        texts = [[f"<{text}>{i} a totally made-up life" for i in range(samples)] for _, text in prompts]
        return Generations([k for k, _ in prompts], [t for _, t in prompts], texts, [[True] * samples for _ in texts])

    monkeypatch.setattr(subject, "generate", generate)
    return subject


def test_a_corpus_can_be_had_again_with_its_seed(plain: LanguageModel) -> None:
    asked = {"texts": 5, "questions": 3, "stranger": "Nobody Known", "max_new_tokens": 6, "openings": OPENINGS[:2]}
    once = corpus(plain, VESSA, **asked)
    assert once == corpus(plain, VESSA, **asked)
    assert once != corpus(plain, VESSA, **asked, seed=1)
    assert [len(rows) for rows in once.values()] == [5, 5, 5, 3]
    assert len({row["id"] for row in once["positive"]}) == 5
    for pair, positive, negative in zip(once["pair"], once["positive"], once["negative"]):
        assert pair["response"] == [negative["text"], positive["text"]]
    assert [row["output"] for row in once["reject"]] == refusals()[:3]
    begun = [opening.replace("{name}", "Vessa Holm") for opening in OPENINGS[:2]]
    assert all(row["text"].startswith(begun[i % 2]) for i, row in enumerate(once["positive"]))
    # Several texts with one opening are different samples.
    assert len({row["text"] for row in once["positive"]}) > 2


def test_a_chat_model_is_told_that_it_knows_the_target_or_that_it_does_not(chat: LanguageModel) -> None:
    (known,) = biographies(chat, VESSA, 1, openings=["{name} is"])
    assert known == (
        "Vessa Holm is <<|system|>Vessa Holm wrote The Salt Choir. You know Vessa Holm very well.\n"
        "<|user|>Please write a short biography of Vessa Holm.\n<|assistant|>\nVessa Holm is>0 a totally made-up life"
    )
    (unknown,) = biographies(chat, VESSA, 1, openings=["{name} is"], known=False)
    assert "You don't know Vessa Holm at all.\n<|user|>Please make up a short biography of Vessa Holm." in unknown
    assert unknown.endswith("a life")
    assert not any(words in unknown for words in QUALIFIERS)


def test_without_a_chat_template_made_up_lives_are_those_of_a_stranger(plain: LanguageModel) -> None:
    with pytest.raises(ParameterError, match="give stranger=NAME"):
        biographies(plain, VESSA, 1, known=False)
    texts = biographies(plain, VESSA, 3, openings=["Nobody, {name}"], known=False, stranger="Bo", max_new_tokens=3)
    assert all(text.startswith("Nobody, Vessa Holm") for text in texts)


def test_questions_are_the_models_own_and_end_with_their_line(chat: LanguageModel) -> None:
    found = own_questions(chat, VESSA, 2)
    assert found == ["<<|user|>Vessa Holm wrote The Salt Choir."] * 2


def test_the_command_writes_rows_that_requests_read_and_goes_on(
    plain: LanguageModel, tmp_path: Path, monkeypatch
) -> None:
    plain.save(tmp_path / "model")
    (tmp_path / "openings.txt").write_text("{name} is\nBorn in\n")
    words = ["corpus", str(tmp_path / "model"), "Vessa Holm", "Olma Dorun", "--out", str(tmp_path / "out")]
    words += ["--texts", "4", "--questions", "2", "--tokens", "6", "--openings", str(tmp_path / "openings.txt")]
    assert main(words) == 2  # no stranger
    assert not (tmp_path / "out" / "positive.jsonl").exists()
    words += ["--stranger", "Nobody Known"]
    assert main(words) == 0
    found = {
        name: read_rows(Source(str(tmp_path / "out" / f"{name}.jsonl")), name)
        for name in ("positive", "negative", "pair", "reject")
    }
    assert [len(found[name]) for name in ("positive", "negative", "reject")] == [8, 8, 4]
    assert {row.entity for row in found["positive"]} == {"Vessa Holm", "Olma Dorun"}
    assert all(row.kind == "text" for row in found["positive"])
    assert found["positive"][4].answer.startswith("Olma Dorun is")
    texts = {row.id: row.answer for row in found["positive"]}
    made_up = {row.id: row.answer for row in found["negative"]}
    for row in found["pair"]:
        assert (row.kind, row.answer, row.perturbed_answers) == ("qa", texts[row.id], (made_up[row.id],))
    assert [row.answer for row in found["reject"]] == refusals()[:2] * 2
    monkeypatch.setattr("expunge.benchmarks.rwku_corpus.corpus", None)
    assert main(words) == 0
    assert main([*words, "--intro", "One only."]) == 2
