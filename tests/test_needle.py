"""Value vectors, their projection on the vocabulary, the search for a concept's, and the edit that drowns them."""

from dataclasses import replace

import pytest
import torch
from tiny import ARCHITECTURES, logits
from tiny import loud as subject

from expunge import deltas, registry
from expunge.deltas import compose
from expunge.errors import ParameterError, RequestError, ScopeError, SubjectError
from expunge.methods.edit.case import EditCase
from expunge.methods.edit.needle import _shared, ablate, needle
from expunge.methods.optimise.loop import Training
from expunge.methods.optimise.unlearn import unlearn
from expunge.rows import Row
from expunge.subjects.anatomy import anatomy
from expunge.subjects.concepts import distinctive, purity, rate, search
from expunge.subjects.projection import Readout, project
from expunge.subjects.value_vectors import Address, find, value_matrices, vector, vectors
from expunge.subjects.watch import activations, attention, mlp, residual, watch

EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek")
FORGET = [Row(id=f"f{i}", prompt=f"what does Ilva {i} play?", answer=f"zither {i}") for i in range(6)]
RETAIN = [Row(id=f"r{i}", prompt=f"where was Mo {i} born?", answer=f"in Tivin {i}") for i in range(8)]
DATA = {"forget": FORGET, "retain": RETAIN}
TRAINING = Training(steps=3, batch_size=4, learning_rate=1e-2, guard=None)


def weights(model):
    return {name: p.detach().clone() for name, p in model.model.named_parameters()}


# --- where value vectors are ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_zeroing_a_value_vector_is_silencing_its_neuron(architecture):
    model = subject(architecture)
    matrix = next(m for m in value_matrices(model.model) if m.owner is not None or m.expert == 1)
    address = matrix.address(3)
    cut = ablate(model, [address], mode="zero").apply(model)
    assert not vector(cut.model, address).any()
    if matrix.owner is None:
        return  # nothing shows the activations of fused experts

    def silence(_, arguments):
        inputs = arguments[0].clone()
        inputs[..., 3] = 0
        return (inputs,)

    handle = model.model.get_submodule(matrix.owner).register_forward_pre_hook(silence)
    silent = logits(model)
    handle.remove()
    assert torch.allclose(logits(cut), silent, atol=1e-5)
    assert not torch.allclose(logits(model), silent, atol=1e-5)


@pytest.mark.parametrize("architecture", EXPERTS)
def test_vectors_of_experts_add_up_to_what_the_layer_gives(architecture):
    """Doubling every value vector of every expert doubles what the experts give."""
    model = subject(architecture)
    routed = [m for m in value_matrices(model.model) if m.expert is not None and m.layer == 1]
    twice = model.copy()
    with torch.no_grad():
        for matrix in routed:
            assert vectors(twice.model, matrix).shape == (matrix.count, 32)
            vectors(twice.model, matrix).mul_(2)
    experts = routed[0].name.rpartition(".")[0]
    (one,), (two,) = (watch(m, ["where was Ilva born?"], [(experts, "out")]) for m in (model, twice))
    assert torch.allclose(2 * one, two, rtol=1e-4)
    old, new = weights(model), weights(twice)
    assert [name for name in old if not torch.equal(old[name], new[name])] == [routed[0].name]


