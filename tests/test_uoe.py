"""UOE (specs: uoe, sections 3, 8 and 9)."""

import copy
from dataclasses import replace

import pytest
import torch
from test_routing import MIXTURES, OTHERS, mixture
from tiny import tiny

from expunge import registry
from expunge.errors import ParameterError, ScopeError, SubjectError
from expunge.methods.optimise import loop
from expunge.methods.optimise.loop import Training, Turn, entries
from expunge.methods.optimise.terms import Side
from expunge.methods.optimise.unlearn import _needs, _working_copy, recipe_of, set_up, unlearn
from expunge.methods.optimise.uoe import Anchor, affinity, anchored, sample, select
from expunge.plan import estimate
from expunge.rows import Row
from expunge.subjects.language import LanguageModel, weights_fingerprint
from expunge.subjects.packed import pack
from expunge.subjects.protocol import Taps

TRAINING = Training(steps=4, batch_size=4, learning_rate=1e-2, guard=None)


def rows(kind, count):
    return [Row(id=f"{kind}/{i}", prompt=f"where was {kind} {i} born?", answer=f"Tivin {i}") for i in range(count)]


DATA = {"forget": rows("forget", 6), "retain": rows("retain", 9)}
ANY = {"contrast": 0.0}


def run(subject, training=TRAINING, scope=None, name="uoe", data=DATA, **settings):
    return unlearn(subject, registry.get("methods", name), settings, scope=scope, data=data, training=training)


def prepared(subject, training=TRAINING, **settings):
    return set_up(subject, registry.get("methods", "uoe"), settings, scope=None, data=DATA, training=training)


def turn(subject, name="uoe", scope=None, **settings):
    setup = set_up(subject, registry.get("methods", name), settings, scope=scope, data=DATA, training=TRAINING)
    _needs(setup.case, setup.needs, setup.drawn)
    working, parameters, _ = _working_copy(setup.case, setup.resolved)
    stored = entries(subject, setup.drawn, setup.resolved.first_layer)
    return Turn(working, parameters, setup.drawn, recipe_of(setup), 0, {}, subject.head, stored), setup


# --- attribution -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [*MIXTURES, *OTHERS])
def test_affinities_of_a_block_sum_to_the_score_that_is_kept(architecture):
    subject = mixture(architecture)
    encoded = [subject.encode(row) for row in DATA["forget"]]
    layers = [i for i, block in enumerate(subject.blocks) if block.experts]
    table, kinds = affinity(subject, encoded, layers)
    assert list(table) == layers == ([1, 2] if "deepseek" in architecture else [0, 1, 2])
    assert set(kinds.values()) == {"sigmoid" if architecture == "deepseek" else "softmax"}
    for layer in layers:
        means = []
        for row in encoded:
            found = subject.states(pack([row]), Taps(final=False, routers=(layer,), chosen=(layer,)))
            logits, chosen = found[f"router.{layer}"], found[f"chosen.{layer}"]
            s = logits.sigmoid() if architecture == "deepseek" else logits.exp()
            means.append((s / s.sum(-1, keepdim=True)).gather(1, chosen).sum(-1).mean())
        mass = float(torch.stack(means).detach().mean())
        assert 0 < mass < 1
        assert float(table[layer].sum()) == pytest.approx(mass, abs=1e-5)


def test_where_all_experts_are_chosen_affinities_sum_to_one():
    subject = mixture("mixtral")
    for layer in subject.model.model.layers:
        layer.mlp.gate.top_k = 4
    table, _ = affinity(subject, [subject.encode(row) for row in DATA["forget"]], [0, 1, 2])
    for row in table.values():
        assert float(row.sum()) == pytest.approx(1, abs=1e-5)


def test_permuting_experts_permutes_affinities():
    subject, other = mixture("qwen3_moe"), mixture("qwen3_moe")
    order = torch.tensor([2, 0, 3, 1])
    block = other.model.model.layers[1].mlp
    with torch.no_grad():
        for tensor in (block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj):
            tensor.copy_(tensor[order])
    encoded = [subject.encode(row) for row in DATA["forget"]]
    before, after = (affinity(s, encoded, [0, 1, 2])[0] for s in (subject, other))
    for layer in (0, 1, 2):
        wanted = before[layer][order] if layer == 1 else before[layer]
        assert torch.allclose(after[layer], wanted, atol=1e-6)
    assert (before[1][order] - before[1]).abs().max() > 1e-3


