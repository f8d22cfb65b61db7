"""RMU (specs: rmu, section 9)."""

from dataclasses import replace

import pytest
import torch
from tiny import tiny

from expunge import registry
from expunge.errors import ParameterError, RowError, ScopeError
from expunge.methods.optimise import loop
from expunge.methods.optimise.loop import Training
from expunge.methods.optimise.unlearn import set_up, unlearn
from expunge.rows import Row
from expunge.subjects.language import LanguageModel
from expunge.subjects.packed import pack

TRAINING = Training(steps=4, batch_size=4, learning_rate=1e-3, guard=None)


def rows(kind, count):
    return [Row(id=f"{kind}/{i}", prompt=f"where was {kind} {i} born?", answer=f"Tivin {i}") for i in range(count)]


DATA = {"forget": rows("forget", 6), "retain": rows("retain", 9)}


def run(subject, training=TRAINING, scope=None, **settings):
    part = registry.get("methods", "rmu")
    return unlearn(subject, part, settings, scope=scope, data=DATA, training=training)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "phi"])
def test_only_the_mlp_outputs_up_to_the_layer_move(architecture):
    subject = LanguageModel(*tiny(architecture))
    outcome = run(subject, layer=1)
    roles = {name for role, name in _outputs(subject) if role <= 1}
    assert set(outcome.delta.entries) <= roles
    assert len({name.split(".")[2] for name in outcome.delta.entries}) == 2
    assert outcome.summary["prepared"]["layer"] == 1


def _outputs(subject):
    from expunge.subjects.anatomy import anatomy

    return anatomy(subject.model).roles["mlp_out"]


def test_the_stored_prefix_changes_nothing(monkeypatch):
    subject = LanguageModel(*tiny("llama"))
    training = replace(TRAINING, steps=8)
    with_prefix = run(subject, training, scope="role:mlp_out@1-2", layer=2)
    monkeypatch.setattr(loop, "ENTRY_BYTES", 0)
    without = run(subject, training, scope="role:mlp_out@1-2", layer=2)
    assert with_prefix.summary["log"]["loss"] == pytest.approx(without.summary["log"]["loss"], abs=1e-5)
    for name, entry in without.delta.entries.items():
        assert torch.allclose(entry["difference"], with_prefix.delta.entries[name]["difference"], atol=1e-5)


def test_splitting_a_step_changes_nothing():
    subject = LanguageModel(*tiny("llama"))
    whole, split = run(subject, layer=1), run(subject, replace(TRAINING, micro_tokens=40), layer=1)
    assert whole.summary["log"]["loss"] == pytest.approx(split.summary["log"]["loss"], abs=1e-5)


def test_the_retain_term_starts_at_zero_and_so_does_its_gradient():
    subject = LanguageModel(*tiny("llama"))
    small, large = (
        run(subject, replace(TRAINING, steps=1), retain_weight=0.0),
        run(subject, replace(TRAINING, steps=1), retain_weight=1e4),
    )
    assert small.summary["log"]["loss"] == pytest.approx(large.summary["log"]["loss"], rel=1e-6)
    assert small.summary["log"]["gradient_norm"] == pytest.approx(large.summary["log"]["gradient_norm"], rel=1e-4)


def test_without_a_retain_term_activations_turn_to_the_direction():
    subject = LanguageModel(*tiny("llama"))
    training = replace(TRAINING, steps=150, learning_rate=2e-2)
    outcome = run(subject, training, layer=1, retain="none", coefficient=3.0)
    setup = set_up(subject, registry.get("methods", "rmu"), {"layer": 1}, scope=None, data=DATA, training=TRAINING)
    after = outcome.delta.apply(subject)
    encoded = setup.case.rows["forget"]
    with torch.no_grad():
        states = after.states(pack(encoded), setup.case.taps)["layer.1"]
    cosine = torch.nn.functional.cosine_similarity(states, setup.case.given["targets"], dim=-1)
    assert float(cosine.mean()) > 0.9


def test_the_adaptive_coefficient_follows_the_size_of_activations():
    subject = LanguageModel(*tiny("llama"))
    first = run(subject, layer=0).summary["prepared"]["coefficient"]
    scaled = subject.copy()
    with torch.no_grad():
        # Everything that is added to the residual stream of block 0, times three.
        scaled.model.model.embed_tokens.weight.mul_(3)
        scaled.model.model.layers[0].self_attn.o_proj.weight.mul_(3)
        scaled.model.model.layers[0].mlp.down_proj.weight.mul_(3)
    assert run(scaled, layer=0).summary["prepared"]["coefficient"] == pytest.approx(3 * first, rel=0.02)


