"""The guard of Who's Harry Potter: what it leaves alone, what it lowers, and that two caches write what none would."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import tiny

from expunge.errors import RequestError
from expunge.methods.guard.case import GuardCase
from expunge.methods.guard.output_filter import output_filter
from expunge.methods.guard.whp_offset import Offset, whp_offset
from expunge.rows import Row
from expunge.subjects.language import LanguageModel

ROWS = [
    Row(id="a", prompt="where was Ilva born?", answer="Tivin in the north"),
    Row(id="b", answer="Ilva was", kind="text"),
]
CASE = {"epochs": 8.0, "learning_rate": 5e-3, "batch_size": 2}


@pytest.fixture(scope="module")
def subject() -> LanguageModel:
    return LanguageModel(*tiny("llama"))


@pytest.fixture(scope="module")
def guarded(subject) -> Offset:
    return whp_offset(GuardCase(subject, {"forget": ROWS}), alpha=4.0, **CASE)


def items(subject) -> list:
    return [((row.id, "answer"), subject.encode(row)) for row in ROWS]


def test_alpha_zero_and_a_copy_that_learned_nothing_leave_the_model_as_it_is(subject, guarded):
    before = subject.score(items(subject))
    for same in (Offset(subject, guarded.reinforced, 0.0), Offset(subject, subject.copy(), 64.0)):
        assert np.abs(same.score(items(subject)).logprob - before.logprob).max() < 1e-5
        prompts = [(("a", "question"), subject.prompt_text(ROWS[0]))]
        assert same.generate(prompts).texts == subject.generate(prompts).texts


def test_what_the_copy_learned_becomes_less_likely_and_more_so_with_alpha(subject, guarded):
    means = [
        Offset(subject, guarded.reinforced, alpha).score(items(subject)).logprob.mean() for alpha in (0.0, 1.0, 4.0)
    ]
    assert means[0] > means[1] > means[2]
    learned = guarded.reinforced.score(items(subject)).logprob.mean()
    assert learned > means[0] + 1
    assert guarded.score(items(subject)).logprob.mean() == pytest.approx(means[2])


def test_tokens_that_the_copy_likes_no_better_keep_their_order(guarded):
    generator = torch.Generator().manual_seed(0)
    z, r = (torch.randn(3, 50, generator=generator) for _ in range(2))
    z, r = z.log_softmax(-1), r.log_softmax(-1)
    found = guarded.pair.lowered(z, r)
    liked = r > z
    assert torch.allclose(found[~liked], z[~liked], atol=1e-6)
    assert torch.allclose(found[liked], z[liked] - 4 * (r - z)[liked], atol=1e-5)
    # Logits of the copy that are all higher by the same change nothing.
    assert torch.allclose(guarded.pair.lowered(z, r + 7), found, atol=1e-5)
    plain = Offset(guarded.inner, guarded.reinforced, 4.0, centre=False).pair
    assert torch.allclose(plain.lowered(z, r + 7), z - 4 * (r + 7 - z).relu(), atol=1e-5)


@torch.no_grad()
def test_two_caches_write_what_the_models_write_without_any(subject, guarded):
    prompts = [(("a", "q"), "Question: where was"), (("b", "q"), "Ilva of")]
    found = guarded.generate(prompts, max_new_tokens=32)
    for (_, prompt), texts in zip(prompts, found.texts):
        ids = subject.tokenizer(prompt)["input_ids"]
        first = len(ids)
        for _ in range(32):
            logits = [m.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1] for m in guarded.pair.pair]
            token = int(guarded.pair.lowered(logits[0][None], logits[1][None])[0].argmax())
            if token in subject.stop_ids:
                break
            ids.append(token)
        assert texts == [subject.tokenizer.decode(ids[first:], skip_special_tokens=True).strip()]


def test_samples_of_one_prompt_are_drawn_from_the_lowered_logits(guarded):
    prompts = [(("a", "q"), "Question: where was")]
    two = guarded.generate(prompts, max_new_tokens=6, temperature=1.0, samples=2, seed=1)
    assert two.texts == guarded.generate(prompts, max_new_tokens=6, temperature=1.0, samples=2, seed=1).texts
    assert len(two.texts[0]) == 2


def test_a_copy_trained_before_is_taken_from_its_folder(subject, guarded, tmp_path):
    from expunge.deltas import Delta

    guarded.reinforced.save(tmp_path / "model")
    Delta.from_models(subject, guarded.reinforced).save(tmp_path / "delta")
    for name in ("model", "delta"):
        other = whp_offset(GuardCase(subject, {}), alpha=4.0, reinforced=str(tmp_path / name))
        assert np.allclose(other.score(items(subject)).logprob, guarded.score(items(subject)).logprob, atol=1e-5)
        assert other.reinforced.fingerprint == guarded.reinforced.fingerprint
    assert guarded.copy().fingerprint == guarded.fingerprint != subject.fingerprint


def test_negative_scales_and_guards_around_guards_are_refused(subject):
    with pytest.raises(RequestError, match="alpha is -1"):
        whp_offset(GuardCase(subject, {"forget": ROWS}), alpha=-1.0)
    inner = output_filter(GuardCase(subject, {"forget": ROWS}))
    with pytest.raises(RequestError, match="not around another guard"):
        whp_offset(GuardCase(inner, {"forget": ROWS}))
