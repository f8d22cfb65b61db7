"""Knowledge editors: closed forms by hand, the shared passes against plain ones, and that everything can be undone."""

from dataclasses import replace

import pytest
import torch
from tiny import loud as subject

from expunge import registry
from expunge.edits import EditRow
from expunge.errors import DeltaError, ExpungeError, ParameterError, RequestError, RowError, SubjectError, TrainingError
from expunge.methods.edit.case import EditCase
from expunge.methods.edit.operations import Edited, carry_out
from expunge.methods.edit.rome import conditions
from expunge.methods.edit.values import Settings, depth, keys, located, lookup, optimised
from expunge.rows import Row
from expunge.subjects import moments as moments_module
from expunge.subjects.moments import Moment, moments
from expunge.subjects.packed import Encoded
from expunge.subjects.tails import Tails, adds_up, edited_matrix, look
from expunge.subjects.value_vectors import vectors

WANTED = ("llama", "gpt2", "gpt_neox", "qwen2", "mistral", "gemma2", "phi")
EDITS = [
    EditRow("a", "Ilva was born in", "Tivin north", "Ilva", ("Carth",)),
    EditRow("b", "where was Carth born?", "the north", "Carth"),
]
CORPUS = [Row(id=f"c{i}", prompt=f"where was Mo {i} born?", answer=f"in Tivin {i}") for i in range(20)]
PREFIXES = ("So they say.", "In the north.")
WRITERS = {
    "rome": {"layer": 1, "steps": 4, "clamp": 50.0, "learning_rate": 2.0},
    "memit": {"layers": (0, 1), "steps": 4, "clamp": 50.0, "weight": 1.0},
    "alphaedit": {"layers": (0, 1), "steps": 4, "clamp": 50.0},
    "ft_l": {"layer": 1, "steps": 3},
    "ft_m": {"layer": 1, "steps": 3},
    "lora_edit": {"steps": 3},
    "ultraedit": {"layers": (1, 2), "learning_rate": 1e-2},
}


pytestmark = pytest.mark.usefixtures("own_cache")


def case(model, **changes):
    return EditCase(model, **{"data": {}, "edits": EDITS, "corpus": CORPUS, "prefixes": PREFIXES, **changes})


def run(name, model, **settings):
    return registry.get("methods", name).function(case(model), **{**WRITERS[name], **settings})


def weights(model):
    return {name: p.detach().clone() for name, p in model.model.named_parameters()}


def outputs(model, layer, ks):
    """What an MLP's output matrix makes of keys (f, n), without its bias."""
    return vectors(model.model, edited_matrix(model, layer)).double().T @ ks


# --- where a fact is looked up ----------------------------------------------------------------------------------------


def test_a_subject_is_found_by_characters_behind_any_prefix_with_and_without_a_beginning_token():
    model = subject()
    edit = EDITS[0]
    for preface in ("", "In the north. ", "Ilva. "):
        found = lookup(model, edit.row(preface=preface), "Ilva")
        ids = found.tokens.ids
        read = model.tokenizer.decode(ids[: found.at + 1])
        assert read.endswith("Ilva")
        assert model.tokenizer.decode(ids) == preface + "Ilva was born in Tivin north"
    model.tokenizer.padding_side = "left"
    again = lookup(model, edit.row(), "Ilva")
    bare = lookup(model, edit.row(preface=""), "Ilva")
    assert again == bare
    assert lookup(model, edit.row(), "").at == bare.tokens.start - 1
    twice = replace(edit, prompt="Ilva and Ilva were born in")
    made = case(model, edits=[twice])
    (fact,) = located(made, 0)
    assert model.tokenizer.decode(fact.lookups[0].tokens.ids[: fact.lookups[0].at + 1]) == "Ilva and Ilva"
    assert "stands twice" in made.warnings[0]
    with pytest.raises(RowError, match="the subject 'Nobody' does not stand"):
        lookup(model, edit.row(), "Nobody")


