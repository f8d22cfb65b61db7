"""The last MLP takes only tokens that are read: the same states and gradients, fewer tokens."""

from __future__ import annotations

import pytest
import torch
from tiny import ARCHITECTURES, tiny

from expunge.subjects.language import LanguageModel
from expunge.subjects.packed import Encoded, pack
from expunge.subjects.protocol import Taps

ROWS = [
    Encoded((5, 9, 31, 77, 12, 40, 8, 19, 3), 6, 0, ""),
    Encoded((5, 9, 31, 77, 12, 40, 8, 20), 6, 0, ""),  # shares the prompt and an answer token with the first
    Encoded((7, 9, 31, 2, 60, 61, 62, 63, 64, 65), 8, 0, ""),
]
WITHOUT = {"opt", "gpt_neo", "bloom", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek"}
"""No module of its own for the MLP, no packing, or experts."""


def passed(model: LanguageModel, taps: Taps, spares: bool) -> tuple[dict, dict, int]:
    """(states, gradients, tokens that the highest MLP saw)"""
    model._can_spare = spares
    model.model.zero_grad()
    at = len(model.blocks) - 1 if taps.final else max(taps.layers)
    seen: list[int] = []
    out = model.model.get_submodule(str(model.blocks[at].mlp))
    handle = out.register_forward_hook(lambda _, __, output: seen.append(output.shape[1]))
    states = model.states(pack(ROWS), taps)
    handle.remove()
    sum((values * values.detach().cos()).sum() for values in states.values()).backward()
    gradients = {name: p.grad.clone() for name, p in model.model.named_parameters() if p.grad is not None}
    return {key: values.detach() for key, values in states.items()}, gradients, seen[0]


@pytest.mark.parametrize("taps", [Taps(), Taps(final=False, layers=(1,), positions="answer")], ids=["final", "layer"])
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in WITHOUT])
def test_states_and_gradients_stay(name: str, taps: Taps) -> None:
    model = LanguageModel(*tiny(name))
    assert model.can_spare
    pack_ = pack(ROWS)
    assert pack_.read.tolist() == sorted(set(pack_.predict.tolist()))
    whole, wanted, every = passed(model, taps, spares=False)
    spared, found, few = passed(model, taps, spares=True)
    assert (every, few) == (pack_.tokens, len(pack_.read))
    assert few < every
    assert wanted.keys() == found.keys()
    for mine, theirs in ((spared, whole), (found, wanted)):
        for key, values in theirs.items():
            torch.testing.assert_close(mine[key], values, rtol=1e-4, atol=1e-6 * float(values.abs().max()), msg=key)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name in WITHOUT])
def test_other_models_run_as_ever(name: str) -> None:
    assert not LanguageModel(*tiny(name)).can_spare


def test_nothing_is_spared_where_all_positions_are_read() -> None:
    model = LanguageModel(*tiny("llama"))
    assert model.can_spare
    *_, tokens = passed(model, Taps(final=False, layers=(1,), positions="all"), spares=True)
    assert tokens == pack(ROWS).tokens


def test_adapters_see_the_tokens_that_their_matrix_sees() -> None:
    peft = pytest.importorskip("peft")
    model = LanguageModel(*tiny("llama"))
    config = peft.LoraConfig(r=2, target_modules=["gate_proj", "down_proj"], init_lora_weights=False)
    made = model.with_model(peft.inject_adapter_in_model(config, model.model))
    whole, wanted, _ = passed(made, Taps(), spares=False)
    spared, found, _ = passed(made, Taps(), spares=True)
    torch.testing.assert_close(spared, whole, rtol=1e-4, atol=1e-6)
    assert any("lora_" in key for key in found)
    for key, values in wanted.items():
        torch.testing.assert_close(found[key], values, rtol=1e-4, atol=1e-6 * float(values.abs().max()), msg=key)
