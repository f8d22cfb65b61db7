"""Linear probes on hidden states, and the attack that asks one what the model knows."""

import numpy as np
import pytest
import torch
from tiny import tiny

from expunge.attacks.case import Case, carry_out
from expunge.attacks.probing import by_layer, fit, spaced, transfer, unit
from expunge.errors import ParameterError
from expunge.evidence import Item, ProbeRun
from expunge.ignorance import read
from expunge.rows import Row
from expunge.subjects.language import LanguageModel
from expunge.tables.generations import Generations
from expunge.tables.passes import Hidden, run


def people(kind, count, each=3):
    return [
        Row(
            id=f"{kind}/{i}/{j}",
            prompt=f"what is fact {j} of {kind} {i}?",
            answer="Tivin",
            value="Tivin",
            entity=f"{kind} {i}",
        )
        for i in range(count)
        for j in range(each)
    ]


DATA = {"forget": people("Ilva", 8), "retain": people("Mo", 10), "holdout": people("Zed", 10)}
WIDTH = 12


class Made(LanguageModel):
    """A model whose hidden states and answers are made up: `knows(prompt)` shows in one direction of layer 2."""

    def __init__(self, knows, signal=1.0, answer="Tivin"):
        super().__init__(*tiny("llama"))
        self.knows, self.signal, self.answer = knows, signal, answer
        self.fingerprint = f"{signal}/{answer}"

    def hidden(self, prompts, ends=None):
        draw = torch.Generator().manual_seed(0)
        states = torch.randn(len(prompts), 4, WIDTH, generator=draw)
        states[:, 2, 0] += torch.tensor([8 * self.signal * (1 if self.knows(text) else -1) for text in prompts])
        return states

    def generate(self, prompts, **options):
        return Generations(
            [k for k, _ in prompts], [t for _, t in prompts], [[self.answer]] * len(prompts), [[True]] * len(prompts)
        )


def probe(subject, data=DATA, **settings):
    return carry_out(Case(subject, data, 0, 8), [("knowledge_probe", settings)])[0]


# --- probes -----------------------------------------------------------------------------------------------------------


def synthetic(signal, seed=0, entities=24, each=4):
    draw = np.random.default_rng(seed)
    labels = np.repeat(np.arange(entities) % 2, each)
    features = draw.normal(size=(len(labels), 3, 16))
    features[:, 1, 0] += signal * (2 * labels - 1)
    return unit(features), labels, np.repeat([f"e{i}" for i in range(entities)], each)


def test_vectors_have_length_one_and_do_not_depend_on_other_rows():
    states = torch.randn(5, 3, 7)
    features = unit(states)
    assert np.allclose(np.linalg.norm(features, axis=-1), 1)
    assert np.array_equal(unit(states[:2]), features[:2])
    assert not unit(torch.zeros(1, 1, 4)).any()


def test_what_a_line_parts_is_recognised_and_its_layer_found():
    features, labels, entities = synthetic(12.0)
    found = fit(features, labels, entities)
    assert (found.accuracy, found.layer) == (1.0, 1)
    assert (found(features).argmax(1) == labels).all()
    assert by_layer(features, labels, entities)[1] == 1.0
    assert fit(features, labels, entities, classifier="svm").accuracy == 1.0


def test_probes_are_tried_on_rows_of_another_kind_about_others_only():
    features, labels, entities = synthetic(12.0)
    other, same, about = synthetic(12.0, seed=1)
    assert (transfer(features, labels, entities, other, about).argmax(1) == same).all()
    # Another sign of the same direction: what is learned here is wrong there.
    flipped = other * np.array([1.0, -1.0, 1.0])[None, :, None]
    assert (transfer(features, labels, entities, flipped, about).argmax(1) != same).mean() > 0.9
    # Every entity has a direction of its own and nothing is shared: known by heart, of no use for others.
    draw = np.random.default_rng(0)
    own = np.repeat(draw.normal(size=(24, 1, 64)), 4, axis=0)
    said = transfer(unit(own), labels, entities, unit(own), entities).argmax(1)
    assert (said == labels).mean() < 0.8
    strangers = transfer(features, labels, entities, other, [f"new {name}" for name in about])
    assert (strangers.argmax(1) == same).all()


@pytest.mark.parametrize("seed", range(3))
def test_random_labels_are_recognised_as_often_as_by_chance(seed):
    features, labels, entities = synthetic(0.0, seed)
    # 24 independent entities: 3 standard deviations of a share are 3 x 0.5 / sqrt(24).
    assert abs(fit(features, labels, entities).accuracy - 0.5) < 0.31


def test_a_label_that_belongs_to_an_entity_cannot_be_learned_from_its_other_rows():
    """Every entity has a direction of its own: known by heart, of no use for others. Folds of rows would give 1."""
    draw = np.random.default_rng(0)
    own = np.repeat(draw.normal(size=(24, 1, 64)), 6, axis=0)
    features = unit(own + 0.01 * draw.normal(size=own.shape))
    labels, entities = np.repeat(np.arange(24) % 2, 6), np.repeat(np.arange(24).astype(str), 6)
    assert fit(features, labels, entities).accuracy < 0.8


