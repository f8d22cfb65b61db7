"""SAM and its variants, latent adversarial training, circuit breakers, UNDO (docs/specs, section 9 of each)."""

from dataclasses import replace

import pytest
import torch
from tiny import tiny

from expunge import registry
from expunge.errors import ParameterError, RequestError, SubjectError
from expunge.methods.edit.case import EditCase
from expunge.methods.edit.undo import noised
from expunge.methods.optimise import loop
from expunge.methods.optimise.circuit_breaker import moved, rerouted
from expunge.methods.optimise.latent_adversarial import adversary
from expunge.methods.optimise.loop import Training, Turn, entries
from expunge.methods.optimise.sharpness_aware import forget_gradient
from expunge.methods.optimise.terms import Side, Step, negative_log_likelihood
from expunge.methods.optimise.unlearn import _needs, _working_copy, recipe_of, set_up, unlearn
from expunge.rows import Row
from expunge.subjects.language import LanguageModel, weights_fingerprint

TRAINING = Training(steps=3, batch_size=4, learning_rate=1e-3, guard=None)
ARCHITECTURES = ["llama", "gpt2", "mixtral"]


def rows(kind, count):
    return [Row(id=f"{kind}/{i}", prompt=f"where was {kind} {i} born?", answer=f"Tivin {i}") for i in range(count)]


DATA = {"forget": rows("forget", 6), "retain": rows("retain", 9)}


def run(subject, name, training=TRAINING, scope=None, **settings):
    return unlearn(subject, registry.get("methods", name), settings, scope=scope, data=DATA, training=training)


def turn(name, subject=None, scope="all", index=0, **settings):
    """(the method's function, one step of it, the settings it is called with)"""
    subject = subject or LanguageModel(*tiny("llama"))
    part = registry.get("methods", name)
    setup = set_up(subject, part, settings, scope=scope, data=DATA, training=TRAINING)
    _needs(setup.case, setup.needs, setup.drawn)
    working, parameters, _ = _working_copy(setup.case, setup.resolved)
    stored = entries(subject, setup.drawn, setup.resolved.first_layer)
    made = Turn(working, parameters, setup.drawn, recipe_of(setup), index, {}, subject.head, stored)
    return part.function, made, setup.chain[0][1]


def flat(gradients):
    return torch.cat([g.detach().flatten() for g in gradients if g is not None])


def gradient(name, **settings):
    function, made, chosen = turn(name, **settings)
    loss = function(made, **chosen)
    return loss, flat(p.grad for p in made.parameters)


def plain(objective="npo", **settings):
    _, made, _ = turn("sharpness_aware", objective=objective, **settings)
    loss = made.backward()
    return loss, flat(p.grad for p in made.parameters)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("sam", {}),
        ("sharpness_aware", {"variant": "rs"}),
        ("sharpness_aware", {"variant": "cr", "objective": "rmu"}),
        ("latent_adversarial", {"inner_steps": 2}),
        ("latent_adversarial", {"inner_steps": 2, "objective": {"rmu": {"layer": 2}}}),
        ("latent_adversarial", {"inner_steps": 2, "objective": "dpo", "positions": "prompt"}),
        ("circuit_breaker", {}),
    ],
)
def test_they_run_leave_the_base_alone_and_repeat_by_seed(architecture, name, settings):
    subject = LanguageModel(*tiny(architecture))
    before = weights_fingerprint(subject.model)
    # RMU's own scope is MLP outputs, which Mixtral has none of.
    scope = "all" if "rmu" in str(settings) else None
    outcomes = []
    for _ in range(2):
        torch.manual_seed(0)  # peft draws adapters from the global generator
        outcomes.append(run(subject, name, scope=scope, **settings))
    first, second = outcomes
    assert weights_fingerprint(subject.model) == before
    assert len(first.summary["log"]["loss"]) == 3
    assert first.delta.entries
    for key, entry in first.delta.entries.items():
        for part, value in entry.items():
            assert torch.equal(value, second.delta.entries[key][part])


