"""Influence approximation and influence unlearning: hand-computed cases and exact properties."""

import numpy as np
import pytest
import torch
from tiny import tiny
from torch import nn

from expunge import registry
from expunge.errors import RequestError, ScopeError, SubjectError
from expunge.methods.edit import iau as iau_file
from expunge.methods.edit import influence as influence_file
from expunge.methods.edit.case import EditCase
from expunge.methods.edit.influence import woodbury
from expunge.methods.optimise.curvature import hessian_product, mean_gradient, twice
from expunge.methods.optimise.importance import cross_entropy, flowing
from expunge.methods.optimise.loop import Training
from expunge.rows import Row
from expunge.subjects.image import ImageClassifier, Preparation, weights_fingerprint
from expunge.subjects.language import LanguageModel
from expunge.world.pictures.draw import digits

CLASSES = [str(i) for i in range(10)]


def make():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.Tanh(), nn.Linear(6, 10))


@pytest.fixture(scope="module")
def pictures():
    return digits(8)["train"][:40]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return ImageClassifier(make(), CLASSES, Preparation((8, 8)), "net", make)


@pytest.fixture(scope="module")
def language():
    return LanguageModel(*tiny("llama"))


def sentences(count):
    return [
        Row(id=str(i), prompt=f"where was {i} born?", answer=f"Tivin {i}" + " Carth" * (i % 3)) for i in range(count)
    ]


def names(subject):
    return [name for name, _ in subject.model.named_parameters()]


def split(rows, count=8):
    return {"forget": rows[:count], "retain": rows[count:]}


def run(subject, data, method="iau", scope=None, memory=None, **settings):
    case = EditCase(subject, data, Training(seed=0), scope, memory={} if memory is None else memory)
    part = registry.get("methods", method)
    return part.function(case, **part.resolve(settings)), case


def direct(subject, rows):
    """d mean loss / d theta by plain torch."""
    pixels = torch.stack([subject.encode(row).pixels for row in rows])
    target = torch.tensor([int(row.answer) for row in rows])
    loss = nn.functional.cross_entropy(subject.model(pixels), target)
    return torch.autograd.grad(loss, list(subject.model.parameters()))


def values(delta, subject):
    return [
        delta.entries.get(n, {"difference": torch.zeros(p.shape)})["difference"]
        for n, p in subject.model.named_parameters()
    ]


# --- derivatives ------------------------------------------------------------------------------------------------------


def test_gradients_of_row_sets_do_not_depend_on_chunks(network, language, pictures):
    for subject, rows in ((network, pictures[:11]), (language, sentences(11))):
        encoded = [subject.encode(row) for row in rows]
        whole = mean_gradient(subject, encoded, names(subject), batch_size=11)
        for size in (1, 4):
            parts = mean_gradient(subject, encoded, names(subject), batch_size=size)
            assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(whole, parts))
    assert all(
        torch.allclose(a, b, atol=1e-6)
        for a, b in zip(
            mean_gradient(network, [network.encode(r) for r in pictures], names(network)), direct(network, pictures)
        )
    )


@pytest.mark.parametrize("kind", ["network", "language"])
def test_products_with_the_hessian_are_differences_of_gradients(kind, request, pictures):
    subject = request.getfixturevalue(kind)
    rows = [subject.encode(row) for row in (pictures[:6] if kind == "network" else sentences(6))]
    generator = torch.Generator().manual_seed(1)
    vector = [torch.randn(p.shape, generator=generator) for p in subject.model.parameters()]
    found = hessian_product(subject, rows, names(subject), vector, batch_size=4)
    model = subject.copy()
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, start, v in zip(model.model.parameters(), subject.model.parameters(), vector):
                p.copy_(start + sign * 1e-3 * v)
        sides.append(mean_gradient(model, rows, names(subject)))
    expected = torch.cat([((a - b) / 2e-3).flatten() for a, b in zip(*sides)])
    flat = torch.cat([h.flatten() for h in found])
    assert float((flat - expected).norm() / expected.norm()) < 2e-2