def test_three_classes_and_too_few_entities():
    features, _, entities = synthetic(0.0)
    labels = np.repeat(np.arange(24) % 3, 4)
    features[np.arange(len(labels)), 1, labels] += 5
    assert fit(unit(features), labels, entities).held_out.shape == (len(labels), 3)
    assert fit(unit(features), labels, entities).accuracy > 0.9
    with pytest.raises(ParameterError, match="rows of 2 entities; a probe needs at least 4"):
        fit(features[:16], np.repeat([0, 1, 0, 1], 4), entities[:16])


def test_layers_are_spaced_evenly_up_to_the_last():
    assert spaced(5, 8) == [0, 1, 2, 3, 4]
    assert spaced(33, 4) == [8, 16, 24, 32]
    assert spaced(5, 0) == [0, 1, 2, 3, 4]


# --- the attack -------------------------------------------------------------------------------------------------------


def test_states_are_read_at_the_end_of_the_entitys_name():
    subject = LanguageModel(*tiny("llama"))
    row = Row(id="0", prompt="where was Ilva born?", answer="Tivin", entity="Ilva")
    text = subject.prompt_text(row)
    asked = [Hidden(((row, None),), at="entity"), Hidden(((row, None),))]
    at_entity, at_end = run(subject, asked)
    assert torch.equal(at_entity, subject.hidden([text], [text.index("Ilva") + 4]))
    assert torch.equal(at_end, subject.hidden([text]))
    assert not torch.equal(at_entity, at_end)
    nobody = Row(id="1", prompt="where was she born?", answer="Tivin", entity="Ilva")
    assert torch.equal(
        run(subject, [Hidden(((nobody, None),), at="entity")])[0], subject.hidden([subject.prompt_text(nobody)])
    )


def test_a_model_whose_states_tell_that_it_knows_is_found_out_and_one_that_never_saw_is_not():
    suppressed = probe(Made(lambda text: "Zed" not in text))
    ignorant = probe(Made(lambda text: "Mo" in text))
    assert suppressed.status == ignorant.status == "scored"
    assert suppressed.numbers["accuracy"] == ignorant.numbers["accuracy"] == 1
    assert suppressed.numbers["layer"] == 2
    assert suppressed.score > 0.9
    assert ignorant.score < 0.1
    assert all(item.recovered > suppressed.numbers["threshold"] for item in suppressed.items)


def test_a_model_in_which_all_people_look_alike_gives_no_score():
    found = probe(Made(lambda text: "Mo" in text, signal=0.0))
    assert found.status.startswith("uninformative: the probe tells known from unseen people only 0.")


def test_retain_rows_that_are_answered_wrongly_teach_the_probe_nothing():
    found = probe(Made(lambda text: "Mo" in text, answer="Carth"))
    assert found.status == "skipped: 0 of 30 retained rows are known, 30 rows held out; a probe needs 24 of either"
    assert probe(Made(lambda text: True), {"forget": DATA["forget"]}).status.startswith("skipped: a probe learns from")
    few = {**DATA, "holdout": people("Zed", 3, each=10)}
    assert probe(Made(lambda text: True), few).status.endswith("of 3 entities on one side; a probe needs 4")


# --- ignorance or error -----------------------------------------------------------------------------------------------


def ran(attack, values, status="scored", **numbers):
    items = [Item("x", row, value) for row, value in values.items()]
    return ProbeRun(attack, "latent", items, {}, {}, status=status, numbers=numbers)


def test_wrong_answers_are_told_apart_row_by_row():
    direct = ran("direct", {"a": 1.0, "b": 0.0, "c": 0.0, "d": 0.4})
    other = ran("paraphrase", {"a#0": 1.0, "b#0": 0.0, "b#1": 1.0, "c#0": 0.0, "d#0": 0.0})
    inside = ran("knowledge_probe", {"a": 0.1, "b": 0.1, "c": 0.9, "d": 0.5}, threshold=0.5, accuracy=0.8)
    (found,) = read({"after": [direct, other, inside]})
    # a is answered; b comes back in other words, c looks known; d is at the threshold, not above it.
    assert (found.known, found.suppressed, found.ignorant) == (0.25, 0.5, 0.25)
    assert (found.role, found.n, found.accuracy) == ("after", 4, 0.8)
    (alone,) = read({"after": [direct, inside]})
    assert (alone.known, alone.suppressed, alone.ignorant) == (0.25, 0.25, 0.5)


def test_without_a_probe_that_tells_there_is_no_word_about_ignorance():
    direct = ran("direct", {"a": 0.0})
    blind = ran("knowledge_probe", {"a": 0.9}, status="uninformative: 0.55", threshold=0.5, accuracy=0.55)
    assert read({"after": [direct, blind], "before": [direct]}) == []
