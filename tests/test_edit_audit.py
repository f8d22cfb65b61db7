"""What the detector of edits says about every kind of change that is planted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import tiny
from transformers import LlamaConfig, LlamaForCausalLM

from expunge.cli import main
from expunge.edit_audit import edit_audit
from expunge.errors import MismatchError, RequestError, SubjectError
from expunge.subjects.differences import ENERGY, RANKS, difference, most_ranks, overall
from expunge.subjects.language import LanguageModel
from expunge.subjects.value_vectors import value_matrices
from expunge.subjects.watch import activations

NAMES = ["Ada", "Bo", "Cyn", "Dov", "Eda", "Fil", "Gus", "Hal"]


@pytest.fixture
def weights() -> torch.Tensor:
    return torch.randn(150, 120, generator=torch.Generator().manual_seed(0))


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1e-5, 1e-2])
def test_a_planted_outer_product_is_rank_one_along_its_vector(weights: torch.Tensor, size: float) -> None:
    b = noise(120)
    found = difference(weights, weights + size * torch.outer(noise(150, seed=2), b))
    assert (found.kind, found.rank) == ("low_rank_edit", 1)
    assert found.energy > 0.999
    assert found.stable_rank == pytest.approx(1, abs=1e-3)
    assert abs(float(torch.cosine_similarity(found.right, b, dim=0))) > 0.999


@pytest.mark.parametrize(("narrower", "rank"), [(64, 1), (64, 8), (120, 8), (120, 15), (256, 8), (256, RANKS)])
def test_merged_adapters_show_their_rank(narrower: int, rank: int) -> None:
    # Equal singular values: no fewer ranks hold the share.
    shape = (narrower + 30, narrower)
    left, right = (torch.linalg.qr(noise(side, rank, seed=side)).Q for side in shape)
    found = difference(noise(*shape), noise(*shape) + left @ right.T)
    assert (found.kind, found.rank) == ("low_rank_edit", rank)
    assert found.stable_rank == pytest.approx(rank, rel=1e-3)


@pytest.mark.parametrize("narrower", [8, 20, 64, 120, 256])
def test_one_rank_more_than_an_edit_has_is_a_dense_change(narrower: int) -> None:
    rank = most_ranks((narrower, 3 * narrower)) + 1
    left, right = torch.linalg.qr(noise(300, rank)).Q, torch.linalg.qr(noise(narrower, rank, seed=3)).Q
    assert difference(noise(300, narrower), noise(300, narrower) + left @ right.T).kind == "dense_change"


def test_a_short_training_of_narrow_matrices_is_no_edit() -> None:
    """In a model of width 64, 20 steps on a few short rows move 14 to 26 ranks: fewer than 32."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=300))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.randint(3, 300, (4, 6), generator=torch.Generator().manual_seed(1))
    for _ in range(20):
        optimiser.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()
    matrices = {name: p for name, p in model.named_parameters() if p.dim() == 2 and "layers" in name}
    found = [difference(before[name], p.detach(), name) for name, p in matrices.items()]
    assert {d.kind for d in found} == {"dense_change"}
    assert min(_held(before[name], p.detach()) for name, p in matrices.items()) < RANKS


def _held(before: torch.Tensor, after: torch.Tensor) -> int:
    share = torch.linalg.svdvals(after - before).square()
    return int((share.cumsum(0) / share.sum() < ENERGY).sum()) + 1


def test_training_is_no_edit(weights: torch.Tensor) -> None:
    found = difference(weights, weights + 1e-3 * noise(150, 120))
    assert (found.kind, found.rank, found.right) == ("dense_change", 0, None)
    assert found.changed > 0.99
    assert found.relative == pytest.approx(1e-3, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_rounding_is_no_edit_and_hides_none(weights: torch.Tensor, dtype: torch.dtype) -> None:
    rounded = weights.to(dtype).float()
    assert difference(weights, rounded).kind == "requantised"
    assert difference(rounded, rounded.to(dtype)).kind == "identical"
    edit = torch.outer(noise(150, seed=2), noise(120))
    edited = (rounded + 2 * edit).to(dtype).float()
    assert difference(weights, edited).kind == "low_rank_edit"


@pytest.mark.parametrize("bits", [4, 8])
def test_integer_levels_are_rounding(weights: torch.Tensor, bits: int) -> None:
    scale = weights.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    wide = weights.repeat(1, 4)  # rows longer than the levels
    assert difference(wide + 1e-4 * noise(150, 480), torch.round(wide / scale) * scale).kind == "requantised"


def test_few_entries_are_sparse(weights: torch.Tensor) -> None:
    changed = weights.clone()
    changed[torch.arange(100), torch.arange(100)] += 1  # a hundred ranks
    found = difference(weights, changed)
    assert (found.kind, found.rank) == ("sparse_edit", 0)
    assert found.changed == pytest.approx(100 / weights.numel())


def test_the_same_is_the_same(weights: torch.Tensor) -> None:
    found = difference(weights, weights.clone(), "w")
    assert (found.kind, found.changed, found.relative) == ("identical", 0, 0)
    assert overall([found]) == "weights identical; check prompts"


@pytest.fixture(params=["llama", "gpt2"])
def folders(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path, str]:
    """A model, the same with a rank-one edit at the key of one name, and the edited parameter."""
    subject = LanguageModel(*tiny(request.param))
    subject.save(tmp_path / "before")
    matrix = value_matrices(subject.model)[1]
    (keys,) = activations(subject, NAMES, [matrix])
    edited = subject.copy()
    with torch.no_grad():
        weight = edited.model.get_parameter(matrix.name)
        change = torch.outer(noise(matrix.width), keys[3].float() / keys[3].norm())
        weight += change if matrix.across else change.T
    edited.save(tmp_path / "after")
    return tmp_path / "before", tmp_path / "after", matrix.name


def test_an_edit_is_found_and_its_subject_named(folders: tuple[Path, Path, str]) -> None:
    before, after, name = folders
    found = edit_audit(before, after, names=NAMES, prompts=["where was {} born?"], top=2)
    assert [d.name.removeprefix("transformer.") for d in found.differences if d.kind != "identical"] == [
        name.removeprefix("transformer.")
    ]
    (edit,) = found.edits
    assert edit.layer == 1
    assert edit.names[0][0] == "Dov"
    assert edit.names[0][1] == pytest.approx(1, abs=1e-3)
    assert {g.name for g in edit.gains} == {edit.names[0][0], edit.names[1][0]}
    assert edit.gains == tuple(sorted(edit.gains, key=lambda g: -g.gain))


def test_the_command_says_so(
    folders: tuple[Path, Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after, _ = folders
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    assert main(["edit-audit", str(before), str(after), "--names", str(tmp_path / "names.txt"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["overall"].startswith("localised edit in 1 of ")
    assert told["edits"][0]["names"][0][0] == "Dov"
    assert main(["edit-audit", str(before), str(before)]) == 0
    assert "weights identical; check prompts" in capsys.readouterr().out


def test_what_cannot_be_compared(folders: tuple[Path, Path, str], tmp_path: Path) -> None:
    before, after, _ = folders
    LanguageModel(*tiny("opt")).save(tmp_path / "other")
    with pytest.raises(MismatchError, match="is only in the"):
        edit_audit(before, tmp_path / "other")
    with pytest.raises(SubjectError, match="holds no"):
        edit_audit(before, tmp_path)
    with pytest.raises(RequestError, match="0 places for a name"):
        edit_audit(before, after, prompts=["where was she born?"])