def test_rows_weigh_alike_however_long_they_are_and_packing_changes_nothing():
    subject = mixture("mixtral")
    uneven = [
        subject.encode(Row(id=str(i), prompt=f"where was {i} born?", answer="Tivin " * (1 + 9 * (i % 2))))
        for i in range(4)
    ]
    whole, _ = affinity(subject, uneven, [0, 1, 2])
    alone = [affinity(subject, [row], [0, 1, 2])[0] for row in uneven]
    for layer in (0, 1, 2):
        assert torch.allclose(whole[layer], torch.stack([one[layer] for one in alone]).mean(0), atol=1e-6)


def test_rows_are_drawn_until_there_are_tokens_enough():
    subject = mixture("mixtral")
    encoded = [subject.encode(row) for row in rows("forget", 20)]
    fed = len(encoded[0].ids) - 1
    assert sample(encoded, 10**6, 0) == [encoded[i] for i in torch.randperm(20, generator=_seeded(0)).tolist()]
    few = sample(encoded, 3 * fed, 0)
    assert 3 <= len(few) <= 4
    assert few == sample(encoded, 10**6, 0)[: len(few)]
    assert few != sample(encoded, 3 * fed, 1)
    summary = run(subject, attribution_tokens=1, **ANY).summary["prepared"]
    assert summary["attribution"]["rows"] == 1


def _seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_the_head_is_not_run_for_attribution(monkeypatch):
    subject = mixture("mixtral")
    assert subject.mode == "families"

    def head(*_):
        raise AssertionError

    monkeypatch.setattr(LanguageModel, "head", head)
    affinity(subject, [subject.encode(row) for row in DATA["forget"]], [0, 1, 2])


# --- selection -------------------------------------------------------------------------------------------------------

TABLE = {1: torch.tensor([0.1, 0.3, 0.02, 0.2]), 4: torch.tensor([0.25, 0.05, 0.4, 0.01])}


@pytest.mark.parametrize(
    ("settings", "taken"),
    [
        ({}, [(4, 2)]),
        ({"experts": 3}, [(4, 2), (1, 1), (4, 0)]),
        ({"experts": 3, "per": "layer"}, [(4, 2), (4, 0), (4, 1)]),
        ({"per": "every_layer"}, [(1, 1), (4, 2)]),
        ({"experts": 2, "per": "every_layer"}, [(1, 1), (1, 3), (4, 2), (4, 0)]),
        ({"rank": 2}, [(1, 1)]),
        ({"rank": 3, "experts": 2}, [(4, 0), (1, 3)]),
        ({"rank": -1}, [(4, 3)]),
        ({"rank": -1, "experts": 2}, [(4, 3), (1, 2)]),
        ({"rank": -1, "per": "every_layer"}, [(1, 2), (4, 3)]),
        ({"rank": -2, "per": "layer"}, [(4, 1)]),
    ],
)
def test_experts_are_taken_by_rank(settings, taken):
    resolved = registry.get("methods", "uoe").resolve(settings)
    assert select(TABLE, resolved) == taken


def test_ties_go_to_the_lower_block_and_expert():
    settings = registry.get("methods", "uoe").resolve({"experts": 2, **ANY})
    assert select({0: torch.ones(3), 1: torch.ones(3)}, settings) == [(0, 0), (0, 1)]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"rank": 0}, "rank 0"),
        ({"experts": 0}, "experts is 0"),
        ({"experts": 5, "per": "layer"}, r"5 experts from rank 1 on .* 4 to choose from \(per = layer\)"),
        ({"rank": 8, "experts": 2}, "2 experts from rank 8 on"),
    ],
)
def test_experts_that_are_not_there_are_refused(settings, match):
    with pytest.raises(ParameterError, match=match):
        select(TABLE, registry.get("methods", "uoe").resolve(settings))


