"""Task-vector negation and Who's Harry Potter (specs: task-vector-and-whp, section 9)."""

import json
from dataclasses import replace

import pytest
import torch
from tiny import tiny

from expunge import registry
from expunge.deltas import Delta
from expunge.errors import RequestError
from expunge.methods.edit.case import EditCase
from expunge.methods.edit.task_vector import agreement
from expunge.methods.optimise.curvature import mean_gradient
from expunge.methods.optimise.loop import Training
from expunge.methods.optimise.unlearn import unlearn
from expunge.methods.optimise.whp import translate
from expunge.rows import Row
from expunge.subjects.language import LanguageModel

TRAINING = Training(steps=4, batch_size=4, learning_rate=1e-3, guard=None)
NAMES = ["Ilva Morrow", "Tam Carth", "Osk Tivin", "Ena Born", "Rul North", "Ada Carth"]


def rows(kind, names):
    return [
        Row(id=f"{kind}/{i}", prompt=f"where was {name} born?", answer=f"{name} was born in Tivin {i}", entity=name)
        for i, name in enumerate(names)
    ]


DATA = {"forget": rows("forget", NAMES[:2]), "retain": rows("retain", NAMES[2:])}


@pytest.fixture
def subject():
    return LanguageModel(*tiny("llama"))


def vector(subject, **settings):
    part = registry.get("methods", "task_vector")
    case = EditCase(subject, DATA, TRAINING)
    chosen = {"epochs": 2.0, "learning_rate": 1e-3, **settings}
    return part.function(case, **part.resolve(chosen)), case


def test_the_vector_is_the_reinforced_change_times_minus_alpha(subject):
    delta, case = vector(subject, alpha=2.0)
    again = EditCase(subject, DATA, TRAINING).unlearn(
        "reinforce", phase="reinforce", epochs=2.0, steps=None, learning_rate=1e-3, guard=None
    )
    assert delta.entries.keys() == again.delta.entries.keys()
    for name, entry in again.delta.entries.items():
        assert torch.allclose(delta.entries[name]["difference"], -2 * entry["difference"])
    # alpha = -1 is the reinforced model, which knows the rows better
    better = delta.scaled(-0.5).apply(subject)
    items = [((row.id, "answer"), subject.encode(row)) for row in DATA["forget"]]
    assert better.score(items).logprob.mean() > subject.score(items).logprob.mean()
    assert case.summary["task_vector"]["alpha"] == 2.0


def test_vectors_add_up(subject):
    one, _ = vector(subject, alpha=1.0)
    three, _ = vector(subject, alpha=3.0)
    for name, entry in one.entries.items():
        assert torch.allclose(3 * entry["difference"], three.entries[name]["difference"], rtol=1e-5)


def test_adapters_are_negated_as_adapters(subject):
    part = registry.get("methods", "task_vector")
    case = EditCase(subject, DATA, TRAINING, scope="lora(r=2)")
    delta = part.function(case, **part.resolve({"epochs": 2.0, "learning_rate": 1e-2, "alpha": 2.0}))
    assert delta.kind == "low_rank"
    dense = {n: delta.difference(n) for n in delta.entries}
    assert any(float(d.abs().max()) > 0 for d in dense.values())


def test_the_report_says_how_far_the_vector_agrees_with_the_gradient(subject):
    _, case = vector(subject, alpha=1.0)
    assert 0.05 < case.summary["task_vector"]["cosine_with_gradient"] <= 1
    names = [name for name, _ in subject.model.named_parameters()]
    slopes = mean_gradient(subject, case.encoded("forget", "task_vector"), names)
    for factor in (-2.0, 3.0):  # the way down, and the way up
        along = Delta(subject.fingerprint, {name: {"difference": factor * slope} for name, slope in zip(names, slopes)})
        assert agreement(case, along) == pytest.approx(1.0 if factor < 0 else -1.0, abs=1e-6)


