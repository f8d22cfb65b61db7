"""SSD and its relatives: exact properties, on pictures and on text alike."""

import math

import numpy as np
import pytest
import torch
from tiny import tiny
from torch import nn

from expunge import registry
from expunge.errors import ParameterError, RequestError
from expunge.methods.edit.case import EditCase
from expunge.methods.edit.ssd import Importances
from expunge.methods.optimise.importance import importance
from expunge.methods.optimise.loop import Training
from expunge.rows import Row
from expunge.subjects.image import ImageClassifier, Preparation, weights_fingerprint
from expunge.subjects.language import LanguageModel
from expunge.world.pictures.draw import digits
from expunge.world.pictures.models import Recipe, untrained

CLASSES = [str(i) for i in range(10)]


@pytest.fixture(scope="module")
def pictures():
    return digits(8)["train"][:40]


@pytest.fixture(scope="module")
def network():
    return untrained(CLASSES, Recipe(side=8, widths=(4, 8)), 0)


def linear():
    torch.manual_seed(0)
    return ImageClassifier(nn.Sequential(nn.Flatten(), nn.Linear(192, 10)), CLASSES, Preparation((8, 8)), "linear")


def names(subject):
    return [name for name, _ in subject.model.named_parameters()]


def split(rows):
    return {"forget": rows[:8], "retain": rows[8:]}


def run(subject, data, **settings):
    case = EditCase(subject, data, Training(seed=0))
    part = registry.get("methods", "ssd")
    return part.function(case, **part.resolve(settings)), case


def pair(subject, rows, **kind):
    encoded = [subject.encode(row) for row in rows]
    return Importances(
        subject,
        importance(subject, encoded[:8], names(subject), **kind),
        importance(subject, encoded, names(subject), **kind),
    )


def test_the_row_wise_fisher_of_a_linear_model_is_its_closed_form(pictures):
    subject = linear()
    encoded = [subject.encode(row) for row in pictures[:6]]
    found = importance(subject, encoded, names(subject), batch_size=1)
    x = torch.stack([row.pixels.flatten() for row in encoded])
    p = subject.model(torch.stack([row.pixels for row in encoded])).softmax(-1)
    error = p - nn.functional.one_hot(torch.tensor([row.ids[1] for row in encoded]), 10)
    expected = (error.square()[:, :, None] * x.square()[:, None, :]).mean(0)
    assert torch.allclose(found["1.weight"], expected, rtol=1e-4, atol=1e-9)
    assert torch.allclose(found["1.bias"], error.square().mean(0), rtol=1e-4)


def test_a_batch_squares_its_mean_gradient(pictures):
    subject = linear()
    encoded = [subject.encode(row) for row in pictures[:6]]
    halves = [importance(subject, part, names(subject), batch_size=3) for part in (encoded[:3], encoded[3:])]
    whole = importance(subject, encoded, names(subject), batch_size=3)
    assert torch.allclose(whole["1.weight"], (halves[0]["1.weight"] + halves[1]["1.weight"]) / 2)


def test_gradient_flags_and_weights_are_left_alone(network, pictures):
    network.model.requires_grad_(False)
    before = weights_fingerprint(network.model)
    importance(network, [network.encode(row) for row in pictures[:4]], names(network))
    assert not any(p.requires_grad or p.grad is not None for p in network.model.parameters())
    assert weights_fingerprint(network.model) == before


def test_loss_free_importance_knows_no_labels(network, pictures):
    encoded = [network.encode(row) for row in pictures[:8]]
    moved = [network.encode(row, answer=str((int(row.answer) + 1) % 10)) for row in pictures[:8]]
    for kind in ("loss_free", "loss_free_l1"):
        first, second = (importance(network, rows, names(network), kind=kind) for rows in (encoded, moved))
        assert all(torch.allclose(first[n], second[n], rtol=1e-3, atol=1e-7) for n in first)
    first, second = (importance(network, rows, names(network)) for rows in (encoded, moved))
    assert not all(torch.allclose(first[n], second[n], rtol=1e-3) for n in first)


def test_selected_weights_shrink_by_exactly_the_ratio_and_keep_their_sign(network, pictures):
    both = pair(network, pictures)
    alpha = both.threshold(0.2)
    delta = both.dampened(alpha, 1.0)
    after = dict(delta.apply(network).model.named_parameters())
    for name, old in network.model.named_parameters():
        hit = both.forget[name] > alpha * both.every[name]
        expected = torch.where(hit, old * both.every[name] / both.forget[name], old)
        assert torch.allclose(after[name], expected, rtol=1e-4, atol=1e-7)
        assert (after[name].abs() <= old.abs() + 1e-7).all()
        assert (after[name] * old >= 0).all()
        assert torch.equal(after[name][~hit], old[~hit])
    buffers = dict(network.model.named_buffers())
    assert all(torch.equal(b, buffers[n]) for n, b in delta.apply(network).model.named_buffers())


