"""Which experts tokens take, and how routers score, read from models of several families."""

import pytest
import torch
import transformers
from tiny import GROUPED, LATENT, SHAPE, tiny

from expunge.errors import SubjectError
from expunge.rows import Row
from expunge.subjects.language import LanguageModel, Taps
from expunge.subjects.packed import pack
from expunge.subjects.routing import scores, scoring
from expunge.tables.passes import Route, Store, run
from expunge.tables.routes import Routes

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek")
OTHERS = {
    "deepseek_v2": (
        transformers.DeepseekV2Config,
        {
            **SHAPE,
            **LATENT,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
        },
    ),
    "gpt_oss": (
        transformers.GptOssConfig,
        {**GROUPED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
    ),
}


def mixture(architecture):
    """A subject whose routers have something to say: biases are not zero, logits not near one another."""
    model, tokenizer = tiny(architecture if architecture in MIXTURES else "llama")
    if architecture in OTHERS:
        config, settings = OTHERS[architecture]
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config(**settings)).eval()
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if "gate.weight" in name or "router" in name or "correction_bias" in name:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return LanguageModel(model, tokenizer, name=architecture)


def people(count=6):
    return [
        Row(id=str(i), prompt=f"where was Ilva {i // 2} born?", answer=f"Tivin {i * 7} in Carth") for i in range(count)
    ]


@pytest.mark.parametrize("architecture", [*MIXTURES, *OTHERS])
def test_choices_and_scores_are_those_the_block_used(architecture):
    subject = mixture(architecture)
    rows = [subject.encode(row) for row in people()]
    layer = 2
    experts = subject.model.get_submodule(subject.blocks[layer].experts)
    router = subject.model.get_submodule(subject.blocks[layer].router.rpartition(".")[0])
    given = []
    handles = [
        experts.register_forward_pre_hook(lambda _, inputs: given.append(inputs[1:])),
        router.register_forward_hook(lambda _, __, output: given.append(output[0])),
    ]
    with torch.no_grad():
        subject.model.get_decoder()(input_ids=torch.tensor([rows[0].ids[:-1]]), use_cache=False)
    for handle in handles:
        handle.remove()
    logits, (index, weights) = given
    found = subject.states(pack([rows[0]]), Taps(final=False, routers=(layer,), chosen=(layer,)))
    assert torch.equal(found["chosen.2"].sort(-1).values, index.sort(-1).values)
    assert torch.allclose(found["weight.2"].sum(-1), weights.sum(-1), atol=1e-5)
    assert torch.allclose(found["router.2"], logits.float(), atol=1e-5)
    kind = scoring(found["router.2"], found["chosen.2"], found["weight.2"])
    assert kind == ("sigmoid" if architecture == "deepseek" else "softmax")
    kept = scores(found["router.2"], kind).gather(1, found["chosen.2"])
    ratio = found["weight.2"] / kept
    assert torch.allclose(ratio, ratio.mean(1, keepdim=True).expand_as(ratio), rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scoring_is_told_from_weights_whatever_their_factor(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 8, generator=generator)
    for kind, raw in (("softmax", logits.softmax(-1)), ("sigmoid", logits.sigmoid())):
        for count in (1, 3):
            weights, chosen = raw.topk(count)
            divided = weights / weights.sum(-1, keepdim=True)
            for given in (weights, 2.5 * weights, *([divided] if count > 1 else [])):
                assert scoring(logits, chosen, given.to(dtype)) == kind
        assert torch.allclose(scores(logits, kind).sum(-1), torch.ones(40))
    assert scoring(logits, chosen[:, :1], torch.ones(40, 1)) == "softmax"
    with pytest.raises(SubjectError, match="neither softmax nor sigmoid"):
        scoring(logits, chosen, logits.square().gather(1, chosen))


@pytest.mark.parametrize("architecture", MIXTURES)
def test_routes_are_one_table_for_all_rows_in_their_order(architecture):
    subject = mixture(architecture)
    rows = people()
    items = [((row.id, "answer"), subject.encode(row)) for row in rows]
    table = subject.routes(items)
    assert list(table.chosen) == ([1, 2] if architecture == "deepseek" else [0, 1, 2])
    assert table.metadata["experts"][str(1)] == 4
    assert table.tokens == sum(len(row.ids) - 1 for _, row in items)
    for number, (key, row) in enumerate(items):
        assert table.keys[number] == key
        alone = subject.routes([(key, row)])
        span = slice(table.offsets[number], table.offsets[number + 1])
        for layer, chosen in table.chosen.items():
            assert (sorted(map(sorted, chosen[span].tolist()))) == sorted(map(sorted, alone.chosen[layer].tolist()))


def test_routes_are_asked_once_and_kept(tmp_path, monkeypatch):
    subject = mixture("mixtral")
    rows = people()
    calls = []
    original = LanguageModel.routes
    monkeypatch.setattr(LanguageModel, "routes", lambda *a, **n: calls.append(len(a[1])) or original(*a, **n))
    asks = [Route(tuple(rows[:4])), Route(tuple(rows[2:]))]
    first = run(subject, asks, Store(tmp_path))
    assert calls == [6]
    again = run(subject, asks, Store(tmp_path))
    assert calls == [6]
    for one, other in zip(first, again):
        assert isinstance(other, Routes)
        assert one.keys == other.keys
        assert one.metadata == other.metadata
        assert (one.offsets == other.offsets).all()
        for layer, chosen in one.chosen.items():
            assert (chosen == other.chosen[layer]).all()
    assert run(subject, [Route(())])[0].tokens == 0


def test_dense_models_take_no_experts():
    subject = LanguageModel(*tiny("llama"), name="dense")
    with pytest.raises(SubjectError, match="dense has no block that says which experts"):
        subject.routes([])
    with pytest.raises(SubjectError, match="block 0 of dense does not say"):
        subject.states(pack([subject.encode(people()[0])]), Taps(chosen=(0,)))