def test_what_has_no_second_derivative_is_named(network):
    def fused():
        q = torch.ones(1, 1, 4, 8, requires_grad=True)
        out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)[0]
        (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
        torch.autograd.grad(first.sum(), q)

    def other():
        raise RuntimeError("something else")

    for function, error, words in (
        (fused, SubjectError, r"net: aten::_scaled_dot\w+ cannot be differentiated twice.*eager"),
        (other, RuntimeError, "something else"),
    ):
        with pytest.raises(error, match=words), twice(network):
            function()


# --- iau --------------------------------------------------------------------------------------------------------------


def test_the_sign_step_is_the_first_step_of_adam(network, pictures):
    data = split(pictures)
    delta, case = run(network, data)
    twin = network.copy()
    optimiser = torch.optim.Adam(twin.model.parameters(), lr=1e-3)
    retain, forget = direct(network, data["retain"]), direct(network, data["forget"])
    for p, r, f in zip(twin.model.parameters(), retain, forget):
        p.grad = r - f
    optimiser.step()
    moved = total = 0
    for change, new, old, r, f in zip(
        values(delta, network), twin.model.parameters(), network.model.parameters(), retain, forget
    ):
        g = r - f
        # Where g is of rounding size, Adam's step and ours are too.
        sure = g.abs() > 1e-5
        assert torch.allclose(change[sure], (new - old).detach()[sure], rtol=1e-2, atol=1e-7)
        large = g.abs() > 1e-4
        assert torch.allclose(change[large], -1e-3 * g[large].sign(), rtol=2e-4)
        moved, total = moved + int((change != 0).sum()), total + change.numel()
    assert case.summary["iau"]["moved"] == [moved / total]


def test_weights_that_rows_do_not_reach_stay_and_small_gradients_can_be_held(network, pictures):
    dead = network.copy()
    with torch.no_grad():
        dead.model[3].weight[:, 0] = 0  # nothing flows back to what feeds this unit
    delta, case = run(dead, split(pictures))
    assert not delta.entries["1.weight"]["difference"][0].any()
    assert delta.entries["1.weight"]["difference"][1:].all()
    held, less = run(dead, split(pictures), min_magnitude=1e-3)
    assert 0 < less.summary["iau"]["moved"][0] < case.summary["iau"]["moved"][0] < 1
    g = [r - f for r, f in zip(direct(dead, pictures[8:]), direct(dead, pictures[:8]))]
    sure = g[0].abs() < 9e-4
    assert not held.entries["1.weight"]["difference"][sure].any()


def test_without_correction_a_gradient_step_is_ascent_on_the_forget_rows(network, pictures):
    delta, _ = run(network, {"forget": pictures[:8]}, rule="gradient", correction=0.0, learning_rate=0.3)
    expected = direct(network, pictures[:8])
    assert all(torch.allclose(d, 0.3 * g, rtol=1e-3, atol=1e-7) for d, g in zip(values(delta, network), expected))


def test_where_forget_rows_are_the_retain_rows_nothing_moves(network, pictures):
    delta, _ = run(network, {"forget": pictures, "retain": pictures}, rule="gradient")
    assert max(float(d.abs().max()) for d in values(delta, network)) < 1e-7
    held, case = run(network, {"forget": pictures, "retain": pictures}, min_magnitude=1e-6)
    assert not held.entries
    assert case.summary["iau"]["moved"] == [0.0]


def test_the_gradient_of_all_rows_serves_every_request_on_a_model(network, pictures, monkeypatch):
    asked = []
    plain = iau_file.mean_gradient
    monkeypatch.setattr(
        iau_file, "mean_gradient", lambda s, rows, n, **k: asked.append(len(rows)) or plain(s, rows, n, **k)
    )
    memory = {}
    run(network, split(pictures), memory=memory, rule="gradient")
    second, _ = run(
        network, {"forget": pictures[20:26], "retain": pictures[:20] + pictures[26:]}, memory=memory, rule="gradient"
    )
    assert asked == [8, 40, 6]
    alone, _ = run(network, {"forget": pictures[20:26], "retain": pictures[:20] + pictures[26:]}, rule="gradient")
    assert all(torch.equal(a, b) for a, b in zip(values(second, network), values(alone, network)))
    retain, forget = direct(network, pictures[:20] + pictures[26:]), direct(network, pictures[20:26])
    for change, r, f in zip(values(second, network), retain, forget):
        assert torch.allclose(change, -0.1 * (r - f), rtol=1e-3, atol=1e-7)


def test_chunks_do_not_change_the_step(network, pictures):
    first, second = (run(network, split(pictures), rule="gradient", batch_size=size)[0] for size in (5, 40))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(values(first, network), values(second, network)))
    first, second = (run(network, split(pictures), batch_size=size)[0] for size in (5, 40))
    retain, forget = direct(network, pictures[8:]), direct(network, pictures[:8])
    for a, b, r, f in zip(values(first, network), values(second, network), retain, forget):
        sure = (r - f).abs() > 1e-5
        assert torch.allclose(a[sure], b[sure], atol=1e-5)


