"""Passes without gradients in few operators: states of the models' own code, or they are not taken."""

import numpy as np
import pytest
import torch
from tiny import ARCHITECTURES, loud, shaped

from expunge.subjects import plain_pass
from expunge.subjects.contexts import read
from expunge.subjects.language import LanguageModel
from expunge.subjects.packed import Encoded, pack
from expunge.tables.scores import COLUMNS

PLAIN = {"llama", "qwen2", "mistral"}


def rows():
    """A common beginning, prompts alone and shared, answers that begin alike, one short row."""
    draw = torch.Generator().manual_seed(0)
    first, *others = (torch.randint(3, 300, (n,), generator=draw).tolist() for n in (9, 4, 6, 3, 5, 2, 3, 2))
    texts = [
        ([*first, *others[0]], others[1]),
        ([*first, *others[0]], [*others[1][:2], *others[2]]),
        ([*first, *others[3]], others[4]),
        ([*first, *others[5]], others[6]),
        ([*first, *others[5]], others[2]),
    ]
    return [Encoded((*prompt, *answer), len(prompt), 1, "") for prompt, answer in texts]


def tables(model, items):
    """Scores by few operators, and by the model's own code."""
    found = [model.score(items)]
    plan, model._plain = model._plain, False
    found.append(model.score(items))
    model._plain = plan
    return found


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_are_those_of_the_models_own_code(name):
    model = loud(name)
    assert (model.plain is not None) is (name in PLAIN)
    items = [((str(i), "answer" if i % 2 else "item"), row) for i, row in enumerate(rows())]
    ours, own = tables(model, items)
    for column in COLUMNS:
        np.testing.assert_allclose(getattr(ours, column), getattr(own, column), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"num_key_value_heads": 4, "hidden_act": "gelu", "num_hidden_layers": 1}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
        ("qwen2", {"hidden_act": "gelu_pytorch_tanh"}),
        ("mistral", {"sliding_window": None}),
    ],
)
@pytest.mark.parametrize("sharing", ["tokens", "prompts", "nothing"])
def test_states_are_those_of_the_models_own_code(monkeypatch, name, settings, sharing):
    model = shaped(monkeypatch, name, **settings)
    monkeypatch.setattr(plain_pass, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(plain_pass, "FEWEST", 7)  # several chunks, the last one short
    assert model.plain is not None
    packed = pack(rows(), sharing=sharing)
    with torch.no_grad():
        found = model.hidden_states(packed)
        with model.packing(packed):
            own = model.run_decoder(packed)[packed.predict]
    torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-5 * float(own.abs().max()))


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_texts_are_read_as_by_the_models_own_code(name):
    model, texts = loud(name), [row.ids for row in rows()]
    assert model.plain is not None
    found = [read(model, texts)]
    model._plain = False
    found.append(read(model, texts))
    ours, own = found
    assert torch.equal(ours.ids, own.ids)
    assert all(torch.equal(*pair) for pair in zip(ours.places, own.places, strict=True))
    for one, other in zip(
        [ours.states, *(part for pair in ours.layers for part in pair)],
        [own.states, *(part for pair in own.layers for part in pair)],
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


def test_a_window_that_short_rows_do_not_show_is_seen(monkeypatch):
    model = shaped(monkeypatch, "mistral", sliding_window=20)
    assert model.plain.window == 20
    long = Encoded(tuple(torch.randint(3, 300, (60,), generator=torch.Generator().manual_seed(2)).tolist()), 9, 0, "")
    ours, own = tables(model, [(("0", "answer"), long)])
    np.testing.assert_allclose(ours.logprob, own.logprob, rtol=1e-5, atol=1e-5)


def test_layers_that_look_back_unequally_far_run_their_own_code(monkeypatch):
    settings = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
    assert shaped(monkeypatch, "qwen2", **settings).plain is None


def test_weights_are_taken_as_they_are_when_a_pass_runs():
    model, packed = loud("llama"), pack(rows())
    with torch.no_grad():
        before = model.hidden_states(packed)
        model.model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
        after = model.hidden_states(packed)
        assert not torch.allclose(before, after, atol=1e-3)
        model._plain = False
        torch.testing.assert_close(after, model.hidden_states(packed), rtol=1e-5, atol=1e-5)


def doubled(model):
    return model.model.model.layers[1].mlp.register_forward_hook(lambda _, __, output: 2 * output)


def replaced(model):
    class Doubled(type(model.model.model.layers[1].mlp)):
        def forward(self, x):
            return 2 * super().forward(x)

    model.model.model.layers[1].mlp.__class__ = Doubled


def adapted(model):
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    inject_adapter_in_model(LoraConfig(target_modules=["up_proj"], init_lora_weights=False), model.model)


@pytest.mark.parametrize("change", [doubled, replaced, adapted])
def test_what_somebody_has_put_into_a_model_counts(change):
    model, packed = loud("llama"), pack(rows())
    with torch.no_grad():
        before = model.hidden_states(packed)
        assert model.plain is not None
        change(model)
        found = model.hidden_states(packed)
        model._plain = False
        assert torch.equal(found, model.hidden_states(packed))
    assert not torch.allclose(before, found, atol=1e-3)


def test_gradients_and_half_precision_run_the_models_own_code():
    model, packed = loud("llama"), pack(rows())
    assert model.plain is not None
    assert model.hidden_states(packed).requires_grad
    half = model.copy()
    half.model.bfloat16()
    with torch.no_grad():
        assert half.hidden_states(packed).dtype == torch.bfloat16
    assert plain_pass.plain_pass(half) is None
    assert LanguageModel(half.model, half.tokenizer).plain is None
