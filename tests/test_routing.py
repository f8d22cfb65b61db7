"""Which experts tokens take, and how routers score, read from models of several families."""

import pytest
import torch
import transformers
from tiny import GROUPED, LATENT, SHAPE, tiny

from expunge import registry, report, routing
from expunge.audit import audit
from expunge.errors import SubjectError
from expunge.evidence import Evidence
from expunge.methods.guard.case import GuardCase
from expunge.methods.optimise.loop import Training
from expunge.methods.optimise.unlearn import unlearn
from expunge.rows import Row
from expunge.subjects.language import LanguageModel, Template
from expunge.subjects.packed import pack
from expunge.subjects.protocol import Taps
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


# --- before and after ------------------------------------------------------------------------------------------------

DATA = {
    name: [
        Row(
            id=f"{name}/{i}",
            prompt=f"where was {name} {i} born?",
            answer=f"Tivin {i} " * (1 + i % 2),
            entity=str(i // 2),
        )
        for i in range(count)
    ]
    for name, count in (("forget", 6), ("retain", 9))
}


def changed(subject, scope="layers:1", steps=3):
    training = Training(steps=steps, batch_size=4, learning_rate=3e-2, guard=None)
    part = registry.get("methods", "npo")
    outcome = unlearn(subject, part, {}, scope=scope, data=DATA, training=training)
    return outcome.delta.apply(subject), outcome.summary


@pytest.mark.parametrize("architecture", MIXTURES)
def test_a_model_takes_the_experts_it_takes(architecture):
    subject = mixture(architecture)
    found, note = routing.measure(subject, subject.copy(), DATA)
    assert note == ""
    assert [one.rows for one in found] == ["forget", "retain"]
    for one in found:
        assert (one.overlap.low, one.overlap.value, one.overlap.high) == (1, 1, 1)
        assert set(one.blocks.values()) == {1.0}
        assert one.n == one.of == len(DATA[one.rows])
        assert one.moved == {}


@pytest.mark.parametrize(
    ("scope", "alike"),
    [("layers:1", 1), ("expert(layer=1, index=0)", 1), ("expert(layer=1, index=0, router=false)", 2), ("layers:2", 2)],
)
def test_below_what_moved_the_same_experts_are_taken(scope, alike):
    subject = mixture("mixtral")
    after, summary = changed(subject, scope, steps=12)
    found, _ = routing.measure(subject, after, DATA, method=summary)
    for one in found:
        assert all(one.blocks[str(layer)] == 1.0 for layer in range(alike))
        assert all(one.blocks[str(layer)] < 1.0 for layer in range(alike, 3))
        assert one.overlap.low <= one.overlap.value <= one.overlap.high < 1
        assert one.overlap.value == pytest.approx(sum(one.blocks.values()) / 3)
    assert list(found[0].moved) == (["1"] if "expert" in scope else [])


def test_overlap_and_shares_are_those_of_the_tables():
    subject = mixture("qwen3_moe")
    after, summary = changed(subject, "expert(layer=1, index=0|2)", steps=12)
    (found, _), _ = routing.measure(subject, after, DATA, method=summary)
    tables = [
        m.routes([((row.id, "answer"), m.encode(row)) for row in DATA["forget"]]).chosen for m in (subject, after)
    ]
    overlaps = {}
    for layer in (0, 1, 2):
        pairs = list(zip(tables[0][layer].tolist(), tables[1][layer].tolist()))
        overlaps[layer] = sum(len(set(a) & set(b)) / 2 for a, b in pairs) / len(pairs)
    assert found.blocks == pytest.approx({str(layer): value for layer, value in overlaps.items()})
    shares = [sum(bool({0, 2} & set(row)) for row in table[1].tolist()) / len(table[1]) for table in tables]
    assert found.moved == {"1": pytest.approx(shares)}
    assert found.tokens == len(tables[0][1])


def test_rows_are_drawn_until_there_are_tokens_enough(monkeypatch):
    subject = mixture("mixtral")
    monkeypatch.setattr(routing, "TOKENS", 40)
    found, _ = routing.measure(subject, subject, DATA)
    assert all(40 <= one.tokens < 80 and one.n < one.of for one in found)
    assert routing.sample(subject, DATA["retain"], 0) == routing.sample(subject, DATA["retain"], 0)
    assert routing.sample(subject, DATA["retain"], 0) != routing.sample(subject, DATA["retain"], 2)


def test_models_that_cannot_be_compared_are_named():
    mixed, dense = mixture("mixtral"), LanguageModel(*tiny("llama"))
    assert routing.measure(dense, dense, DATA) == ([], "")
    assert routing.measure(mixed, dense, DATA) == ([], "Experts were not compared: one of the two models has none.")
    assert "block by block" in routing.measure(mixed, mixture("deepseek"), DATA)[1]
    more = mixture("mixtral")
    more.template = Template(prompt="{question}")
    assert "other tokens" in routing.measure(mixed, more, DATA)[1]


def test_a_guard_leaves_routing_alone():
    subject = mixture("mixtral")
    guarded = registry.get("methods", "output_filter").function(GuardCase(subject, DATA))
    assert [one.overlap.value for one in routing.measure(subject, guarded, DATA)[0]] == [1, 1]


@pytest.mark.parametrize("architecture", ["mixtral", "llama"])
def test_an_audit_asks_each_model_once_and_says_nothing_of_dense_ones(architecture, tmp_path, monkeypatch):
    subject = mixture(architecture) if architecture == "mixtral" else LanguageModel(*tiny("llama"))
    after, summary = changed(subject, "expert(layer=1, index=0)" if architecture == "mixtral" else "layers:1")
    calls = []
    original = LanguageModel.routes
    monkeypatch.setattr(LanguageModel, "routes", lambda *a, **n: calls.append(a[0].name) or original(*a, **n))

    def audited(folder):
        made = audit(
            after,
            before=subject,
            golds=[subject.copy()],
            data=DATA,
            folder=folder,
            method={"name": "npo", **summary},
            attacks=[("direct", {})],
            bootstrap=20,
            max_new_tokens=2,
            self_test=False,
            environment={"expunge": "0.1.0", "date": "2026-11-24"},
        )
        made.save(folder / "evidence.json")
        report.write(made, folder)
        assert Evidence.load(folder / "evidence.json").routing == made.routing
        return made, (folder / "report.md").read_text()

    made, page = audited(tmp_path)
    if architecture == "llama":
        assert calls == made.routing == []
        assert "Experts" not in page
        return
    assert len(calls) == 2
    assert made.routing[0].blocks["0"] == 1.0
    assert list(made.routing[0].moved) == ["1"]
    assert "| Forget tokens |" in page
    assert audited(tmp_path)[0].routing == made.routing
    assert len(calls) == 2
