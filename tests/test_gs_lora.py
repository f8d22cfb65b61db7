"""GS-LoRA: its loss by hand, groups that are switched off, prototypes (specs: gs_lora, section 9)."""

from types import SimpleNamespace

import pytest
import torch
from test_objectives import side
from tiny import tiny

from expunge import registry
from expunge.errors import ParameterError, ScopeError, TrainingError
from expunge.methods.optimise import gs_lora as module
from expunge.methods.optimise.loop import Training
from expunge.methods.optimise.terms import Step
from expunge.methods.optimise.unlearn import unlearn
from expunge.pictures import chosen
from expunge.rows import Row
from expunge.subjects.language import LanguageModel
from expunge.subjects.packed import pack
from expunge.world.pictures.draw import digits
from expunge.world.pictures.models import Recipe, untrained

CLASSES = [str(i) for i in range(10)]
SHORT = Training(steps=3, batch_size=4, learning_rate=1e-2, guard=None)
PART = registry.get("methods", "gs_lora")


@pytest.fixture(scope="module")
def vit():
    return untrained(CLASSES, Recipe(kind="vit", side=8, widths=(8,)), 0)


@pytest.fixture(scope="module")
def data():
    forget, retain = chosen(digits(8)["train"][:48], {"label": "3"})
    return {"forget": forget, "retain": retain}


def run(subject, data, method="gs_lora", *, scope=None, training=SHORT, **settings):
    return unlearn(subject, registry.get("methods", method), settings, scope=scope, data=data, training=training)


def change(outcome):
    return {name: outcome.delta.difference(name) for name in outcome.delta.entries}


def same(first, second, tolerance=0.0):
    a, b = change(first), change(second)
    return a.keys() == b.keys() and all(torch.allclose(a[n], b[n], rtol=0, atol=tolerance) for n in a)


# --- the loss --------------------------------------------------------------------------------------------------------


def loss(forget, retain, bound, **settings):
    given = {"bound": bound, **settings.pop("given", {})}
    return PART.function(Step({"forget": forget, "retain": retain}, 0, 1, given=given), **PART.resolve(settings))


def test_ascent_stops_at_the_bound_and_pushes_by_beta_before():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 11, generator=generator).requires_grad_()
    target = torch.randint(11, (8,), generator=generator)
    kept = side(torch.randn(8, 11, generator=generator), target)
    nll = -(logits.log_softmax(-1).gather(1, target[:, None])).mean()
    here = float(nll.detach())
    (plain,) = torch.autograd.grad(nll, logits)
    (found,) = torch.autograd.grad(loss(side(logits, target), kept, here + 1, beta=0.3), logits)
    assert torch.allclose(found, -0.3 * plain, atol=1e-6)
    value = loss(side(logits, target), kept, here - 1e-4, beta=0.3)
    (found,) = torch.autograd.grad(value, logits)
    assert not found.any()
    assert float(value.detach()) == pytest.approx(float(-kept.token_logprob.mean().detach()))


@pytest.mark.parametrize(("distance", "expected"), [("squared", 5.0), ("kl", 0.5108256)])
def test_distances_to_prototypes_by_hand(distance, expected):
    # Softmaxes (1/2, 1/2) and (9/10, 1/10): KL = ln(1/2 / sqrt(0.9 * 0.1)) = 0.5108...; (0 - 2)^2 + (0 - 1)^2 = 5.
    states = torch.tensor([[2.0, 1.0]]) if distance == "squared" else torch.tensor([[9.0, 1.0]]).log()
    one = side(states, torch.tensor([7]), (1,))
    classes, table = torch.tensor([3, 7]), torch.tensor([[5.0, 5.0], [0.0, 0.0]])
    assert float(module.from_prototype(one, classes, table, "embedding", distance)) == pytest.approx(expected)
    assert float(module.from_prototype(one, classes, table, "logits", distance)) == pytest.approx(expected)
    between = {"squared": 50.0, "kl": 0.0}[distance]
    assert module._mean_distance(table, distance) == pytest.approx(between, abs=1e-6)
    with pytest.raises(ParameterError, match="one prototype only"):
        module._mean_distance(table[:1], distance)