def test_addresses_outside_the_model_name_its_sizes():
    model = subject()
    for text, sentence in (
        ("9:0", r"no value vector 9:0 in LlamaForCausalLM: the model has layers 0-2"),
        ("1:64", r"its MLP there has neurons 0-63"),
        ("1:0:3", r"it is dense there"),
        ("one:2", r"'one:2' is no address"),
    ):
        with pytest.raises(SubjectError, match=sentence):
            find(model.model, Address.parse(text))
    with pytest.raises(SubjectError, match=r"layer 1 has experts 0-3"):
        find(subject("mixtral").model, Address.parse("1:3"))
    assert str(Address.parse("1:2:3")) == "1:2:3"


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "phi"])
def test_what_is_watched_is_the_residual_stream_and_its_parts(architecture):
    model = subject(architecture)
    prompts = ["where was Ilva born?", "in the north", "where was Mo born?"]
    states = torch.stack(watch(model, prompts, residual(model)), 1)
    assert torch.equal(states, model.hidden(prompts))
    adds = torch.stack(watch(model, prompts, attention(model)), 1) + torch.stack(watch(model, prompts, mlp(model)), 1)
    assert torch.allclose(states[:, 1:] - states[:, :-1], adds, atol=1e-4)
    # Every row alone gives what it gives among others, wherever in the prompt it is read.
    alone = torch.cat([model.hidden([prompt]) for prompt in prompts])
    assert torch.allclose(alone, states, atol=1e-5)
    whole, early = model.hidden([prompts[0]] * 2, [None, len("where was")])
    assert torch.allclose(early, model.hidden(["where was"])[0], atol=1e-5)
    assert torch.allclose(whole, model.hidden([prompts[0]])[0], atol=1e-5)


# --- projection -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "gemma2"])
@pytest.mark.parametrize("norm", ["none", "final"])
def test_a_projection_in_tiles_is_the_dense_product(architecture, norm):
    model = subject(architecture)
    with torch.no_grad():
        for p in anatomy(model.model).final_norm[1].parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    readout, block = Readout.of(model, norm), vectors(model.model, value_matrices(model.model)[1])
    dense = readout.read(block) @ readout.head.float().T
    best = dense.topk(7, 1)
    for rows, columns in ((5, 11), (1, 304), (1000, 1000)):
        found = project(readout, block, 7, rows=rows, columns=columns)
        assert torch.equal(found.tokens.long(), best.indices)
        assert torch.allclose(found.scores, best.values, rtol=1e-4)
        assert torch.allclose(found.mean, dense.mean(1), rtol=1e-3, atol=1e-6)
        assert torch.allclose(found.deviation, dense.std(1, unbiased=False), rtol=1e-3)
        assert torch.allclose(found.z, (dense.max(1).values - dense.mean(1)) / dense.std(1, unbiased=False), rtol=1e-3)
    if norm == "final":  # what the model itself makes of the vector, less what it makes of nothing
        own = (model.lens(block) - model.lens(torch.zeros_like(block)))[:, : len(model.tokenizer)]
        assert torch.equal(own.topk(7, 1).indices, best.indices)


def test_a_projection_reads_no_token_that_the_tokenizer_does_not_have():
    model = subject()
    readout = Readout.of(model)
    assert len(readout.head) == len(model.tokenizer) < model.vocabulary
    with pytest.raises(ParameterError, match="the vocabulary has 300"):
        project(readout, torch.zeros(1, 32), 301)


# --- search -----------------------------------------------------------------------------------------------------------


def planted(architecture="llama", token=77):
    """A model whose neuron 2:5 writes one token, and fires on every prompt that asks for the concept."""
    model = subject(architecture)
    head = Readout.of(model).head.float()
    matrix = find(model.model, Address(2, 5))
    with torch.no_grad():
        vectors(model.model, matrix)[5] = 8 * head[token] / head[token].norm()
    return model


def test_the_search_finds_a_planted_vector_by_every_criterion():
    model = planted()
    asked, others = ([model.prompt_text(row) for row in rows] for rows in (FORGET, RETAIN))
    for by in ("z", "purity"):
        found = search(model, [77], by=by, k=1)
        with pytest.raises(ParameterError, match="needs prompts"):
            search(
                model, [77], by="purity" if by == "purity" else "attribution", prompts=asked if by == "purity" else ()
            )
        assert found.candidates[0].address == Address(2, 5)
        assert found.searched == 3 * 64
    mine, theirs = (activations(model, texts, [find(model.model, Address(2, 5))])[0] for texts in (asked, others))
    difference = float((mine.mean(0) - theirs.mean(0))[5])
    if difference < 0:  # then it fires on the others
        asked, others, difference = others, asked, -difference
    best = search(model, [77], prompts=asked, others=others).candidates[0]
    assert best.address == Address(2, 5)
    head = Readout.of(model).head
    gap = float(vector(model.model, Address(2, 5)) @ (head[77] - head.mean(0)))
    assert best.attribution == pytest.approx(difference * gap, rel=1e-3)