def test_the_direction_depends_on_the_seed_only():
    subject = LanguageModel(*tiny("llama"))
    part = registry.get("methods", "rmu")
    target = [
        set_up(subject, part, {}, scope=None, data=DATA, training=replace(TRAINING, seed=seed)).case.given["targets"]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(target[0], target[1])
    assert not torch.allclose(target[0], target[2])


def test_a_layer_that_does_not_exist_is_an_error():
    with pytest.raises(ParameterError, match="layer 7 is not within 0-2"):
        run(LanguageModel(*tiny("llama")), layer=7)


def test_in_a_mixture_the_experts_up_to_the_layer_move():
    subject = LanguageModel(*tiny("mixtral"))
    outcome = run(subject, layer=1)
    assert {name.split(".experts.")[0] for name in outcome.delta.entries} == {
        "model.layers.0.mlp",
        "model.layers.1.mlp",
    }


KEYWORDS = ("glass", "weaving")


def contrast(subject, **settings):
    part = registry.get("methods", "rmu")
    settings = {"layer": 1, "direction": "contrast", "keywords": KEYWORDS, "retain": "none", **settings}
    return unlearn(subject, part, settings, scope=None, data=DATA, training=TRAINING)


def test_a_contrast_of_nothing_has_no_loss_at_the_start():
    log = contrast(LanguageModel(*tiny("llama")), coefficient=0.0).summary["log"]
    assert log["loss"][0] == pytest.approx(0, abs=1e-12)


def test_a_contrast_leads_from_expert_to_novice_from_where_each_token_is():
    """The loss of the first step is the squared length of the step that is asked for, over the width."""
    subject = LanguageModel(*tiny("llama"))
    log = contrast(subject, coefficient=3.0).summary["log"]
    width = subject.model.config.hidden_size
    assert log["loss"][0] == pytest.approx(9 / width, rel=1e-4)
    setup = set_up(
        subject,
        registry.get("methods", "rmu"),
        {"layer": 1, "direction": "contrast", "keywords": KEYWORDS, "coefficient": 3.0},
        scope=None,
        data=DATA,
        training=TRAINING,
    )
    novice, expert = (
        subject.hidden([text.format(word) for word in KEYWORDS])[:, 2]
        for text in ("You are a novice in {} who often makes mistakes.", "You are a world-class expert in {}.")
    )
    wanted = 3 * torch.nn.functional.normalize(novice - expert, dim=-1)
    torch.testing.assert_close(setup.case.given["targets"].cpu(), wanted.cpu())
    assert {"forget.layers", "retain.layers"} <= setup.needs


def test_a_contrast_needs_keywords():
    with pytest.raises(ParameterError, match="needs keywords"):
        contrast(LanguageModel(*tiny("llama")), keywords=())


TOPICS = {
    "forget": [
        Row(
            id=str(i),
            prompt=f"where was {i} born?",
            answer="Tivin" * (1 + 4 * (i % 2)),
            relation="salt" if i % 2 else "gas",
        )
        for i in range(6)
    ],
    "retain": DATA["retain"],
}


def test_every_topic_has_a_direction_and_a_coefficient_of_its_own():
    subject, part = LanguageModel(*tiny("llama")), registry.get("methods", "rmu")
    settings = {"layer": 1, "topics": "relation", "retain": "none"}
    outcome = unlearn(
        subject, part, settings, scope=None, data=TOPICS, training=replace(TRAINING, steps=1, batch_size=6)
    )
    setup = set_up(subject, part, settings, scope=None, data=TOPICS, training=TRAINING)
    targets = setup.case.given["targets"]
    assert targets.shape == (2, 32)
    assert torch.nn.functional.cosine_similarity(*targets, dim=0) < 0.999
    coefficients = outcome.summary["prepared"]["coefficient"]
    assert list(coefficients) == ["gas", "salt"]
    losses, counts = 0.0, 0
    for at, topic in enumerate(coefficients):
        encoded = [subject.encode(row) for row in TOPICS["forget"] if row.relation == topic]
        with torch.no_grad():
            states = subject.states(pack(encoded), setup.case.taps)["layer.1"]
        assert coefficients[topic] == pytest.approx(5 * float(states.norm(dim=-1).mean()), rel=1e-4)
        assert float(targets[at].norm()) == pytest.approx(coefficients[topic], rel=1e-5)
        losses += float((states - targets[at]).square().sum())
        counts += states.numel()
    assert outcome.summary["log"]["loss"][0] == pytest.approx(losses / counts, rel=1e-4)


def test_rows_without_a_topic_are_named_and_keywords_are_no_topics():
    subject = LanguageModel(*tiny("llama"))
    with pytest.raises(RowError, match=r"row forget/0: no relation, which rmu\(topics='relation'\) needs"):
        run(subject, topics="relation")
    with pytest.raises(ParameterError, match="directions of contrast come from keywords"):
        contrast(subject, topics="entity")


def test_a_scope_above_the_layer_is_refused_before_anything_runs():
    with pytest.raises(ScopeError, match="begins at block 2, and rmu reads the states after block 1"):
        run(LanguageModel(*tiny("llama")), scope="layers:2", layer=1)