def test_rows_on_their_prototypes_are_pulled_by_nothing_and_pushed_by_the_whole_bound():
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name in ("forget", "retain"):
        states = torch.randn(3, 11, generator=generator)
        target = torch.tensor([4, 1, 9])
        order = target.argsort()
        made[name] = (side(states, target, (1, 1, 1)), (target[order], states[order]))
    sides, known = ({name: pair[i] for name, pair in made.items()} for i in (0, 1))
    settings = {"prototypes": True, "push": 0.5, "pull": 2.0, "prototype_bound": 7.0, "given": {"prototypes": known}}
    plain = loss(sides["forget"], sides["retain"], 3.0)
    assert float(loss(sides["forget"], sides["retain"], 3.0, **settings) - plain) == pytest.approx(3.5, abs=1e-5)


def test_prototypes_are_mean_states_of_classes(vit, data):
    rows = [vit.encode(row) for row in data["retain"][:20]]
    classes, table = module.prototypes(vit, rows)
    states = vit.hidden_states(pack(rows))
    assert classes.tolist() == sorted({row.ids[-1] for row in rows})
    for number, prototype in zip(classes.tolist(), table):
        own = states[[row.ids[-1] == number for row in rows]]
        assert torch.allclose(prototype, own.mean(0), atol=1e-5)


# --- runs ------------------------------------------------------------------------------------------------------------


def test_without_its_terms_it_is_plain_training_of_adapters(vit, data):
    scope = "lora(r=8, alpha=1, modules=mlp)"
    bounded = run(vit, data, alpha=0.0, beta=1.0, bound=1e3)
    assert same(bounded, run(vit, data, "grad_diff", scope=scope), 1e-6)
    kept = run(vit, data, alpha=0.0, beta=0.0)
    assert same(kept, run(vit, data, "neggrad_plus", scope=scope, weight=1.0), 1e-6)
    assert not same(kept, bounded, 1e-6)
    assert same(bounded, run(vit, data, alpha=1.0, warmup=9, beta=1.0, bound=1e3))


def test_adapters_start_at_nothing_stand_in_feed_forward_layers_and_their_delta_equals_them(vit, data):
    still = run(vit, data, training=Training(steps=1, batch_size=4, learning_rate=0.0, guard=None))
    assert not still.delta.entries
    outcome = run(vit, data)
    assert set(outcome.delta.entries) == {f"vit.layers.{i}.mlp.{fc}.weight" for i in range(4) for fc in ("fc1", "fc2")}
    assert outcome.delta.kind == "low_rank"
    rows = pack([vit.encode(row) for row in data["forget"]])
    after = outcome.delta.apply(vit)
    assert torch.allclose(after.hidden_states(rows), outcome.subject.hidden_states(rows), atol=1e-5)
    back = outcome.delta.negate().apply(after, check=False)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(back.model.parameters(), vit.model.parameters()))


@pytest.mark.parametrize(("grouping", "count"), [("block", 4), ("module", 8), ("matrix", 16)])
def test_the_group_terms_gradient_is_each_matrix_over_its_groups_norm(vit, data, grouping, count):
    subject = run(vit, data).subject
    turn = SimpleNamespace(
        subject=subject, index=0, drawn=SimpleNamespace(per_epoch=1), backward=lambda: torch.tensor(1.0)
    )
    settings = PART.resolve({"alpha": 0.5, "grouping": grouping})
    members = module.groups(subject.model, grouping)
    assert len(members) == count
    for some in members.values():
        for p in some:
            p.grad = torch.ones_like(p)
    value = module._around(turn, settings)
    stacked = {name: torch.cat([p.detach().flatten() for p in some]).norm() for name, some in members.items()}
    assert float(value) == pytest.approx(1 + 0.5 * float(sum(stacked.values())), rel=1e-5)
    for name, some in members.items():
        for p in some:
            assert torch.allclose(p.grad, 1 + 0.5 * p.detach() / stacked[name], atol=1e-6)