def test_several_steps_take_the_gradient_anew(network, pictures):
    data = split(pictures)
    once, _ = run(network, data, rule="gradient")
    again, _ = run(once.apply(network), data, rule="gradient")
    both, case = run(network, data, rule="gradient", steps=2)
    assert len(case.summary["iau"]["moved"]) == 2
    for two, a, b in zip(values(both, network), values(once, network), values(again, network)):
        assert torch.allclose(two, a + b, atol=1e-6)


def quadratic(monkeypatch, file):
    """Replace the loss by 0.5 (theta - x)^2 with one theta, x the first number of a row's pixels; returns a subject."""
    model = nn.Module()
    model.theta = nn.Parameter(torch.tensor([0.0]))
    subject = ImageClassifier(model, CLASSES, Preparation((8, 8)), "quadratic")

    def slope(subject, rows, names, *, batch_size=64):
        return [subject.model.theta.detach() - torch.stack([row.pixels[0, 0, :1] for row in rows]).mean(0)]

    monkeypatch.setattr(file, "mean_gradient", slope)
    return subject


@pytest.mark.parametrize("method", ["iau", "influence"])
def test_on_a_quadratic_loss_one_step_is_retraining(method, pictures, monkeypatch):
    file = iau_file if method == "iau" else influence_file
    subject = quadratic(monkeypatch, file)
    rows = sorted(pictures, key=lambda row: -int(row.image[0, 0, 0]))
    shifted = [marked(row, i) for i, row in enumerate(rows)]
    x = torch.stack([subject.encode(row).pixels[0, 0, :1] for row in shifted]).flatten()
    assert x.std() > 0.1
    with torch.no_grad():
        subject.model.theta.copy_(x.mean())
    data = split(shifted)
    if method == "iau":
        delta, _ = run(subject, data, rule="gradient", correction=0.0, learning_rate=8 / 32)
    else:
        monkeypatch.setattr(influence_file, "hessian_product", lambda s, r, n, vector, **k: [v.clone() for v in vector])
        delta, _ = run(subject, data, "influence", damping=0.0)
    assert delta.apply(subject).model.theta.item() == pytest.approx(float(x[8:].mean()), abs=1e-6)


def marked(row, i):
    """The picture with a first pixel of its own."""
    from dataclasses import replace

    image = row.image.copy()
    image[0, 0] = 6 * i
    return replace(row, image=image)


def test_steps_stay_in_their_scope_and_missing_rows_are_named(network, pictures):
    delta, _ = run(network, split(pictures), scope="role:head")
    assert set(delta.entries) == {"3.weight", "3.bias"}
    with pytest.raises(RequestError, match=r"request.data.forget: 0 rows, but iau needs at least 1"):
        run(network, {"retain": pictures})
    with pytest.raises(RequestError, match=r"request.data.retain: 0 rows, but iau needs .*correction = 0"):
        run(network, {"forget": pictures})
    with pytest.raises(RequestError, match=r"request.data.retain: 0 rows, but influence"):
        run(network, {"forget": pictures}, "influence")


@pytest.mark.parametrize("method", ["iau", "influence"])
def test_language_models_take_the_same_steps(method, language):
    before = weights_fingerprint(language.model)
    # An untrained model is at no minimum: the solver would stop at its first direction.
    settings = {"solver": "woodfisher"} if method == "influence" else {}
    first, second = (run(language, split(sentences(12), 3), method, **settings)[0] for _ in range(2))
    assert first.entries
    assert all(torch.equal(e["difference"], second.entries[n]["difference"]) for n, e in first.entries.items())
    assert weights_fingerprint(language.model) == before
    assert first.apply(language).fingerprint != language.fingerprint
    with pytest.raises(ScopeError, match=f"{method}: scope 'lora' is not made of whole tensors"):
        run(language, split(sentences(12), 3), method, scope="lora")


