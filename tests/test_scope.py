"""The scope language resolves to exactly the tensors it names (specs: wgt-scopes)."""

import pytest
import torch
from tiny import tiny

from expunge.errors import ScopeError
from expunge.methods.optimise.scope import resolve


def names(scope, architecture="llama"):
    return [name for name, _ in resolve(scope, tiny(architecture)[0]).parameters]


def test_all_and_none():
    model, _ = tiny("llama")
    assert names("all") == [name for name, _ in model.named_parameters()]
    assert names("none") == []
    assert resolve("all", model).share == 1.0


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("llama", ["model.layers.{}.mlp.down_proj.weight"]),
        ("gpt_neox", ["gpt_neox.layers.{}.mlp.dense_4h_to_h.weight", "gpt_neox.layers.{}.mlp.dense_4h_to_h.bias"]),
        ("gpt2", ["transformer.h.{}.mlp.c_proj.weight", "transformer.h.{}.mlp.c_proj.bias"]),
        ("gpt_neo", ["transformer.h.{}.mlp.c_proj.weight", "transformer.h.{}.mlp.c_proj.bias"]),
        ("phi", ["model.layers.{}.mlp.fc2.weight", "model.layers.{}.mlp.fc2.bias"]),
        ("opt", ["model.decoder.layers.{}.fc2.weight", "model.decoder.layers.{}.fc2.bias"]),
    ],
)
def test_one_role_names_each_architectures_own_tensors(architecture, expected):
    assert names("role:mlp_out@1-2", architecture) == [name.format(i) for i in (1, 2) for name in expected]


def test_roles_of_a_mixture_of_experts():
    assert names("role:router@all", "mixtral") == [f"model.layers.{i}.mlp.gate.weight" for i in range(3)]
    assert names("role:experts@-1", "mixtral") == [
        "model.layers.2.mlp.experts.gate_up_proj",
        "model.layers.2.mlp.experts.down_proj",
    ]
    with pytest.raises(ScopeError, match="has no mlp_out there"):
        names("role:mlp_out", "mixtral")


@pytest.mark.parametrize(
    ("span", "layers"),
    [
        ("1", {1}),
        ("0-1", {0, 1}),
        ("-1", {2}),
        ("-2-", {1, 2}),
        ("1-", {1, 2}),
        ("0.5-", {1, 2}),
        ("0.5", {1}),
        ("0-0.5", {0, 1}),
        ("all", {0, 1, 2}),
    ],
)
def test_ranges(span, layers):
    assert {int(name.split(".")[2]) for name in names(f"layers:{span}")} == layers


def test_layers_hold_every_tensor_of_a_block():
    model, _ = tiny("gpt_neox")
    wanted = [name for name, _ in model.named_parameters() if name.startswith("gpt_neox.layers.2.")]
    assert names("layers:2", "gpt_neox") == wanted


def test_forms_are_joined_and_taken_away():
    joined = names("role:mlp_out@0+role:lm_head")
    assert joined == ["model.layers.0.mlp.down_proj.weight", "lm_head.weight"]
    without = names("layers:0 - role:norm")
    assert all("norm" not in name for name in without)
    assert names("all-layers:all") == ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]


def test_regex_is_a_full_match_and_names_the_nearest():
    assert names(r"regex:model\.layers\.(0|2)\.mlp\.down_proj\.weight") == [
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.2.mlp.down_proj.weight",
    ]
    with pytest.raises(ScopeError, match=r"Nearest names: .*model\.layers\.\d\.mlp\.down_proj\.weight"):
        names(r"regex:model\.layers\.0\.mlp\.down_proj")


@pytest.mark.parametrize(
    ("scope", "match"),
    [
        ("everything", "not understood"),
        ("", "not understood"),
        ("layers:9", "not within 0-2"),
        ("layers:x", "not a range"),
        ("layers:-", "not a range"),
        ("layers:0.5-1.5", "not within 0-2"),
        ("lora(modules=norm)", "no linear layer of norm"),
        ("role:mlp_outt", "Did you mean mlp_out"),
        ("regex:(", "not a regular expression"),
        ("all-all", "leaves nothing"),
        ("expert(layer=1, index=0)", "is dense"),
        ("lora(rank=3)", "lora has no setting"),
        ("lora(r=x)", "invalid literal"),
        ("lora(r=0)", "at least 1"),
        ("lora(init=fil)", "Did you mean fila"),
        ("lora(modules=down_prj)", "Did you mean down_proj"),
        ("lora+lora", "added once"),
        ({"lora": 3}, "not understood"),
    ],
)
def test_mistakes_are_named(scope, match):
    with pytest.raises(ScopeError, match=match):
        resolve(scope, tiny("llama")[0])


def test_lora_by_text_and_by_mapping():
    model, _ = tiny("llama")
    text = resolve("lora(r=4, alpha=8, modules=mlp, layers=1-2)", model)
    expected = {f"model.layers.{i}.mlp.{m}_proj" for i in (1, 2) for m in ("up", "gate", "down")}
    assert set(text.lora.targets) == expected
    assert text.trainable == 2 * 3 * 4 * (32 + 64)
    mapping = resolve({"lora": {"r": 4, "modules": ["q_proj", "v_proj"], "layers": "1-2"}}, model)
    assert set(mapping.lora.targets) == {f"model.layers.{i}.self_attn.{m}_proj" for i in (1, 2) for m in "qv"}
    assert mapping.first_layer == 1
    assert mapping.parameters == []


def test_tied_tensors_are_one_and_the_report_says_so():
    model, _ = tiny("gpt2")
    found = resolve("role:lm_head", model)
    assert [name for name, _ in found.parameters] == ["transformer.wte.weight"]
    assert "one tensor" in found.notes[0]


def test_quantised_weights_take_adapters_only():
    model, _ = tiny("llama")
    model.is_quantized = True
    with pytest.raises(ScopeError, match="only adapters can move"):
        resolve("all", model)
    assert resolve("lora", model).lora is not None


def test_a_scope_works_without_weights():
    from transformers import AutoModelForCausalLM

    model, _ = tiny("llama")
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    assert resolve("role:mlp_out@1-2", empty).trainable == resolve("role:mlp_out@1-2", model).trainable