def test_flat_affinity_is_refused_with_the_table_unless_the_request_insists():
    flat = {0: torch.tensor([0.25, 0.26, 0.24]), 2: torch.tensor([0.25, 0.25, 0.25])}
    with pytest.raises(SubjectError, match=r"0\.260, is 1\.04 times the mean 0\.250.*0: expert 1 0\.260, 2: expert 0"):
        select(flat, registry.get("methods", "uoe").resolve({}))
    assert select(flat, registry.get("methods", "uoe").resolve(ANY)) == [(0, 1)]
    subject = LanguageModel(*tiny("mixtral"))
    with torch.no_grad():
        for layer in subject.model.model.layers:
            layer.mlp.gate.weight.zero_()
            layer.mlp.gate.top_k = 4
    with pytest.raises(SubjectError, match="use all experts alike"):
        run(subject)


# --- the scope -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [*MIXTURES, *OTHERS])
def test_one_expert_and_its_router_move_and_nothing_else(architecture):
    subject = mixture(architecture)
    before = weights_fingerprint(subject.model)
    outcome = run(subject, **ANY)
    (taken,) = outcome.summary["prepared"]["experts"]
    layer, index = taken["block"], taken["expert"]
    table = outcome.summary["prepared"]["affinity"]
    assert taken["affinity"] == max(max(row) for row in table.values()) == table[str(layer)][index]
    config = subject.model.config
    h, inner = config.hidden_size, getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    count = len(table[str(layer)])
    biases = 2 * inner + h + count if architecture == "gpt_oss" else 0
    assert outcome.summary["scope"]["trainable"] == 3 * h * inner + count * h + biases
    assert weights_fingerprint(subject.model) == before
    after = outcome.delta.apply(subject)
    changed = 0
    for name, p in after.model.named_parameters():
        old = subject.model.get_parameter(name)
        if f"layers.{layer}.mlp.experts." in name:
            rest = [i for i in range(count) if i != index]
            assert torch.equal(p[rest], old[rest])
            changed += p[index].numel() * bool((p[index] != old[index]).any())
        elif name in (subject.blocks[layer].router, f"{subject.blocks[layer].router[: -len('weight')]}bias"):
            changed += p.numel() * bool((p != old).any())
        else:
            assert torch.equal(p, old), name
    assert changed == outcome.summary["scope"]["trainable"]
    for name, buffer in after.model.named_buffers():
        assert torch.equal(buffer, subject.model.get_buffer(name))


def test_the_router_stays_where_it_is_not_to_be_trained():
    outcome = run(mixture("mixtral"), train_router=False, **ANY)
    assert all(set(entry) == {"difference", "slice"} for entry in outcome.delta.entries.values())
    assert len(outcome.delta.entries) == 2


def test_slices_equal_a_masked_whole_gradient_after_five_steps():
    subject = mixture("mixtral")
    made, setup = turn(subject, anchor_weight=3.0, **ANY)
    layer = setup.resolved.first_layer
    other, _ = turn(subject, "grad_diff", scope=f"role:experts@{layer}+role:router@{layer}")
    other.recipe = made.recipe
    assert other.drawn.steps == made.drawn.steps
    whole, places = other.subject.model, {name: list(at) for name, at, _ in setup.resolved.slices}
    for _ in range(5):
        losses = [t.backward() for t in (made, other)]
        assert torch.allclose(*losses, atol=1e-6)
        with torch.no_grad():
            for p in made.parameters:
                p -= 0.1 * p.grad
                p.grad = None
            for name, p in whole.named_parameters():
                if p.grad is not None:
                    at = places.get(name, slice(None))
                    p[at] -= 0.1 * p.grad[at]
                    p.grad = None
    for name, p in made.subject.model.named_parameters():
        assert torch.allclose(p, whole.get_parameter(name), atol=1e-6)
    assert not torch.equal(whole.get_parameter(next(iter(places))), subject.model.get_parameter(next(iter(places))))


@pytest.mark.parametrize("objective", ["npo", {"gradient_ascent": {"retain": "kl"}}, {"rmu": {"layer": 2}}])
def test_all_experts_of_every_layer_are_the_scope_of_all_experts(objective):
    subject = mixture("mixtral")
    outcome = run(subject, objective=objective, experts=4, per="every_layer", anchor_weight=0.0, **ANY)
    name, settings = (objective, {}) if isinstance(objective, str) else next(iter(objective.items()))
    plain = run(subject, scope="role:experts+role:router", name=name, **settings)
    assert outcome.summary["scope"]["resolved"] == plain.summary["scope"]["resolved"]
    assert outcome.delta.entries.keys() == plain.delta.entries.keys()
    for tensor, entry in plain.delta.entries.items():
        assert torch.allclose(entry["difference"], outcome.delta.entries[tensor]["difference"], atol=1e-6)