# --- sharpness-aware -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["sam", "rs", "gp", "cr"])
@pytest.mark.parametrize("objective", ["npo", "rmu", "dpo", {"npo": {"retain": "kl"}}])
def test_a_radius_of_zero_is_the_objective_itself(variant, objective):
    loss, found = gradient("sharpness_aware", objective=objective, variant=variant, rho=0.0)
    wanted_loss, wanted = plain(objective)
    assert float(loss) == pytest.approx(float(wanted_loss), rel=1e-5)
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-6)


def test_the_shift_has_norm_rho_and_the_weights_come_back_bitwise(monkeypatch):
    function, made, chosen = turn("sam", rho=0.3)
    before = [p.detach().clone() for p in made.parameters]
    norms = []
    backward = Turn.backward

    def watched(self, part=None):
        norms.append((part, float(flat(p - b for p, b in zip(self.parameters, before)).norm())))
        return backward(self, part)

    monkeypatch.setattr(Turn, "backward", watched)
    function(made, **chosen)
    assert [part for part, _ in norms] == ["forget", "forget", "retain"]
    assert [norm for _, norm in norms] == pytest.approx([0.0, 0.3, 0.0], abs=1e-5)
    assert all(torch.equal(p, b) for p, b in zip(made.parameters, before))


def test_the_shift_raises_the_forget_loss():
    _, made, _ = turn("sam")
    loss, g = forget_gradient(made, 0.0)
    norm = flat(g).norm()
    ahead, _ = forget_gradient(made, 0.05, [[part / norm for part in g]])
    assert float(ahead - loss) == pytest.approx(0.05 * float(norm), rel=0.2)


