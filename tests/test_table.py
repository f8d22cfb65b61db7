"""Of an embedding only the rows that a run feeds are in training, and what comes out is what came out before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny

from expunge.errors import MismatchError
from expunge.methods.optimise import loop
from expunge.methods.optimise.loop import Guard, Log, Recipe, Training, draw, train
from expunge.methods.optimise.table import Table, fed_tokens
from expunge.methods.optimise.terms import Step, negative_log_likelihood
from expunge.subjects.language import LanguageModel
from expunge.subjects.packed import Encoded
from expunge.subjects.protocol import Taps


def likelihood(step: Step) -> torch.Tensor:
    return negative_log_likelihood(step.retain) - negative_log_likelihood(step.forget)


def apart(step: Step) -> torch.Tensor:
    return step.forget.layers[1].square().mean() - step.retain.layers[1].mean()


def rows(shift: int, first: int = 1) -> list[Encoded]:
    return [Encoded((first, 5 + i, 7, 90 + i, 30 + i + shift, 2), 3, 1, f"{shift}{i}") for i in range(6)]


def run(
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    *,
    whole: bool,
    dtype: torch.dtype = torch.float32,
    first: int = 1,
    recipe: dict[str, Any] | None = None,
    stop_at: int = 0,
    checkpoint: Path | None = None,
    held_out: list[Encoded] | None = None,
    **settings: Any,
) -> tuple[LanguageModel, Log, list[Table]]:
    """A short run; `whole`: with the whole table in training."""
    model, tokenizer = tiny(name)
    subject = LanguageModel(model.to(dtype), tokenizer).copy()
    subject.model.requires_grad_(True)
    made: list[Table] = []

    def choose(*arguments: Any) -> list[int] | None:
        return None if whole else fed_tokens(*arguments)

    def make(*arguments: Any) -> Table:
        made.append(Table(*arguments))
        return made[-1]

    monkeypatch.setattr(loop, "fed_tokens", choose)
    monkeypatch.setattr(loop, "Table", make)
    training = Training(**{"steps": 5, "batch_size": 2, "learning_rate": 1e-2, "max_grad_norm": 0.0, **settings})
    sides = {"forget": rows(0, first), "retain": rows(3, first)}
    drawn = draw(sides, ["forget"], training=training, generator=torch.Generator().manual_seed(0))

    def progress(done: int, _: int) -> None:
        if done == stop_at:
            raise KeyboardInterrupt

    log = train(
        subject,
        list(subject.model.parameters()),
        drawn,
        Recipe(**{"loss": likelihood, "sides": ("forget", "retain"), **(recipe or {})}),
        training,
        held_out=held_out or (),
        checkpoint=checkpoint,
        key="test",
        progress=progress,
    )
    return subject, log, made


def same(a: LanguageModel, b: LanguageModel) -> bool:
    pairs = zip(a.model.state_dict().values(), b.model.state_dict().values())
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_move_as_the_whole_table_does_bitwise(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    with_whole, log, _ = run("llama", monkeypatch, whole=True, dtype=dtype)
    with_rows, again, (made,) = run("llama", monkeypatch, whole=False, dtype=dtype)
    assert same(with_whole, with_rows)
    assert log.loss == again.loss
    assert made.rows.tolist() == sorted({token for row in [*rows(0), *rows(3)] for token in row.ids[:-1]})
    before = tiny("llama")[0].to(dtype).get_input_embeddings().weight
    moved = (with_rows.embedding.weight != before).any(1).nonzero()[:, 0]
    assert 0 < len(moved) <= len(made.rows)
    assert set(moved.tolist()) <= set(made.rows.tolist())


def test_a_tied_table_is_cut_only_where_no_head_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, through_head = run("gpt2", monkeypatch, whole=False)
    assert not through_head
    recipe = {"loss": apart, "taps": Taps(final=False, layers=(1,))}
    with_whole, _, _ = run("gpt2", monkeypatch, whole=True, recipe=recipe)
    with_rows, _, (made,) = run("gpt2", monkeypatch, whole=False, recipe=recipe)
    assert same(with_whole, with_rows)
    assert len(made.weight) < len(made.whole)


def test_a_padding_row_that_is_fed_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    before = tiny("phi3")[0].get_input_embeddings().weight
    with_whole, _, _ = run("phi3", monkeypatch, whole=True, first=0)
    with_rows, _, (made,) = run("phi3", monkeypatch, whole=False, first=0)
    assert made.rows[0] == tiny("phi3")[0].get_input_embeddings().padding_idx == 0
    assert torch.equal(with_rows.embedding.weight[0], before[0])
    assert not torch.equal(with_rows.embedding.weight[7], before[7])
    assert same(with_whole, with_rows)


def test_the_whole_table_moves_where_something_else_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    decayed, _, made = run("llama", monkeypatch, whole=False, weight_decay=0.1)
    assert not made
    assert not torch.equal(decayed.embedding.weight[200], tiny("llama")[0].get_input_embeddings().weight[200])
    for more in ({"around": lambda turn: turn.backward()}, {"after": lambda turn, moved: None}):
        _, _, made = run("llama", monkeypatch, whole=False, recipe=more)
        assert not made


def test_a_run_that_was_stopped_goes_on_and_one_that_left_the_band_is_stepped_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, log, _ = run("llama", monkeypatch, whole=False)
    with pytest.raises(KeyboardInterrupt):
        run("llama", monkeypatch, whole=False, checkpoint=tmp_path / "here", stop_at=3)
    resumed, again, _ = run("llama", monkeypatch, whole=False, checkpoint=tmp_path / "here")
    assert same(whole, resumed)
    assert again.loss == log.loss

    guard = Guard(band=0.0, patience=1, every=2)
    model, tokenizer = tiny("llama")
    held = [Encoded((1, 5, 7, 90 + i, 30, 2), 3, 1, "") for i in range(3)]
    back, log, (made,) = run("llama", monkeypatch, whole=False, guard=guard, held_out=held, learning_rate=1.0)
    assert log.stopped_by_guard
    assert log.stepped_back_to == 0
    assert same(back, LanguageModel(model, tokenizer))
    assert torch.equal(made.weight, model.get_input_embeddings().weight[made.rows])


def test_a_checkpoint_that_another_version_laid_out_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As it was before the table trained only the rows that are fed.
    with pytest.raises(KeyboardInterrupt):
        run("llama", monkeypatch, whole=True, checkpoint=tmp_path / "old", stop_at=3)
    started: list[Table] = []
    monkeypatch.setattr(Table, "write", lambda table: started.append(table))
    said = r"old holds step 3 of .* is 304 x 32 there, and \d\d x 32 moves now. Delete"
    with pytest.raises(MismatchError, match=said):
        run("llama", monkeypatch, whole=False, checkpoint=tmp_path / "old")
    assert not started

    tensors = load_file(tmp_path / "old" / "tensors.safetensors")
    last = max(int(name.split(".")[1]) for name in tensors if name.startswith("value."))
    shape = " x ".join(map(str, tensors[f"value.{last}"].shape))
    fewer = {name: tensor for name, tensor in tensors.items() if not name.endswith(f".{last}")}
    save_file(fewer, tmp_path / "old" / "tensors.safetensors")
    with pytest.raises(MismatchError, match=f"tensor {last + 1} is none there, and {shape} moves now"):
        run("llama", monkeypatch, whole=True, checkpoint=tmp_path / "old")
