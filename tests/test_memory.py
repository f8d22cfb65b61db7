"""Editors that leave the weights alone: codebooks, side memories, facts told in the prompt."""

import json
from dataclasses import replace

import pytest
import torch
from test_editors import CORPUS, EDITS, case, subject, weights

from expunge import cli, registry
from expunge.deltas import Delta, compose
from expunge.edits import EditRow, Probe, edit_row
from expunge.errors import DeltaError, ParameterError, RequestError, SubjectError
from expunge.methods.edit.operations import carry_out, changed
from expunge.methods.edit.values import located
from expunge.serve.run import subject_of
from expunge.subjects import memory
from expunge.subjects.memory import attach, radii_of, ties
from expunge.subjects.tails import look

NAME = "model.layers.1.mlp.down_proj.weight"
SETTINGS = {
    "grace": {"layer": 1, "steps": 8},
    "wise": {"layer": 1, "steps": 12, "learning_rate": 0.3, "mask": 0.5, "unrelated": 4},
    "ike": {},
}


pytestmark = pytest.mark.usefixtures("own_cache")


def said(model, edits=EDITS):
    """Log-probabilities of the targets."""
    return torch.tensor(model.score([((e.id, "x"), model.encode(e.row())) for e in edits]).logprob)


def make(name, model, mode="sequence", **changes):
    settings = {**SETTINGS[name], **changes.pop("settings", {})}
    return carry_out(registry.get("methods", name), case(model, **changes), settings, mode)


# --- the rules, by hand -----------------------------------------------------------------------------------------------


def test_a_token_within_the_radius_of_its_nearest_key_gets_that_keys_value_and_no_other_is_touched():
    model = torch.nn.ModuleDict({"out": torch.nn.Linear(3, 2)})
    before = model["out"](torch.eye(3))
    entry = {
        "keys": torch.tensor([[1.0, 0, 0], [0, 2.0, 0]]),
        "values": torch.tensor([[5.0, 6.0], [7.0, 8.0]]),
        "labels": torch.tensor([1, 2]),
        "reach": torch.tensor([0.5, 0.9]),
    }
    attach(model, "out.weight", entry)
    found = model["out"](torch.eye(3)[None])[0]
    assert found[0].tolist() == [5, 6]
    assert torch.equal(found[1:], before[1:])  # the second is 1.0 from its nearest key, whose radius is 0.9
    attach(model, "out.weight", {**entry, "keys": entry["keys"] + 9, "reach": torch.tensor([20.0, 0.0])})
    assert model["out"](torch.eye(3)).tolist()[0] == [5, 6]  # of keys that reach it the nearest answers
    empty = torch.nn.ModuleDict({"out": torch.nn.Linear(3, 2)})
    plain = empty["out"](torch.eye(3))
    attach(empty, "out.weight", {name: tensor[:0] for name, tensor in entry.items()})
    assert torch.equal(empty["out"](torch.eye(3)), plain)
    with pytest.raises(SubjectError, match="does not fit a matrix"):
        attach(torch.nn.ModuleDict({"out": torch.nn.Linear(4, 2)}), "out.weight", entry)


def test_radii_follow_graces_rule_for_one_edit_after_another():
    keys_ = torch.tensor([[0.0], [10.0], [11.5], [10.8], [0.2]])
    labels, reach = torch.tensor([1, 2, 2, 3, 1]), torch.ones(5)
    kept, radii = radii_of(keys_, labels, reach)
    # 10 is far from 0: new. 11.5 is near 10 and says the same: 10 grows to it. 10.8 says something else: both halve
    # their distance. 0.2 lies within 0's radius and says the same: nothing changes.
    assert kept == [0, 1, 3]
    assert radii[kept].tolist() == pytest.approx([1.0, 0.4, 0.4])


