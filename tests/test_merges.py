"""Merging deltas of one base: every operator by hand, every form of delta, both modalities."""

import re
from pathlib import Path

import pytest
import torch
from tiny import tiny

from expunge import cli
from expunge.deltas import FORMS, Delta, aligned
from expunge.errors import DeltaError, MismatchError, ParameterError, RequestError
from expunge.merges.adamerging import _drawn, entropy
from expunge.merges.case import merge
from expunge.merges.vectors import elected, trimmed
from expunge.rows import Row
from expunge.subjects.language import LanguageModel
from expunge.world.pictures.draw import digits
from expunge.world.pictures.models import Recipe, untrained

DOWN = "model.layers.1.mlp.down_proj.weight"
UP = "model.layers.2.mlp.up_proj.weight"
CLASSES = [str(i) for i in range(10)]


def dense(*values, base="b", name="w"):
    return Delta(base, {name: {"difference": torch.tensor(values)}})


def merged(deltas, how, name="w", **settings):
    return merge(deltas, how, settings).change(name, torch.Size((5,))).tolist()


ONE, TWO, THREE = dense(4.0, -3.0, 1.0, 0.1, 2.0), dense(-1.0, -2.0, 3.0, 0.2, 0.0), dense(-2.0, 1.0, 3.0, 0.3, 1.0)


def test_averaging_and_task_arithmetic_by_hand():
    assert merged([ONE, TWO], "average") == pytest.approx([1.5, -2.5, 2.0, 0.15, 1.0])
    assert merged([ONE, TWO], "task_arithmetic") == pytest.approx([3.0, -5.0, 4.0, 0.3, 2.0])
    assert merged([ONE, TWO], "task_arithmetic", coefficient=0.5) == pytest.approx(merged([ONE, TWO], "average"))
    assert merged([ONE, TWO], "task_arithmetic", coefficient=[1.0, -2.0]) == pytest.approx([6.0, 1.0, -5.0, -0.3, 2.0])
    with pytest.raises(ParameterError, match="3 coefficients for 2 deltas"):
        merged([ONE, TWO], "task_arithmetic", coefficient=[1.0, 1.0, 1.0])


def test_what_a_delta_does_not_move_counts_as_nothing():
    both = merge([ONE, dense(2.0, name="v")], "average")
    assert both.difference("w").tolist() == [2.0, -1.5, 0.5, pytest.approx(0.05), 1.0]
    assert both.difference("v").tolist() == [1.0]


def test_trimming_keeps_the_largest_of_all_tensors_together():
    two = Delta("b", {"v": {"difference": torch.tensor([0.5, -6.0])}, "w": {"difference": torch.tensor([[4.0, -0.4]])}})
    kept = trimmed(two, 0.5)
    assert kept.difference("v").tolist() == [0.0, -6.0]
    assert kept.difference("w").tolist() == [[4.0, 0.0]]
    assert trimmed(two, 1.0).difference("v").tolist() == [0.5, -6.0]
    assert trimmed(two, 0.01).difference("w").tolist() == [[0.0, 0.0]]


def test_signs_are_elected_by_the_sum():
    found = elected([torch.tensor([4.0, 1.0, 2.0]), torch.tensor([-1.0, -3.0, -2.0])])
    assert [value.tolist() for value in found] == [[4.0, 0.0, 0.0], [0.0, -3.0, 0.0]]


def test_ties_by_hand():
    # Two largest of each: (4, -3, ., ., .), (., -2, 3, ., .), (-2, ., 3, ., .). Sums 2, -5, 6: the third's -2 is
    # outvoted. Means over those that agree: 4, (-3 - 2) / 2, (3 + 3) / 2.
    assert merged([ONE, TWO, THREE], "ties", density=0.4) == [4.0, -2.5, 3.0, 0.0, 0.0]
    assert merged([ONE, TWO, THREE], "ties", density=0.4, coefficient=0.5) == [2.0, -1.25, 1.5, 0.0, 0.0]
    # Everything kept: 4 + -1 + -2 = 1, -3 + -2 + 1 = -4, 7, 0.6, 3.
    every = merged([ONE, TWO, THREE], "ties", density=1.0)
    assert every == pytest.approx([4.0, -2.5, 7 / 3, 0.2, 1.5])
    assert merged([ONE, ONE], "ties", density=1.0) == pytest.approx(ONE.difference("w").tolist())
    with pytest.raises(ParameterError, match="density"):
        merged([ONE, TWO], "ties", density=0.0)


