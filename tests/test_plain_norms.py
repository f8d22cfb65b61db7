"""Norms of rows' gradients without autograd: those of the model's own code, or it is not taken."""

import numpy as np
import pytest
import torch
from test_plain_pass import adapted, doubled
from tiny import ARCHITECTURES, loud, shaped

from expunge.subjects import gradients, plain_norms
from expunge.subjects.packed import Encoded
from expunge.subjects.plain_pass import plain_pass
from expunge.tables.scores import COLUMNS

BEGINNING = 9


def rows(shared=BEGINNING):
    """Rows of several lengths with a beginning of so many tokens, some closed."""
    draw = torch.Generator().manual_seed(0)

    def some(count):
        return torch.randint(3, 300, (count,), generator=draw).tolist()

    first = some(shared)
    texts = [(some(3), some(4)), (some(1), some(9)), (some(5), some(2)), (some(1), some(1)), (some(3), some(4))]
    return [
        Encoded((*first, *prompt, *answer), shared + len(prompt), int(len(answer) > 3), "") for prompt, answer in texts
    ]


@pytest.fixture
def walks(monkeypatch):
    """Those that were taken."""
    seen = []

    class Seen(plain_norms.Walk):
        def __init__(self, plain, rows):
            super().__init__(plain, rows)
            seen.append(self)

    monkeypatch.setattr(gradients, "Walk", Seen)
    return seen


@pytest.fixture
def walked(monkeypatch, walks):
    """As `walks`, which are taken however narrow the model is."""
    monkeypatch.setattr(gradients, "pays", lambda *_: True)
    return walks


def both(model, chosen, walked, monkeypatch):
    """(norms, scores) without autograd and with it."""
    items = [((str(i), "answer"), row) for i, row in enumerate(chosen)]
    found = [model.gradients_and_scores(items)]
    assert walked
    walked.clear()
    monkeypatch.setattr(gradients, "pays", lambda *_: False)
    found.append(model.gradients_and_scores(items))
    assert not walked
    return found


def alike(ours, own):
    np.testing.assert_allclose(ours[0].norm, own[0].norm, rtol=2e-5, atol=1e-6 * float(own[0].norm.max()))
    for column in COLUMNS:
        np.testing.assert_allclose(getattr(ours[1], column), getattr(own[1], column), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("llama", {"num_key_value_heads": 4, "hidden_act": "gelu", "num_hidden_layers": 1, "pad_token_id": 0}),
        ("qwen2", {"hidden_act": "gelu_pytorch_tanh"}),
        ("mistral", {}),
    ],
)
@pytest.mark.parametrize("shared", [BEGINNING, 2])
def test_norms_and_scores_are_those_of_the_models_own_code(monkeypatch, walked, name, settings, shared):
    model = shaped(monkeypatch, name, **settings)
    alike(*both(model, rows(shared), walked, monkeypatch))


def test_norms_are_those_of_one_backward_pass_per_row(monkeypatch, walked):
    model, chosen = shaped(monkeypatch, "llama", tie_word_embeddings=True), rows()
    found = model.gradients([((str(i), "answer"), row) for i, row in enumerate(chosen)]).norm
    assert walked
    wanted = []
    for row in chosen:
        own = model.copy().model.requires_grad_(True)
        ids = torch.tensor([row.ids[: len(row.ids) - row.closing]])
        logprobs = own(input_ids=ids).logits[0, :-1].log_softmax(-1)
        (-logprobs.gather(1, ids[0, 1:, None])[row.start - 1 :, 0].mean()).backward()
        wanted.append([float(p.grad.double().norm()) for p in own.parameters()])
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-6 * float(np.max(wanted)))


def test_what_rows_begin_with_is_fed_once(monkeypatch, walked):
    model, chosen = loud("llama"), rows()
    model.gradients([((str(i), "answer"), row) for i, row in enumerate(chosen)])
    fed = [row.ids[: len(row.ids) - row.closing - 1] for row in chosen]
    assert walked[-1].shared == BEGINNING
    assert len(walked[-1].ids) == BEGINNING + len(fed) * (max(map(len, fed)) - BEGINNING)


def test_norms_do_not_depend_on_what_stands_beside(monkeypatch, walked):
    model = loud("llama")
    items = [((str(i), "answer"), row) for i, row in enumerate(rows())]
    whole = model.gradients(items).norm
    back = model.gradients(items[::-1]).norm[::-1]
    monkeypatch.setattr(gradients, "TOKENS", 1)
    alone = model.gradients(items).norm
    for other in (back, alone):
        np.testing.assert_allclose(whole, other, rtol=1e-5, atol=1e-6 * float(whole.max()))


@pytest.mark.parametrize("change", [doubled, adapted])
def test_what_somebody_has_put_into_a_model_counts(walked, change):
    model = loud("llama")
    change(model)
    assert not gradients._can_walk(model)


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"llama", "qwen2", "mistral"}))
def test_blocks_of_another_kind_run_their_own_code(walked, name):
    assert not gradients._can_walk(loud(name))


def test_long_rows_take_weights_gradients_instead():
    # A block holds 1024 + 512 + 512 + 1024 + 3 * 2048 weights, and its matrices take and give 512 numbers a token.
    with torch.no_grad():
        plain = plain_pass(loud("llama"))
    assert plain_norms.pays(plain, 18)
    assert not plain_norms.pays(plain, 19)


def test_a_long_row_goes_another_way_than_short_ones(monkeypatch, walks):
    model, draw = loud("llama"), torch.Generator().manual_seed(4)
    chosen = [Encoded(tuple(torch.randint(3, 300, (n,), generator=draw).tolist()), 5, 0, "") for n in (9, 60, 11)]
    monkeypatch.setattr(gradients, "TOKENS", 30)
    assert gradients._can_walk(model)
    walks.clear()
    items = [((str(i), "answer"), row) for i, row in enumerate(chosen)]
    found = model.gradients(items).norm
    assert [walk.length for walk in walks] == [10]
    monkeypatch.setattr(gradients, "pays", lambda *_: False)
    np.testing.assert_allclose(found, model.gradients(items).norm, rtol=2e-5, atol=1e-6 * float(found.max()))