def test_layers_may_be_fractions_of_the_depth():
    model = subject()
    assert [depth(model, layer) for layer in (0, 2, -1, 0.16, 0.5, 0.99)] == [0, 2, 2, 0, 2, 2]
    for layer in (3, 1.5, -4):
        with pytest.raises(ParameterError, match=f"layer is {layer}, expected a layer from 0 to 2"):
            depth(model, layer)


# --- the shared passes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [*WANTED, "opt", "bloom", "deepseek"])
def test_tails_equal_whole_passes_in_states_and_gradients(architecture):
    model = subject(architecture)
    draw = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 300, (n,), generator=draw).tolist() for n in (9, 14, 5)]
    tails = Tails(model, texts, [4, 9, 0], 0, [[5, 8], [9, 11, 13], [3]])
    tails.states(torch.zeros(3, 32))  # the first pass proves tails
    assert (tails._pass == tails._tail) is adds_up(model, 0) is (architecture != "gemma2")
    plain = [model.model.get_decoder()(input_ids=torch.tensor([text])).last_hidden_state[0] for text in texts]
    assert torch.allclose(tails.clean, torch.cat([plain[0][[5, 8]], plain[1][[9, 11, 13]], plain[2][[3]]]), atol=1e-5)
    change = (0.5 * torch.randn(3, 32, generator=draw)).requires_grad_(True)
    read = torch.randn(tails.clean.shape[-1], generator=draw)
    found = []
    for states in (tails.states, tails._whole):
        value = states(change)
        found.append((value, *torch.autograd.grad((value @ read).sum(), [change])))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-4)
    assert not torch.allclose(found[0][0], tails.clean, atol=1e-2)
    looked = look(model, texts, tails.at, [0])
    assert torch.allclose(looked.keys[0], tails.looked.keys[0], atol=1e-6)
    if adds_up(model, 0):
        assert all(p.grad is None for p in model.model.parameters())


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe"])
def test_a_mixture_says_that_edits_are_of_dense_layers(architecture):
    with pytest.raises(SubjectError, match=r"layer 0 of model is a mixture of experts.*it has no dense layer"):
        run("rome", subject(architecture), layer=0)
    with pytest.raises(SubjectError, match="dense layers: 0"):
        run("ft_m", subject("deepseek"), layer=1)
    with pytest.raises(SubjectError, match="there is no layer 9"):
        edited_matrix(subject(), 9)


def test_values_of_many_facts_together_are_those_of_each_alone():
    model = subject().copy()
    model.model.double()
    facts = located(case(model), 2)
    settings = Settings(steps=16, clamp=30.0)
    together = optimised(model, facts, 1, settings)
    for number, fact in enumerate(facts):
        alone = optimised(model, [fact], 1, settings)
        assert torch.allclose(together.delta[number], alone.delta[0], atol=1e-4 * float(alone.delta.norm()))
        assert alone.log["loss_after"][0] < alone.log["loss_before"][0]


def test_the_loss_of_a_value_is_the_published_one():
    """By hand: mean NLL over contexts, KL(edited || original) at the subject's end, the norm over the squared norm."""
    model = subject()
    (fact,) = located(case(model, edits=EDITS[:1]), 2)
    settings = Settings(steps=2, learning_rate=3.0, kl=0.5, decay=0.7, clamp=1e9)
    found = optimised(model, [fact], 1, settings)
    owner = model.model.get_submodule(edited_matrix(model, 1).owner)

    def logprobs(ids, at, change):
        def add(_, __, output):
            output = output.clone()
            output[0, at] += change
            return output

        handle = owner.register_forward_hook(add)
        with torch.no_grad():
            logits = model.model(input_ids=torch.tensor([ids])).logits[0]
        handle.remove()
        return logits.log_softmax(-1)

    delta, nothing = found.delta[0], torch.zeros(32)
    nll = 0.0
    for one in fact.lookups:
        said = logprobs(one.tokens.ids[:-1], one.at, delta)
        places = range(one.tokens.start, len(one.tokens.ids))
        nll -= sum(float(said[i - 1, one.tokens.ids[i]]) for i in places) / len(places) / len(fact.lookups)
    last = len(fact.essence) - 1
    edited, original = (logprobs(fact.essence, last, change)[-1] for change in (delta, nothing))
    divergence = float((edited.exp() * (edited - original)).sum())
    value = look(model, [fact.lookups[0].tokens.ids], [fact.lookups[0].at], [1]).values[1][0]
    expected = nll + 0.5 * divergence + 0.7 * float(delta.norm()) / float(value.norm()) ** 2
    assert found.log["loss_after"][0] == pytest.approx(expected, rel=1e-4)
    assert float(delta.abs().max()) == pytest.approx(3.0, rel=1e-3)  # one step of Adam
    bounded = optimised(model, [fact], 1, replace(settings, clamp=0.1)).delta
    assert float(bounded.norm()) == pytest.approx(0.1 * float(value.norm()), rel=1e-4)


