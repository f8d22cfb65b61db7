"""Steering: the difference of means by hand, added at one layer, and nothing else about the model changes."""

from dataclasses import replace

import pytest
import torch
from test_editors import EDITS, case, subject, weights
from tiny import logits

from expunge import registry
from expunge.deltas import Delta, compose
from expunge.errors import DeltaError, RowError, SubjectError
from expunge.methods.edit.operations import carry_out
from expunge.rows import Row
from expunge.serve.run import subject_of
from expunge.subjects import memory
from expunge.subjects.tails import edited_matrix

WANTED = ("llama", "gpt2", "gpt_neox", "qwen2", "mistral", "phi", "opt", "bloom")
FACTS = [replace(EDITS[0], ground_truth=("the Carth", "never read")), replace(EDITS[1], ground_truth=("Tivin",))]


def make(model, mode="batch", edits=FACTS, **settings):
    return carry_out(registry.get("methods", "steer"), case(model, edits=edits), {"layer": 1, **settings}, mode)


def stream(model, edit, answer):
    """(d,) mean residual stream after block 1 over an answer's tokens, from one plain pass."""
    row = model.encode(edit.row(answer=answer))
    ids = row.ids[: len(row.ids) - row.closing]
    states = model.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0]
    return states[row.start :].mean(0)


@pytest.mark.parametrize("architecture", WANTED)
def test_the_vector_is_the_mean_difference_and_is_added_to_the_stream_at_every_token(architecture):
    model = subject(architecture)
    before = weights(model)
    (found,) = make(model, multiplier=0.5)
    with torch.no_grad():
        way = torch.stack(
            [stream(model, fact, fact.target_new) - stream(model, fact, fact.ground_truth[0]) for fact in FACTS]
        ).mean(0)
    (entry,) = found.delta.entries.values()
    assert torch.allclose(entry["offset"], 0.5 * way[None], atol=1e-4)
    assert found.steps[0].summary["steer"]["length"] == pytest.approx(float(way.norm()), rel=1e-3)
    made = found.model()
    ids = torch.tensor([model.prompt_ids("where was Ilva born?", ("", ""))])
    with torch.no_grad():
        plain, moved = (one.model(input_ids=ids, output_hidden_states=True).hidden_states[2] for one in (model, made))
    assert torch.allclose(moved - plain, (0.5 * way).expand_as(plain), atol=1e-4)
    assert all(torch.equal(before[name], p) for name, p in weights(made).items())
    assert all(torch.equal(before[name], p) for name, p in weights(model).items())


def test_without_a_multiplier_it_is_the_identity_and_below_zero_it_leads_the_other_way():
    model = subject()
    assert torch.equal(logits(make(model, multiplier=0.0)[0].model()), logits(model))
    there, back = (make(model, multiplier=size)[0].delta.entries for size in (1.0, -1.0))
    name = edited_matrix(model, 1).name
    assert torch.equal(there[name]["offset"], -back[name]["offset"])
    assert not torch.allclose(logits(make(model)[0].model()), logits(model), atol=1e-2)


def test_steps_add_up_and_any_of_them_can_be_left_out(tmp_path):
    model = subject()
    (sequence,) = make(model, "sequence")
    single = make(model, "one")
    (batch,) = make(model)
    assert sequence.undo().model().fingerprint == single[0].model().fingerprint
    assert sequence.undo("a").model().fingerprint == single[1].model().fingerprint
    assert sequence.undo("a").undo().model() is model
    name = edited_matrix(model, 1).name
    rows = sequence.delta.entries[name]["offset"]
    assert torch.allclose(rows.mean(0, keepdim=True), batch.delta.entries[name]["offset"], atol=1e-5)
    assert torch.allclose(memory.of(sequence.model().model, name).shift, rows.sum(0))
    twice = sequence.steps[1].delta.apply(sequence.steps[0].delta.apply(model), check=False)
    assert torch.equal(logits(twice), logits(sequence.model()))
    for number, step in enumerate(sequence.steps):
        step.delta.save(tmp_path / str(number))
    read = compose([Delta.load(tmp_path / str(number)) for number in range(2)])
    assert read.kind == "offset"
    assert read.apply(model).fingerprint == sequence.model().fingerprint
    assert read.cost()["parameters"] == 2 * 32
    with pytest.raises(DeltaError, match=r"cannot be put on 0\.5 times"):
        read.apply(model, 0.5)
    grace = registry.get("methods", "grace").function(case(model), layer=1, steps=1)
    with pytest.raises(DeltaError, match="codebook and offset entries cannot be stacked"):
        compose([grace, sequence.delta])
    model.save(tmp_path / "base")
    folder = tmp_path / "delta"
    replace(read, base=type(model).load(tmp_path / "base").fingerprint).save(folder)
    assert torch.equal(logits(subject_of(str(tmp_path / "base"), [str(folder)], None, None)), logits(sequence.model()))


def test_packed_scoring_and_cached_writing_see_the_same_steered_model():
    model = subject()
    made = make(model, multiplier=3.0)[0].model()
    text = made.prompt_text(FACTS[0].row())
    written = made.generate([(("a", "x"), text)], max_new_tokens=6).texts[0][0]
    ids = made.prompt_ids(text, ("a", "x"))
    with torch.no_grad():
        for _ in range(6):
            ids = [*ids, int(made.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    whole = model.tokenizer.decode(ids[-6:], skip_special_tokens=True).strip()
    assert whole.startswith(written) or written.startswith(whole)
    row = made.encode(FACTS[0].row())
    (packed,) = [made.score([(("a", "x"), row)]).logprob]
    with torch.no_grad():
        plain = made.model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
    places = range(row.start, len(row.ids))
    assert torch.allclose(torch.tensor(packed), torch.stack([plain[i - 1, row.ids[i]] for i in places]), atol=1e-4)


def test_forget_rows_lead_from_answers_to_refusals_and_what_cannot_be_steered_is_said():
    model = subject()
    forget = [Row(id="f", prompt="where was Ilva born?", answer="Tivin", entity="Ilva")]
    made = case(model, edits=(), data={"forget": forget})
    delta = registry.get("methods", "steer").function(made, layer=1)
    (fact,) = made.facts()
    with torch.no_grad():
        way = stream(model, fact, fact.target_new) - stream(model, fact, "Tivin")
    (entry,) = delta.entries.values()
    assert torch.allclose(entry["offset"][0], way, atol=1e-4)
    with pytest.raises(RowError, match=r"^b: field 'ground_truth' is missing"):
        make(model, edits=EDITS)
    with pytest.raises(SubjectError, match="has a norm after its MLP"):
        make(subject("gemma2"))
    with pytest.raises(SubjectError, match="do not fit a matrix"):
        memory.attach(torch.nn.ModuleDict({"out": torch.nn.Linear(4, 2)}), "out.weight", {"offset": torch.zeros(1, 3)})