def test_at_infinite_alpha_nothing_changes(network, pictures):
    assert not pair(network, pictures).dampened(math.inf, 1.0).entries


def test_where_all_rows_are_to_be_forgotten_every_ratio_is_one(network, pictures):
    encoded = [network.encode(row) for row in pictures]
    same = importance(network, encoded, names(network))
    both = Importances(network, same, same)
    assert np.allclose(both.ratios, 1)
    assert not both.dampened(1.0, 1.0).entries


def test_row_wise_ratios_are_bounded_by_the_share(network, pictures):
    both = pair(network, pictures, batch_size=1)
    assert both.ratios.max() <= len(pictures) / 8 * (1 + 1e-4)
    with pytest.raises(ParameterError, match="no ratio exceeds all rows / forget rows = 5"):
        run(network, split(pictures), alpha=10.0, per="row")


def test_the_adaptive_threshold_selects_its_share_of_the_weights(network, pictures):
    both = pair(network, pictures)
    above = (both.ratios > both.threshold(0.2)).sum()
    assert abs(above - len(both.ratios) * math.log(21) / 100) <= 1
    assert both.threshold(0.2) == pytest.approx(np.percentile(both.ratios, 100 - math.log(21)), rel=1e-5)


def test_two_requests_on_one_model_commute(network, pictures):
    encoded = [network.encode(row) for row in pictures]
    every = importance(network, encoded, names(network))
    first, second = (
        Importances(network, importance(network, rows, names(network)), every) for rows in (encoded[:8], encoded[8:16])
    )
    alphas = first.threshold(0.2), second.threshold(0.2)
    for name, weight in network.model.named_parameters():
        a, b = first.factor(name, alphas[0], 1.0), second.factor(name, alphas[1], 1.0)
        assert torch.allclose(weight * a * b, weight * b * a)


def test_a_search_stops_at_the_mildest_round_that_is_enough(pictures):
    from expunge.methods.optimise.teach import teach

    subject = untrained(CLASSES, Recipe(side=8, widths=(4, 8)), 0)
    rows = sorted(pictures, key=lambda row: row.answer)
    teach(subject, [subject.encode(row) for row in rows], epochs=60, batch_size=40, learning_rate=2e-2, seed=0)
    known = lambda model, some: model.score([((r.id, "answer"), model.encode(r)) for r in some]).hit.mean()  # noqa: E731
    data = split(rows)
    assert known(subject, data["forget"]) > 0.8
    delta, case = run(subject, data, alpha="search", rho=0.5)
    about = case.summary["ssd"]
    assert known(delta.apply(subject), data["forget"]) <= 0.5 * known(subject, data["forget"])
    assert about["rounds"] > 1
    assert about["dampened"] > 0
    milder = registry.get("methods", "ssd").resolve({"alpha": about["alpha"] * 1.5})["alpha"]
    assert known(run(subject, data, alpha=milder)[0].apply(subject), data["forget"]) > 0


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["fisher", "loss_free"])
def test_language_models_are_dampened_by_the_same_method(architecture, kind):
    subject = LanguageModel(*tiny(architecture))
    rows = [Row(id=str(i), prompt=f"where was {i} born?", answer=f"Tivin {i}") for i in range(12)]
    delta, case = run(subject, split(rows), importance=kind, batch_size=4)
    again, _ = run(subject, split(rows), importance=kind, batch_size=4)
    assert delta.entries
    assert all(torch.equal(e["difference"], again.entries[n]["difference"]) for n, e in delta.entries.items())
    assert case.summary["ssd"]["of"] == sum(p.numel() for p in subject.model.parameters())
    only, _ = run(subject, split(rows), importance=kind, retained_only=True, alpha=1.0)
    assert only.entries


def test_the_scope_is_kept_and_missing_rows_are_named(network, pictures):
    case = EditCase(network, split(pictures), Training(), "role:head")
    part = registry.get("methods", "ssd")
    delta = part.function(case, **part.resolve({"alpha": 1.0}))
    assert set(delta.entries) <= {n for n in names(network) if n.startswith("classifier")}
    with pytest.raises(RequestError, match=r"request.data.retain: 0 rows, but ssd needs the rows"):
        run(network, {"forget": pictures})
    with pytest.raises(RequestError, match=r"request.data.forget: 0 rows"):
        run(network, {"forget": [], "retain": pictures})
