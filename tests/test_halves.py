"""A step in two halves side by side is the step in one pass, and the same one every time."""

import threading

import pytest
import torch
from tiny import tiny

from expunge import registry
from expunge.methods.optimise import halves as module
from expunge.methods.optimise.halves import Halves, halves
from expunge.methods.optimise.loop import Drawn, Recipe, Training, Turn, entries
from expunge.methods.optimise.unlearn import _needs, _working_copy, recipe_of, set_up, unlearn
from expunge.rows import Row
from expunge.subjects.gather import Gather
from expunge.subjects.language import LanguageModel
from expunge.subjects.packed import Encoded

TRAINING = Training(steps=3, batch_size=4, learning_rate=1e-3, guard=None)


def rows(side, count):
    return [
        Row(id=f"{side}-{i}", prompt=f"where was {side} {'and so ' * (i % 3)}born, {i}?", answer=f"Tivin {i * 7}")
        for i in range(count)
    ]


DATA = {"forget": rows("forget", 6), "retain": rows("retain", 9)}


@pytest.fixture
def two_threads(monkeypatch):
    before = torch.get_num_threads()
    for name, value in (("PRODUCTS", 0), ("TWICE", 1.0), ("LONGER", 1.0)):  # whatever the rows
        monkeypatch.setattr(module, name, value)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def gradients(subject, name, scope, settings, whole=False):
    """Of the first step, and which threads ran its passes."""
    torch.manual_seed(0)  # peft draws adapters from the global generator
    setup = set_up(subject, registry.get("methods", name), settings, scope=scope, data=DATA, training=TRAINING)
    _needs(setup.case, setup.needs, setup.drawn)
    working, parameters, _ = _working_copy(setup.case, setup.resolved)
    stored = entries(subject, setup.drawn, setup.resolved.first_layer, inside=setup.resolved.first_is_out)
    recipe, seen = recipe_of(setup), set()
    states = LanguageModel.states
    with pytest.MonkeyPatch.context() as patch, halves(working) as side_by_side:
        patch.setattr(LanguageModel, "states", lambda *given: seen.add(threading.get_ident()) or states(*given))
        made = Turn(working, parameters, setup.drawn, recipe, 0, {}, subject.head, stored)
        made.halves = None if whole else side_by_side
        loss = made.backward() if recipe.around is None else recipe.around(made)
    return float(loss), [p.grad for p in parameters], seen - {threading.get_ident()}


CASES = [
    ("llama", "grad_diff", None, {}),  # an embedding of its own, of which only some rows are in training
    ("gpt2", "npo", "all", {}),  # embedding and head are one tensor
    ("gemma2", "npo", "all", {}),  # the same with scaled look-ups and capped logits
    ("gemma2", "sam", "all", {}),  # and with two backward passes in a step
    ("mixtral", "npo", "all", {}),
    ("bloom", "npo", "all", {}),  # rows one by one
    ("llama", "rmu", None, {"layer": 1}),  # no head; passes start inside a block
    ("llama", "npo", "role:lm_head", {}),  # nothing moves but the head
    ("llama", "npo", "lora(r=2, layers=1-)", {}),
    ("llama", "latent_adversarial", None, {"inner_steps": 2}),  # half a step's rows take their part of the shift
    ("llama", "kl_minimisation", None, {}),
]


@pytest.mark.parametrize(("architecture", "name", "scope", "settings"), CASES)
def test_halves_have_the_gradients_of_one_pass(architecture, name, scope, settings, two_threads):
    subject = LanguageModel(*tiny(architecture))
    loss, first, seen = gradients(subject, name, scope, settings)
    assert seen  # on a busy machine one of the threads may take both
    _, second, _ = gradients(subject, name, scope, settings)
    want, wanted, seen = gradients(subject, name, scope, settings, whole=True)
    assert not seen

    assert loss == pytest.approx(want, rel=1e-5, abs=1e-6)
    assert any(gradient is not None for gradient in wanted)
    largest = max(float(gradient.abs().max()) for gradient in wanted if gradient is not None)
    for found, again, gradient in zip(first, second, wanted, strict=True):
        if gradient is None:
            assert found is None
        else:
            torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6 * largest)
            assert torch.equal(found, again)


