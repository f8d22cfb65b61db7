"""UltraEdit: its closed form against plain autograd and a direct solve, and statistics that go on over a sequence."""

import pytest
import torch
from test_editors import EDITS, case, subject

from expunge import registry
from expunge.edits import EditRow
from expunge.errors import ParameterError, RequestError
from expunge.methods.edit.factors import observed
from expunge.methods.edit.operations import carry_out
from expunge.methods.edit.ultraedit import normalised, summary
from expunge.methods.edit.values import located
from expunge.subjects.tails import edited_matrix
from expunge.subjects.value_vectors import vectors

WANTED = ("llama", "gpt2", "gpt_neox", "qwen2", "mistral", "gemma2", "phi", "opt", "bloom")
SETTINGS = {"layers": (1, 2), "learning_rate": 1e-2}


def make(model, mode="batch", edits=EDITS, **settings):
    return carry_out(registry.get("methods", "ultraedit"), case(model, edits=edits), {**SETTINGS, **settings}, mode)


def plain(model, edit, layer):
    """Activations and gradients at every fed token of one edit, by autograd on one unpadded text."""
    one = located(case(model, edits=[edit]), 0)[0].lookups[0].tokens
    owner = model.model.get_submodule(edited_matrix(model, layer).owner)
    seen = {}

    def keep(_, arguments, output):
        output = output.detach().requires_grad_(True)
        seen["h"], seen["out"] = arguments[0], output
        return output

    handle = owner.register_forward_hook(keep)
    said = model.model(input_ids=torch.tensor([one.ids])).logits[0].log_softmax(-1)
    handle.remove()
    places = range(one.start, len(one.ids))
    loss = -sum(said[place - 1, one.ids[place]] for place in places) / len(places)
    (gradient,) = torch.autograd.grad(loss, [seen["out"]])
    h, g = (t.reshape(-1, t.shape[-1])[:-1].double().detach() for t in (seen["h"], gradient))
    return h, g, float(loss.detach()), range(one.start - 1, len(one.ids) - 1)


@pytest.mark.parametrize("architecture", WANTED)
def test_a_batch_is_the_published_formula_on_any_architecture(architecture):
    model = subject(architecture)
    ((delta, about),) = [(step.delta, step.summary) for step in make(model)[0].steps]
    changed = delta.apply(model)
    losses = []
    for layer in (1, 2):
        parts = [plain(model, edit, layer) for edit in EDITS]
        h, g = (torch.cat([part[i] for part in parts]) for i in range(2))
        losses = [part[2] for part in parts]
        z = torch.cat([h, g], 1)
        hat = (z - z.mean(0)) / (z.std(0) + torch.finfo(torch.float32).eps)
        inside, gradient = hat[:, : h.shape[1]], hat[:, h.shape[1] :]
        v = -1e-2 * inside.square().sum(1, keepdim=True) * gradient
        whole = torch.linalg.inv(h.T @ h + torch.eye(h.shape[1]).double()) @ h.T @ v  # (f, d)
        matrix = edited_matrix(model, layer)
        moved = vectors(changed.model, matrix).double() - vectors(model.model, matrix).double()
        assert torch.allclose(moved, whole, atol=2e-3 * float(whole.abs().max()))
    assert about["ultraedit"]["loss_before"] == pytest.approx(sum(losses) / 2, rel=1e-4)
    assert sorted(delta.entries) == [edited_matrix(model, layer).name for layer in (1, 2)]


