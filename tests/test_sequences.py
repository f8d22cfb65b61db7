"""Long sequences of edits: each step costs what a step costs, sees what those before it made, and can be undone."""

from dataclasses import replace

import pytest
import torch
from test_editors import case, subject, weights

from expunge import registry
from expunge.deltas import Delta, summed
from expunge.edits import EditRow
from expunge.methods.edit.operations import Edited, carry_out
from expunge.subjects.language import weights_fingerprint
from expunge.subjects.memory import joined, radii_of

NAMES = ("Ilva", "Carth", "Mo", "Tivin")
QUICK = {
    "rome": {"layer": 1, "steps": 2},
    "alphaedit": {"layers": (0, 1), "steps": 2},
    "memit": {"layers": (0, 1), "steps": 2, "weight": 1.0},
    "ft_m": {"layer": 1, "steps": 2},
    "ft_l": {"layer": 2, "steps": 2},
    "lora_edit": {"steps": 2},
    "grace": {"layer": 1, "steps": 2, "eps": 3.0},
    "wise": {"layer": 1, "steps": 2, "mask": 0.3, "unrelated": 2, "shard": 4},
}

pytestmark = pytest.mark.usefixtures("own_cache")


def edits(count):
    return [
        EditRow(f"e{i}", f"{NAMES[i % 4]} {i} was born in", f"Tivin {i % 3}", f"{NAMES[i % 4]} {i}")
        for i in range(count)
    ]


def go_on(model, name, count, done=()):
    made = case(model, edits=edits(count))
    return carry_out(registry.get("methods", name), made, QUICK[name], "sequence", done=done)[0]


@pytest.fixture(scope="module")
def mixed():
    """Fifty edits by seven editors, each going on behind the one before; and what the base was."""
    model = subject()
    before = weights_fingerprint(model.model)
    found = Edited(model)
    for number, name in enumerate(("rome", "ft_m", "lora_edit", "alphaedit", "memit", "ft_l", "rome"), start=1):
        found = go_on(model, name, min(8 * number, 50), found.steps)
    return model, before, found


def test_undoing_all_of_a_long_mixed_sequence_in_any_order_leaves_the_base_to_the_last_bit(mixed):
    model, before, found = mixed
    assert len(found.steps) == 50
    assert not torch.equal(*(weights(one)["model.layers.1.mlp.down_proj.weight"] for one in (model, found.model())))
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0)).tolist()
    left = found
    for place in order:
        left = left.undo(f"e{place}")
    last = found
    for _ in found.steps:
        last = last.undo()
    assert left.model() is last.model() is model
    assert weights_fingerprint(model.model) == before


def test_what_is_left_after_undoing_is_what_the_other_steps_make(mixed):
    model, _, found = mixed
    left = found
    for place in range(20, 50):
        left = left.undo(f"e{place}")
    assert left.model().fingerprint == Edited(model, found.steps[:20]).model().fingerprint


@pytest.mark.parametrize("name", QUICK)
def test_an_edit_of_a_sequence_sees_the_model_that_the_steps_before_it_make(name):
    """However the model is kept up with: 24 low-rank changes are more than stay low-rank here."""
    part = registry.get("methods", name)
    seen = []

    def spy(told, **settings):
        seen.append(told.subject.fingerprint)
        return part.function(told, **settings)

    model = subject()
    count = 24 if name == "rome" else 6
    (found,) = carry_out(replace(part, function=spy), case(model, edits=edits(count)), QUICK[name], "sequence")
    assert len(set(seen)) == count
    assert seen == [Edited(model, found.steps[:n]).model().fingerprint for n in range(count)]


def test_steps_that_were_kept_are_gone_on_from_to_the_same_bits():
    model = subject()
    for name in ("rome", "grace", "wise", "alphaedit"):
        whole = go_on(model, name, 6)
        again = go_on(model, name, 6, whole.steps[:3])
        assert again.model().fingerprint == whole.model().fingerprint


def test_parts_of_a_sum_may_be_summed_before():
    """Low rank (4 x 6, narrow for two ranks), dense and sparse: whatever the first of them come to, the bits agree."""
    draw = torch.Generator().manual_seed(0)
    low = [
        {"A": torch.randn(1, 6, generator=draw), "B": torch.randn(4, 1, generator=draw), "scale": torch.tensor(0.3)}
        for _ in range(7)
    ]
    dense = [{"difference": torch.randn(4, 6, generator=draw)} for _ in range(7)]
    sparse = [{"index": torch.tensor([i, i + 3]), "value": torch.randn(2, generator=draw)} for i in range(7)]
    for parts in (low, dense, sparse):
        whole = summed("w", parts)
        for cut in (2, 3, 6):
            other = summed("w", [summed("w", parts[:cut]), *parts[cut:]])
            assert all(torch.equal(whole[key], other[key]) for key in whole)
    assert set(summed("w", low[:2])) == {"A", "B", "scale"}
    wanted = sum(Delta("", {"w": one}).difference("w") for one in low)
    assert torch.allclose(summed("w", low)["difference"], wanted, atol=1e-5)


def test_a_joined_side_memory_has_every_place_once_per_shard():
    def entry(index, value, shard):
        one = torch.ones(1)
        return {
            "index": torch.tensor(index),
            "value": torch.tensor(value),
            "edit": torch.zeros(len(index), dtype=torch.long),
            "shard": torch.tensor([shard]),
            "least": one,
            "ratio": one,
            "density": one,
        }

    found = joined([entry([1, 4], [1.0, 2.0], 0), entry([4, 5], [0.5, 3.0], 0), entry([4], [7.0], 1)])
    assert found["index"].tolist() == [1, 4, 5, 4]
    assert found["value"].tolist() == [1.0, 2.5, 3.0, 7.0]
    assert found["edit"].tolist() == [0, 0, 1, 2]
    assert found["shard"].tolist() == [0, 0, 1]


def test_radii_go_on_from_those_of_the_first_keys():
    draw = torch.Generator().manual_seed(0)
    points, labels, reach = torch.randn(40, 2, generator=draw), torch.randint(3, (40,), generator=draw), torch.rand(40)
    kept, radii = radii_of(points, labels, reach)
    assert 5 < len(kept) < 40
    for cut in (0, 1, 17, 40):
        first = radii_of(points[:cut], labels[:cut], reach[:cut])
        again = radii_of(points, labels, reach, first)
        assert again[0] == kept
        assert torch.equal(again[1], radii)