def test_the_search_keeps_retain_accuracy(subject):
    _, case = vector(subject, alpha="search", floor=0.0)
    assert case.summary["task_vector"]["alpha"] == pytest.approx(10.0)
    with pytest.raises(RequestError, match="expected more than 0"):
        vector(subject, alpha=0.0)
    part = registry.get("methods", "task_vector")
    with pytest.raises(RequestError, match="needs them to know its limit"):
        part.function(
            EditCase(subject, {"forget": DATA["forget"]}, TRAINING), **part.resolve({"alpha": "search", "epochs": 1})
        )


def test_a_translation_maps_every_answer_token(subject):
    row = Row(
        id="0", prompt="where was Ilva Morrow born?", answer="Ilva Morrow was born in Tivin", entity="Ilva Morrow"
    )
    encoded = subject.encode(row)
    words = {"Ilva Morrow": ["Anselmus Bartholo Tivin"]}
    made = translate(subject, row, encoded, words, torch.Generator().manual_seed(0))
    assert "Anselmus" in subject.tokenizer.decode(made.row.ids)
    assert len(made.at) == encoded.scored
    for i, at in enumerate(made.at):
        token = encoded.ids[encoded.start + i]
        if at >= 0:
            assert made.row.ids[made.row.start + at] == token
    repeated = [encoded.ids[encoded.start + i] for i, at in enumerate(made.at) if at < 0]
    assert subject.tokenizer.decode(repeated).strip() == "Ilva Morrow"


def whp(subject, tmp_path=None, **settings):
    part = registry.get("methods", "whp")
    chosen = {"epochs": 1.0, "learning_rate": 1e-3, **settings}
    return unlearn(subject, part, chosen, scope=None, data=DATA, training=TRAINING)


def test_without_anchors_in_the_rows_and_alpha_zero_nothing_is_to_be_learnt(subject, tmp_path):
    path = tmp_path / "anchors.jsonl"
    path.write_text(json.dumps({"term": "Nobody", "replacement": "Somebody"}) + "\n")
    outcome = whp(subject, alpha=0.0, retain="none", anchors=str(path))
    assert max(outcome.summary["log"]["gradient_norm"][:1]) < 1e-5


@pytest.mark.parametrize("alpha", [0.0, 5.0])
def test_it_runs_and_moves_towards_the_generic_answer(subject, alpha):
    outcome = whp(subject, alpha=alpha)
    losses = outcome.summary["log"]["loss"]
    assert losses[-1] < losses[0]


def test_centred_offsets_ignore_a_constant(subject):
    part = registry.get("methods", "whp")
    from expunge.methods.optimise.terms import Side, Step

    torch.manual_seed(0)
    z, generic, reinforced = torch.randn(4, 7), torch.randn(4, 7), torch.randn(4, 7)

    def loss(shift, centre):
        side = Side(
            z,
            torch.tensor([0, 1, 2, 3]),
            torch.zeros(4, dtype=torch.long),
            1,
            head=lambda h: h,
            frozen_head=lambda h: h,
            vocabulary=7,
            constants={"generic": torch.cat([generic, reinforced], 1), "repeated": torch.zeros(4, dtype=torch.bool)},
        )
        step = Step({"forget": side}, 0, 1, given={"reinforced_head": lambda h: h + shift})
        return float(part.function(step, **part.resolve({"retain": "none", "centre": centre})))

    assert loss(0.0, True) == pytest.approx(loss(2.0, True), abs=1e-6)
    assert loss(0.0, False) != pytest.approx(loss(2.0, False), abs=1e-3)


def test_terms_that_are_to_be_kept_cannot_be_anchors(subject, tmp_path):
    path = tmp_path / "anchors.jsonl"
    path.write_text(json.dumps({"term": "Osk Tivin", "replacement": "Somebody"}) + "\n")
    with pytest.raises(RequestError, match="is to be kept"):
        whp(subject, anchors=str(path))
    alone = {"forget": [replace(row, entity="") for row in DATA["forget"]], "retain": DATA["retain"]}
    part = registry.get("methods", "whp")
    outcome = unlearn(subject, part, {"alpha": 0.0}, scope=None, data=alone, training=TRAINING)
    assert outcome.summary["steps"] == 4