# --- key statistics ---------------------------------------------------------------------------------------------------


def test_second_moments_stream_to_the_plain_product_and_are_kept_by_content(tmp_path, monkeypatch):
    model = subject()
    texts = [model.encode(row).ids for row in CORPUS]
    parts = [look(model, [text], list(range(len(text))), [1], rows=[0] * len(text)).keys[1] for text in texts]
    every = torch.cat(parts).double()
    monkeypatch.setattr(moments_module, "TILE", 24)
    monkeypatch.setattr(moments_module, "TOKEN_BUDGET", 64)
    found = moments(model, texts, [0, 1], tolerance=0.0)
    assert torch.allclose(found[1].matrix, every.T @ every / len(every), atol=1e-6)
    assert found[1].tokens == len(every)
    cut = moments(model, texts, [1], max_tokens=50, tolerance=0.0)[1]
    assert torch.allclose(cut.matrix, every[:50].T @ every[:50] / 50, atol=1e-6)
    early = moments(model, texts, [1], tolerance=0.9)[1]
    assert early.tokens < len(every)
    assert early.change < 0.9
    monkeypatch.setattr(moments_module, "_stream", None)  # everything is on disk
    assert torch.equal(moments(model, texts, [0], tolerance=0.0)[0].matrix, found[0].matrix)
    with pytest.raises(TypeError):
        moments(model, texts[1:], [0], tolerance=0.0)
    with pytest.raises(TypeError):
        moments(subject("qwen2"), texts, [0], tolerance=0.0)
    with pytest.raises(RowError, match="need texts, found 0"):
        moments(model, [], [0])


def test_statistics_that_do_not_fit_are_refused_or_taken_group_by_group(monkeypatch):
    model = subject()
    texts = [model.encode(row).ids for row in CORPUS[:4]]
    together = moments(model, texts, [0, 1])
    monkeypatch.setattr(moments_module, "MOMENT_BYTES", 12 * 64 * 64)
    assert [list(group) for group in moments_module._groups({0: 64, 1: 64})] == [[0], [1]]
    monkeypatch.setenv("EXPUNGE_CACHE", "/nowhere")
    apart = moments_module._stream(model, texts, {1: 64}, 10**6, 0.01, None)
    assert torch.allclose(apart[1].matrix, together[1].matrix)
    monkeypatch.setattr(moments_module, "MOMENT_BYTES", 1000)
    with pytest.raises(SubjectError, match=r"layer 0 \(64 x 64\) takes .* GiB.*covariance=false"):
        moments_module._groups({0: 64})
    with pytest.raises(RequestError, match="key statistics need texts, and the request names none"):
        registry.get("methods", "rome").function(case(model, corpus=()))