def test_a_run_in_halves_ends_where_another_one_did(two_threads):
    subject = LanguageModel(*tiny("llama"))
    part = registry.get("methods", "grad_diff")  # only some rows of the embedding are in training
    first, second = (unlearn(subject, part, {}, scope=None, data=DATA, training=TRAINING) for _ in range(2))
    torch.set_num_threads(1)
    alone = unlearn(subject, part, {}, scope=None, data=DATA, training=TRAINING)
    assert first.summary["log"]["loss"] == pytest.approx(alone.summary["log"]["loss"], rel=1e-4)
    assert first.delta.entries.keys() == alone.delta.entries.keys()
    for name, entry in first.delta.entries.items():
        assert all(torch.equal(tensor, second.delta.entries[name][key]) for key, tensor in entry.items()), name
    assert torch.get_num_threads() == 1


def test_rows_have_the_same_shift_in_a_pass_of_some_of_them():
    """Two rows begin alike for longer than all do, and would share what stands for one of them."""
    subject = LanguageModel(*tiny("llama"))
    same = tuple(range(3, 19))
    given = [Encoded((*same, *own, 5, 6), 20, 0, "") for own in ((30, 31, 32), (30, 31, 33), (40, 41, 42))]
    drawn = Drawn({"forget": given}, [{"forget": [0, 1, 2]}])
    turn = Turn(subject, [], drawn, Recipe(lambda step: step.forget.logprob.sum(), ("forget",)), 0, {}, subject.head)
    delta = torch.randn(turn.positions(), 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), turn.perturbed(0, delta):
        together = turn._states(given, [0, 1, 2])["final"]
        alone = turn._states(given, [0, 1])["final"]
    torch.testing.assert_close(alone, together[: len(alone)], rtol=1e-4, atol=1e-5)


def row(*ids, start=2):
    return Encoded(tuple(ids), start, 0, "")


def test_rows_that_begin_alike_stay_together_and_halves_are_alike():
    one, other = [row(1, 2, i, 4, 5) for i in range(4)], [row(7, 8, i, 4, 5) for i in range(4)]
    mixed = [row for pair in zip(other, one) for row in pair]
    assert Halves(None, 1 << 40).of(mixed) == [[1, 3, 5, 7], [0, 2, 4, 6]]


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ([row(1, 2, 3)], "one row"),
        ([row(*range(100), 200 + i, start=100) for i in range(8)], "what all begin with would be computed twice"),
        ([row(*range(90)), row(200, 201, 202)], "one half would be nearly everything"),
    ],
)
def test_one_pass_where_two_are_no_better(given, why):
    assert Halves(None, 1 << 40).of(given) == [], why


def test_small_passes_are_left_to_one_thread():
    given = [row(i, i + 1, i + 2, i + 3) for i in range(0, 80, 10)]
    tokens = sum(len(one.ids) for one in given)
    enough = 2 * module.PRODUCTS // tokens + 1
    assert Halves(None, enough).of(given)
    assert not Halves(None, enough - 2).of(given)


def test_rows_of_parts_are_added_in_their_order_whichever_thread_ends_first():
    values = [torch.randn(3, 8), torch.randn(3, 8), torch.randn(3, 8)]
    found = []
    for order in ((0, 1, 2), (2, 1, 0)):
        weight, gather = torch.nn.Parameter(torch.zeros(5, 8)), Gather()
        with gather.in_parts():
            for part in order:
                gather.rows(weight, torch.tensor([1, 1, 4]), values[part], part)
            assert weight.grad is None
        found.append(weight.grad)
    assert torch.equal(*found)
    torch.testing.assert_close(found[0][4], values[0][2] + values[1][2] + values[2][2])
    assert not found[0][0].any()
