"""Deltas over a base that is never modified."""

import json

import pytest
import torch
from tiny import ARCHITECTURES, tiny

from expunge.deltas import Delta, compose, editing, undo
from expunge.errors import DeltaError, MismatchError
from expunge.subjects.language import LanguageModel, weights_fingerprint


@pytest.fixture
def base():
    return LanguageModel(*tiny("llama"), name="base")


DOWN = "model.layers.1.mlp.down_proj.weight"
UP = "model.layers.2.mlp.up_proj.weight"


def changed(base, *names, seed=0):
    other = base.copy()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in names:
            parameter = dict(other.model.named_parameters())[name]
            parameter += (1e-2 * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
    return other


def weights(subject):
    return dict(subject.model.named_parameters())


def test_a_delta_holds_what_changed_and_nothing_else(base):
    other = changed(base, DOWN)
    delta = Delta.from_models(base, other)
    assert list(delta.entries) == [DOWN]
    assert delta.kind == "dense"
    assert delta.cost()["parameters"] == weights(base)[DOWN].numel()


def test_applying_gives_a_new_subject_that_shares_untouched_tensors(base):
    before = weights_fingerprint(base.model)
    delta = Delta.from_models(base, changed(base, DOWN))
    made = delta.apply(base)
    for name, parameter in weights(made).items():
        assert (parameter.data_ptr() == weights(base)[name].data_ptr()) == (name != DOWN), name
    assert weights_fingerprint(base.model) == before
    assert undo(made) is base
    with pytest.raises(DeltaError, match="no delta to undo"):
        undo(base)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_save_load_apply_is_bitwise_reproducible(architecture, tmp_path):
    base = LanguageModel(*tiny(architecture))
    name = [n for n, p in base.model.named_parameters() if p.dim() > 1][-1]
    delta = Delta.from_models(base, changed(base, name))
    delta.save(tmp_path / "delta")
    first, second = delta.apply(base), Delta.load(tmp_path / "delta").apply(base)
    assert weights_fingerprint(first.model) == weights_fingerprint(second.model)
    assert weights_fingerprint(first.model) != weights_fingerprint(base.model)


def test_negating_leads_back(base):
    delta = Delta.from_models(base, changed(base, DOWN))
    made = delta.apply(base)
    back = delta.negate().apply(made, check=False)
    assert torch.allclose(weights(back)[DOWN], weights(base)[DOWN], atol=1e-7)
    assert torch.allclose(weights(delta.apply(base, scale=0.0))[DOWN], weights(base)[DOWN])


def test_stacking_equals_one_after_the_other(base):
    first = Delta.from_models(base, changed(base, DOWN))
    middle = first.apply(base)
    second = Delta.from_models(middle, changed(middle, DOWN, UP, seed=1))
    stacked = compose([first, second]).apply(base)
    one_by_one = second.apply(middle)
    for name in (DOWN, UP):
        assert torch.allclose(weights(stacked)[name], weights(one_by_one)[name], atol=1e-6)


def test_stacking_checks_the_order(base):
    first = Delta.from_models(base, changed(base, DOWN))
    known = Delta(first.base, first.entries, result=first.apply(base).fingerprint)
    with pytest.raises(MismatchError, match="delta 2 was made on"):
        compose([known, first])
    with pytest.raises(DeltaError, match="0 deltas"):
        compose([])


def test_another_base_is_refused(base):
    delta = Delta.from_models(base, changed(base, DOWN))
    with pytest.raises(MismatchError, match="was made on a base with fingerprint"):
        delta.apply(changed(base, UP))
    other = LanguageModel(*tiny("gpt2"))
    with pytest.raises(MismatchError, match="has no tensor"):
        delta.apply(other, check=False)
    wrong = Delta(base.fingerprint, {DOWN: {"difference": torch.zeros(3, 3)}})
    with pytest.raises(MismatchError, match="has shape"):
        wrong.apply(base)


def test_low_rank_equals_dense(base):
    a, b = torch.randn(2, 64), torch.randn(32, 2)
    low = Delta(base.fingerprint, {DOWN: {"A": a, "B": b, "scale": torch.tensor(0.5)}})
    dense = Delta(base.fingerprint, {DOWN: {"difference": 0.5 * b @ a}})
    assert low.kind == "low_rank"
    assert torch.allclose(weights(low.apply(base))[DOWN], weights(dense.apply(base))[DOWN], atol=1e-6)
    assert low.cost()["bytes"] < dense.cost()["bytes"]
    back = low.negate().difference(DOWN)
    assert torch.allclose(back, -low.difference(DOWN))


def test_sparse_equals_dense(base):
    difference = torch.zeros(32, 64)
    difference[3, 5] = 0.25
    dense = Delta(base.fingerprint, {DOWN: {"difference": difference}})
    sparse = dense.sparsified()
    assert sparse.kind == "sparse"
    assert torch.equal(weights(sparse.apply(base))[DOWN], weights(dense.apply(base))[DOWN])


def test_sixteen_bit_bases_keep_fp32_differences(base):
    base.model.to(torch.bfloat16)
    small = torch.full((32, 64), 1e-6)
    delta = Delta(base.fingerprint, {DOWN: {"difference": small}})
    assert delta.entries[DOWN]["difference"].dtype == torch.float32
    assert weights(delta.apply(base))[DOWN].dtype == torch.bfloat16
    # One such step is below the resolution of 16 bits; a thousand of them stacked are not lost.
    thousand = delta.scaled(1000.0).apply(base)
    assert not torch.equal(weights(thousand)[DOWN], weights(base)[DOWN])


def test_editing_records_what_was_changed_in_place(base):
    before = weights_fingerprint(base.model)
    with editing(base) as recorded, torch.no_grad():
        weights(recorded.subject)[UP].zero_()
    assert list(recorded.delta.entries) == [UP]
    assert not weights(recorded.delta.apply(base))[UP].any()
    assert weights_fingerprint(base.model) == before


def test_damaged_deltas_are_refused(base, tmp_path):
    delta = Delta.from_models(base, changed(base, DOWN))

    def saved(name):
        delta.save(tmp_path / name)
        return tmp_path / name

    with pytest.raises(DeltaError, match="not a readable delta"):
        Delta.load(tmp_path / "missing")
    folder = saved("bits")
    data = bytearray((folder / "delta.safetensors").read_bytes())
    data[-3] ^= 1
    (folder / "delta.safetensors").write_bytes(data)
    with pytest.raises(DeltaError, match="damaged"):
        Delta.load(folder)
    folder = saved("format")
    about = json.loads((folder / "delta.json").read_text())
    (folder / "delta.json").write_text(json.dumps({**about, "format": 9}))
    with pytest.raises(DeltaError, match="format 9"):
        Delta.load(folder)
    folder = saved("json")
    (folder / "delta.json").write_text("{")
    with pytest.raises(DeltaError, match="not a readable delta"):
        Delta.load(folder)


def test_a_guards_delta_changes_no_weights(base, tmp_path):
    guard = Delta(base.fingerprint, config={"name": "output_filter"})
    guard.save(tmp_path / "guard")
    assert Delta.load(tmp_path / "guard").kind == "guard"
    with pytest.raises(DeltaError, match="changes no weights"):
        guard.apply(base)
