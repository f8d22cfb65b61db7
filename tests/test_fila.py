"""Adapters that start in principal directions (specs: loku, sections 3 and 9)."""

import copy

import pytest
import torch
from peft import inject_adapter_in_model
from tiny import tiny

from expunge import registry
from expunge.deltas import Delta
from expunge.errors import RequestError, ScopeError, TrainingError
from expunge.methods.optimise import fila
from expunge.methods.optimise.loop import Training
from expunge.methods.optimise.scope import resolve
from expunge.methods.optimise.unlearn import unlearn
from expunge.rows import Row
from expunge.subjects.language import LanguageModel

IDS = torch.arange(40).view(2, 20)
CASES = [("llama", "mlp"), ("llama", "all"), ("gpt2", "all"), ("gpt_neo", "mlp")]


def rows(subject, first, count):
    """Rows of different length."""
    return [
        subject.encode(Row(id=str(i), prompt=f"where was {i} born?", answer="Tivin" + " in Carth" * (i % 3)))
        for i in range(first, first + count)
    ]


def adapted(architecture="llama", init="pissa", modules="mlp", r=4, dtype=torch.float32):
    """(base, working copy with adapters, their spec); as the loop makes them, tensors shared."""
    base = LanguageModel(*tiny(architecture), name="base")
    base.model.to(dtype)
    spec = resolve(f"lora(r={r}, init={init}, modules={modules})", base.model).lora
    model = copy.deepcopy(base.model, {id(p): p for p in base.model.parameters()})
    model.requires_grad_(False)
    inject_adapter_in_model(spec.config(), model)
    return base, base.with_model(model), spec


def started(architecture="llama", init="pissa", **settings):
    base, working, spec = adapted(architecture, init, **settings)
    about = fila.start(working, spec, rows(base, 0, 3), rows(base, 3, 7), seed=0)
    return base, working, spec, about


def logits(subject):
    return subject.model(input_ids=IDS).logits


def product(layer):
    a, b = fila._factors(layer)
    return layer.scaling["default"] * b @ a


def trained(working, steps=3):
    parameters = [p.requires_grad_(True) for n, p in working.model.named_parameters() if ".lora_" in n]
    optimiser = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(steps):
        working.model(input_ids=IDS, labels=IDS).loss.backward()
        optimiser.step()
        optimiser.zero_grad()


def delta(base, working, spec):
    entries = {}
    for name in spec.targets:
        entry = fila.low_rank(working.model.get_submodule(name), transposed=spec.transposed)
        if entry is not None:
            entries[f"{name}.weight"] = entry
    return Delta(base.fingerprint, entries)


# --- the start -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", "fila"])
@pytest.mark.parametrize(("architecture", "modules"), CASES)
def test_at_step_0_the_model_is_the_start_model(architecture, modules, init):
    before = {name: p.detach().clone() for name, p in tiny(architecture)[0].named_parameters()}
    base, working, spec, about = started(architecture, init, modules=modules)
    assert (logits(working) - logits(base)).abs().max() <= 1e-5
    for name in spec.targets:
        layer = working.model.get_submodule(name)
        assert product(layer).abs().max() > 1e-4
        whole = layer.get_base_layer().weight + layer.get_delta_weight("default")
        assert torch.allclose(whole, before[f"{name}.weight"], atol=1e-5)
    assert 0 < about["outside"]["mean"] <= about["outside"]["largest"] < 1
    for name, p in base.model.named_parameters():
        assert torch.equal(p, before[name])
    assert not any(p.requires_grad for n, p in working.model.named_parameters() if ".lora_" not in n)
    assert not delta(base, working, spec).entries


def test_other_starts_are_left_alone():
    for init in ("default", "gaussian"):
        base, working, spec, about = started(init=init)
        assert about == {}
        assert torch.equal(logits(working), logits(base))
        assert not delta(base, working, spec).entries


def test_the_start_is_deterministic():
    for init in ("pissa", "fila"):
        first, second = started(init=init), started(init=init)
        for name in first[2].targets:
            one, other = (run[1].model.get_submodule(name) for run in (first, second))
            assert all(torch.equal(a, b) for a, b in zip(fila._factors(one), fila._factors(other)))