# --- ROME -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", WANTED)
def test_rome_maps_the_key_to_the_value_and_moves_one_matrix_by_rank_one(architecture):
    model = subject(architecture)
    before = weights(model)
    made = case(model, edits=EDITS[:1])
    delta = registry.get("methods", "rome").function(made, **WRITERS["rome"])
    changed = delta.apply(model)
    matrix = edited_matrix(model, 1)
    after = weights(changed)
    assert [name for name in before if not torch.equal(before[name], after[name])] == [matrix.name]
    facts = located(made, 2)
    value = optimised(model, facts, 1, Settings(4, 2.0, clamp=50.0)).delta[0].double()
    k = keys(model, facts, [1])[0][1].mean.double().T
    old, new = outputs(model, 1, k)[:, 0], outputs(changed, 1, k)[:, 0]
    assert torch.allclose(new - old, value, rtol=1e-3, atol=1e-4 * float(value.norm()))
    moved = vectors(changed.model, matrix).double() - vectors(model.model, matrix).double()
    singular = torch.linalg.svdvals(moved)
    assert float(singular[1]) < 1e-4 * float(singular[0])
    # Keys across u keep their output.
    u = torch.linalg.svd(moved.T).Vh[0]
    other = torch.randn(matrix.count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    other -= u * (other @ u)
    assert torch.allclose(outputs(changed, 1, other[:, None]), outputs(model, 1, other[:, None]), atol=1e-4)
    # u is C^-1 k: solved by hand from the regularised moment.
    moment = made.moments([1], 3_200_000)[1]
    direction = torch.linalg.solve(moment.regularised(1e-2), k[:, 0])
    assert abs(float(direction @ u) / float(direction.norm())) == pytest.approx(1, abs=1e-3)


def test_with_plain_statistics_rome_is_the_smallest_change_that_meets_the_condition():
    model = subject()
    made = case(model, edits=EDITS[:1])
    plain = registry.get("methods", "rome").function(made, **WRITERS["rome"], covariance=False)
    scaled = case(model, edits=EDITS[:1], memory={"moments": {1: Moment(3 * torch.eye(64, dtype=torch.float64), 1, 0)}})
    also = registry.get("methods", "rome").function(scaled, **WRITERS["rome"])
    (name,) = plain.entries
    assert torch.allclose(plain.difference(name), also.difference(name), atol=1e-5)
    k = keys(model, located(made, 2), [1])[0][1].mean[0]
    change = plain.difference(name)
    least = torch.outer(change @ k, k) / k.square().sum()  # the minimum-norm solution of D k = r
    assert torch.allclose(change, least, atol=1e-5 * float(change.norm()))


def test_the_published_form_meets_its_condition_at_the_prompt_as_it_is():
    model = subject()
    made = case(model, edits=EDITS[:1])
    form = registry.get("methods", "rome_original")
    changed = form.function(made, **WRITERS["rome"], **form.preset).apply(model)
    facts = located(made, 2)
    value = optimised(model, facts, 1, Settings(4, 2.0, clamp=50.0)).delta[0].double()
    found = keys(model, facts, [1])[0][1]
    moved = [outputs(changed, 1, k.double().T) - outputs(model, 1, k.double().T) for k in found]
    assert torch.allclose(moved[1][:, 0], value, rtol=1e-3, atol=1e-4 * float(value.norm()))
    assert not torch.allclose(moved[0][:, 0], value, rtol=1e-2, atol=1e-2 * float(value.norm()))


def test_several_facts_at_once_meet_all_their_conditions():
    model = subject()
    changed = run("rome", model).apply(model)
    facts = located(case(model), 2)
    value = optimised(model, facts, 1, Settings(4, 2.0, clamp=50.0)).delta.double()
    k = keys(model, facts, [1])[0][1].mean.double().T
    moved = outputs(changed, 1, k) - outputs(model, 1, k)
    assert torch.allclose(moved.T, value, rtol=1e-3, atol=1e-3 * float(value.norm()))


def test_a_change_that_would_explode_is_refused():
    draw = torch.Generator().manual_seed(0)
    k, r = (torch.randn(8, 2, dtype=torch.float64, generator=draw) for _ in range(2))
    b, a = conditions(r, k, k)
    assert torch.allclose(b @ a @ k, r)
    with pytest.raises(TrainingError, match="keys of 2 facts determine no change that is not huge"):
        conditions(r, k[:, :1].expand(-1, 2), k[:, :1].expand(-1, 2))
    across = torch.tensor([[1.0], [0.0]]).double()
    with pytest.raises(TrainingError, match="not huge"):
        conditions(r[:2, :1], across, across.flip(0))


# --- MEMIT and AlphaEdit ----------------------------------------------------------------------------------------------


def test_without_weight_memit_meets_every_condition_and_with_all_of_it_moves_nothing():
    model = subject()
    facts = located(case(model), 2)
    value = optimised(model, facts, 1, Settings(4, clamp=50.0), at="stream").delta.double()
    k = keys(model, facts, [1])[0][1].mean.double().T
    norms = []
    for weight in (1e-9, 1.0, 1e3, 1e9):
        changed = run("memit", model, layers=(1, 1), weight=weight).apply(model)
        moved = outputs(changed, 1, k) - outputs(model, 1, k)
        norms.append(float(moved.norm()))
        if weight < 1e-6:
            assert torch.allclose(moved.T, value, rtol=1e-2, atol=1e-3 * float(value.norm()))
    assert norms == sorted(norms, reverse=True)
    assert norms[-1] < 1e-4 * norms[0]


def test_memit_solves_the_regularised_least_squares_of_its_paper():
    """R K^T (weight C + K K^T)^-1, inverted whole, against the n x n form."""
    model = subject()
    made = case(model)
    delta = run("memit", model, layers=(1, 1), weight=2.0, ridge=0.1)
    facts = located(made, 2)
    r = optimised(model, facts, 1, Settings(4, clamp=50.0), at="stream").delta.double().T
    k = keys(model, facts, [1])[0][1].mean.double().T
    c = made.moments([1], 3_200_000)[1].regularised(0.1)
    whole = r @ k.T @ torch.linalg.inv(2.0 * c + k @ k.T)
    (name,) = delta.entries
    assert torch.allclose(delta.difference(name).double(), whole, atol=1e-5 * float(whole.norm()))
    exact = (k.T @ torch.linalg.inv(2.0 * c + k @ k.T)).T
    m = Moment(made.moments([1], 3_200_000)[1].matrix, 1, 0).solve(k, 0.1) / 2.0
    assert torch.allclose(m @ torch.linalg.inv(torch.eye(2).double() + k.T @ m), exact, rtol=1e-8, atol=1e-10)


def test_memit_spreads_what_is_missing_over_its_layers():
    model = subject()
    made = case(model)
    delta = registry.get("methods", "memit").function(made, **WRITERS["memit"] | {"weight": 1e-6})
    assert sorted(delta.entries) == [edited_matrix(model, layer).name for layer in (0, 1)]
    missing = made.summary["spread"]["missing_before_layer"]
    changed = delta.apply(model)
    facts = located(made, 2)
    start, end = (keys(m, facts, [1])[1].streams[1] for m in (model, changed))
    value = optimised(model, facts, 1, Settings(4, clamp=50.0), at="stream").delta
    left = float((start + value - end).norm(dim=-1).mean())
    assert left < 0.5 * missing["1"] < missing["0"]
    with pytest.raises(ParameterError, match="expected the lower one first"):
        run("memit", model, layers=(2, 0))
    with pytest.raises(ParameterError, match="weight is 0"):
        run("memit", model, weight=0.0)
    with pytest.raises(SubjectError, match=r"has a norm after its MLP.*use rome"):
        run("memit", subject("gemma2"))


def test_alphaedit_leaves_what_preserved_keys_give_unchanged():
    model = subject()
    made = case(model)
    settings = WRITERS["alphaedit"] | {"layers": (1, 1), "null": 0.5, "ridge": 0.3}
    delta = registry.get("methods", "alphaedit").function(made, **settings)
    vectors_ = made.moments([1], 3_200_000)[1].spectrum[1]
    (name,) = delta.entries
    change = delta.difference(name).double()
    kept = vectors_[:, 32:] @ torch.randn(32, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert float((change @ kept).abs().max()) < 1e-6 * float(change.norm() * kept.norm())
    assert float((change @ vectors_[:, :32]).norm()) > 0.99 * float(change.norm())
    # The paper's own form, with P and an f x f inverse, and the keys of earlier edits.
    facts = located(made, 2)
    r = optimised(model, facts, 1, Settings(4, 0.1, decay=0.5, clamp=50.0), at="stream").delta.double().T
    k = keys(model, facts, [1])[0][1].mean.double().T
    p = vectors_[:, :32] @ vectors_[:, :32].T
    past = torch.randn(60, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    again, many = (replace(made, earlier={1: [past[:count]]}) for count in (3, 60))  # 62 keys, 32 directions
    part = registry.get("methods", "alphaedit")
    other, third = (part.function(one, **settings).difference(name).double() for one in (again, many))
    for found, spared in ((change, 0.0), (other, past[:3].T @ past[:3]), (third, past.T @ past)):
        whole = (torch.linalg.inv(p @ (k @ k.T + spared) + 0.3 * torch.eye(64).double()) @ p @ k @ r.T).T
        assert torch.allclose(found, whole, atol=1e-5 * float(whole.norm()))
    assert [len(found) for found in again.earlier[1]] == [3, 2]
    with pytest.raises(ParameterError, match="null is 0"):
        run("alphaedit", model, null=0.0)


# --- fine-tuning ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ft_l", "ft_m"])
def test_fine_tuning_is_adam_on_one_matrix(name):
    """Two steps against torch's own Adam on plain passes."""
    model = subject()
    delta = run(name, model, steps=2, learning_rate=1e-2)
    plain = subject()
    matrix = edited_matrix(plain, 1)
    weight = plain.model.get_parameter(matrix.name)
    adam = torch.optim.Adam([weight], lr=1e-2)
    for _ in range(2):
        losses = []
        for edit in EDITS:
            one = lookup(plain, edit.row(), edit.subject).tokens
            said = plain.model(input_ids=torch.tensor([one.ids])).logits[0].log_softmax(-1)
            places = range(one.start, len(one.ids))
            losses.append(
                -sum(said[one.start - 1 if name == "ft_l" else i - 1, one.ids[i]] for i in places) / len(places)
            )
        adam.zero_grad()
        (sum(losses) / 2).backward()
        adam.step()
    change = weight.detach() - model.model.get_parameter(matrix.name)
    # Where a gradient is next to nothing, Adam's step is of its sign alone.
    close = (delta.difference(matrix.name) - change).abs() < 1e-4
    assert float(close.float().mean()) > 0.99
    assert list(delta.entries) == [matrix.name]


def test_fine_tuning_keeps_within_its_bound_and_stops_where_the_loss_is_low():
    model = subject()
    bounded = run("ft_m", model, norm=1e-3, learning_rate=1e-2)
    (difference,) = (entry["difference"] for entry in bounded.entries.values())
    assert float(difference.abs().max()) <= 1e-3 + 1e-7
    with torch.no_grad():  # a random head cannot be sure of anything
        model.model.lm_head.weight.mul_(20)
    made = case(model, edits=EDITS[:1])
    registry.get("methods", "ft_m").function(made, layer=2, steps=200, learning_rate=1e-2)
    assert made.summary["tuning"]["loss_after"] < 1e-2
    assert made.summary["tuning"]["steps"] < 200
    for settings in ({"steps": -1}, {"learning_rate": 0.0}, {"norm": -1.0}):
        with pytest.raises(ParameterError, match="expected >= 0, > 0 and >= 0"):
            run("ft_m", model, **settings)


# --- one, batch, sequence ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_edits_are_deltas_that_can_be_undone_to_the_last_bit(name):
    model = subject()
    before = weights(model)
    part = registry.get("methods", name)
    (sequence,) = carry_out(part, case(model), WRITERS[name], "sequence")
    (again,) = carry_out(part, case(model), WRITERS[name], "sequence")
    (batch,) = carry_out(part, case(model), WRITERS[name], "batch")
    single = carry_out(part, case(model), WRITERS[name], "one")
    assert [[edit.id for edit in step.edits] for step in sequence.steps] == [["a"], ["b"]]
    assert [edit.id for edit in batch.edits] == ["a", "b"]
    assert len(batch.steps) == 1
    assert [len(one.steps) for one in single] == [1, 1]
    full, same, first = (weights(found.model()) for found in (sequence, again, sequence.undo()))
    moved = {name for step in sequence.steps for name in step.delta.entries}
    alone = weights(single[0].model())
    for tensor in before:
        assert torch.equal(full[tensor], same[tensor])  # deterministic
        assert torch.equal(first[tensor], alone[tensor])  # the first of a sequence is that edit alone
        assert torch.equal(before[tensor], full[tensor]) is (tensor not in moved)
    assert [edit.id for edit in sequence.undo("a").edits] == ["b"]
    assert sequence.undo().undo().model() is model
    assert batch.undo().model() is model
    assert all(torch.equal(before[name], p) for name, p in model.model.named_parameters())
    with pytest.raises(DeltaError, match="carries no edit"):
        Edited(model).undo()
    with pytest.raises(DeltaError, match=r"edit 'a' was made in one batch with 1 others"):
        batch.undo("a")
    with pytest.raises(DeltaError, match="no edit is called 'x'"):
        batch.undo("x")


def test_a_sequence_of_low_rank_changes_stays_low_rank():
    model = subject()
    (found,) = carry_out(registry.get("methods", "rome"), case(model), WRITERS["rome"], "sequence")
    assert found.delta.kind == "low_rank"
    assert found.delta.cost()["parameters"] == 2 * (32 + 64)


def test_what_is_no_editor_is_refused():
    model = subject()
    with pytest.raises(ParameterError, match="npo is of kind optimise, expected an editor"):
        carry_out(registry.get("methods", "npo"), case(model), {}, "one")
    with pytest.raises(ParameterError, match="mode is 'all'"):
        carry_out(registry.get("methods", "rome"), case(model), {}, "all")
    with pytest.raises(RequestError, match="nothing to edit"):
        registry.get("methods", "rome").function(case(model, edits=()))


def test_forget_rows_are_facts_to_be_deleted():
    model = subject()
    forget = [Row(id="f", prompt="where was Ilva born?", answer="Tivin", entity="Ilva")]
    made = case(model, edits=(), data={"forget": forget, "retain": CORPUS}, corpus=())
    (fact,) = made.facts()
    assert (fact.subject, fact.ground_truth, fact.kind) == ("Ilva", ("Tivin",), "qa")
    assert fact.target_new
    assert made.facts() == [fact]
    delta = registry.get("methods", "rome").function(made, **WRITERS["rome"])
    assert delta.apply(model).fingerprint != model.fingerprint
    with pytest.raises(RowError, match="a text row is no fact"):
        case(model, edits=(), data={"forget": [Row(id="t", answer="a b", kind="text")]}).facts()


def test_prefixes_are_the_models_own_texts_and_the_same_for_every_edit():
    model = subject()
    made = case(model, prefixes=None)
    (first, second) = located(made, 5)
    assert [len(fact.lookups) for fact in (first, second)] == [6, 6]
    assert located(case(model, prefixes=None), 5) == [first, second]
    beginnings = [model.tokenizer.decode(one.tokens.ids) for one in first.lookups]
    assert beginnings[0] == "Ilva was born in Tivin north"
    assert all(text.endswith(". " + beginnings[0]) for text in beginnings[1:])
    assert located(case(model, prefixes=None), 0)[0].lookups == first.lookups[:1]
    assert isinstance(first.lookups[0].tokens, Encoded)
    with pytest.raises(ExpungeError, match="contexts is -1"):
        located(case(model, prefixes=None), -1)