def test_a_gradient_penalty_of_its_own_step_is_sam():
    _, sam = gradient("sam", rho=0.05)
    _, gp = gradient("sharpness_aware", variant="gp", rho=0.05, penalty=0.05)
    assert torch.allclose(sam, gp, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("variant", ["gp", "cr"])
def test_penalties_have_the_gradients_of_double_backward(variant):
    model, tokenizer = tiny("llama")
    subject = LanguageModel(model.double(), tokenizer)
    subject.__dict__["linear_head"] = None  # its fused gradient is differentiable once
    # Losses are fp32; the penalty of cr is itself of the size of rho.
    rho, penalty = {"gp": 1e-3, "cr": 2e-3}[variant], 0.5
    _, found = gradient("sharpness_aware", subject=subject, variant=variant, rho=rho, penalty=penalty)
    _, without = plain(subject=subject)
    _, made, _ = turn("sharpness_aware", subject=subject)
    made.subject.__dict__["linear_head"] = None

    def first(create=False):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            sides = [side for side in made.recipe.sides if side != "retain"]
            pass_ = made._states(made.rows(sides), range(len(made.rows(sides))))
            value = made.recipe.forget(made._step(sides, pass_))
            return torch.autograd.grad(value, made.parameters, create_graph=create)

    def size(g):
        return torch.cat([part.flatten() for part in g]).norm()

    here = first()
    v = [g / size(here) for g in here]
    if variant == "gp":
        wanted = torch.autograd.grad(size(first(create=True)), made.parameters)
    else:
        # |grad L(theta + rho v) - grad L(theta)| differs by H(theta + rho v) u - H(theta) u along each weight.
        def curved(u):
            g = first(create=True)
            return torch.autograd.grad(sum((a * b).sum() for a, b in zip(g, u)), made.parameters)

        def shifted(function, scale):
            with torch.no_grad():
                for p, along in zip(made.parameters, v):
                    p.add_(along, alpha=scale)
            result = function()
            with torch.no_grad():
                for p, along in zip(made.parameters, v):
                    p.sub_(along, alpha=scale)
            return result

        bend = [a - b for a, b in zip(shifted(first, rho), here)]
        u = [part / size(bend) for part in bend]
        wanted = [a - b for a, b in zip(shifted(lambda: curved(u), rho), curved(u))]
    added = (found - without) / penalty
    wanted = flat(wanted)
    assert float((added - wanted).norm() / wanted.norm()) < {"gp": 0.02, "cr": 0.05}[variant]


def test_noise_is_new_in_every_step_and_sample():
    _, first = gradient("sharpness_aware", variant="rs", rho=0.05)
    _, again = gradient("sharpness_aware", variant="rs", rho=0.05)
    _, more = gradient("sharpness_aware", variant="rs", rho=0.05, samples=4)
    assert torch.equal(first, again)
    assert not torch.allclose(first, more)


def test_weights_in_16_bits_are_warned_of():
    model, tokenizer = tiny("llama")
    subject = LanguageModel(model.to(torch.bfloat16), tokenizer)
    assert any("bfloat16" in text for text in run(subject, "sam").summary["warnings"])
    assert not any("bfloat16" in text for text in run(subject, "sam", scope="lora(r=2)").summary["warnings"])


# --- latent adversary ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["all", "layers:2-"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_adversary_stays_in_its_ball_and_lowers_its_loss(architecture, scope, monkeypatch):
    monkeypatch.setattr(loop, "ENTRY_BYTES", 1 << 30)
    _, made, _ = turn("latent_adversarial", LanguageModel(*tiny(architecture)), scope=scope, layer=0)
    if made.entries is not None:  # what the method does itself
        assert made.entries.layer == 2
        made.entries = None

    def loss(delta):
        with made.perturbed(0, delta.requires_grad_()):
            return float(made.delta_gradient(lambda step: negative_log_likelihood(step.forget))[0])

    delta = adversary(made, radius=0.5, steps=8, rate=0.05)
    norms = delta.norm(dim=-1)
    assert len(delta) == made.positions()
    assert float(norms.max()) <= 0.5 + 1e-5
    assert float(norms.max()) > 0.4
    assert loss(delta) < loss(torch.zeros_like(delta)) - 0.05
    assert all(p.grad is None for p in made.parameters)
    bounded = adversary(made, radius=0.5, steps=2, rate=0.05, positions="prompt")
    first = made.rows(["forget"])[0]
    assert float(bounded[first.start - 1].abs().sum()) > 0
    assert float(bounded[first.start : len(first.ids) - 1].abs().sum()) == 0


def test_a_frozen_prefix_hides_no_shift():
    # Blocks 0 and 1 stand still, so passes would start at block 2; the shift is after block 0.
    training = replace(TRAINING, steps=8)
    subject = LanguageModel(*tiny("llama"))
    settings = {"layer": 0, "inner_steps": 4, "radius": 1.0}
    shifted = run(subject, "latent_adversarial", training, "layers:2-", **settings)
    without = run(subject, "latent_adversarial", training, "layers:2-", **{**settings, "radius": 0.0})
    assert shifted.summary["log"]["loss"][0] > without.summary["log"]["loss"][0] + 1e-3
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in subject.model.modules())


@pytest.mark.parametrize("objective", ["npo", {"rmu": {"layer": 1}}])
def test_without_a_radius_it_is_the_objective_itself(objective):
    loss, found = gradient("latent_adversarial", objective=objective, radius=0.0)
    wanted_loss, wanted = plain(objective)
    assert float(loss) == pytest.approx(float(wanted_loss), rel=1e-5)
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-6)


def test_what_the_objective_cannot_see_is_an_error():
    subject = LanguageModel(*tiny("llama"))
    assert (
        run(subject, "latent_adversarial", objective={"rmu": {"layer": 2}}, inner_steps=1).summary["prepared"][
            "attacked_layer"
        ]
        == 1
    )
    with pytest.raises(ParameterError, match="sees nothing of a shift after block 1"):
        run(subject, "latent_adversarial", objective={"rmu": {"layer": 1}}, layer=1)
    with pytest.raises(ParameterError, match="layer 9 is not within 0-2"):
        run(subject, "latent_adversarial", layer=9)
    with pytest.raises(ParameterError, match="radius is -1"):
        run(subject, "latent_adversarial", radius=-1.0)
    with pytest.raises(SubjectError, match="takes no packed rows"):
        run(LanguageModel(*tiny("bloom")), "latent_adversarial")
    faint = run(subject, "latent_adversarial", radius=1e-4, inner_steps=1)
    assert any("of the mean activation norm" in text for text in faint.summary["warnings"])