def test_ties_trims_elects_signs_and_takes_means_of_those_that_agree():
    parts = torch.tensor([[4.0, -3.0, 0.5, 0.0, 2.0], [2.0, 1.0, -0.5, 6.0, 0.0]])
    assert ties(parts, 1.0).tolist() == [3.0, -3.0, 0.0, 6.0, 2.0]
    # Half of four is two: 4 and -3 of the first; 2 and 6 of the second.
    assert ties(parts, 0.5).tolist() == [3.0, -3.0, 0.0, 6.0, 0.0]


# --- what they have in common -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETTINGS)
def test_memories_move_no_weight_serve_all_operations_and_any_edit_can_be_left_out(name, tmp_path):
    model = subject()
    before, start = weights(model), said(model)
    (sequence,) = make(name, model)
    (batch,) = make(name, model, "batch")
    single = make(name, model, "one")
    made = sequence.model()
    assert all(torch.equal(before[n], p) for n, p in weights(made).items())
    assert len({m.fingerprint for m in (model, made, sequence.undo().model())}) == 3
    assert make(name, model)[0].model().fingerprint == made.fingerprint
    assert sequence.undo().model().fingerprint == single[0].model().fingerprint
    assert sequence.undo("a").undo("b").model() is model
    assert batch.undo().model() is model
    assert len(single) == 2
    if name != "ike":  # a random model does not read contexts
        assert float(said(made)[:2].mean()) > float(start[:2].mean())
    # Stored, loaded, stacked from its steps.
    for number, step in enumerate(sequence.steps):
        step.delta.save(tmp_path / str(number))
    sequence.delta.save(tmp_path / "whole")
    read = Delta.load(tmp_path / "whole")
    assert read.kind == {"grace": "codebook", "wise": "side", "ike": "guard"}[name]
    assert changed(read, model).fingerprint == made.fingerprint
    stacked = compose([Delta.load(tmp_path / str(number)) for number in range(2)])
    assert changed(stacked, model).fingerprint == made.fingerprint
    # Packed scoring and cached writing see the same model.
    row = EDITS[0].row()
    text = made.prompt_text(row)
    first = made.generate([(("a", "x"), text)], max_new_tokens=1).texts[0][0]
    ids = torch.tensor([made.prompt_ids(text, ("a", "x"))])
    with torch.no_grad():
        best = int(made.model(input_ids=ids).logits[0, -1].argmax())
    assert first == model.tokenizer.decode([best], skip_special_tokens=True).strip()
    assert all(torch.equal(before[n], p) for n, p in weights(model).items())


@pytest.mark.parametrize("name", ["grace", "wise"])
def test_a_memory_goes_with_copies_and_is_not_left_behind_in_a_model_folder(name, tmp_path, capsys):
    model = subject()
    (found,) = make(name, model)
    made = found.model()
    assert made.copy().fingerprint == made.fingerprint
    assert torch.equal(said(made.copy()), said(made))
    assert memory.remembers(made.model) == "model.layers.1.mlp.down_proj.memory"
    assert not memory.remembers(model.model)
    twice = found.steps[1].delta.apply(found.steps[0].delta.apply(model), check=False)
    assert twice.fingerprint == made.fingerprint
    with pytest.raises(DeltaError, match=r"cannot be put on 0\.5 times"):
        found.delta.apply(model, 0.5)
    with pytest.raises(DeltaError, match="a memory has no opposite"):
        found.delta.negate()
    rome = registry.get("methods", "rome").function(case(model), layer=1, steps=2)
    with pytest.raises(DeltaError, match="entries cannot be stacked"):
        compose([found.delta, rome])
    model.save(tmp_path / "base")
    replace(found.delta, base=type(model).load(tmp_path / "base").fingerprint).save(tmp_path / "delta")
    asked = ["delta", "apply", str(tmp_path / "delta"), "--base", str(tmp_path / "base"), "--out", str(tmp_path / "o")]
    assert cli.main(asked) != cli.DONE
    assert "a model folder cannot hold the memory" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "o").exists()


# --- GRACE ------------------------------------------------------------------------------------------------------------