def test_the_proximal_step_shortens_groups_and_keeps_their_direction():
    first, second = torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])
    module.shrink([(first, first), (second, second)], 1.0)
    assert torch.allclose(first, torch.tensor([2.4, 0.0]))
    assert torch.allclose(second, torch.tensor([[3.2]]))
    module.shrink([(first, first), (second, second)], 4.5)
    assert not first.any()
    assert not second.any()


def test_blocks_are_switched_off_and_the_summary_says_which(vit, data):
    once = Training(steps=1, batch_size=4, learning_rate=1e-2, guard=None)
    free = run(vit, data, alpha=0.0, training=once).summary["prepared"]["groups"]
    assert free["active"] == ["0", "1", "2", "3"]
    assert all(value > 0 for value in free["moved"].values())
    order = sorted(free["norms"], key=free["norms"].get)
    by = (free["norms"][order[1]] + free["norms"][order[2]]) / 2  # between the second and the third of four
    outcome = run(vit, data, alpha=by / 1e-2, proximal=True, training=once)
    found = outcome.summary["prepared"]["groups"]
    assert found["active"] == sorted(order[2:])
    assert all(found["norms"][name] == found["moved"][name] == 0 for name in order[:2])
    assert found["norms"][order[3]] == pytest.approx(free["norms"][order[3]] - by, abs=1e-4)
    assert {name.split(".")[2] for name in outcome.delta.entries} == set(order[2:])
    with pytest.raises(TrainingError, match="had switched off every block after step 1;"):
        run(vit, data, alpha=1e4, proximal=True)


def test_what_is_off_stays_off_and_a_matrix_that_starts_at_nothing_is_not(vit, data):
    subject = run(vit, data).subject
    members = module.groups(subject.model, "block")
    for p in members["1"]:
        p.data.zero_()
    turn = SimpleNamespace(
        subject=subject, index=1, drawn=SimpleNamespace(per_epoch=1), backward=lambda: torch.tensor(1.0)
    )
    module._around(turn, PART.resolve({"alpha": 1e-4, "proximal": True}))
    assert {name for name, some in members.items() if not any(p.requires_grad for p in some)} == {"1"}
    assert run(vit, data, grouping="matrix", proximal=True).delta.entries


def test_running_averages_take_the_weights_place_in_the_end(vit, data):
    def adapters(steps, **settings):
        training = Training(steps=steps, batch_size=4, learning_rate=1e-2, guard=None)
        model = run(vit, data, training=training, **settings).subject.model
        return [p for some in module.groups(model, "block").values() for p in some]

    first, second, mean = adapters(1), adapters(2), adapters(2, ema_decay=0.9)
    for a, b, m in zip(first, second, mean):
        assert torch.allclose(m, 0.9 * a + 0.1 * b, atol=1e-6)
    late = adapters(2, ema_decay=0.9, ema_epoch=1)
    assert all(torch.equal(a, b) for a, b in zip(late, second))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "deepseek"])
def test_language_models_are_grouped_alike(architecture):
    subject = LanguageModel(*tiny(architecture))
    rows = [Row(id=str(i), prompt=f"where was {i} born?", answer=f"Tivin {i}") for i in range(8)]
    outcome = run(subject, {"forget": rows[:3], "retain": rows[3:]}, "gs_lora_plus_plus")
    found = outcome.summary["prepared"]
    assert found["groups"]["of"] == 3
    assert found["prototype_bound"] > 0
    assert outcome.delta.kind == "low_rank"
    assert outcome.delta.apply(subject).fingerprint != subject.fingerprint


def test_one_seed_starts_adapters_alike_whatever_was_drawn_before(vit, data):
    first = run(vit, data)
    torch.rand(3)
    assert same(first, run(vit, data))


def test_models_and_scopes_without_adapters_are_refused(vit, data):
    with pytest.raises(ScopeError, match="scope 'all' has no adapters"):
        run(vit, data, scope="all")
    assert not same(run(vit, data, scope="layers:-1", alpha=0.0), run(vit, data))
    with pytest.raises(ScopeError, match="no adapters that start at nothing"):
        run(vit, data, scope="lora(r=2, modules=mlp, init=pissa)")
    net = untrained(CLASSES, Recipe(side=8, widths=(4, 8)), 0)
    with pytest.raises(ScopeError, match="no linear layer of mlp"):
        run(net, data)
