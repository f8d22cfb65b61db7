"""Exact properties of the gradient objectives (specs: gradient-objectives, sections 3 and 9)."""

import math

import pytest
import torch

from expunge import registry
from expunge.methods.optimise.terms import Side, Step, divergence, negative_log_likelihood

V = 11
LENGTHS = (3, 1, 4)


def side(logits, target, lengths=LENGTHS, **constants):
    """A side whose head is the identity: its hidden states are the logits."""
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return Side(
        logits, target, row, len(lengths), head=lambda h: h, frozen_head=lambda h: h, vocabulary=V, constants=constants
    )


@pytest.fixture
def case(monkeypatch):
    # The product keeps log-probabilities in fp32; the identities are checked in double precision.
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self.double())
    generator = torch.Generator().manual_seed(0)
    tokens = sum(LENGTHS)
    logits = torch.randn(tokens, V, generator=generator, dtype=torch.float64).requires_grad_()
    target = torch.randint(V, (tokens,), generator=generator)
    reference = torch.randn(tokens, V, generator=generator, dtype=torch.float64)
    return logits, target, reference


def gradient(name, logits, sides, **settings):
    part = registry.get("methods", name)
    loss = part.function(Step(sides, 0, 1), **part.resolve(settings))
    (found,) = torch.autograd.grad(loss, logits)
    return loss, found


def likelihood_gradient(logits, target, weight):
    """d/dz of sum_T w l: w (onehot - p)."""
    p = logits.detach().softmax(-1)
    onehot = torch.nn.functional.one_hot(target, V).double()
    return weight[:, None] * (onehot - p)


def reference_tokens(reference, target):
    return reference.log_softmax(-1).gather(-1, target[:, None])[:, 0]


def test_gradient_ascent_pushes_every_answer_token_down_alike(case):
    logits, target, _ = case
    _, found = gradient("gradient_ascent", logits, {"forget": side(logits, target)})
    weight = torch.full((len(target),), 1 / len(target), dtype=torch.float64)
    assert torch.allclose(found, likelihood_gradient(logits, target, weight), atol=1e-12)


def test_npo_weights_rows_by_how_likely_they_still_are(case):
    logits, target, reference = case
    beta = 0.7
    forget = side(logits, target, reference_tokens=reference_tokens(reference, target))
    _, found = gradient("npo", logits, {"forget": forget}, beta=beta, retain="none")
    s, ref = forget.logprob.detach(), forget.reference
    rows = 2 * torch.exp(beta * s) / (torch.exp(beta * s) + torch.exp(beta * ref))
    weight = rows[forget.row] / len(LENGTHS)
    assert torch.allclose(found, likelihood_gradient(logits, target, weight), atol=1e-12)


def test_npo_at_the_start_has_weight_one_and_value_two_over_beta_log_two(case):
    logits, target, _ = case
    forget = side(logits, target, reference_tokens=reference_tokens(logits.detach(), target))
    loss, found = gradient("npo", logits, {"forget": forget}, beta=0.1, retain="none")
    weight = torch.full((len(target),), 1 / len(LENGTHS), dtype=torch.float64)
    assert torch.allclose(found, likelihood_gradient(logits, target, weight), atol=1e-12)
    assert float(loss) == pytest.approx(2 / 0.1 * math.log(2), abs=1e-12)


def test_npo_with_tiny_beta_is_gradient_ascent_on_row_sums(case):
    logits, target, reference = case
    forget = side(logits, target, reference_tokens=reference_tokens(reference, target))
    _, found = gradient("npo", logits, {"forget": forget}, beta=1e-6, retain="none")
    weight = torch.full((len(target),), 1 / len(LENGTHS), dtype=torch.float64)
    assert torch.allclose(found, likelihood_gradient(logits, target, weight), rtol=1e-5)


def test_simnpo_divides_by_scored_tokens(case):
    logits, target, _ = case
    beta, margin = 2.5, 0.3
    forget = side(logits, target)
    _, found = gradient("simnpo", logits, {"forget": forget}, beta=beta, margin=margin, retain="none")
    n = forget.length.double()
    m = torch.exp(forget.logprob.detach() / n + margin)
    rows = 2 / n * m**beta / (1 + m**beta)
    weight = rows[forget.row] / len(LENGTHS)
    assert torch.allclose(found, likelihood_gradient(logits, target, weight), atol=1e-12)


def test_idk_pulls_towards_the_alternative_and_leaves_the_answer_alone(case):
    logits, target, _ = case
    _, found = gradient("idk", logits, {"alternative": side(logits, target)}, retain="none")
    weight = torch.full((len(target),), -1 / len(target), dtype=torch.float64)
    assert torch.allclose(found, likelihood_gradient(logits, target, weight), atol=1e-12)


