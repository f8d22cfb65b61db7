"""Fused norms and rotations give what the models' own code gives, forward and backward, and leave nothing behind."""

from __future__ import annotations

import sys
from contextlib import nullcontext

import pytest
import torch
from tiny import ARCHITECTURES, tiny

from expunge.subjects import fused as module
from expunge.subjects.fused import _RMSNorm, _rotates, _Rotation, fused
from expunge.subjects.packed import Family, Run

NORMS = {
    "llama": "LlamaRMSNorm",
    "qwen3": "Qwen3RMSNorm",
    "mistral": "MistralRMSNorm",
    "gemma2": "Gemma2RMSNorm",
    "gemma3": "Gemma3RMSNorm",
    "olmo2": "Olmo2RMSNorm",
    "mixtral": "MixtralRMSNorm",
}


def changed(model):
    return {owner.__name__.rpartition(".")[2] for owner, *_ in module._found(model)}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_same_states_and_gradients(name):
    model = tiny(name)[0].float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    ids = torch.arange(3, 33)[None]
    found = []
    for context in (nullcontext(), fused(model)):
        model.zero_grad()
        with context:
            states = model(input_ids=ids).logits
        states.square().mean().backward()
        found.append((states.detach(), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}))
    (plain, theirs), (ours, mine) = found
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6 * float(plain.abs().max()))
    assert mine.keys() == theirs.keys()
    for key, gradient in theirs.items():
        size = float(gradient.abs().max())
        torch.testing.assert_close(mine[key], gradient, rtol=1e-4, atol=1e-5 * size)


@pytest.mark.parametrize("name", [name for name in NORMS if name in ARCHITECTURES])
def test_known_norms_and_rotations_are_replaced_and_put_back(name):
    model = tiny(name)[0]
    found = changed(model)
    assert NORMS[name] in found
    assert any(part.startswith("modeling_") for part in found)
    library = sys.modules[type(model).__module__]
    kind = getattr(library, NORMS[name])
    before = kind.forward, library.apply_rotary_pos_emb
    with fused(model):
        with fused(model):
            pass
        assert kind.forward is not before[0]
        assert library.apply_rotary_pos_emb is not before[1]
    assert (kind.forward, library.apply_rotary_pos_emb) == before


def test_nothing_of_other_models_is_touched():
    assert not changed(tiny("gpt2")[0])


def test_interleaved_rotations_are_left_alone():
    from transformers.models.cohere import modeling_cohere

    assert not _rotates(modeling_cohere.apply_rotary_pos_emb)


def test_gradients_of_gradients():
    generator = torch.Generator().manual_seed(0)

    def values(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)

    cos, first, second = (values(1, 4, n).detach() for n in (6, 3, 3))
    assert torch.autograd.gradcheck(lambda x: _Rotation.apply(x, cos, first, second), values(2, 4, 6))
    assert torch.autograd.gradgradcheck(lambda x: _Rotation.apply(x, cos, first, second), values(2, 4, 6))


@pytest.mark.parametrize("style", module.STYLES)
def test_norm_against_the_formula(style):
    offset, wide = style
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 7, 16, generator=generator, requires_grad=True)
    weight = torch.randn(16, generator=generator, requires_grad=True)
    factor = torch.randn(5, 7, 16, generator=generator)
    ours = _RMSNorm.apply(x, weight, 1e-3, offset, wide)
    plain = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3) * (weight + offset)
    torch.testing.assert_close(ours, plain)
    mine = torch.autograd.grad((ours * factor).sum(), (x, weight), create_graph=True)
    theirs = torch.autograd.grad((plain * factor).sum(), (x, weight), create_graph=True)
    torch.testing.assert_close(mine, theirs)
    again = [torch.autograd.grad(sum(g.square().sum() for g in pair), (x, weight)) for pair in (mine, theirs)]
    torch.testing.assert_close(again[0], again[1], rtol=1e-4, atol=1e-4)


def test_padding_of_a_run_passes_no_gradient():
    # Two families of 2 and 3 tokens: place (0 1 1 | 2 3 4), the second 1 is padding.
    run = Run.of([Family(0, 2), Family(2, 5)], torch.device("cpu"))
    tokens = torch.arange(5.0).reshape(5, 1, 1).requires_grad_()
    spread = run.take(tokens)
    assert spread.flatten().tolist() == [0, 1, 1, 2, 3, 4]
    given = run.give(spread)
    assert given.flatten().tolist() == [0, 1, 2, 3, 4]
    (given.flatten() * torch.tensor([1.0, 2, 3, 4, 5])).sum().backward()
    assert tokens.grad.flatten().tolist() == [1, 2, 3, 4, 5]