def test_a_scope_of_the_users_is_refused():
    with pytest.raises(ScopeError, match="the request asks for the scope 'all'; leave scope out"):
        run(mixture("mixtral"), scope="all")
    # What the objective inside would move by itself is no such thing.
    assert "expert(" in run(mixture("mixtral"), objective={"rmu": {"layer": 2}}, **ANY).summary["scope"]["form"]


# --- the anchor ------------------------------------------------------------------------------------------------------


def side(logits):
    empty = torch.zeros(0)
    return Side(empty, empty, empty, 0, lambda h: h, lambda h: h, 1, routers=logits)


def test_the_anchor_is_zero_on_the_target_and_two_on_another_expert():
    for count in (3, 64):
        target = torch.zeros(count).index_fill(0, torch.tensor(1), 1.0)
        for kind, on in (("softmax", 200.0), ("sigmoid", 200.0)):
            logits = torch.full((5, count), -on)
            for index, wanted in ((1, 0.0), (2, 2.0)):
                given = {7: logits.index_fill(1, torch.tensor(index), on)}
                value = anchored(side(given), {7: Anchor(kind, target)})
                assert float(value) == pytest.approx(wanted, abs=1e-6)
        free = torch.randn(50, count, generator=_seeded(0))
        assert 0 < float(anchored(side({7: free}), {7: Anchor("softmax", target)})) < 2


def test_the_anchor_pulls_a_trained_router_and_cannot_move_a_frozen_one():
    subject = mixture("mixtral")

    def gradients(**settings):
        made, setup = turn(subject, objective={"gradient_ascent": {"retain": "none"}}, **settings, **ANY)
        made.backward()
        return [p.grad.clone() for p in made.parameters], setup

    with_anchor, setup = gradients(anchor_weight=5.0)
    without, _ = gradients(anchor_weight=0.0)
    router = [name for name, _ in setup.resolved.parameters].index(subject.blocks[setup.resolved.first_layer].router)
    assert (with_anchor[router] - without[router]).abs().max() > 1e-4
    for one, other in zip(with_anchor[1:], without[1:]):
        assert torch.allclose(one, other, atol=1e-6)
    frozen = [gradients(anchor_weight=weight, train_router=False)[0] for weight in (0.0, 5.0)]
    for one, other in zip(*frozen):
        assert torch.allclose(one, other, atol=1e-6)


def test_forget_tokens_are_drawn_to_the_target():
    subject = mixture("mixtral")
    training = replace(TRAINING, steps=30, learning_rate=3e-2)
    shares = []
    for weight in (0.0, 30.0):
        outcome = run(subject, training, objective={"gradient_ascent": {"retain": "none"}}, anchor_weight=weight, **ANY)
        (taken,) = outcome.summary["prepared"]["experts"]
        for model in (subject, outcome.delta.apply(subject)):
            table = model.routes([(("x", str(i)), model.encode(row)) for i, row in enumerate(DATA["forget"])])
            shares.append(float((table.chosen[taken["block"]] == taken["expert"]).any(1).mean()))
    start, without, _, with_anchor = shares
    assert with_anchor > 0.9 > start
    assert with_anchor > without


def test_splitting_a_step_changes_nothing():
    subject = mixture("mixtral")
    whole, split = run(subject, **ANY), run(subject, replace(TRAINING, micro_tokens=40), **ANY)
    assert whole.summary["log"]["loss"] == pytest.approx(split.summary["log"]["loss"], abs=1e-5)


# --- objectives inside -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["gradient_ascent", "grad_diff", "npo", "simnpo", "idk", "dpo", "undial"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_objectives_run_inside(objective, dtype):
    subject = mixture("deepseek")
    subject = LanguageModel(subject.model.to(dtype), subject.tokenizer)
    first, second = (run(subject, objective=objective, name=name, **ANY) for name in ("uoe", "seuf"))
    assert len(first.summary["log"]["loss"]) == 4
    for name, entry in first.delta.entries.items():
        assert torch.equal(entry["difference"], second.delta.entries[name]["difference"])


