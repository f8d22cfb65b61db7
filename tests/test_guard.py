"""GUARD: what cannot be said under it, and that nothing else changes."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from tiny import tiny

from expunge.errors import ParameterError, RequestError
from expunge.methods.guard.case import GuardCase
from expunge.methods.guard.forbidden import Forbidden
from expunge.methods.guard.gate import Names, Phrases, shortened, train
from expunge.methods.guard.guard import guard
from expunge.methods.guard.pieces import Line, Pieces
from expunge.methods.guard.processor import GuardLogits
from expunge.methods.guard.restriction import FLOOR
from expunge.rows import Row
from expunge.subjects.language import LanguageModel
from expunge.wording import words

ASKED = [Row(str(i), "-", f"where was {who} born?") for i, who in enumerate(("Ilva", "Mo", "Carth"))]
RETAIN = [Row(f"r{i}", f"In the north of {i}.", f"how is {i}?") for i in range(6)]
ALL = {"threshold": 0.0, "epochs": 1}
"""Every prompt is flagged."""


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def subject(request) -> LanguageModel:
    return LanguageModel(*tiny(request.param), name=request.param)


def prompts(subject, rows=ASKED):
    return [((row.id, "question"), subject.prompt_text(row)) for row in rows]


def said(subject, **options):
    made = subject.generate(prompts(subject), max_new_tokens=12, **options)
    return [text for texts in made.texts for text in texts]


def forget(texts):
    """Rows that forbid every word of the texts."""
    found = sorted({word for text in texts for word in words(text) if word not in words("I don't know.")})
    return [Row(f"f{i}", word, "?", value=word) for i, word in enumerate(found)]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "samples": 4, "seed": 3}])
@pytest.mark.parametrize("settings", [{"soft": 0.0, "delta": 2.0}, {}, {"beams": 3}])
def test_what_is_forbidden_is_never_said(subject, options, settings) -> None:
    rows = forget(said(subject, **options))
    assert rows
    guarded = guard(GuardCase(subject, {"forget": rows, "retain": RETAIN}), **ALL, nearest=99, **settings)
    forbidden = Forbidden([row.value for row in rows])
    for text in said(guarded, **options):
        assert not forbidden.within(text)


def test_unflagged_prompts_are_answered_as_without_it(subject) -> None:
    rows = forget(said(subject))
    guarded = guard(GuardCase(subject, {"forget": rows, "retain": RETAIN}), threshold=1.1, epochs=1)
    assert said(guarded) == said(subject)
    assert said(guarded, temperature=1.0, samples=2) == said(subject, temperature=1.0, samples=2)
    ids = [subject.prompt_ids(text, key) for key, text in prompts(subject)]
    assert torch.equal(guarded.start(ids, 4).logits, subject.start(ids, 4).logits)
    items = [((row.id, "answer"), subject.encode(row, answer="Tivin")) for row in ASKED]
    assert guarded.score(items).logprob.tolist() == subject.score(items).logprob.tolist()
    assert guarded.detach() is subject


def test_with_nothing_to_forget_nothing_changes(subject) -> None:
    assert said(guard(GuardCase(subject, {"forget": [], "retain": RETAIN}), **ALL)) == said(subject)


def test_banned_tokens_are_exactly_those_that_complete_a_run(subject) -> None:
    pieces = Pieces(subject.tokenizer, subject.vocabulary)
    draw = random.Random(0)
    strings = [text.strip().lower() for text in pieces.texts if len(text.strip()) > 1 and text.strip().isalpha()]
    for _ in range(12):
        phrases = ["".join(draw.sample(strings, 2)) for _ in range(4)] + [" ".join(draw.sample(strings, 2))]
        phrases += draw.sample(strings, 2)
        forbidden = Forbidden(phrases)
        line = Line(pieces, forbidden)
        for step in range(8):
            several = pieces.several_of(forbidden)
            whole = [token for token in range(subject.vocabulary) if token not in pieces.broken]
            wanted = set(line.would_complete(whole))
            glued = {t for w in line.reader.closing() if line.reader.word for t in pieces.going.get(w, ())}
            assert set(line.banned(several)) == wanted | glued
            nearly = [token for token in whole if pieces.texts[token].strip() and token not in wanted]
            hints = [t for t in nearly if any(p.startswith(pieces.texts[t].strip().lower()) for p in phrases)]
            line.take(draw.choice(hints if step % 2 == 0 and hints else nearly))


def test_characters_that_are_spelt_in_bytes_are_read_whole(subject) -> None:
    pieces = Pieces(subject.tokenizer, subject.vocabulary)
    ids = subject.tokenizer(" né 北京", add_special_tokens=False)["input_ids"]
    assert any(token in pieces.broken for token in ids)
    for phrase in ("né", "北京"):
        line = Line(pieces, Forbidden([phrase]))
        stopped = False
        for token in ids:
            stopped = stopped or token in line.would_complete([token])
            line.take(token)
        line.reader.end()
        assert line.reader.found
        assert stopped


def test_beams_that_change_places_keep_their_own_text(subject) -> None:
    rows = [Row("f", "zz qq", "?", value="zz qq")]
    guarded = guard(GuardCase(subject, {"forget": rows, "retain": RETAIN}), **ALL)
    started = guarded.start([subject.prompt_ids(prompts(subject)[0][1], ("a", "b"))], 8, 3)
    taken: list[list[int]] = [[], [], []]
    draw = random.Random(1)
    for _ in range(6):
        places = [draw.randrange(3) for _ in range(3)]
        tokens = [draw.randrange(3, subject.vocabulary - 4) for _ in range(3)]
        started.keep(torch.tensor(places))
        started.follow(torch.tensor(tokens))
        taken = [[*taken[place], token] for place, token in zip(places, tokens)]
        for line, ids in zip(started.lines, taken):
            fresh = Line(guarded.pieces, line.ban.forbidden)
            for token in ids:
                fresh.take(token)
            assert (line.line.reader.word, line.line.reader.read) == (fresh.reader.word, fresh.reader.read)
            assert line.line.reader._begun == fresh.reader._begun


def test_scores_are_those_of_the_renormalised_logits(subject) -> None:
    encoded = subject.encode(ASKED[0], answer="north of Carth")
    items = [(("0", "answer"), encoded)]
    plain = subject.score(items).logprob
    rows = [Row("f", "of", "?", value="of")]
    guarded = guard(GuardCase(subject, {"forget": rows, "retain": RETAIN}), **ALL, soft=0.0, delta=2.0)
    under = guarded.score(items).logprob
    assert under.min() == FLOOR
    allowed = under > FLOOR
    assert (under[allowed] >= plain[allowed] - 1e-4).all()
    ids = list(encoded.ids[: encoded.start])
    assert float(guarded.start([ids], 4).logits.softmax(-1).sum()) == pytest.approx(1.0, abs=1e-5)


def test_when_nothing_is_allowed_the_refusal_is_said(subject, monkeypatch) -> None:
    rows = [Row("f", "zz", "?", value="zz")]
    guarded = guard(GuardCase(subject, {"forget": rows, "retain": RETAIN}), **ALL)
    monkeypatch.setattr(Line, "banned", lambda self, several: list(range(subject.vocabulary)))
    made = guarded.generate(prompts(subject), max_new_tokens=40)
    assert [text for texts in made.texts for text in texts] == ["I don't know."] * 3
    assert all(ended for several in made.stopped for ended in several)


def test_flagged_prompts_may_be_refused_outright(subject) -> None:
    rows = [Row("f", "zz", "?", value="zz")]
    guarded = guard(GuardCase(subject, {"forget": rows, "retain": RETAIN}), **ALL, on_flag="refuse", refusal="No.")
    made = guarded.generate(prompts(subject), max_new_tokens=40)
    assert [texts[0] for texts in made.texts] == ["No."] * 3


def test_transformers_decodes_the_same_under_the_processor(subject) -> None:
    rows = forget(said(subject))
    case = GuardCase(subject, {"forget": rows, "retain": RETAIN})
    guarded = guard(case, **ALL, nearest=99, soft=0.0, delta=2.0)
    key, text = prompts(subject)[0]
    ids = torch.tensor([subject.prompt_ids(text, key)])
    forbidden = Forbidden([row.value for row in rows])
    for options in ({}, {"num_beams": 4}):
        made = subject.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=sorted(subject.stop_ids),
            pad_token_id=2,
            logits_processor=[GuardLogits(guarded, ids)],
            **options,
        )
        found = subject.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()
        assert not forbidden.within(found)
        if not options:
            assert found == said(guarded)[0]


def test_phrases_are_what_only_the_answer_says() -> None:
    retain = [Row("r", "The author was born in Santiago.", "?"), Row("s", "The author writes.", "?")]
    phrases = Phrases(retain, "I cannot say.", 0.1)
    row = Row("0", "The author Jaime Vasquez was born in Tivin, by a harbour.", "Where was Jaime born?")
    item = phrases.item(row)
    assert item.texts[1:] == ("vasquez", "tivin", "harbour")
    assert item.telling == {"vasquez", "tivin", "harbour"}
    valued = phrases.item(replace(row, value="Tivin", aliases=("the harbour town",), entity="Jaime Vasquez"))
    assert (valued.texts, valued.name) == (("Tivin", "the harbour town"), ("jaime", "vasquez"))
    with pytest.raises(RequestError, match="says nothing that others do not"):
        phrases.item(Row("1", "The author.", "?"))


def test_a_share_of_a_phrase_is_its_beginning() -> None:
    assert shortened(Forbidden(["one two three four"]), 0.5).runs == {("one", "two")}
    assert shortened(Forbidden(["one two three four"]), 0.01).runs == {("one",)}
    assert shortened(Forbidden(["one two three four"]), 1.0).runs == {("one", "two", "three", "four")}


def test_names_are_found_in_prompts_and_only_whole() -> None:
    phrases = Phrases([], "No.", 0.1)
    names = Names(
        [phrases.item(Row(str(i), "x", "?", value="x", entity=who)) for i, who in enumerate(("Mo", "Mo Ilva", "Mo"))]
    )
    assert names.of("Who is Mo, then?") == [0, 2]
    assert names.of("Who is MO ILVA?") == [0, 2, 1]
    assert names.of("Who is Moritz?") == []


def test_the_classifier_learns_what_can_be_told_apart_and_the_same_by_seed() -> None:
    generator = torch.Generator().manual_seed(0)
    known, others = torch.randn(20, 8, generator=generator) + 2, torch.randn(60, 8, generator=generator)
    first, again = (train(known, others, epochs=20, seed=4) for _ in range(2))
    assert (first(known) > 0.5).float().mean() > 0.9
    assert (first(others) < 0.5).float().mean() > 0.9
    assert torch.equal(first(others), again(others))


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"beta": 0.0}, "beta"), ({"beams": 0}, "beams"), ({"embedder": "/nowhere/at/all"}, "cannot be loaded|extra")],
)
def test_settings_out_of_range(subject, settings, said) -> None:
    with pytest.raises(ParameterError, match=said):
        guard(GuardCase(subject, {"forget": [Row("f", "zz", "?", value="zz")], "retain": RETAIN}), **settings)


def test_it_needs_a_model_and_retain_rows(subject) -> None:
    rows = [Row("f", "zz", "?", value="zz")]
    with pytest.raises(RequestError, match="0 retain rows"):
        guard(GuardCase(subject, {"forget": rows}))
    inner = guard(GuardCase(subject, {"forget": [], "retain": RETAIN}))
    with pytest.raises(RequestError, match="around the model"):
        guard(GuardCase(inner, {"forget": rows, "retain": RETAIN}))
