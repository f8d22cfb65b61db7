"""Edits of neurons: rows turned away from a concept (TARS), knowledge neurons (KN), and what is claimed of them."""

import math
from dataclasses import replace

import pytest
import torch
from tiny import loud as subject

from expunge import registry
from expunge.edits import EditRow
from expunge.errors import ParameterError, RequestError, RowError, SubjectError
from expunge.methods.edit import kn as kn_module
from expunge.methods.edit.case import EditCase
from expunge.methods.edit.tars import Concept, nearest, state, targeted
from expunge.reproductions.case import Case
from expunge.reproductions.mini import SMALL
from expunge.reproductions.neuron_decoding import decoding, reversal
from expunge.rows import Row
from expunge.subjects.input_vectors import reading_matrices
from expunge.subjects.value_vectors import Address, value_matrices, vector, vectors

RETAIN = [Row(id=f"r{i}", prompt=f"where was Mo {i} born?", answer=f"in Tivin {i}") for i in range(6)]
FACTS = [
    EditRow("a", "Ilva was born in", "north", "Ilva", ("Tivin",)),
    EditRow("b", "where was Carth born?", "the north", "Carth", ("Tivin",)),
]


pytestmark = pytest.mark.usefixtures("own_cache")


# --- TARS -------------------------------------------------------------------------------------------------------------


def tars(model, **settings):
    case = EditCase(model, settings.pop("data", {"retain": RETAIN}), edits=settings.pop("edits", FACTS[:1]))
    part = registry.get("methods", "tars")
    return part.function(case, **part.resolve(settings)), case


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "mixtral"])
def test_tars_turns_exactly_the_nearest_rows_and_keeps_their_lengths(architecture):
    model = subject(architecture)
    delta, case = tars(model, count=7)
    after = delta.apply(model)
    (about,) = case.summary["tars"].values()
    cosines = about["cosines"]
    assert len(cosines) == 7
    assert cosines == sorted(cosines, reverse=True)
    changed = []
    for matrix in reading_matrices(model.model):
        old, new = vectors(model.model, matrix), vectors(after.model, matrix)
        for dim in (old != new).any(1).nonzero()[:, 0].tolist():
            changed.append((old[dim], new[dim]))
            assert [matrix.name, str(matrix.address(dim))] in about["rows"]
    assert len(changed) == 7
    for old, new in changed:
        assert float(new.norm()) == pytest.approx(float(old.norm()), rel=1e-6)
        for other in changed:
            assert float(torch.cosine_similarity(new, other[1], dim=0)) == pytest.approx(1, abs=1e-5)
    # The rows that were nearest to the vector now point away from it.
    away = -changed[0][1] / changed[0][1].norm()
    every = torch.cat(
        [vectors(model.model, m) @ away / vectors(model.model, m).norm(dim=1) for m in reading_matrices(model.model)]
    )
    assert every.topk(7).values.tolist() == pytest.approx(cosines, abs=1e-3)
    entries = sum(p.numel() for p in delta.entries[next(iter(delta.entries))].values())
    assert entries <= 2 * 7 * 32
    untouched = set(dict(model.model.named_parameters())) - set(delta.entries)
    assert all(torch.equal(model.model.get_parameter(n), after.model.get_parameter(n)) for n in untouched)


def test_a_targeting_vector_is_the_mean_of_the_draws_after_which_the_concept_is_most_probable():
    model = subject()
    with torch.no_grad():  # a random head is sure of nothing
        model.model.lm_head.weight.mul_(5)
    concept = Concept("Tivin", 150, ("Ilva was born in", "where was Carth born?"))
    start = state(model, concept.prompts)
    assert torch.allclose(
        start, torch.stack([model.hidden([text])[0, -1] for text in concept.prompts]).mean(0), atol=1e-6
    )
    found = [targeted(model, concept, None, 1000, 0.3, 0.99, rounds, 0) for rounds in (1, 5)]
    p0 = float(model.lens(start).softmax(-1)[150])
    assert found[1][1] > 2 * found[0][1] > 4 * p0
    for v, p in found:
        assert float(model.lens(v).softmax(-1)[150]) == pytest.approx(p, rel=1e-4)
    # Sure enough from the start: nothing is drawn.
    assert torch.equal(targeted(model, concept, None, 1000, 0.3, p0 / 2, 5, 0)[0], start)
    centred = targeted(model, concept, start, 1000, 0.3, 0.99, 1, 0)[0]
    assert torch.allclose(centred, found[0][0] - start)


def test_tars_takes_half_a_percent_of_all_rows_and_is_the_same_for_a_seed():
    model = subject()
    delta, case = tars(model)
    (about,) = case.summary["tars"].values()
    total = sum(matrix.count for matrix in reading_matrices(model.model))
    assert len(about["rows"]) == max(1, round(0.005 * total)) == 2
    again, _ = tars(model)
    assert all(torch.equal(again.entries[n][k], delta.entries[n][k]) for n in delta.entries for k in delta.entries[n])
    _, above = tars(model, threshold=about["cosines"][-1] - 1e-3)
    (more,) = above.summary["tars"].values()
    assert more["cosines"][:2] == about["cosines"]


