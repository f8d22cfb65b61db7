"""MEND: what it begins as, its edit by hand, that training lowers its loss, and that it is trained once."""

from dataclasses import replace

import pytest
import torch
from test_editors import EDITS, case, subject
from test_serac import SHOWN

from expunge import registry
from expunge.errors import ParameterError, RequestError, TrainingError
from expunge.methods.edit import mend as module
from expunge.methods.edit.factors import observed
from expunge.methods.edit.mend import Network, Teaching, taught
from expunge.methods.edit.operations import carry_out
from expunge.methods.edit.values import located
from expunge.subjects.tails import edited_matrix
from expunge.subjects.value_vectors import vectors

SETTINGS = {"layers": (1, 2), "rank": 4, "steps": 3, "batch": 2}

pytestmark = pytest.mark.usefixtures("own_cache")


def make(model, mode="sequence", shown=SHOWN, **settings):
    made = case(model, demonstrations=shown)
    return carry_out(registry.get("methods", "mend"), made, {**SETTINGS, **settings}, mode)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "gemma2", "bloom"])
def test_untrained_it_is_a_gradient_step_on_normalised_factors(architecture):
    model = subject(architecture)
    (found,) = make(model, "batch", steps=0, rate=0.01)
    changed = found.model()
    for layer in (1, 2):
        matrix = edited_matrix(model, layer)
        (parts, _), (own, _) = (
            observed(model, located(case(model, edits=edits), 0), [matrix], "target") for edits in (SHOWN, EDITS)
        )
        z, mine = (torch.cat(one[0], 1) for one in (parts, own))
        h, g = ((mine - z.mean(0)) / (z.std(0) + 1e-7)).split([matrix.count, matrix.width], 1)
        moved = vectors(changed.model, matrix).double() - vectors(model.model, matrix).double()
        assert torch.allclose(moved, -0.01 * h.T @ g, atol=2e-4 * float((h.T @ g).abs().max()))
    assert found.delta.kind == "low_rank"


def test_the_network_is_residual_with_a_scale_and_a_shift_for_each_matrix():
    model = subject()
    network = Network([edited_matrix(model, layer) for layer in (0, 1)], 2, 0.5, 0)
    with torch.no_grad():
        network.up.copy_(torch.randn(network.up.shape, generator=torch.Generator().manual_seed(1)))
        network.scale[1].fill_(2.0)
        network.shift[1].fill_(-0.1)
        network.mean[1].fill_(0.3)
        network.deviation[1].fill_(4.0)
    h, g = torch.ones(1, 64), torch.zeros(1, 32)
    z = (torch.cat([h, g], 1) - 0.3) / 4.0
    for i in range(2):
        z = z + (2.0 * (network.up[i] @ (network.down[i] @ z[0])) - 0.1).clamp(min=0)
    (_, (inputs, gradients)) = network([(h, g), (h, g)])
    assert torch.allclose(torch.cat([inputs, gradients / 0.5], 1), z, atol=1e-4)


def test_training_runs_through_the_edit_and_lowers_the_loss(monkeypatch):
    model = subject()
    made = case(model, demonstrations=SHOWN)
    matrices = [edited_matrix(model, layer) for layer in (1, 2)]
    how = Teaching(8, 60, 4, 3e-3, 1e-3, 1.0, 1.0, 0)
    network, (first, last) = taught(made, SHOWN, matrices, how)
    assert float(last) < 0.9 * float(first)
    untaught = Network(matrices, 8, 1e-3, 0)
    assert not torch.equal(network.down, untaught.down)
    assert not torch.equal(network.rate, untaught.rate)
    # The loss by hand: of the edited model as a delta makes it.
    lesson = module._lessons(replace(made, edits=SHOWN), SHOWN, matrices)[0]
    with torch.no_grad():
        loss = float(module._loss(model, network, matrices, lesson, how))
        pairs = network(lesson.factors)
    changed = model.copy()
    with torch.no_grad():
        for matrix, (h, g) in zip(matrices, pairs):
            vectors(changed.model, matrix).sub_(h.T @ g)
        rows = [changed.encode(SHOWN[0].row(text)) for text in SHOWN[0].rephrasings]
        said = [changed.model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1) for row in rows]
        nll = [-one[i - 1, row.ids[i]] for one, row in zip(said, rows) for i in range(row.start, len(row.ids))]
        stays = model.encode(SHOWN[0].row("Orra likes to eat", "bread"))
        p, q = (
            one.model(input_ids=torch.tensor([stays.ids])).logits[0, stays.start - 1 : -1].log_softmax(-1)
            for one in (model, changed)
        )
    expected = float(torch.stack(nll).mean() + (p.exp() * (p - q)).sum(-1).mean())
    assert loss == pytest.approx(expected, rel=1e-3)
    monkeypatch.setattr(module, "_lessons", None)  # it is in the cache
    again, ends = taught(made, SHOWN, matrices, how)
    assert torch.equal(again.up, network.up)
    assert ends.tolist() == [float(first), float(last)]
    with pytest.raises(TypeError):
        taught(made, SHOWN[1:], matrices, how)


def test_edits_are_deltas_by_one_network_and_the_first_of_a_sequence_is_that_edit_alone():
    model = subject()
    (sequence,) = make(model)
    single = make(model, "one")
    assert sequence.undo().model().fingerprint == single[0].model().fingerprint
    assert sequence.undo("a").undo("b").model() is model
    assert sequence.steps[0].summary["mend"]["training_losses"] == sequence.steps[1].summary["mend"]["training_losses"]
    assert len(list(make(model, shown=[replace(one, locality={}, rephrasings=()) for one in SHOWN])[0].steps)) == 2


def test_what_mend_cannot_do_is_said():
    model = subject()
    with pytest.raises(RequestError, match="and there are 1: give at least 2 edit rows as demonstrations"):
        make(model, shown=SHOWN[:1])
    for wrong in ({"rank": 0}, {"steps": -1}, {"rate": 0.0}):
        with pytest.raises(ParameterError, match="expected rank, batch"):
            make(model, **wrong)
    with pytest.raises(ParameterError, match="expected the lower one first"):
        make(model, layers=(2, 0))
    with pytest.raises(TrainingError, match="lower learning_rate or rate"):
        make(model, rate=3e38)