def test_grace_stores_the_last_prompt_tokens_activation_and_leaves_other_prompts_to_the_last_bit():
    model = subject()
    (found,) = make("grace", model, settings={"eps": 1e-3})
    entry = found.delta.entries[NAME]
    last = [e.row() for e in EDITS]
    ids = [model.encode(row) for row in last]
    seen = look(model, [one.ids for one in ids], [one.start - 1 for one in ids], [1])
    assert torch.allclose(entry["keys"], seen.keys[1], atol=1e-5)
    assert not torch.allclose(entry["values"], seen.values[1], atol=1e-2)
    other = [EditRow("c", "Tivin lies in", "the north")]
    assert torch.equal(said(found.model(), other), said(model, other))
    log = found.steps[0].summary["grace"]
    mean = -float(said(found.model(), EDITS[:1])[:2].mean())
    assert mean == pytest.approx(log["loss_after"][0], abs=1e-3) or log["loss_after"][0] < log["loss_before"][0]
    untrained = make("grace", model, settings={"steps": 1})[0].model()
    assert torch.allclose(said(untrained), said(model), atol=1e-4)


def test_the_automatic_radius_is_half_the_low_quantile_of_distances_between_prompts():
    model = subject()
    made = case(model)
    registry.get("methods", "grace").function(made, layer=1, steps=1)
    texts = [model.prompt_ids(model.prompt_text(row), ("", "")) for row in CORPUS]
    at = torch.cat([look(model, [text], [len(text) - 1], [1]).keys[1] for text in texts])
    apart = (at[:, None] - at).norm(dim=-1).fill_diagonal_(float("inf")).min(1).values
    assert made.summary["grace"]["radius"] == pytest.approx(float(apart.quantile(0.05)) / 2, rel=1e-3)
    with pytest.raises(RequestError, match="the corpus has 0 with a prompt"):
        make("grace", model, corpus=())
    with pytest.raises(ParameterError, match="eps is -1"):
        make("grace", model, settings={"eps": -1.0})


# --- WISE -------------------------------------------------------------------------------------------------------------


def test_wise_moves_its_masks_share_within_its_bound_and_routes_by_the_least_it_saw():
    model = subject()
    (found,) = make("wise", model, settings={"bound": 0.01, "ratio": 0.5})
    side = memory.of(found.model().model, NAME)
    places = found.delta.entries[NAME]["index"].unique()
    assert 0.4 < len(places) / (32 * 64) < 0.6
    assert float(side.difference.abs().max()) <= 0.01 + 1e-6
    (fact, _) = located(case(model), 0)
    own = fact.lookups[0].tokens
    where = list(range(own.start - 1, len(own.ids) - 1))
    first = memory.of(found.undo("b").model().model, NAME)
    k = look(model, [own.ids], where, [1], rows=[0] * len(where)).keys[1]
    least = float((k @ first.difference.T).norm(dim=-1).min())
    assert float(first.threshold) == pytest.approx(0.5 * least, rel=1e-3)
    owner = found.model().model.get_submodule(NAME.rpartition(".")[0])
    plain = model.model.get_submodule(NAME.rpartition(".")[0])
    draw = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)) * k.norm(dim=-1).mean() / 8
    more = draw @ side.difference.T
    aside = more.norm(dim=-1) > side.threshold
    assert 0 < int(aside.sum()) < 50
    assert torch.equal(owner(draw)[~aside], plain(draw)[~aside])
    assert torch.allclose(owner(draw)[aside], (plain(draw) + more)[aside], atol=1e-5)


def test_wise_begins_another_shard_with_another_mask_and_merges_shards():
    model = subject()
    (one,) = make("wise", model)
    (two,) = make("wise", model, settings={"shard": 1})
    assert [step.summary["wise"]["shard"] for step in one.steps] == [0, 0]
    assert [step.summary["wise"]["shard"] for step in two.steps] == [0, 1]
    places = [set(step.delta.entries[NAME]["index"].tolist()) for step in two.steps]
    assert 0.2 < len(places[0] & places[1]) / (32 * 64) < 0.3  # masks of a half, drawn apart
    parts = torch.stack([memory.of(two.undo(name).model().model, NAME).difference.reshape(-1) for name in "ba"])
    merged = memory.of(two.model().model, NAME).difference.reshape(-1)
    assert torch.allclose(merged, ties(parts, 0.53))
    with pytest.raises(RequestError, match="give a corpus"):
        make("wise", model, corpus=())
    with pytest.raises(ParameterError, match="expected 0 < mask"):
        make("wise", model, settings={"mask": 0.0})


