"""What tables hold of a row of logits, against the whole softmax."""

import math

import pytest
import torch

from expunge.subjects import token_statistics as module
from expunge.subjects.token_statistics import token_statistics

V = 50


def statistics(logits, target, at=None):
    at = torch.arange(len(logits)) if at is None else at
    return token_statistics(lambda rows: rows.clone(), logits, target, at, logits.shape[1])


def whole(logits, target, at):
    logprobs = logits.double().log_softmax(-1)[at]
    p = logprobs.exp()
    mean = (p * logprobs.nan_to_num(neginf=0.0)).sum(-1)
    variance = (p * (logprobs.nan_to_num(neginf=0.0) - mean[:, None]) ** 2).sum(-1)
    return logprobs[torch.arange(len(at)), target], logits.argmax(-1)[at] == target, mean, variance


@pytest.mark.parametrize(("chunk", "block"), [(1 << 22, 1 << 17), (7 * V, 2 * V), (1, 1)])
def test_numbers_are_those_of_the_whole_softmax_for_any_chunk(monkeypatch, chunk, block):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", block)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(23, V, generator=generator) * 4
    at = torch.randint(0, 23, (40,), generator=generator)  # some states predict several tokens, some none
    target = torch.randint(0, V, (40,), generator=generator)
    for found, expected in zip(statistics(logits, target, at), whole(logits, target, at)):
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("chunk", "block"), [(1 << 22, 1 << 17), (7 * V, 2 * V), (1, 1)])
@pytest.mark.parametrize("asked", ["some", "none", "all"])
def test_moments_only_where_they_are_asked_for(monkeypatch, chunk, block, asked):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", block)
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(23, V, generator=generator) * 4
    at = torch.randint(0, 23, (40,), generator=generator)
    target = torch.randint(0, V, (40,), generator=generator)
    moments = {"some": torch.arange(23) % 3 == 1, "none": torch.zeros(23) > 0, "all": torch.zeros(23) == 0}[asked]
    expected = whole(logits, target, at)
    logprob, hit, mean, variance = token_statistics(lambda rows: rows.clone(), logits, target, at, V, moments)
    torch.testing.assert_close(logprob.double(), expected[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(hit, expected[1])
    for found, value in zip((mean, variance), expected[2:]):
        assert torch.equal(found.isnan(), ~moments[at])
        torch.testing.assert_close(found[moments[at]].double(), value[moments[at]], rtol=1e-5, atol=1e-5)


def test_masked_entries_carry_no_probability():
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(1))
    logits[1, 5:40] = -torch.inf
    at, target = torch.arange(3), torch.tensor([0, 7, 2])
    found, expected = statistics(logits, target), whole(logits, target, at)
    assert found[0][1] == -torch.inf
    for one, other in zip(found[1:], expected[1:]):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-5, atol=1e-6)


def test_ties_go_to_the_smallest_id_and_alike_logits_have_no_variance():
    logits = torch.full((2, V), 3.0)
    logprob, hit, mean, variance = statistics(logits, torch.tensor([0, 1]))
    assert hit.tolist() == [True, False]
    assert torch.allclose(logprob, torch.tensor(-math.log(V)))
    assert torch.allclose(mean, logprob)
    assert (variance == 0).all()


def test_no_tokens_give_nothing():
    empty = torch.zeros(0, dtype=torch.long)
    assert [len(column) for column in statistics(torch.zeros(0, V), empty)] == [0] * 4