# --- influence --------------------------------------------------------------------------------------------------------


def test_the_solver_inverts_the_damped_hessian_of_a_softmax(pictures):
    torch.manual_seed(0)
    subject = ImageClassifier(
        nn.Sequential(nn.Flatten(), nn.Linear(192, 3)), CLASSES[:3], Preparation((8, 8)), "linear"
    )
    rows = [row for row in digits(8)["train"] if int(row.answer) < 3][:30]
    data = split(rows, 6)
    delta, case = run(subject, data, "influence", damping=0.05, iterations=400)
    assert case.summary["influence"]["relative_residual"] < 1e-5
    x = torch.stack([subject.encode(row).pixels.flatten() for row in data["retain"]]).double()
    x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    head = subject.model[1]
    p = (x @ torch.cat([head.weight, head.bias[:, None]], 1).double().T).softmax(-1)
    # d2 L / d theta_ka d theta_lb = mean p_k (1[k = l] - p_l) x_a x_b
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    hessian = torch.einsum("nkl,na,nb->kalb", inner, x, x).reshape(3 * 193, 3 * 193) / len(x)
    weight, bias = direct(subject, data["forget"])
    right = torch.cat([weight, bias[:, None]], 1).double().flatten()
    expected = torch.linalg.solve(hessian + 0.05 * torch.eye(len(right), dtype=torch.float64), right).reshape(3, 193)
    found = torch.cat([values(delta, subject)[0], values(delta, subject)[1][:, None]], 1).double()
    assert torch.allclose(found, 6 / 24 * expected, rtol=1e-3, atol=1e-5)


def test_negative_curvature_stops_the_solver_with_a_warning(network, pictures, monkeypatch):
    monkeypatch.setattr(influence_file, "hessian_product", lambda s, r, n, vector, **k: [-v for v in vector])
    delta, case = run(network, split(pictures), "influence")
    assert not delta.entries
    assert "negative curvature in direction 1" in case.warnings[0]


def test_damping_does_not_hide_negative_curvature(network, pictures, monkeypatch):
    # Along the right side H is -0.005: with damping 0.01 the solution would be 200 times as long.
    monkeypatch.setattr(influence_file, "hessian_product", lambda s, r, n, vector, **k: [-0.005 * v for v in vector])
    _, case = run(network, split(pictures), "influence", damping=0.01)
    assert "negative curvature" in case.warnings[0]


def test_the_woodbury_recursion_is_the_published_one_by_hand():
    rows = [[torch.tensor(g)] for g in ([1.0, 0.0], [2.0, 1.0], [1.0, 3.0])]
    (found,) = woodbury([torch.tensor([3.0, 4.0])], rows)
    k, o = np.array([3.0, 4.0]), np.array([1.0, 0.0])
    # Second row: o.g = 2, k.g = 10; third: o is (1 - 2/1002) (1, 0).
    k = k - 10 / 1002 * o
    o = o * (1 - 2 / 1002)
    k = k - (k @ [1.0, 3.0]) / (1000 + o[0]) * o
    assert np.allclose(found, k)
    assert float(found[1]) == 4.0  # across the first row's gradient nothing is corrected


def test_woodfisher_moves_against_the_difference_of_the_gradients(network, pictures):
    delta, case = run(network, split(pictures), "influence", solver="woodfisher")
    assert case.summary["influence"]["rows"] == 32
    flat = torch.cat([d.flatten() for d in values(delta, network)])
    difference = torch.cat(
        [(f - r).flatten() for f, r in zip(direct(network, pictures[:8]), direct(network, pictures[8:]))]
    )
    assert torch.nn.functional.cosine_similarity(flat, difference, dim=0) > 0.99
    assert float(flat.norm()) == pytest.approx(0.2 * float(difference.norm()), rel=0.02)


def test_a_penalised_loss_is_the_plain_one_in_value(network, pictures):
    from expunge.methods.optimise.curvature import smooth_cross_entropy

    rows = [network.encode(row) for row in pictures[:5]]
    with flowing(network.model, list(network.model.parameters())):
        pair = [loss(network, rows).item() for loss in (smooth_cross_entropy, cross_entropy)]
    assert pair[0] == pytest.approx(pair[1], rel=1e-5)
