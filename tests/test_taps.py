"""What passes hand out: layers, routers, early exit, frozen prefix, perturbations."""

import pytest
import torch
from tiny import ARCHITECTURES, tiny

from expunge.errors import SubjectError
from expunge.rows import Row
from expunge.subjects.entering import Start, laid, stored
from expunge.subjects.language import LanguageModel
from expunge.subjects.packed import pack
from expunge.subjects.protocol import Taps

PACKED = [name for name in ARCHITECTURES if name not in ("gpt_neo", "bloom")]


def encoded(subject, count=4):
    """Rows that share prompts two by two, and a beginning."""
    return [
        subject.encode(Row(id=str(i), prompt=f"where was Ilva {i // 2} born?", answer=f"Tivin {i * 7} in Carth"))
        for i in range(count)
    ]


def entry(subject, pack_, layer, inside=False):
    return laid(layer, stored(subject, pack_.rows, Start(layer, inside)), pack_)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_equal_those_of_plain_passes(architecture):
    subject = LanguageModel(*tiny(architecture))
    rows = encoded(subject)
    found = subject.states(pack(rows), Taps(layers=(0, 1)))
    with torch.no_grad():
        plain = [
            subject.decoder(input_ids=torch.tensor([row.ids[:-1]]), use_cache=False, output_hidden_states=True)
            for row in rows
        ]
    for layer in (0, 1):
        wanted = torch.cat([out.hidden_states[layer + 1][0] for out in plain])
        assert torch.allclose(found[f"layer.{layer}"], wanted, atol=1e-5)
    wanted = torch.cat([out.last_hidden_state[0, row.start - 1 :] for out, row in zip(plain, rows)])
    assert torch.allclose(found["final"], wanted, atol=1e-5)
    answers = subject.states(pack(rows), Taps(final=False, layers=(1,), positions="answer"))
    assert list(answers) == ["layer.1"]
    wanted = torch.cat([out.hidden_states[2][0, row.start - 1 :] for out, row in zip(plain, rows)])
    assert torch.allclose(answers["layer.1"], wanted, atol=1e-5)


