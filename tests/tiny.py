"""Tiny random models of many architectures: d = 32, 3 layers, about 300 tokens, nothing downloaded."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEXT = ["Question: where was Ilva born?\nAnswer: Tivin in the north of Carth"] * 3
SHAPE = {
    "vocab_size": 304,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
GROUPED = {**SHAPE, "num_key_value_heads": 2}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", GROUPED),
    "qwen2": ("Qwen2Config", GROUPED),
    "qwen3": ("Qwen3Config", {**GROUPED, "head_dim": 8}),
    "mistral": ("MistralConfig", {**GROUPED, "sliding_window": 6}),
    "gemma2": ("Gemma2Config", {**GROUPED, "head_dim": 8, "sliding_window": 6}),
    "gemma3": ("Gemma3TextConfig", {**GROUPED, "head_dim": 8, "sliding_window": 6}),
    "phi": ("PhiConfig", SHAPE),
    "phi3": ("Phi3Config", {**GROUPED, "pad_token_id": 0}),
    "gpt2": ("GPT2Config", {"vocab_size": 304, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256}),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            "vocab_size": 304,
            "hidden_size": 32,
            "num_layers": 3,
            "num_heads": 4,
            "attention_types": [[["global", "local", "global"], 1]],
            "window_size": 6,
            "max_position_embeddings": 256,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", SHAPE),
    "opt": (
        "OPTConfig",
        {
            "vocab_size": 304,
            "hidden_size": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "word_embed_proj_dim": 16,
        },
    ),
    "olmo2": ("Olmo2Config", GROUPED),
    "falcon": (
        "FalconConfig",
        {"vocab_size": 304, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "alibi": False},
    ),
    "bloom": ("BloomConfig", {"vocab_size": 304, "hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "mixtral": ("MixtralConfig", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {**GROUPED, **EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 48},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", {**GROUPED, **EXPERTS, "num_experts": 4, "head_dim": 8}),
    "deepseek": (
        "DeepseekV3Config",
        {
            **SHAPE,
            **EXPERTS,
            **LATENT,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
}
ARCHITECTURES = tuple(CONFIGS)


@cache
def _tokenizer() -> str:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXT, trainer)
    return made.to_str()


def tiny(architecture: str) -> tuple[Any, Any]:
    """A random model and a byte-level BPE tokenizer with <s>, </s>, <pad>; the same at every call."""
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer()), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    name, settings = CONFIGS[architecture]
    config = getattr(transformers, name)(**{**settings, "bos_token_id": 0, "eos_token_id": 1})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    return model, tokenizer


def loud(architecture: str = "llama") -> Any:
    """A subject with weights of a trained model's size: a random one's neurons hardly move its output."""
    from expunge.subjects.language import LanguageModel

    made = LanguageModel(*tiny(architecture))
    with torch.no_grad():
        for name, p in made.model.named_parameters():
            if p.dim() > 1 and "embed" not in name:
                p.mul_(5)
    return made


def shaped(monkeypatch: Any, architecture: str, **settings: Any) -> Any:
    """A loud subject of another configuration, whose norms and biases do something."""
    kind, known = CONFIGS[architecture]
    monkeypatch.setitem(CONFIGS, architecture, (kind, {**known, **settings}))
    made = loud(architecture)
    with torch.no_grad():
        for p in made.model.parameters():
            if p.dim() == 1:
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return made


def logits(model: Any, text: str = "where was Ilva born?") -> torch.Tensor:
    """(1, T, V) by the model's own code."""
    ids = torch.tensor([model.prompt_ids(text, ("a", "b"))])
    with torch.no_grad():
        return model.model(input_ids=ids).logits