def test_concepts_are_the_answers_first_tokens_or_named_and_follow_one_another():
    model = subject()
    other = replace(FACTS[1], id="c", ground_truth=("Carth",))
    _, case = tars(model, edits=[*FACTS, other])
    found = case.summary["tars"]
    assert len(found) == 2  # two facts share an answer
    delta, case = tars(model, concept="north; North", prompts=("born in the", "was in the"), edits=[], count=2)
    assert set(case.summary["tars"]) == {"north", "North"}
    assert delta.apply(model).fingerprint != model.fingerprint
    forget = [Row(id="f", prompt="where was Ilva born?", answer="Tivin", entity="Ilva")]
    deleted, case = tars(model, edits=[], data={"forget": forget}, count=1)
    assert len(next(iter(case.summary["tars"].values()))["rows"]) == 1
    assert "whether the vector is common was not checked" in case.warnings[0]
    assert deleted.kind == "sparse"


def test_a_vector_that_stands_for_everything_is_refused_and_the_mean_can_be_taken_off():
    model = subject()
    with torch.no_grad():  # every state has one direction in common
        model.model.model.embed_tokens.weight[:, 0] = 30.0
    with pytest.raises(RequestError, match="the rows it finds serve everything"):
        tars(model, noise=0.01)
    _, case = tars(model, noise=0.01, centre=True)
    (about,) = case.summary["tars"].values()
    assert about["cosine_to_mean"] < 0.9


def test_what_tars_cannot_use_is_refused():
    model = subject()
    for settings, sentence in (
        ({"count": 0}, "count is 0"),
        ({"share": 0.0}, "0 < share <= 1"),
        ({"concept": "north"}, "expected a concept and 1 to 5 prompts"),
        ({"threshold": 0.999}, "no row has a cosine above 0.999"),
        ({"centre": True, "data": {}}, "centre needs retain rows"),
        ({"edits": [replace(FACTS[0], ground_truth=())]}, "'ground_truth' is missing"),
    ):
        with pytest.raises((ParameterError, RequestError, RowError), match=sentence):
            tars(model, **settings)
    with pytest.raises(SubjectError, match="has no gate matrix"):
        tars(subject("gpt2"), rows="gate")
    v = torch.randn(32, generator=torch.Generator().manual_seed(0))
    gates = nearest(model, v, "gate", 0.1, None, None)
    assert {matrix.name.rpartition(".")[0][-9:] for matrix, *_ in gates} == {"gate_proj"}


# --- knowledge neurons ------------------------------------------------------------------------------------------------


def kn(model, edits=FACTS[:1], **settings):
    case = EditCase(model, settings.pop("data", {}), edits=edits, prefixes=("So they say.", "In the north."))
    part = registry.get("methods", "kn")
    return part.function(case, **part.resolve(settings)), case


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_attribution_is_the_integral_of_the_gradient_by_activations(architecture):
    """Against plain passes in which the activations of one layer are replaced, and autograd through them."""
    model = subject(architecture)
    row = kn_module.asked(model, FACTS[0], "Tivin", "")
    steps, layer = 4, 1
    owner = model.model.get_submodule(value_matrices(model.model)[layer].owner)
    at, ids = row.start - 1, torch.tensor([row.ids[:-1]])
    seen = []
    handle = owner.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].detach()))
    logits_of = model.model(input_ids=ids).logits
    handle.remove()
    key = seen[0].reshape(1, -1, seen[0].shape[-1])[0, at]

    def probability(activation):
        def put(_, arguments):
            states = arguments[0].clone().reshape(1, -1, len(key))
            states[0, at] = activation
            return (states.reshape(arguments[0].shape),)

        handle = owner.register_forward_pre_hook(put)
        said = model.model(input_ids=ids).logits[0].log_softmax(-1)
        handle.remove()
        places = range(row.start, len(row.ids))
        return sum(said[i - 1, row.ids[i]] for i in places).exp()

    total = torch.zeros_like(key)
    for j in range(1, steps + 1):
        a = (key * j / steps).requires_grad_(True)
        total += torch.autograd.grad(probability(a), [a])[0]
    found = kn_module.attribution(model, row, steps)[layer]
    assert torch.allclose(found, key * total / steps, atol=1e-3 * float(found.abs().max()))
    if architecture == "llama":  # completeness: scores add up to what silence costs
        fine = kn_module.attribution(model, row, 200)[layer]
        whole = float((probability(key) - probability(torch.zeros_like(key))).detach())
        assert float(fine.sum()) == pytest.approx(whole, rel=0.05, abs=1e-6)
    assert logits_of.isfinite().all()


