"""The scope language resolves to exactly the tensors it names (specs: wgt-scopes)."""

import pytest
import torch
from tiny import GROUPED, tiny

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


class Eighth(torch.nn.Module):
    """A layer whose matrix is stored in 8 bits."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.weight = torch.nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight * self.scale, self.bias)


def test_a_delta_over_a_quantised_base_is_not_rounded_away():
    from transformers import BitsAndBytesConfig

    from expunge.deltas import Delta
    from expunge.subjects.language import LanguageModel

    model, tokenizer = tiny("llama")
    path = "model.layers.1.mlp.down_proj"
    model.set_submodule(path, Eighth(model.get_submodule(path)))
    model.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    base = LanguageModel(model, tokenizer)
    before = model.get_parameter(f"{path}.weight").clone()
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 64, generator=generator), 1e-4 * torch.randn(32, 2, generator=generator)
    delta = Delta(base.fingerprint, {f"{path}.weight": {"A": a, "B": b, "scale": torch.tensor(2.0)}})
    made = delta.apply(base)
    layer, quantised = made.model.get_submodule(path), model.get_submodule(path)
    assert type(layer) is torch.nn.Linear
    assert torch.allclose(layer.weight, quantised.weight * quantised.scale + 2.0 * b @ a, atol=1e-6)
    assert {path, "lm_head"} <= set(made.model.config.quantization_config.llm_int8_skip_modules)
    assert torch.equal(model.get_parameter(f"{path}.weight"), before)
    assert model.config.quantization_config.llm_int8_skip_modules is None


@pytest.mark.parametrize("bits", [8, 4])
def test_adapters_are_trained_over_a_quantised_base(bits, tmp_path):
    pytest.importorskip("bitsandbytes")
    import transformers

    from expunge import registry
    from expunge.methods.optimise.loop import Training
    from expunge.methods.optimise.unlearn import unlearn
    from expunge.rows import Row
    from expunge.subjects.language import LanguageModel

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**GROUPED, "hidden_size": 128, "intermediate_size": 256})
    LanguageModel(transformers.AutoModelForCausalLM.from_config(config), tiny("llama")[1]).save(tmp_path / "plain")
    wanted = transformers.BitsAndBytesConfig(
        load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_compute_dtype=torch.float32
    )

    def load():
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=wanted)

    model = load()
    layers = [module for module in model.modules() if getattr(module, "support_avx512bf16_for_cpu", False)]
    if layers:
        with pytest.raises(ScopeError, match=r"layers\.0\.self_attn\.q_proj is in 4 bits on a CPU"):
            resolve("lora", load())
        for layer in layers:
            layer.support_avx512bf16_for_cpu = False
    base = LanguageModel(model, tiny("llama")[1])
    with pytest.raises(ScopeError, match="only adapters can move"):
        resolve("layers:1", model)
    assert resolve("lora(r=4, layers=1, modules=down_proj)", model).trainable == 4 * (128 + 256)
    before = base.fingerprint
    rows = [Row(id=str(i), prompt=f"where was {i} born?", answer="Tivin in Carth") for i in range(4)]
    found = unlearn(
        base,
        registry.get("methods", "npo"),
        {},
        scope="lora(r=4, layers=1)",
        data={"forget": rows, "retain": rows},
        training=Training(steps=5, learning_rate=1e-2, guard=None),
    )
    made = found.delta.apply(base)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        start, trained, applied = (s.model(input_ids=ids).logits for s in (base, found.subject, made))
    # 8 bits round activations as well; the result's dense layers do not.
    assert (applied - trained).abs().max() < 0.03 * (trained - start).abs().max()
    assert LanguageModel(model, base.tokenizer).fingerprint == before


def test_a_scope_works_without_weights():
    from transformers import AutoModelForCausalLM

    model, _ = tiny("llama")
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    assert resolve("role:mlp_out@1-2", empty).trainable == resolve("role:mlp_out@1-2", model).trainable
