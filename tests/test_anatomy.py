"""Parts are found by structure: every architecture against names written down by hand."""

import pytest
import torch
from tiny import ARCHITECTURES, tiny

from expunge.errors import SubjectError
from expunge.subjects.anatomy import anatomy

GATED = ("mlp.up_proj", "mlp.gate_proj", "mlp.down_proj")
APART = ("self_attn.q_proj self_attn.k_proj self_attn.v_proj", "self_attn.o_proj")
SHARED = ("mlp.shared_expert.up_proj", "mlp.shared_expert.gate_proj", "mlp.shared_expert.down_proj")
FUSED = "mlp.experts.gate_up_proj mlp.experts.down_proj"
NEOX = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "", "mlp.dense_4h_to_h")
FALCON = ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "", "mlp.dense_4h_to_h")
# qkv, attention out, into the MLP, gate, out of it, router, experts: the modules of block 1
EXPECTED = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "olmo2"), (*APART, *GATED, "", "")),
    "phi": (APART[0], "self_attn.dense", "mlp.fc1", "", "mlp.fc2", "", ""),
    "phi3": ("self_attn.qkv_proj", APART[1], "mlp.gate_up_proj", "mlp.gate_up_proj", GATED[2], "", ""),
    "gpt2": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "", "mlp.c_proj", "", ""),
    "gpt_neo": (
        "attn.attention.q_proj attn.attention.k_proj attn.attention.v_proj",
        "attn.attention.out_proj",
        "mlp.c_fc",
        "",
        "mlp.c_proj",
        "",
        "",
    ),
    "gpt_neox": (*NEOX, "", ""),
    "opt": (APART[0], "self_attn.out_proj", "fc1", "", "fc2", "", ""),
    "falcon": (*FALCON, "", ""),
    "bloom": (*FALCON, "", ""),
    "mixtral": (*APART, "", "", "", "mlp.gate", FUSED),
    "qwen2_moe": (*APART, *SHARED, "mlp.gate mlp.shared_expert_gate", FUSED),
    "qwen3_moe": (*APART, "", "", "", "mlp.gate", FUSED),
    "deepseek": (
        "self_attn.q_a_proj self_attn.q_b_proj self_attn.kv_a_proj_with_mqa self_attn.kv_b_proj",
        APART[1],
        *(name.replace("shared_expert", "shared_experts") for name in SHARED),
        "mlp.gate",
        FUSED,
    ),
}


def modules(names, block):
    return {name.removeprefix(block.name + ".").removesuffix(".weight").removesuffix(".bias") for name in names}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_part_of_a_block_is_found(architecture):
    model, _ = tiny(architecture)
    parts = anatomy(model)
    block = parts.blocks[1]
    found = (
        block.qkv,
        block.attention_out,
        block.mlp_in,
        block.mlp_gate,
        block.mlp_out,
        block.router,
        block.experts,
    )
    assert [modules(names, block) for names in found] == [set(names.split()) for names in EXPECTED[architecture]]
    assert len(parts.blocks) == 3
    assert parts.embedding[1] is model.get_input_embeddings()
    assert parts.lm_head[1] is model.get_output_embeddings()
    assert parts.final_norm is not None


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_has_exactly_one_role_or_is_a_fused_gate(architecture):
    model, _ = tiny(architecture)
    places = [(role, name) for role, several in anatomy(model).roles.items() for _, name in several]
    for name, _ in model.named_parameters():
        roles = {role for role, other in places if other == name}
        assert roles, name
        assert len(roles) == 1 or roles == {"mlp_in", "mlp_gate"}, (name, roles)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_same_is_found_without_weights(architecture):
    from transformers import AutoModelForCausalLM

    model, _ = tiny(architecture)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config)
    assert anatomy(empty).roles == anatomy(model).roles


def test_the_first_dense_block_of_a_mixture_is_found_too():
    block = anatomy(tiny("deepseek")[0]).blocks[0]
    assert modules(block.mlp_in + block.mlp_gate + block.mlp_out, block) == set(GATED)
    assert block.experts == block.router == ()


def test_what_is_no_decoder_is_refused():
    with pytest.raises(SubjectError, match="no token embedding or no LM head"):
        anatomy(torch.nn.Sequential(torch.nn.Linear(3, 3)))