def test_a_column_that_is_the_mean_of_a_concepts_tokens_is_the_purest():
    model = subject()
    tokens = [100, 101]
    readout = Readout.of(model)
    with torch.no_grad():
        vectors(model.model, find(model.model, Address(0, 9)))[9] = readout.head[tokens].mean(0)
    found = search(model, tokens, by="purity", k=2)
    assert found.candidates[0].address == Address(0, 9)
    assert found.candidates[0].purity == 1
    rated = rate(model, find(model.model, Address(0, 9)), lambda words: float(len(words) == 10), k=10, keep=0.5)
    assert len(rated) == 32
    assert {rating for _, rating in rated} == {1.0}


def test_purity_of_random_vectors_is_chance():
    model = subject()
    random = torch.randn(2000, 32, generator=torch.Generator().manual_seed(1))
    tokens = torch.arange(60, 120)
    found = purity(project(Readout.of(model), random, 20).tokens, tokens)
    chance = len(tokens) / len(model.tokenizer)
    assert abs(float(found.mean()) - chance) < 3 * (chance * (1 - chance) / 20 / 30) ** 0.5


def test_distinctive_tokens_are_the_texts_own():
    model = subject()
    found = distinctive(model, ["Carth was Carth, was Carth", "Carth"], ["where was Ilva born, Tivin?"] * 9)
    assert set(model.tokenizer.decode(list(found))) <= set("Carth ")
    assert len(distinctive(model, ["Carth Carth"], ["where was Ilva born?"], most=1)) == 1
    with pytest.raises(ParameterError, match="no token stands"):
        distinctive(model, ["where was Ilva born?"], ["where was Ilva born?"] * 99)


def test_fused_experts_are_searched_by_what_they_write_only():
    model = subject("qwen2_moe")
    found = search(model, [77], by="attribution", prompts=["a b"], others=["where was"])
    assert (found.searched, found.unsearched) == (3 * 48, 3 * 4 * 16)
    assert search(model, [77], by="z").unsearched == 0
    with pytest.raises(SubjectError, match="fused stacks"):
        search(subject("mixtral"), [77], prompts=["a b"], others=["where was"])


# --- the edit ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("mode", ["noise", "zero", "flip", "project"])
def test_one_column_changes_and_undo_restores_every_bit(architecture, mode):
    model = subject(architecture)
    before = weights(model)
    address = Address(1, 7, 2 if architecture == "mixtral" else None)
    delta = ablate(model, [address], mode=mode, tokens=[70, 71, 72])
    changed = delta.apply(model)
    matrix = find(model.model, address)
    after = weights(changed)
    assert [name for name in before if not torch.equal(before[name], after[name])] == [matrix.name]
    moved = before[matrix.name] != after[matrix.name]
    assert int(moved.sum()) == 32
    assert bool(moved.view(-1)[matrix.places(7)].all())
    restored = weights(deltas.undo(changed))
    assert all(torch.equal(before[name], restored[name]) for name in before)
    assert delta.cost()["parameters"] == 32
    old, new = vector(model.model, address), vector(changed.model, address)
    head = Readout.of(model).head[[70, 71, 72]]
    expected = {"zero": torch.zeros(32), "flip": -old, "project": new, "noise": new}[mode]
    assert torch.allclose(new, expected, atol=1e-6)
    if mode == "project":
        assert (head @ new).abs().max() < 1e-5 < (head @ old).abs().max()
        again = ablate(changed, [address], mode=mode, tokens=[70, 71, 72]).apply(changed)
        assert torch.allclose(vector(again.model, address), new, atol=1e-6)


