"""Blocks of the common kind as one function: states and gradients of the models' own code, or it is not taken."""

import pytest
import torch
from tiny import loud, shaped
from torch.utils.flop_counter import FlopCounterMode

from expunge.methods.edit.told import told
from expunge.subjects.tails import Tails

TEXTS = (9, 14, 5)
AT = [4, 9, 0]
READ = [[5, 8], [9, 11, 13], [3]]


def tails(model, layer, read=READ):
    draw = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 300, (n,), generator=draw).tolist() for n in TEXTS]
    made = Tails(model, texts, AT, layer, read)
    made.states(torch.zeros(3, 32))  # the first pass proves tails
    return made


def deep(monkeypatch, name, **settings):
    return shaped(monkeypatch, name, num_hidden_layers=4, **settings)


# Without a block above, with one, with two, and with one between the first and the last.
@pytest.mark.parametrize("layer", [3, 2, 1, 0])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"num_key_value_heads": 4, "hidden_act": "gelu"}),
        ("qwen2", {"hidden_act": "gelu_pytorch_tanh"}),
        ("mistral", {}),
    ],
)
@pytest.mark.parametrize("read", [READ, [[8], [13], [0]]], ids=["several", "one"])
def test_states_and_gradients_are_those_of_whole_passes(monkeypatch, name, settings, layer, read):
    made = tails(deep(monkeypatch, name, **settings), layer, read)
    assert made._pass == made._tail
    assert (made.plain is None) is (layer == 3)
    change = (0.5 * torch.randn(3, 32, generator=torch.Generator().manual_seed(2))).requires_grad_(True)
    weight = torch.randn(made.clean.shape, generator=torch.Generator().manual_seed(3))
    found = []
    for states in (made.states, made._whole):
        value = states(change)
        found.append((value.detach(), *torch.autograd.grad((value * weight).sum(), [change])))
    for ours, plain in zip(*found):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))
    assert not torch.allclose(found[0][0], made.clean, atol=1e-2)


def test_passes_may_interleave(monkeypatch):
    made = tails(deep(monkeypatch, "llama"), 0)
    assert made.plain is not None
    assert not any(part.requires_grad for block in made.plain.blocks for part in (block.keys, block.values))
    changes = [torch.full((3, 32), value, requires_grad=True) for value in (0.3, -0.2)]
    alone = [torch.autograd.grad(made.states(change).square().sum(), [change])[0] for change in changes]
    values = [made.states(change).square().sum() for change in changes]
    for value, change, wanted in zip(values, changes, alone):
        assert torch.equal(torch.autograd.grad(value, [change])[0], wanted)


def test_a_model_that_computes_something_else_runs_its_own_code(monkeypatch):
    model = deep(monkeypatch, "llama")
    block = model.model.model.layers[2]
    handle = block.mlp.register_forward_hook(lambda _, __, output: 2 * output)
    try:
        made = tails(model, 0)
        assert made._pass == made._tail
        assert made.plain is None
        change = torch.ones(3, 32)
        assert torch.allclose(made.states(change), made._whole(change), atol=1e-4)
    finally:
        handle.remove()


def test_products_are_counted(monkeypatch):
    made = tails(deep(monkeypatch, "llama"), 0)
    change = torch.zeros(3, 32, requires_grad=True)
    flops = []
    for plain in (made.plain, None):
        made.plain = plain
        with FlopCounterMode(display=False) as counter:
            torch.autograd.grad(made.states(change).sum(), [change])
        flops.append(counter.get_total_flops())
    assert 0 < flops[0] < flops[1]


@pytest.mark.parametrize("name", ["gpt2", "phi", "bloom", "qwen3"])
def test_blocks_of_another_kind_run_their_own_code(name):
    made = tails(loud(name), 0)
    assert made._pass == made._tail
    assert made.plain is None


def test_an_unknown_activation_runs_its_own_code(monkeypatch):
    assert tails(deep(monkeypatch, "llama", hidden_act="relu2"), 0).plain is None


def test_half_precision_runs_its_own_code(monkeypatch):
    model = deep(monkeypatch, "llama").copy()
    model.model.bfloat16()
    assert tails(model, 0).plain is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "mistral", "phi"])
def test_tails_that_stand_one_place_too_late_are_told_from_rounding(name, dtype):
    model = loud(name)
    model.model.to(dtype)
    right = tails(model, 0)
    assert right._pass == right._tail
    wrong = Tails(model, right.texts, AT, 0, READ)
    wrong.positions = wrong.positions + 1
    wrong.states(torch.zeros(3, 32))
    assert wrong._pass == wrong._whole


@pytest.mark.parametrize(("count", "others"), [(3, 2), (3, 0), (0, 2)])
def test_what_is_told_is_what_autograd_makes_of_log_softmax(count, others):
    draw = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(8, 20)
    states = torch.randn(count + others, 8, generator=draw, requires_grad=True)
    target = torch.randint(20, (count,), generator=draw)
    before = torch.randn(others, 20, generator=draw).log_softmax(-1)
    weights = torch.randn(count + others, generator=draw)
    logprobs = head(states).log_softmax(-1)
    now = logprobs[count:]
    wanted = logprobs[:count].gather(1, target[:, None])[:, 0], (now.exp() * (now - before)).sum(-1)
    found = told(head, states, target, before)
    gradients = []
    for parts in (wanted, found):
        gradients.append(torch.autograd.grad((torch.cat(parts) * weights).sum(), [states])[0])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