def test_low_rank_and_places_merge_as_the_dense_changes_they_stand_for():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 8, generator=generator), torch.randn(6, 2, generator=generator)
    low = Delta("b", {"w": {"A": a, "B": b, "scale": torch.tensor(0.5)}})
    sparse = Delta("b", {"w": {"index": torch.tensor([3, 40]), "value": torch.tensor([1.0, -2.0])}})
    slices = Delta("b", {"w": {"slice": torch.tensor([4, 1]), "difference": torch.randn(2, 8, generator=generator)}})
    full = Delta("b", {"w": {"difference": torch.randn(6, 8, generator=generator)}})
    shape = torch.Size((6, 8))
    plain = [Delta("b", {"w": {"difference": one.change("w", shape)}}) for one in (low, sparse, slices, full)]
    for how in ("average", "task_arithmetic"):
        assert torch.allclose(
            merge([low, sparse, slices, full], how).change("w", shape), merge(plain, how).change("w", shape), atol=1e-6
        )
    assert torch.allclose(
        merge([low, full], "ties").change("w", shape), merge([plain[0], full], "ties").change("w", shape), atol=1e-6
    )
    other = Delta("b", {"w": {"A": a[:1], "B": b[:, :1], "scale": torch.tensor(1.0)}})
    assert merge([low, other], "average").kind == "low_rank"
    places = Delta("b", {"w": {"index": torch.tensor([40, 7]), "value": torch.tensor([5.0, 1.0])}})
    assert merge([sparse, places], "average").change("w", shape).flatten()[[3, 7, 40]].tolist() == [0.5, 0.5, 1.5]
    values, put = aligned("w", [sparse.entries["w"], places.entries["w"]])
    assert [value.tolist() for value in values] == [[1.0, 0.0, -2.0], [0.0, 1.0, 5.0]]
    assert put(values[0])["index"].tolist() == [3, 7, 40]
    with pytest.raises(DeltaError, match="without a base"):
        merge([sparse, slices], "average")


def test_other_bases_guards_and_single_deltas_are_refused():
    with pytest.raises(MismatchError, match="delta 2 was made on base other, delta 1 on b; only changes of one base"):
        merge([ONE, dense(1.0, base="other")])
    with pytest.raises(DeltaError, match="1 deltas to merge"):
        merge([ONE])
    with pytest.raises(DeltaError, match=r"delta 2 is a guard's \(guard\)"):
        merge([ONE, Delta("b", config={"name": "guard"})])
    memory = Delta("b", {"w": {key: torch.zeros(1) for key in FORMS["codebook"]}})
    with pytest.raises(DeltaError, match="delta 2 holds a memory at w"):
        merge([ONE, memory])
    with pytest.raises(MismatchError, match=r"shape \(5,\) in one delta and \(1,\)"):
        merge([ONE, dense(1.0)])
    with pytest.raises(RequestError, match="adamerging looks at what the model says"):
        merge([ONE, TWO], "adamerging")


# --- AdaMerging ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def language():
    return LanguageModel(*tiny("llama"))


@pytest.fixture(scope="module")
def vit():
    return untrained(CLASSES, Recipe(kind="vit", side=8, widths=(8,)), 0)


def moved(base, *names, seed=0, size=3e-2):
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(base.model.named_parameters())
    return Delta(
        base.fingerprint,
        {name: {"difference": size * torch.randn(parameters[name].shape, generator=generator)} for name in names},
    )


TEXTS = [Row(id=str(i), prompt=f"where was {i} born?", answer=f"Tivin {i}") for i in range(6)]


def sides(kind, language, vit):
    if kind == "language":
        return language, TEXTS, (DOWN, UP)
    return vit, digits(8)["train"][:12], ("vit.layers.1.mlp.fc2.weight", "classifier.weight")