def test_objectives_that_read_a_layer_see_the_expert():
    subject = mixture("mixtral")
    table = {int(layer): max(row) for layer, row in run(subject, **ANY).summary["prepared"]["affinity"].items()}
    highest = max(table, key=table.get)
    for layer in (0, 1, 2):
        outcome = run(subject, objective={"rmu": {"layer": layer}}, **ANY)
        (taken,) = outcome.summary["prepared"]["experts"]
        assert taken["block"] == max((at for at in table if at <= layer), key=table.get)
        told = [text for text in outcome.summary["warnings"] if f"set its layer to {highest}" in text]
        assert bool(told) == (layer < highest)
        assert not [text for text in outcome.summary["warnings"] if "out of the objective's reach" in text]
        assert outcome.summary["prepared"]["layer"] == layer
    with pytest.raises(ParameterError, match="the objective reads block 0, below the first block with experts, 1"):
        run(mixture("deepseek"), objective={"rmu": {"layer": 0}})


# --- subjects --------------------------------------------------------------------------------------------------------


def test_dense_models_are_refused_before_anything_runs():
    subject = LanguageModel(*tiny("llama"), name="tiny-llama")
    for dry in (False, True):
        with pytest.raises(SubjectError, match="uoe needs routed experts; tiny-llama has none"):
            set_up(subject, registry.get("methods", "uoe"), {}, scope=None, data=DATA, training=TRAINING, dry=dry)


def test_experts_that_are_called_without_choices_are_refused():
    from test_slices import Mixture, replaced

    with pytest.raises(SubjectError, match="are not called with the experts chosen"):
        run(LanguageModel(replaced(Mixture), tiny("llama")[1]))


def test_noise_of_routers_is_off_while_unlearning():
    quiet, noisy = mixture("mixtral"), mixture("mixtral")
    for layer in noisy.model.model.layers:
        layer.mlp.jitter_noise = 0.5
    noisy.model.config.router_jitter_noise = 0.5
    first, second = (run(subject, **ANY).delta for subject in (quiet, noisy))
    for name, entry in first.entries.items():
        assert torch.equal(entry["difference"], second.entries[name]["difference"])


def test_the_load_balancing_loss_takes_no_part():
    losses = []
    for coefficient in (0.0, 10.0):
        subject = mixture("mixtral")
        subject.model.config.output_router_logits = True
        subject.model.config.router_aux_loss_coef = coefficient
        losses.append(run(subject, **ANY).summary["log"]["loss"])
    assert losses[0] == losses[1]


def test_an_empty_forget_set_changes_nothing():
    outcome = run(mixture("mixtral"), data={"forget": [], "retain": DATA["retain"]})
    assert outcome.delta.kind == "empty"


def test_a_plan_needs_no_weights_and_says_what_it_could_not_know():
    subject = mixture("mixtral")
    bare = LanguageModel(copy.deepcopy(subject.model).to("meta"), subject.tokenizer)
    part = registry.get("methods", "uoe")
    planned = estimate(bare, part, {}, scope=None, data=DATA, training=TRAINING)
    outcome = run(subject, **ANY)
    assert planned["parameters"]["trainable"] == outcome.summary["scope"]["trainable"]
    assert planned["tokens"]["steps"] == 4
    assert "counted as if the experts were in block 0" in planned["remarks"][0]
    every = estimate(bare, part, {"experts": 9, "per": "every_layer"}, scope=None, data=DATA, training=TRAINING)
    assert every["parameters"]["trainable"] == 3 * (4 * 3 * 32 * 64 + 4 * 32)


def test_the_prefix_below_the_expert_runs_once(monkeypatch):
    subject = mixture("mixtral")
    assert subject.can_enter
    stored = []
    original = loop.stored
    monkeypatch.setattr(loop, "stored", lambda *a, **k: stored.append(a[2].layer) or original(*a, **k))
    outcome = run(subject, replace(TRAINING, steps=8), objective="npo", **ANY)
    (taken,) = outcome.summary["prepared"]["experts"]
    assert taken["block"] > 0
    assert stored == [taken["block"]]