def test_weights_that_are_all_alike_give_the_principal_singular_vectors():
    _, plain, spec, _ = started(init="pissa")
    _, weighted, _ = adapted(init="fila")
    for name in spec.targets:
        fila.principal(weighted.model.get_submodule(name), torch.full((spec_out(plain, name),), 3.0), spec, 0)
        one, other = (product(w.model.get_submodule(name)) for w in (plain, weighted))
        assert torch.allclose(one, other, atol=1e-5)


def spec_out(working, name):
    return working.model.get_submodule(name).out_features


def test_full_rank_leaves_nothing():
    _, working, spec = adapted(r=32)
    generator = torch.Generator().manual_seed(0)
    for name in spec.targets:
        layer = working.model.get_submodule(name)
        share = fila.principal(layer, 0.5 + torch.rand(spec_out(working, name), generator=generator), spec, 0)
        assert share < 1e-4
        assert layer.get_base_layer().weight.abs().max() < 1e-4


def test_rank_above_the_matrix_leaves_the_rest_of_the_adapter_as_lora_starts():
    base, working, _, _ = started(r=40)
    assert (logits(working) - logits(base)).abs().max() <= 1e-5
    a, b = fila._factors(working.model.get_submodule("model.layers.0.mlp.down_proj"))
    assert not b[:, 32:].any()
    assert a[32:].any()


def test_no_other_rank_r_part_is_nearer_in_the_weighted_norm():
    _, working, spec = adapted(init="fila")
    generator = torch.Generator().manual_seed(0)
    layer = working.model.get_submodule(spec.targets[0])
    weight = layer.get_base_layer().weight.clone()
    d = 0.5 + 2 * torch.rand(len(weight), generator=generator)
    fila.principal(layer, d, spec, 0)
    a, b = fila._factors(layer)
    s = layer.scaling["default"]

    def distance(a, b):
        return float((d[:, None] * (weight - s * b @ a)).double().norm())

    best = distance(a, b)
    for size in (1e-1, 1e-2, 1e-3):
        for _ in range(20):
            moved = [
                t
                + size * t.norm() * torch.nn.functional.normalize(torch.randn(t.shape, generator=generator), dim=(0, 1))
                for t in (a, b)
            ]
            assert distance(*moved) > best - 1e-5 * best