def test_neurons_above_a_share_of_the_best_in_more_than_half_of_the_contexts_are_the_facts():
    scores = torch.tensor([[0.1, 1.0], [0.31, -2.0]])
    assert kn_module.above(scores, 0.3) == {Address(0, 1), Address(1, 0)}
    assert kn_module.above(scores, 0.2) == {Address(0, 1), Address(1, 0)}
    assert kn_module.above(scores, 0.05) == {Address(0, 0), Address(0, 1), Address(1, 0)}
    assert kn_module.above(-scores.abs(), 0.3) == set()
    a, b, c = Address(0, 1), Address(0, 2), Address(1, 0)
    found = [{a, b}, {a, b}, {a}, {a, c}]
    assert kn_module.agreed(found, 0.5) == [a]
    assert kn_module.agreed(found, 0.49) == [a, b]
    assert kn_module.agreed([{b}, {c}, {b}, set()], 0.0, most=True) == [b]
    assert kn_module.agreed([set()], 0.0, most=True) == []


def test_kn_moves_the_facts_neurons_from_the_old_answer_to_the_new_one():
    model = subject()
    delta, case = kn(model, steps=3)
    neurons = [Address.parse(text) for text in case.summary["kn"]["facts"]["a"]["neurons"]]
    assert neurons
    after = delta.apply(model)
    table = model.model.get_input_embeddings().weight
    tokens = [model.encode(FACTS[0].row(answer=text)) for text in ("Tivin", "north")]
    old, new = (table[one.ids[one.start]] for one in tokens)
    for address in neurons:
        change = vector(after.model, address) - vector(model.model, address)
        assert torch.allclose(change, 2 * (new - old), atol=1e-5)
    moved = sum(
        int((vectors(after.model, m) != vectors(model.model, m)).any(1).sum()) for m in value_matrices(model.model)
    )
    assert moved == len(neurons)
    assert delta.kind == "sparse"
    erased, _ = kn(model, steps=3, erase=True)
    assert not any(vector(erased.apply(model).model, address).any() for address in neurons)


def test_forget_rows_are_erased_and_several_facts_share_a_neuron():
    model = subject()
    forget = [Row(id=f"f{i}", prompt="where was Ilva born?", answer="Tivin", entity="Ilva") for i in range(2)]
    delta, case = kn(model, edits=(), data={"forget": forget}, steps=2)
    assert case.summary["kn"]["erased"]
    facts = case.summary["kn"]["facts"]
    assert facts["f0"]["neurons"] == facts["f1"]["neurons"]
    assert not vector(delta.apply(model).model, Address.parse(facts["f0"]["neurons"][0])).any()


def test_what_kn_cannot_use_is_refused():
    model = subject()
    for settings in ({"steps": 0}, {"threshold": 1.0}, {"shared": -0.1}):
        with pytest.raises(ParameterError, match="kn: expected steps"):
            kn(model, **settings)
    with pytest.raises(RowError, match="'ground_truth' is missing"):
        kn(model, edits=[replace(FACTS[0], ground_truth=())])
    with pytest.raises(SubjectError, match="is a mixture of experts"):
        kn(subject("mixtral"))
    with pytest.raises(SubjectError, match="embeddings of model have 16 entries"):
        kn(subject("opt"), steps=2)
    delta, _ = kn(subject("opt"), steps=2, erase=True)
    assert math.isfinite(float(next(iter(delta.entries.values()))["value"].sum()))


# --- the reproduction's claims ----------------------------------------------------------------------------------------


def trials(above=0.02, wins=0.7, tuned=0.75, independent=0.2, own=0.6, blind=0.8, after=0.92):
    held = {str(layer): {"own": 0.3, "random": 0.1, "wins": wins if layer in (1, 2) else 0.0} for layer in range(4)}
    found = {"above": above, "tuned": tuned, "independent": independent, "held": held, "words": ["of", "in"]}
    lines = {"none": [0.9, 1.0, 0, 0], "tars 0.06": [own, after, 0, 0], "random 0.06": [blind, 1.0, 0, 0]}
    lines["tars 0.0"] = [0.1, 1.0, 0, 0]
    removed = {"lines": lines, "cosine to mean": 0.3, "sequence": {"median": 0.01, "mean": 0.1}}
    return [{**found, "seed": 0}], [{**removed, "seed": 0}]


def test_claims_are_judged_at_their_bounds():
    found, after = trials()
    claims = [*decoding(found), *reversal(after)]
    assert [claim.holds for claim in claims] == [True, True, True, True, True, True, None]
    for place, changed in (
        (0, {"above": 0.009}),
        (1, {"wins": 0.69}),
        (2, {"tuned": 0.74}),
        (2, {"independent": 0.21}),
        (3, {"own": 0.61}),
        (3, {"after": 0.91}),
    ):
        found, after = trials(**changed)
        assert [claim.holds for claim in (*decoding(found), *reversal(after))][place] is False


@pytest.mark.slow
def test_the_reproduction_runs_on_a_small_world(tmp_path):
    part = registry.get("reproductions", "neuron_decoding")
    found = part.function(Case(tmp_path, seeds=(0,), workers=1), world={**SMALL})
    assert len(found.claims) == 7
    assert all(claim.measured for claim in found.claims)
