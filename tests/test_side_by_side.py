"""Threads that take groups of rows each find what one pass after another finds."""

import threading
import time

import numpy as np
import pytest
import torch
from tiny import tiny

from expunge.rows import Row
from expunge.subjects import decoding, gradients, language
from expunge.subjects.language import LanguageModel
from expunge.subjects.side_by_side import alone, side_by_side
from expunge.tables.scores import COLUMNS

GROUPS = [[0, 1], [2], [3, 4], [5], [6, 7]]


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def llama():
    return LanguageModel(*tiny("llama"))


def items(subject):
    towns = ("Tivin", "Carth in the north", "the old town of Tivin", "Carth")
    made = [
        Row(id=f"{who} {town}", prompt=f"where was {who} born?", answer=town)
        for who in ("Ilva", "Mo")
        for town in towns
    ]
    return [((row.id, "answer"), subject.encode(row)) for row in made]


def run(subject, do, groups=GROUPS, progress=None):
    return side_by_side(subject, groups, do, of=groups, progress=progress)


# Families, a window and a cap, experts, and a model that takes no packed rows.
@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral", "bloom"])
def test_scores_and_gradients_are_those_of_one_pass_after_another(name, two_threads, monkeypatch):
    subject = LanguageModel(*tiny(name), name)
    monkeypatch.setattr(language, "TOKEN_BUDGET", 24)
    monkeypatch.setattr(gradients, "TOKENS", 24)
    seen = set()
    head = LanguageModel.head
    monkeypatch.setattr(LanguageModel, "head", lambda *given: seen.add(threading.get_ident()) or head(*given))
    chosen = items(subject)
    together, pulls = subject.score(chosen), subject.gradients(chosen).norm
    assert seen - {threading.get_ident()}
    torch.set_num_threads(1)
    alone, wanted = subject.score(chosen), subject.gradients(chosen).norm
    assert together.keys == alone.keys
    for column in COLUMNS:
        assert np.allclose(getattr(together, column), getattr(alone, column), rtol=1e-5, atol=1e-5), column
    assert np.allclose(pulls, wanted, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert all(p.requires_grad and p.grad is None for p in subject.model.parameters())


@pytest.mark.parametrize("name", ["llama", "gemma2", "mixtral"])
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "samples": 3, "seed": 4}])
def test_threads_write_what_one_writes(name, settings, two_threads, monkeypatch):
    subject = LanguageModel(*tiny(name), name)
    monkeypatch.setattr(language, "TOGETHER", 2)
    seen = set()
    decode = decoding.decode
    monkeypatch.setattr(decoding, "decode", lambda *a, **k: seen.add(threading.get_ident()) or decode(*a, **k))
    asked = [((str(i), "question"), f"where was {who * (1 + i % 3)} born?") for i, who in enumerate(("Ilva", "Mo") * 5)]
    together = subject.generate(asked, max_new_tokens=6, **settings)
    assert seen - {threading.get_ident()}
    torch.set_num_threads(1)
    alone = subject.generate(asked, max_new_tokens=6, **settings)
    assert together.texts == alone.texts
    assert together.stopped == alone.stopped
    assert together.keys == alone.keys


def test_every_thread_has_modules_of_its_own_around_the_same_tensors(llama, two_threads):
    together = threading.Barrier(2, timeout=20)
    calls = []

    def do(subject, group):
        if group in GROUPS[:2]:
            together.wait()  # passes only if two threads are in here at once
        norm = subject.model.model.norm
        handle = norm.register_forward_hook(lambda *_: calls.append((threading.get_ident(), group)))
        subject.model(input_ids=torch.tensor([[1, 2]]))
        time.sleep(0.01)
        handle.remove()
        return id(norm), id(norm.weight), torch.is_grad_enabled(), torch.get_num_threads()

    with torch.no_grad():
        modules, weights, enabled, threads = zip(*run(llama, do))
    assert len(set(modules)) == 2
    assert id(llama.model.model.norm) not in modules
    assert set(weights) == {id(llama.model.model.norm.weight)}
    assert not any(enabled)
    assert set(threads) == {1}
    assert torch.get_num_threads() == 2
    assert sorted(group for _, group in calls) == sorted(GROUPS)


def test_what_is_found_comes_in_the_order_of_groups_and_is_counted(llama, two_threads):
    told = []

    def do(_, group):
        time.sleep(0.02 if group == [0, 1] else 0)
        return group

    assert run(llama, do, progress=lambda done, total: told.append((done, total))) == GROUPS
    assert told == [(2, 8), (3, 8), (5, 8), (6, 8), (8, 8)]


def test_an_error_in_one_pass_ends_them_all(llama, two_threads):
    def do(_, group):
        if group == [2]:
            raise ValueError("no such row")

    with pytest.raises(ValueError, match="no such row"):
        run(llama, do)
    assert torch.get_num_threads() == 2


def test_hooked_models_and_few_groups_run_in_this_thread(llama, two_threads):
    def where(subject, _):
        return threading.get_ident(), subject

    here = {(threading.get_ident(), llama)}
    assert set(run(llama, where, GROUPS[:3])) == here
    handle = llama.model.model.norm.register_forward_hook(lambda *_: None)
    try:
        assert set(run(llama, where)) == here
    finally:
        handle.remove()
    assert not set(run(llama, where)) & here


def test_trials_run_on_one_thread_and_leave_as_many_as_there_were(two_threads):
    def fail():
        with alone():
            assert torch.get_num_threads() == 1
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert torch.get_num_threads() == 2