# --- IKE --------------------------------------------------------------------------------------------------------------

SHOWN = [
    EditRow("d1", "Mo was born in", "Carth", "Mo", rephrasings=("Mo is from",)),
    EditRow("d2", "Ilvo was born in", "the south", "Ilvo", locality={"near": (Probe("Mo lives in", ("Pell",)),)}),
]


def test_ike_tells_the_fact_that_is_most_like_the_question_behind_demonstrations_of_three_kinds():
    model = subject()
    (both,) = make("ike", model)
    fact = "New Fact: Ilva was born in Tivin north\nPrompt: "
    assert both.model().prompt_text(EDITS[0].row()) == fact + "Ilva was born in"
    assert both.model().prompt_text(EDITS[0].row("Ilva lives in")) == fact + "Ilva lives in"
    assert both.model().prompt_text(EDITS[1].row()).startswith("New Fact: where was Carth born? the north\n")
    (alone, _) = make("ike", model, "one")
    assert alone.model().prompt_text(EDITS[1].row()).startswith(fact)  # one fact is told, whatever is asked
    (shown,) = make("ike", model, settings={"k": 2}, demonstrations=SHOWN, edits=EDITS[:1])
    assert shown.model().prompt_text(EDITS[0].row()) == (
        "New Fact: Mo was born in Carth\nPrompt: Mo was born in Carth\n\n"  # copy; the liker one comes last
        "New Fact: Ilvo was born in the south\nPrompt: Ilvo was born in the south\n\n" + fact + "Ilva was born in"
    )
    (many,) = make("ike", model, settings={"k": 8}, demonstrations=SHOWN * 4, edits=EDITS[:1])
    text = many.model().prompt_text(EDITS[0].row())
    assert "Prompt: Mo is from Carth\n" in text
    assert "Prompt: Mo lives in Pell\n" in text
    with pytest.raises(RequestError, match="0 demonstrations; give edit rows"):
        make("ike", model, settings={"k": 2})
    with pytest.raises(ParameterError, match=r"expected k >= 0 and a text with \{fact\}"):
        make("ike", model, settings={"fact": "New."})


def test_facts_of_one_guard_stack_and_others_do_not():
    model = subject()
    (both,) = make("ike", model)
    filter_ = Delta(model.fingerprint, config={"name": "output_filter", "settings": {}})
    for other in (filter_, make("ike", model, settings={"k": 0, "fact": "Now {fact}."})[0].delta):
        with pytest.raises(DeltaError, match="only facts told by one guard"):
            compose([both.delta, other])
    row = replace(SHOWN[1], portability={"hop": (Probe("a", ("b", "c")),)}, ground_truth=("x",))
    assert edit_row(json.loads(json.dumps(row.record())), "here", fallback="") == replace(row, source="here")


@pytest.mark.parametrize("name", SETTINGS)
def test_a_memory_is_served_from_its_delta(name, tmp_path):
    model = subject()
    model.save(tmp_path / "base")
    read = type(model).load(tmp_path / "base")
    (found,) = make(name, read)
    found.delta.save(tmp_path / "delta")
    served = subject_of(str(tmp_path / "base"), [str(tmp_path / "delta")], None, None)
    assert served.fingerprint == found.model().fingerprint
    Delta(read.fingerprint, config={"name": "output_filter", "settings": {}}).save(tmp_path / "filter")
    with pytest.raises(DeltaError, match="changes no weights; run it with its method"):
        subject_of(str(tmp_path / "base"), [str(tmp_path / "filter")], None, None)