def test_of_few_tokens_the_change_is_low_rank_and_equal_to_the_whole_solve():
    model = subject()
    few = make(model, tokens="target")[0].delta
    assert few.kind == "low_rank"
    more = [*EDITS, EditRow("c", "Quvux jumps over", "dizzy gophers")]
    assert make(model, edits=more)[0].delta.kind == "dense"  # vectors of 96 numbers, more than 64 x 32 of them
    ((h, g),), _ = observed(model, located(case(model), 0), [edited_matrix(model, 1)], "target")
    rows = [plain(model, edit, 1) for edit in EDITS]
    own = [torch.cat([part[i][list(part[3])] for part in rows]) for i in range(2)]
    assert torch.allclose(h, own[0], atol=1e-5)
    assert torch.allclose(g, own[1], atol=1e-6)
    z = torch.cat([h, g], 1)
    hat = normalised(z, [summary(z)])
    v = -1e-2 * hat[:, :64].square().sum(1, keepdim=True) * hat[:, 64:]
    whole = torch.linalg.solve(h.T @ h + torch.eye(64).double(), h.T @ v)
    found = few.difference(edited_matrix(model, 1).name).double()
    assert torch.allclose(found.T, whole, atol=1e-6 * float(whole.abs().max()) + 1e-9)


def test_running_statistics_are_those_of_all_vectors_together():
    draw = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, 5, dtype=torch.float64, generator=draw) * n + 1 for n in (1, 7, 4)]
    whole = torch.cat(parts)
    whole[:, 4] = 2.0  # what never varies
    parts = list(whole.split([1, 7, 4]))
    found = normalised(parts[2], [summary(part) for part in parts])
    expected = (parts[2] - whole.mean(0)) / (whole.std(0) + torch.finfo(torch.float32).eps)
    assert torch.allclose(found, expected, atol=1e-12)
    assert torch.equal(found[:, 4], torch.zeros(4).double())


def test_a_sequence_goes_on_with_the_statistics_of_its_steps_and_without_those_that_are_undone():
    model = subject()
    edits = [*EDITS, EditRow("c", "Mo was born in", "Carth", "Mo")]
    (sequence,) = make(model, "sequence", edits)
    first, second, third = sequence.steps
    assert set(first.keys) == {1, 2}
    assert first.keys[1].shape == (3, 64 + 32)
    assert [float(step.keys[1][0, 0]) for step in sequence.steps] == [
        step.summary["ultraedit"]["tokens"] for step in sequence.steps
    ]
    assert len(sequence.undo("b").keys[1]) == 2
    # The second step by hand: its own tokens, by the statistics of both.
    before = first.delta.apply(model)
    h, g = observed(before, located(case(before, edits=[edits[1]]), 0), [edited_matrix(model, 1)])[0][0]
    hat = normalised(torch.cat([h, g], 1), [first.keys[1], summary(torch.cat([h, g], 1))])
    v = -1e-2 * hat[:, :64].square().sum(1, keepdim=True) * hat[:, 64:]
    whole = torch.linalg.solve(h.T @ h + torch.eye(64).double(), h.T @ v)
    found = second.delta.difference(edited_matrix(model, 1).name).double()
    assert torch.allclose(found.T, whole, atol=1e-5 * float(whole.abs().max()))
    alone = make(model, "one", [edits[1]])[0].delta
    assert not torch.allclose(alone.difference(edited_matrix(model, 1).name).double(), found, rtol=1e-2)
    assert third.delta.entries


def test_edits_make_their_targets_likelier_and_no_other_size_of_batch_changes_their_gradients():
    model = subject()

    def said(one):
        return torch.tensor(one.score([((e.id, "x"), one.encode(e.row())) for e in EDITS]).logprob)

    made = make(model, learning_rate=3e-2)[0].model()
    assert float(said(made).mean()) > float(said(model).mean()) + 0.1
    matrix = [edited_matrix(model, 1)]
    both = observed(model, located(case(model), 0), matrix)[0][0][1]
    alone = [observed(model, located(case(model, edits=[edit]), 0), matrix)[0][0][1] for edit in EDITS]
    assert torch.allclose(both, torch.cat(alone), atol=1e-6)


def test_what_ultraedit_cannot_do_is_said():
    model = subject()
    short = [EditRow("s", "Ilva", "the")]
    with pytest.raises(RequestError, match="one token in all has no deviation"):
        make(model, edits=short, tokens="target")
    with pytest.raises(ParameterError, match="expected both more than 0"):
        make(model, ridge=0.0)
    with pytest.raises(ParameterError, match="expected the lower one first"):
        make(model, layers=(2, 0))