def test_the_random_decomposition_is_near_the_exact_one(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.diag(0.9 ** torch.arange(120.0))
    matrix = torch.randn(200, 120, generator=generator) @ spectrum @ torch.randn(120, 150, generator=generator)
    exact = fila._decomposed(matrix, 8, 0)
    monkeypatch.setattr(fila, "EXACT", 10)
    before = torch.get_rng_state()
    near, again = fila._decomposed(matrix, 8, 0), fila._decomposed(matrix, 8, 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(x, y) for x, y in zip(near, again))
    assert [t.shape for t in near] == [t.shape for t in exact]
    rebuilt = [u * s @ v.T for u, s, v in (exact, near)]
    assert (matrix - rebuilt[1]).norm() <= 1.001 * (matrix - rebuilt[0]).norm()


# --- importance ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_importance_is_the_ratio_of_squared_single_row_gradients(architecture, monkeypatch):
    base, working, spec = adapted(architecture, "fila")
    sides = rows(base, 0, 3), rows(base, 3, 2)
    assert len({row.scored for row in sides[0]}) > 1
    found = fila.importance(working, spec, *sides)
    name = spec.targets[-1]
    plain = copy.deepcopy(base.model).requires_grad_(True)
    fisher = []
    for side in sides:
        total = 0
        for row in side:
            plain.zero_grad()
            labels = torch.tensor([[-100] * row.start + list(row.ids[row.start :])])
            plain(input_ids=torch.tensor([row.ids]), labels=labels).loss.backward()
            total = total + row.scored * plain.get_parameter(f"{name}.weight").grad ** 2
        fisher.append(total / sum(row.scored for row in side))
    ratio = fisher[0] / (fisher[1] + 1e-5)
    expected = (ratio.T if spec.transposed else ratio).sum(1).sqrt()
    assert torch.allclose(found[name], expected, rtol=1e-4)
    assert expected.max() > 2 * expected.min()
    # One matrix at a time gives the same.
    monkeypatch.setattr(fila, "FISHER_BYTES", 1)
    alone = fila.importance(working, spec, *sides)
    assert all(torch.allclose(alone[name], found[name], rtol=1e-5) for name in spec.targets)
    assert not any(p.requires_grad for n, p in working.model.named_parameters() if ".lora_" not in n)


def test_fila_without_retain_rows_says_so_and_without_forget_rows_stops():
    base, working, spec = adapted(init="fila")
    about = fila.start(working, spec, rows(base, 0, 2))
    assert about["rows"] == {"forget": 2, "retain": 0}
    assert "without retain rows" in about["warnings"][0]
    with pytest.raises(RequestError, match="there are 0"):
        fila.start(adapted(init="fila")[1], spec)


def test_as_many_retain_rows_as_forget_rows_are_measured():
    assert started(init="fila")[3]["rows"] == {"forget": 3, "retain": 3}


def test_a_gradient_that_is_not_finite_is_named():
    base, working, spec = adapted(init="fila")
    layer = working.model.get_submodule(spec.targets[-1]).get_base_layer()
    layer.weight = torch.nn.Parameter(torch.full_like(layer.weight, float("nan")), requires_grad=False)
    with pytest.raises(TrainingError, match="the gradient of model"):
        fila.importance(working, spec, rows(base, 0, 2), [])


def test_quantised_weights_cannot_give_a_part_away():
    model, _ = tiny("llama")
    model.is_quantized = True
    with pytest.raises(ScopeError, match="init pissa takes a part out of the weights"):
        resolve("lora(init=pissa)", model)


# --- the delta -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["default", "pissa", "fila"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_delta_leads_from_the_untouched_base_to_the_result(architecture, init, tmp_path):
    base, working, spec, _ = started(architecture, init)
    trained(working)
    made = delta(base, working, spec)
    assert made.kind == "low_rank"
    entry = made.entries[f"{spec.targets[0]}.weight"]
    assert entry["A"].shape[0] == (4 if init == "default" else 8)
    made.save(tmp_path / "delta")
    result = Delta.load(tmp_path / "delta").apply(base)
    assert (logits(result) - logits(working)).abs().max() <= 1e-4
    assert (logits(result) - logits(base)).abs().max() > 1e-2


def test_sixteen_bits_keep_the_start_models_likelihood():
    base, working, _, _ = started(init="pissa", modules="all", r=8, dtype=torch.bfloat16)
    with torch.no_grad():
        losses = [float(s.model(input_ids=IDS, labels=IDS).loss) for s in (base, working)]
    assert abs(losses[0] - losses[1]) < 1e-3 * losses[0]


@pytest.mark.parametrize("scope", ["lora(r=2, init={}, modules=mlp)", "lora(r=2, init={}, modules=mlp)+role:mlp_out"])
@pytest.mark.parametrize(("init", "method"), [("pissa", "npo"), ("fila", "npo"), ("fila", "idk")])
def test_a_run_starts_where_the_scope_says(scope, init, method):
    base = LanguageModel(*tiny("llama"))
    data = {
        side: [Row(id=f"{side}{i}", prompt=f"where was {side} {i} born?", answer=f"Tivin {i}") for i in range(6)]
        for side in ("forget", "retain")
    }
    seen = []
    outcome = unlearn(
        base,
        registry.get("methods", method),
        {},
        scope=scope.format(init),
        data=data,
        training=Training(steps=3, batch_size=4, learning_rate=1e-2),
        evaluate_at=[0, 3],
        evaluate=lambda subject, _: seen.append(logits(subject).detach()),
    )
    assert torch.allclose(seen[0], logits(base), atol=1e-5)
    assert (seen[1] - seen[0]).abs().max() > 1e-2
    assert torch.allclose(logits(outcome.delta.apply(base)), seen[1], atol=1e-4)
    about = outcome.summary["prepared"]["adapters"]
    assert about["init"] == init
    assert ("rows" in about) == (init == "fila")
    entry = outcome.delta.entries["model.layers.0.mlp.up_proj.weight"]
    assert entry["A"].shape[0] == 4  # the adapter as it is, less the adapter as it started