@pytest.mark.parametrize("architecture", PACKED)
def test_early_exit_and_entry_have_the_loss_and_the_gradients_of_the_full_pass(architecture):
    subject = LanguageModel(*tiny(architecture))
    assert subject.can_enter
    pack_ = pack(encoded(subject))
    name = subject.blocks[1].name + "."
    moving = {n: p for n, p in subject.model.named_parameters() if n.startswith(name)}

    def gradient(taps, entry_=None):
        for n, p in subject.model.named_parameters():
            p.requires_grad_(n in moving)
            p.grad = None
        loss = (subject.states(pack_, taps, entry_)["layer.1"] - 0.3).square().mean()
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in moving.items() if p.grad is not None}

    loss, wanted = gradient(Taps(layers=(1,)))
    for other in (
        gradient(Taps(final=False, layers=(1,))),
        gradient(Taps(final=False, layers=(1,)), entry(subject, pack_, 1)),
    ):
        assert torch.allclose(other[0], loss, atol=1e-6)
        assert other[1].keys() == wanted.keys()
        for n, g in wanted.items():
            assert torch.allclose(other[1][n], g, atol=1e-6), n


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("architecture", PACKED)
def test_entry_inside_a_block_has_the_loss_and_the_gradient_of_the_full_pass(architecture, layer):
    subject = LanguageModel(*tiny(architecture))
    block = subject.blocks[layer]
    # A norm behind the MLP stands between its matrix and what the block gives.
    assert subject.can_enter_inside(layer) == (
        block.out is not None and architecture not in ("gemma2", "gemma3", "olmo2")
    )
    if not subject.can_enter_inside(layer):
        return
    pack_ = pack(encoded(subject))
    weight = subject.model.get_parameter(f"{block.out}.weight")
    for p in subject.model.parameters():
        p.requires_grad_(p is weight)
    ran = []
    for name, module in subject.model.named_modules():
        if name.startswith(block.name + ".") and name != block.out:
            module.register_forward_hook(lambda module, *_: ran.append(module))

    def gradient(entry_=None):
        weight.grad = None
        states = subject.states(pack_, Taps(layers=(layer,)), entry_)
        ((states[f"layer.{layer}"] - 0.3).square().mean() + states["final"].square().mean()).backward()
        return states["final"].detach(), weight.grad.clone()

    whole = gradient()
    inside = entry(subject, pack_, layer, inside=True)
    assert ran
    ran.clear()
    for found, wanted in zip(gradient(inside), whole):
        assert torch.allclose(found, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
    assert not ran


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3", "olmo2"])
def test_a_norm_behind_the_mlp_is_seen_in_16_bits_too(architecture):
    model, tokenizer = tiny(architecture)
    assert not LanguageModel(model.to(torch.bfloat16), tokenizer).can_enter_inside(1)


@pytest.mark.parametrize("architecture", PACKED)
def test_a_pass_from_the_middle_ends_where_a_whole_one_does(architecture):
    subject = LanguageModel(*tiny(architecture))
    pack_ = pack(encoded(subject))
    with torch.no_grad():
        whole = subject.hidden_states(pack_)
        found = subject.states(pack_, Taps(), entry(subject, pack_, 2))["final"]
        again = subject.hidden_states(pack_)
    assert torch.allclose(found, whole, atol=1e-5)
    assert torch.equal(again, whole)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek"])
def test_router_logits_choose_the_experts_the_model_chooses(architecture):
    subject = LanguageModel(*tiny(architecture))
    pack_ = pack(encoded(subject))
    layer = 2
    weight = subject.blocks[layer].router
    seen = []
    handle = subject.model.get_submodule(weight.rpartition(".")[0]).register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].reshape(-1, inputs[0].shape[-1]))
    )
    with torch.no_grad():
        found = subject.states(pack_, Taps(final=False, routers=(layer,)))[f"router.{layer}"]
    handle.remove()
    wanted = seen[-1] @ subject.model.get_parameter(weight).T
    assert torch.allclose(found, wanted[pack_.every], atol=1e-6)


def test_a_dense_block_has_no_router():
    subject = LanguageModel(*tiny("llama"))
    with pytest.raises(SubjectError, match="has no router"):
        subject.states(pack(encoded(subject)), Taps(routers=(0,)))
    with pytest.raises(SubjectError, match="there is no block 9"):
        subject.states(pack(encoded(subject)), Taps(layers=(9,)))


def test_repacking_changes_nothing():
    subject = LanguageModel(*tiny("llama"))
    rows = encoded(subject, 6)
    taps = Taps(layers=(1,))
    whole = subject.states(pack(rows), taps)["layer.1"].split([len(row.ids) - 1 for row in rows])
    turned = subject.states(pack(rows[::-1]), taps)["layer.1"].split([len(row.ids) - 1 for row in rows[::-1]])
    for a, b in zip(whole, reversed(turned)):
        assert torch.allclose(a, b, atol=1e-5)


def test_perturbations_reach_the_blocks_above_and_nothing_stays_hooked():
    subject = LanguageModel(*tiny("llama"))
    pack_ = pack(encoded(subject))
    delta = torch.zeros(pack_.tokens, 32, requires_grad=True)
    before = subject.hidden_states(pack_)
    with subject.perturbed(0, delta):
        same = subject.hidden_states(pack_)
        same.sum().backward()
    assert torch.equal(same, before)
    assert delta.grad.abs().sum() > 0
    with torch.no_grad(), subject.perturbed(0, torch.ones(pack_.tokens, 32)):
        assert not torch.allclose(subject.hidden_states(pack_), before)
    with pytest.raises(RuntimeError), subject.perturbed(0, torch.ones(3, 32)):
        subject.hidden_states(pack_)
    assert torch.equal(subject.hidden_states(pack_), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in subject.model.modules())