@pytest.mark.parametrize("kind", ["language", "image"])
@pytest.mark.parametrize("by", ["task", "layer"])
def test_the_first_step_of_adamerging_follows_the_gradient_of_the_entropy(kind, by, language, vit):
    base, rows, (first, second) = sides(kind, language, vit)
    deltas = [moved(base, first, second), moved(base, first, seed=1)]
    settings = {"by": by, "steps": 1, "learning_rate": 1e-2, "batch_size": 4}
    found = merge(deltas, "adamerging", settings, subject=base, rows=[rows])
    coefficients = found.lineage["coefficients"]
    assert set(coefficients) == ({"all"} if by == "task" else {first, second})
    batch = next(_drawn([base.encode(row) for row in rows], 4, 0))

    def value(name, k, by_how_much):
        own = {n: [0.3, 0.3] for n in (first, second)}
        for n in own if name == "all" else [name]:
            own[n][k] += by_how_much
        entries = {
            n: {
                "difference": sum(
                    c * d.change(n, dict(base.model.named_parameters())[n].shape)
                    for c, d in zip(cs, deltas)
                    if n in d.entries
                )
            }
            for n, cs in own.items()
        }
        with torch.no_grad():
            return float(entropy(Delta(base.fingerprint, entries).apply(base), batch))

    for name, learnt in coefficients.items():
        for k in range(2):
            slope = (value(name, k, 0.1) - value(name, k, -0.1)) / 0.2
            if abs(slope) > 1e-4:  # Adam's first step is the learning rate, down the slope
                assert learnt[k] == pytest.approx(0.3 - 1e-2 * (1 if slope > 0 else -1), abs=1e-5)
    if by == "layer":
        assert coefficients[second][1] == pytest.approx(0.3)  # the second delta does not move it


@pytest.mark.parametrize("kind", ["language", "image"])
def test_adamerging_makes_the_model_surer_within_bounds_and_leaves_the_base_alone(kind, language, vit):
    base, rows, names = sides(kind, language, vit)
    deltas = [moved(base, *names, size=0.2), moved(base, *names, seed=1, size=0.2)]
    before = {name: p.detach().clone() for name, p in base.model.named_parameters()}
    settings = {"steps": 40, "learning_rate": 5e-2, "density": 0.5}
    found = merge(deltas, "adamerging", settings, subject=base, rows=[rows[:3], rows[3:]])
    assert found.lineage["entropy"]["last"] < found.lineage["entropy"]["first"]
    assert all(0 <= c <= 1 for each in found.lineage["coefficients"].values() for c in each)
    assert all(torch.equal(p, before[name]) for name, p in base.model.named_parameters())
    assert set(found.entries) == set(names)
    with pytest.raises(MismatchError, match="the deltas were made on base"):
        merge(deltas, "adamerging", subject=found.apply(base), rows=[rows])


def test_merging_from_the_command_line(language, tmp_path, capsys):
    base = tmp_path / "base"
    language.save(base)
    subject = LanguageModel.load(base)
    first, second = moved(subject, DOWN), moved(subject, DOWN, UP, seed=1)
    first.save(tmp_path / "first")
    second.save(tmp_path / "second")
    command = ["delta", "merge", str(tmp_path / "first"), str(tmp_path / "second"), "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--how", "ties", "--set", "density=0.5"]) == cli.DONE
    made = Delta.load(tmp_path / "out")
    expected = merge([first, second], "ties", {"density": 0.5})
    for name in (DOWN, UP):
        shape = second.difference(name).shape
        assert torch.allclose(made.change(name, shape), expected.change(name, shape))
    assert made.lineage["merge"] == "ties"
    assert made.apply(subject).fingerprint != subject.fingerprint
    (tmp_path / "rows.jsonl").write_text('{"prompt": "where was 1 born?", "completion": "Tivin"}\n' * 2)
    rows = ["--base", str(base), "--rows", str(tmp_path / "rows.jsonl"), "--set", "steps=2"]
    assert cli.main([*command, "--how", "adamerging", *rows]) == cli.DONE
    assert set(Delta.load(tmp_path / "out").lineage["coefficients"]) == {DOWN, UP}
    assert cli.main([*command, "--how", "tie"]) == 2
    assert "Did you mean ties" in capsys.readouterr().err


def test_the_example_of_the_docs_runs(language, tmp_path, monkeypatch):
    text = (Path(__file__).parent.parent / "docs" / "deltas.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"runs this block -->\n```python\n(.*?)```", text, re.S)
    monkeypatch.chdir(tmp_path)
    language.save("models/original")
    base = LanguageModel.load("models/original")
    moved(base, DOWN).save("runs/forget/delta")
    tuned = moved(base, DOWN, UP, seed=1)
    tuned.apply(base).save("models/dialect")
    exec(block, {})
    both = LanguageModel.load("models/both")
    own, made = (dict(one.model.named_parameters()) for one in (base, both))
    assert torch.allclose(made[UP] - own[UP], 0.8 * tuned.difference(UP), atol=1e-6)