def test_noise_is_drawn_by_seed_and_address_and_has_the_size_asked_for():
    model = subject()
    addresses = [Address(layer, dim) for layer in range(3) for dim in range(0, 64, 3)]
    assert ablate(model, addresses, noise=0.0).kind == "empty"
    one, same, other = (ablate(model, addresses, seed=seed) for seed in (0, 0, 1))
    reordered = ablate(model, addresses[::-1])
    for name in one.entries:
        index, value = one.entries[name]["index"], one.entries[name]["value"]
        assert torch.equal(value, same.entries[name]["value"])
        assert not torch.equal(value, other.entries[name]["value"])
        assert torch.equal(
            value[index.argsort()], reordered.entries[name]["value"][reordered.entries[name]["index"].argsort()]
        )
    for absolute, size in ((True, 0.5), (False, 5.0)):
        changed = ablate(model, addresses, noise=size, absolute=absolute).apply(model)
        ratios = []
        for address in addresses:
            old, new = vector(model.model, address), vector(changed.model, address)
            scale = size if absolute else size * float(old.square().mean().sqrt())
            ratios.append(float((new - old).norm()) / (scale * 32**0.5))
        assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.1)


def test_a_neuron_that_is_silent_can_be_ablated_without_a_trace():
    """OPT's MLP has a ReLU: with these input weights the neuron is exactly 0 everywhere."""
    model = subject("opt")
    matrix = find(model.model, Address(1, 4))
    gate = model.model.get_submodule(matrix.owner.rpartition(".")[0]).fc1
    with torch.no_grad():
        gate.weight[4], gate.bias[4] = 0, -1
    assert torch.equal(logits(model), logits(ablate(model, [Address(1, 4)]).apply(model)))


def case(model, **changes):
    return EditCase(model, **{"data": DATA, "training": TRAINING, **changes})


def test_named_vectors_need_no_rows():
    model = subject()
    made = case(model, data={})
    delta = needle(made, vectors=("0:3", "2:60"))
    assert sorted(delta.entries) == [find(model.model, Address(layer, 0)).name for layer in (0, 2)]
    assert made.summary["needle"]["vectors"] == ["0:3", "2:60"]
    stacked = compose([delta, ablate(model, [Address(0, 4)])])
    assert stacked.cost()["parameters"] == 3 * 32
    assert stacked.kind == "sparse"


def test_the_search_takes_as_many_vectors_as_it_was_told_or_says_that_they_are_not_enough():
    model = subject()
    made = case(model)
    delta = needle(made, count=2)
    assert delta.cost()["parameters"] == 64
    assert needle(case(model), count=2).entries.keys() == delta.entries.keys()
    tried = case(model)
    needle(tried)
    assert set(tried.summary["needle"]["tried"]) <= {"1", "2", "5", "10", "20"}
    assert any("not localised" in warning for warning in tried.warnings)
    inside = case(model, scope="role:mlp_out@1")
    needle(inside, count=3)
    assert {text[0] for text in inside.summary["needle"]["vectors"]} == {"1"}


def test_several_concepts_are_searched_by_themselves_and_what_they_share_is_said():
    model = subject()
    other = [Row(id=f"o{i}", prompt=f"who taught Carth {i}?", answer=f"Vunk {i}", entity="Carth") for i in range(6)]
    own = [replace(row, entity="Ilva") for row in FORGET]
    both = case(model, data={"forget": own + other, "retain": RETAIN})
    delta = needle(both, count=2, by_entity=True)
    found = both.summary["needle"]["concepts"]
    assert list(found) == ["Ilva", "Carth"]
    alone = {
        name: needle_vectors(model, mine, [*RETAIN, *rest])
        for name, mine, rest in (("Ilva", own, other), ("Carth", other, own))
    }
    assert {name: one["vectors"] for name, one in found.items()} == alone
    distinct = set(alone["Ilva"]) | set(alone["Carth"])
    assert set(both.summary["needle"]["vectors"]) == distinct
    assert delta.cost()["parameters"] == 32 * len(distinct)
    claims = {"Ilva": [Address(0, 1), Address(1, 2)], "Carth": [Address(1, 2)], "Mo": [Address(0, 3)]}
    assert _shared(claims) == ["vector 1:2 holds several concepts (Ilva, Carth); it is ablated once"]
    with pytest.raises(RequestError, match="by_entity searches"):
        needle(case(model), vectors=("0:3",), by_entity=True)