def test_dpo_moves_answer_and_alternative_in_opposite_directions(case):
    logits, target, reference = case
    other = torch.randn_like(logits, requires_grad=True)
    wanted = torch.randint(V, (len(target),), generator=torch.Generator().manual_seed(1))
    sides = {
        "forget": side(logits, target, reference_tokens=reference_tokens(reference, target)),
        "alternative": side(other, wanted, reference_tokens=reference_tokens(reference, wanted)),
    }
    part = registry.get("methods", "dpo")
    beta = 0.3
    loss = part.function(Step(sides, 0, 1), **part.resolve({"beta": beta, "retain": "none"}))
    down, up = torch.autograd.grad(loss, [logits, other])
    a = (sides["alternative"].logprob - sides["alternative"].reference).detach()
    f = (sides["forget"].logprob - sides["forget"].reference).detach()
    rows = 2 * torch.sigmoid(-beta * (a - f)) / len(LENGTHS)
    assert torch.allclose(down, likelihood_gradient(logits, target, rows[sides["forget"].row]), atol=1e-12)
    assert torch.allclose(up, likelihood_gradient(other, wanted, -rows[sides["alternative"].row]), atol=1e-12)


def test_kl_retain_term_has_gradient_p_minus_reference(case):
    logits, target, reference = case
    kept = side(logits, target, reference_hidden=reference)
    (found,) = torch.autograd.grad(divergence(kept), logits)
    expected = (logits.detach().softmax(-1) - reference.softmax(-1)) / len(target)
    assert torch.allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("name", ["gradient_ascent", "npo", "simnpo", "dpo", "idk"])
def test_a_constant_added_to_all_logits_of_a_position_changes_no_term(case, name):
    logits, target, reference = case
    shift = torch.randn(len(target), 1, dtype=torch.float64)

    def value(z):
        ref = reference_tokens(reference, target)
        sides = {which: side(z, target, reference_tokens=ref) for which in ("forget", "alternative")}
        sides["retain"] = side(z, target, reference_hidden=reference)
        part = registry.get("methods", name)
        return float(part.function(Step(sides, 0, 1), **part.resolve({"retain": "kl"})))

    assert value(logits.detach()) == pytest.approx(value(logits.detach() + shift), abs=1e-10)


def test_chunks_of_the_vocabulary_axis_change_nothing(case, monkeypatch):
    from expunge.methods.optimise import terms

    logits, target, reference = case

    def both():
        kept = side(logits, target, reference_hidden=reference)
        loss = divergence(kept) + negative_log_likelihood(kept)
        return loss, torch.autograd.grad(loss, logits)[0]

    whole, gradient_whole = both()
    monkeypatch.setattr(terms, "LOGIT_ELEMENTS", 2 * V)
    parts, gradient_parts = both()
    assert torch.allclose(whole, parts, atol=1e-12)
    assert torch.allclose(gradient_whole, gradient_parts, atol=1e-12)


@pytest.mark.parametrize("kept", [1 << 26, 0])
def test_the_linear_head_has_the_gradients_of_autograd(monkeypatch, kept):
    from expunge.subjects import head

    monkeypatch.setattr(head, "KEEP_ELEMENTS", kept)
    monkeypatch.setattr(head, "CHUNK_ELEMENTS", 3 * V)
    generator = torch.Generator().manual_seed(2)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((8, 5), (V, 5), (V,)))
    target = torch.randint(V, (8,), generator=generator)
    scale = torch.randn(8, generator=generator)
    inputs = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    ours = head.linear_logprob(hidden, weight, bias, target)
    expected = (hidden @ weight.T + bias).log_softmax(-1).gather(1, target[:, None])[:, 0]
    assert torch.allclose(ours, expected, atol=1e-6)
    found = torch.autograd.grad((ours * scale).sum(), inputs)
    wanted = torch.autograd.grad((expected * scale).sum(), inputs)
    for a, b in zip(found, wanted):
        assert torch.allclose(a, b, atol=1e-5)
    frozen = torch.autograd.grad(head.linear_logprob(hidden, weight.detach(), None, target).sum(), hidden)
    assert frozen[0].shape == hidden.shape


def test_aliases_are_configurations_of_one_objective():
    assert registry.get("methods", "grad_diff").resolve()["retain"] == "nll"
    assert registry.get("methods", "kl_minimisation").resolve()["retain"] == "kl"
    assert registry.get("methods", "grad_diff").function is registry.get("methods", "gradient_ascent").function
