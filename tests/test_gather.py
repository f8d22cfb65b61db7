"""Gradients added up in place are autograd's; AdamW in blocks is torch's."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

from expunge.methods.optimise import adamw
from expunge.methods.optimise.adamw import AdamW
from expunge.methods.optimise.loop import Recipe, Training, Turn, draw
from expunge.methods.optimise.shards import norm
from expunge.methods.optimise.terms import Step, negative_log_likelihood
from expunge.subjects.gather import Gather
from expunge.subjects.head import linear_logprob
from expunge.subjects.language import LanguageModel
from expunge.subjects.packed import Encoded


def gradients(tied: bool, gathered: bool, frozen: bool = False) -> list[torch.Tensor]:
    torch.manual_seed(0)
    embedding = nn.Embedding(13, 4, padding_idx=2)
    head = nn.Linear(4, 13, bias=not tied)
    if tied:
        head.weight = embedding.weight
    embedding.weight.requires_grad_(not frozen)
    ids, target = torch.tensor([[1, 2, 5, 5, 12, 0]]), torch.tensor([2, 5, 5, 12, 0, 1])
    gather = Gather()
    found = []
    for _ in range(2):  # the second turn works in the memory of the first
        with gather.embedding(embedding), gather.adding() if gathered else torch.enable_grad():
            hidden = embedding(ids)[0].tanh() * 3
            for part in (slice(0, 2), slice(2, 6)):  # two sides, each with its own call of the head
                values = linear_logprob(hidden[part], head.weight, head.bias, target[part], gather)
                (values * torch.arange(1.0, 1 + len(values))).sum().backward(retain_graph=part.start == 0)
        weights = list(dict.fromkeys([embedding.weight, head.weight, *([] if tied else [head.bias])]))
        found = [w.grad.clone() for w in weights if w.grad is not None]
        for w in weights:
            gather.clear(w)
            assert w.grad is None
    return found


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_gathered_gradients_are_those_of_autograd(tied: bool, frozen: bool) -> None:
    if tied and frozen:
        pytest.skip("nothing would move")
    plain, gathered = gradients(tied, False, frozen), gradients(tied, True, frozen)
    assert len(plain) == len(gathered) > 0
    for want, found in zip(plain, gathered):
        torch.testing.assert_close(found, want)


def test_memory_goes_from_step_to_step() -> None:
    gather, weight = Gather(), nn.Parameter(torch.randn(40, 8))
    hidden, target = torch.randn(6, 8), torch.arange(6)

    def turn(count: int) -> tuple[int, int]:
        with gather.adding():
            values = linear_logprob(hidden[:count], weight, None, target[:count], gather)
            room = gather._room.data_ptr()
            values.sum().backward()
        place = weight.grad.data_ptr()
        gather.clear(weight)
        return place, room

    first, second, third = turn(5), turn(5), turn(4)
    assert first[0] == second[0] == third[0]
    assert second[1] == third[1] != first[1]


def test_autograd_grad_outside_adding_is_untouched() -> None:
    gather, weight = Gather(), nn.Parameter(torch.randn(9, 3))
    hidden = torch.randn(4, 3, requires_grad=True)
    (found,) = torch.autograd.grad(linear_logprob(hidden, weight, None, torch.arange(4), gather).sum(), [hidden])
    assert found.abs().sum() > 0
    assert weight.grad is None


def test_a_models_step_gathers_the_gradient_of_its_usual_step() -> None:
    """A tied model: the head's two calls and the embedding in one tensor, exactly as without."""
    subject = LanguageModel(*tiny.tiny("gpt2"))
    assert subject.linear_head.weight is subject.embedding.weight
    subject.model.requires_grad_(True)
    rows = {
        side: [Encoded((1, 5 + i, 7, 9, 3 + i + shift), 2, 1, f"{side}{i}") for i in range(2)]
        for side, shift in (("forget", 0), ("retain", 4))
    }
    drawn = draw(rows, ["forget"], training=Training(steps=1, batch_size=2), generator=torch.Generator())
    parameters = list(subject.model.parameters())

    def loss(step: Step) -> torch.Tensor:
        return negative_log_likelihood(step.retain) - negative_log_likelihood(step.forget)

    def step(linear: bool) -> list[torch.Tensor]:
        turn = Turn(subject, parameters, drawn, Recipe(loss, ("forget", "retain")), 0, {}, subject.head)
        if not linear:
            turn.gather.takes = lambda weight: False  # type: ignore[method-assign]
        turn.backward()
        found = [p.grad.clone() for p in parameters]
        for p in parameters:
            p.grad = None
        return found

    for want, found in zip(step(False), step(True)):
        torch.testing.assert_close(found, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_norm", [0.0, 0.5])
def test_adamw_is_torchs(dtype: torch.dtype, max_norm: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "BLOCK", 1 << 10)  # the first tensor has several blocks and a rest
    torch.manual_seed(0)
    shapes = [(67, 70), (5,), (7, 3)]
    ours = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    wide = [nn.Parameter(p.detach().float().clone()) for p in ours]
    reference = torch.optim.AdamW(wide, lr=0.01, weight_decay=0.1)
    optimiser = AdamW(ours, weight_decay=0.1)
    for _ in range(3):
        for p, q in zip(ours[:2], wide):  # the third gets no gradient and stays
            p.grad = torch.randn(p.shape).to(dtype)
            q.grad = p.grad.float()
        total = norm([p.grad for p in ours[:2]])
        torch.testing.assert_close(total, torch.nn.utils.get_total_norm([q.grad for q in wide[:2]]))
        torch.nn.utils.clip_grads_with_norm_(wide, max_norm or float("inf"), total)
        optimiser.step(0.01, total, max_norm)
        reference.step()
    for p, q, master in zip(ours, wide, optimiser.masters):
        torch.testing.assert_close(master, q, rtol=1e-5, atol=1e-6)
        assert torch.equal(p, master.to(dtype))
    assert set(optimiser.state) == set(optimiser.masters[:2])
    assert all(float(state["step"]) == 3 for state in optimiser.state.values())