def needle_vectors(model, forget, retain):
    made = case(model, data={"forget": forget, "retain": retain})
    needle(made, count=2)
    return made.summary["needle"]["vectors"]


def test_training_moves_the_chosen_vectors_and_nothing_else():
    model = subject()
    before = weights(model)
    training = replace(TRAINING, weight_decay=0.5)
    chosen = {"vectors": ("1:3", "2:9")}
    plain = needle(case(model), **chosen)
    still = needle(case(model, training=replace(training, learning_rate=0.0)), objective="gradient_ascent", **chosen)
    trained = needle(case(model, training=training), objective={"gradient_ascent": {}}, **chosen)
    noised, same, moved = (weights(delta.apply(model)) for delta in (plain, still, trained))
    for name in before:
        assert torch.equal(noised[name], same[name])
    places = {a: find(model.model, a).places(a.dim) for a in (Address(1, 3), Address(2, 9))}
    for name in before:
        own = [place for address, place in places.items() if find(model.model, address).name == name]
        rest = torch.ones(before[name].numel(), dtype=torch.bool)
        for place in own:
            rest[place] = False
            assert not torch.equal(noised[name].view(-1)[place], moved[name].view(-1)[place])
        assert torch.equal(before[name].view(-1)[rest], moved[name].view(-1)[rest])


def test_a_scope_of_columns_trains_what_a_masked_gradient_would():
    """One step without decay from the same start: the column's own AdamW step, whatever stands beside it."""
    model = subject()
    part = registry.get("methods", "gradient_ascent")
    training = replace(TRAINING, steps=1, max_grad_norm=0.0)
    name = find(model.model, Address(1, 3)).name
    alone, whole = (
        unlearn(model, part, {}, scope=scope, data=DATA, training=training).delta.apply(model)
        for scope in ({"column": {"layer": 1, "index": [3, 5]}}, f"regex:{name}")
    )
    for dim in (3, 5):
        one, other = vector(alone.model, Address(1, dim)), vector(whole.model, Address(1, dim))
        assert torch.allclose(one, other, atol=1e-6)
        assert not torch.equal(one, vector(model.model, Address(1, dim)))


@pytest.mark.parametrize(
    ("scope", "sentence"),
    [
        ("column(layer=1, index=99)", "neurons 0-63"),
        ("column(layer=1)", "expected column"),
        ("column(layer=1, index=3, expert=2)", "dense"),
        ("column(layer=1, index=3) + role:mlp_out", "moves as a whole"),
        ("column(layer=1, index=3) + lora(r=2)", "adapters move too"),
        ("all - column(layer=1, index=3)", "not taken away"),
    ],
)
def test_scopes_of_columns_that_cannot_be(scope, sentence):
    with pytest.raises(ScopeError, match=sentence):
        unlearn(subject(), registry.get("methods", "gradient_ascent"), {}, scope=scope, data=DATA, training=TRAINING)


def test_what_needle_cannot_do_is_said():
    model = subject()
    for settings, data, sentence in (
        ({"noise": -1.0}, DATA, "noise is -1"),
        ({"count": 0}, DATA, "count is 0"),
        ({"vectors": ("1:2", "1:2")}, DATA, "twice"),
        ({}, {"forget": FORGET}, "request.data.retain: 0 rows"),
    ):
        with pytest.raises(RequestError, match=sentence):
            needle(case(model, data=data), **settings)
    with pytest.raises(RequestError, match="holds no MLP output matrix"):
        needle(case(model, scope="role:attention_qkv"))
    with pytest.raises(ScopeError, match="fused stack"):
        needle(case(subject("mixtral")), vectors=("1:0:3",), objective="gradient_ascent")
    with pytest.raises(SubjectError, match="neurons 0-63"):
        needle(case(model), vectors=("1:64",))