# --- circuit breaker -----------------------------------------------------------------------------------------------


def side(values, start):
    empty = torch.zeros(0, dtype=torch.long)
    constants = {"layer.0": start}
    return Side(values[:0], empty, empty, 1, lambda h: h, lambda h: h, 3, constants=constants, layers={0: values})


def test_the_forget_term_is_relu_of_the_cosine():
    torch.manual_seed(0)
    values, start = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8)
    cosine = (values * start).sum(-1) / values.norm(dim=-1) / start.norm(dim=-1)
    assert float(rerouted(side(values, start)).detach()) == pytest.approx(
        float(cosine.detach().clamp_min(0).mean()), abs=1e-6
    )
    away = (-2 * start).requires_grad_()
    loss = rerouted(side(away, start))
    loss.backward()
    assert float(loss.detach()) == 0
    assert float(away.grad.abs().max()) == 0


def test_the_retain_term_is_the_distance_and_rounding_is_none():
    torch.manual_seed(0)
    start = torch.randn(5, 8)
    far = start + 0.1 * torch.randn(5, 8)
    assert float(moved(side(far, start))) == pytest.approx(float((far - start).norm(dim=-1).mean()), rel=1e-4)
    near = (start * (1 + 1e-7)).requires_grad_()
    loss = moved(side(near, start))
    loss.backward()
    assert float(loss.detach()) < 1e-7
    assert float(near.grad.norm(dim=-1).max()) < 0.05  # 1/5 if it were the plain norm


def test_the_schedule_moves_from_forgetting_to_retaining():
    part = registry.get("methods", "rr")
    start = torch.ones(2, 4)
    sides = {"forget": side(start, start), "retain": side(start + 1, start)}
    losses = [float(part.function(Step(sides, index, 10), **part.resolve())) for index in (0, 9)]
    # t/2T = 1/20 and 1/2; cos = 1, distance = 2
    assert losses == pytest.approx([10 * (19 / 20 + 2 / 20), 10 * (1 / 2 + 2 / 2)], rel=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_begins_with_retain_rows_where_they_were(architecture):
    subject = LanguageModel(*tiny(architecture))
    part = registry.get("methods", "circuit_breaker")
    setup = set_up(subject, part, {}, scope=None, data=DATA, training=TRAINING)
    _needs(setup.case, setup.needs, setup.drawn)
    working, parameters, _ = _working_copy(setup.case, setup.resolved)
    made = Turn(working, parameters, setup.drawn, recipe_of(setup), 0, {}, subject.head)
    with torch.no_grad():
        sides = made.recipe.sides
        step = made._step(sides, made._states(made.rows(sides), range(len(made.rows(sides)))))
    assert float(moved(step.retain)) < 1e-6
    assert float(rerouted(step.forget)) == pytest.approx(1.0, abs=1e-5)


def test_adapters_reach_up_to_the_highest_layer_and_activations_turn():
    subject = LanguageModel(*tiny("llama"))
    training = replace(TRAINING, steps=40, learning_rate=1e-2)
    outcome = run(subject, "rr", training)
    assert outcome.summary["prepared"]["layers"] == [0, 1]
    assert outcome.delta.kind == "low_rank"
    assert {name.split(".")[2] for name in outcome.delta.entries} == {"0", "1"}
    losses = outcome.summary["log"]["loss"]
    assert losses[-1] < 0.8 * losses[0]
    assert run(subject, "rr", layers=[-1]).summary["prepared"]["layers"] == [2]
    with pytest.raises(ParameterError, match="layer 3 is not within 0-2"):
        run(subject, "rr", layers=[3])
    with pytest.raises(ParameterError, match="cannot stand inside another method"):
        run(subject, "sam", objective="rr")


# --- undo ------------------------------------------------------------------------------------------------------------


def undone(subject, training=TRAINING, scope=None, **settings):
    part = registry.get("methods", "undo")
    case = EditCase(subject, DATA, training, scope)
    return part.function(case, **part.resolve({"epochs": 2.0, "learning_rate": 1e-3, **settings})), case


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_without_noise_and_distilling_it_is_the_unlearned_model(architecture):
    subject = LanguageModel(*tiny(architecture))
    delta, _ = undone(subject, alpha=0.0, epochs=0.0)
    unlearned = EditCase(subject, DATA, TRAINING).unlearn("npo", phase="unlearn").delta
    assert delta.entries.keys() == unlearned.entries.keys()
    for name, entry in unlearned.entries.items():
        assert torch.allclose(delta.entries[name]["difference"], entry["difference"], atol=1e-7)
    # with training, only what distilling a model into itself does by rounding
    again, _ = undone(subject, alpha=0.0, epochs=1.0, learning_rate=1e-5)
    for name, entry in delta.entries.items():
        assert torch.allclose(again.entries[name]["difference"], entry["difference"], atol=5e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_distilling_brings_the_student_to_the_teacher_and_repeats_by_seed(architecture):
    subject = LanguageModel(*tiny(architecture))
    before = weights_fingerprint(subject.model)
    delta, case = undone(subject, alpha=0.5, epochs=8.0)
    assert case.summary["undo"]["last"] < 0.8 * case.summary["undo"]["first"]
    assert case.summary["undo"]["rows"] == 15
    assert any("what the 15 rows that it distilled on do not show fades with alpha = 0.5" in w for w in case.warnings)
    assert weights_fingerprint(subject.model) == before
    other, _ = undone(subject, alpha=0.5, epochs=8.0)
    for name, entry in delta.entries.items():
        assert torch.equal(entry["difference"], other.entries[name]["difference"])


def test_noise_is_bounded_seeded_and_leaves_vectors_shrunk():
    subject = LanguageModel(*tiny("mixtral"))
    names = [name for name, _ in subject.model.named_parameters()]
    before = {name: p.detach().clone() for name, p in subject.model.named_parameters()}
    made = dict(noised(subject, names, 0.4, 0.1, seed=0).model.named_parameters())
    again = dict(noised(subject, names, 0.4, 0.1, seed=0).model.named_parameters())
    other = dict(noised(subject, names, 0.4, 0.1, seed=1).model.named_parameters())
    shapes = set()
    for name, p in before.items():
        added = made[name] - 0.6 * p
        shapes.add(p.dim())
        bound = 0.04 * (6 / (p.shape[-1] + p.shape[-2])) ** 0.5 if p.dim() > 1 else 0.0
        assert float(added.detach().abs().max()) <= bound + 1e-6
        assert float(added.detach().abs().max()) >= 0.8 * bound
        assert torch.equal(made[name], again[name])
        assert p.dim() == 1 or not torch.equal(made[name], other[name])
        assert torch.equal(dict(subject.model.named_parameters())[name], p)
    assert shapes == {1, 2, 3}
    zero = noised(subject, names, 1.0, 0.0, seed=0)
    assert not any(bool(p.any()) for p in zero.model.parameters())


def test_only_the_scope_is_noised_and_wrong_requests_say_so():
    subject = LanguageModel(*tiny("llama"))
    delta, _ = undone(subject, scope="layers:1", alpha=0.5)
    assert {name.split(".")[2] for name in delta.entries} == {"1"}
    with pytest.raises(RequestError, match="found adapters"):
        undone(subject, scope="lora(r=2)")
    with pytest.raises(RequestError, match="expected both within 0-1"):
        undone(subject, alpha=1.5)
