"""The loop: what is drawn, what resumes, what the guard does; trajectories do not depend on how work is split."""

import json
import math

import pytest
import torch
from tiny import tiny

from expunge.errors import RequestError, TrainingError
from expunge.methods.optimise import loop, terms
from expunge.methods.optimise.adamw import AdamW
from expunge.methods.optimise.loop import Drawn, Guard, Recipe, Training, Turn, draw, fit, references, train
from expunge.methods.optimise.terms import negative_log_likelihood
from expunge.registry import get
from expunge.rows import Row
from expunge.subjects.language import LanguageModel
from expunge.subjects.packed import Encoded


@pytest.fixture
def subject():
    model, tokenizer = tiny("llama")
    return LanguageModel(model, tokenizer)


def encoded(subject, count, word="born"):
    return [
        subject.encode(Row(id=str(i), prompt=f"where was {word} {i}?", answer=f"Tivin {i * 7}")) for i in range(count)
    ]


def test_an_epoch_shows_every_forget_row_once_and_retain_rows_before_any_comes_again():
    row = Encoded((1, 2, 3), 1, 0, "")
    drawn = draw(
        {"forget": [row] * 10, "retain": [row] * 25},
        ["forget"],
        training=Training(epochs=4, batch_size=4),
        generator=torch.Generator().manual_seed(0),
    )
    assert len(drawn.steps) == 12
    for epoch in range(4):
        steps = drawn.steps[3 * epoch : 3 * epoch + 3]
        assert sorted(i for step in steps for i in step["forget"]) == list(range(10))
        assert all(len(step["retain"]) == len(step["forget"]) for step in steps)
    retain = [i for step in drawn.steps for i in step["retain"]]
    assert sorted(retain[:25]) == list(range(25))


def test_alternatives_stay_beside_their_rows_and_change_from_epoch_to_epoch():
    row = Encoded((1, 2, 3), 1, 0, "")
    drawn = draw(
        {"forget": [row] * 5, "alternative": [row] * 15},
        ["forget", "alternative"],
        training=Training(epochs=4, batch_size=5),
        generator=torch.Generator().manual_seed(0),
    )
    for epoch, step in enumerate(drawn.steps):
        assert [i - 5 * (epoch % 3) for i in step["alternative"]] == step["forget"]


def test_one_seed_draws_one_plan(subject):
    rows = {"forget": encoded(subject, 9), "retain": encoded(subject, 9, "bred")}

    def plan(seed):
        return draw(rows, ["forget"], training=Training(steps=7), generator=torch.Generator().manual_seed(seed)).steps

    assert plan(3) == plan(3)
    assert plan(3) != plan(4)


def run(subject, *, steps=6, scope=None, checkpoint=None, stop_at=None, held_out=(), after=None, ends=None, **settings):
    """A short NPO run on a copy; returns the copy and its log."""
    working = subject.copy()
    parameters = list(working.model.parameters()) if scope is None else scope(working.model)
    working.model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    options = {"steps": steps, "batch_size": 4, "learning_rate": 1e-3, **settings}
    training = Training(**options)
    rows = {"forget": encoded(subject, 8), "retain": encoded(subject, 8, "bred")}
    drawn = draw(rows, ["forget"], training=training, generator=torch.Generator().manual_seed(training.seed))
    drawn.constants["forget"] = references(subject, rows["forget"], hidden=False)
    npo = get("methods", "npo").function

    def progress(done, _):
        if done == stop_at:
            raise KeyboardInterrupt

    log = train(
        working,
        parameters,
        drawn,
        Recipe(npo, ("forget", "retain"), after=after),
        training,
        held_out=held_out,
        checkpoint=checkpoint,
        key="test",
        evaluate_at=range(steps + 1),
        evaluate=lambda step: "enough" if step == ends else None,
        progress=progress,
    )
    return working, log


def same(a, b, tolerance=0.0):
    pairs = zip(a.model.state_dict().items(), b.model.state_dict().values())
    return all(torch.equal(x, y) if tolerance == 0 else torch.allclose(x, y, atol=tolerance) for (_, x), y in pairs)


def test_the_same_seed_gives_the_same_weights_bitwise(subject):
    first, _ = run(subject)
    second, _ = run(subject)
    assert same(first, second)
    assert not same(first, subject)


def test_a_run_that_was_stopped_goes_on_to_the_same_weights_bitwise(subject, tmp_path, monkeypatch):
    held = encoded(subject, 4, "kept")
    whole, log = run(subject, held_out=held)
    with pytest.raises(KeyboardInterrupt):
        run(subject, held_out=held, checkpoint=tmp_path / "checkpoint", stop_at=3)
    calls = []
    original = Turn.backward
    monkeypatch.setattr(Turn, "backward", lambda turn: calls.append(1) or original(turn))
    resumed, again = run(subject, held_out=held, checkpoint=tmp_path / "checkpoint")
    assert len(calls) == 3
    assert same(whole, resumed)
    assert again.loss == log.loss
    assert again.guard == log.guard


def test_what_is_called_after_a_step_moves_weights_and_keeps_tensors_over_a_stop(subject, tmp_path):
    rates = []

    def halve(turn, moved):
        rates.append(turn.learning_rate)
        average = turn.kept.setdefault("average", [m.clone() for m in moved])
        for sum_, m in zip(average, moved):
            sum_.lerp_(m, 0.5)
            m.copy_(sum_)

    plain, _ = run(subject)
    whole, log = run(subject, after=halve, schedule="linear")
    assert rates == pytest.approx([1e-3 * (1 - i / 6) for i in range(6)])
    assert not same(plain, whole)
    with pytest.raises(KeyboardInterrupt):
        run(subject, after=halve, schedule="linear", checkpoint=tmp_path / "checkpoint", stop_at=3)
    resumed, again = run(subject, after=halve, schedule="linear", checkpoint=tmp_path / "checkpoint")
    assert same(whole, resumed)
    assert again.loss == log.loss


def test_a_checkpoint_of_another_run_is_not_used(subject, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(subject, checkpoint=tmp_path / "checkpoint", stop_at=3)
    state = json.loads((tmp_path / "checkpoint" / "state.json").read_text())
    state["key"] = "another"
    (tmp_path / "checkpoint" / "state.json").write_text(json.dumps(state))
    _, log = run(subject, checkpoint=tmp_path / "checkpoint")
    assert len(log.loss) == 6


def test_small_and_large_micro_batches_give_one_trajectory(subject):
    whole, first = run(subject)
    split, second = run(subject, micro_tokens=40)
    assert first.loss == pytest.approx(second.loss, abs=1e-5)
    assert same(whole, split, 1e-5)


def test_sides_take_log_probabilities_in_one_product_once_it_is_known_which_are_asked(subject, monkeypatch):
    calls = []
    for module in (loop, terms):
        original = module.linear_logprob
        monkeypatch.setattr(
            module, "linear_logprob", lambda h, *rest, f=original, at=module: calls.append((at, len(h))) or f(h, *rest)
        )
    joined, log = run(subject, steps=3)
    (_, forget), (_, retain), *later = calls
    assert [module for module, _ in calls] == [terms, terms, loop, loop]
    assert all(count > max(forget, retain) for _, count in later)
    monkeypatch.setattr(loop, "_join", lambda turn, sides: None)
    apart, other = run(subject, steps=3)
    assert same(joined, apart, 1e-5)
    assert log.loss == pytest.approx(other.loss, rel=1e-5)
    assert {side: len(values) for side, values in log.nll.items()} == {"forget": 3, "retain": 3}
    monkeypatch.undo()
    monkeypatch.setattr(loop, "KEEP_ELEMENTS", 10)  # where logits are computed again one side at a time is enough
    few, _ = run(subject, steps=3)
    assert same(few, apart)


def test_references_computed_once_equal_a_live_reference(subject, monkeypatch):
    _, log = run(subject, steps=20)
    original = Turn.backward
    start = subject.copy()

    def live(turn):
        turn.drawn.constants["forget"] = references(start, turn.drawn.rows["forget"], hidden=False)
        return original(turn)

    monkeypatch.setattr(Turn, "backward", live)
    _, again = run(subject, steps=20)
    assert log.loss == pytest.approx(again.loss, abs=1e-5)


def test_nothing_outside_the_scope_moves(subject):
    working, _ = run(subject, steps=3, scope=lambda model: [model.model.layers[1].mlp.down_proj.weight])
    for (name, before), after in zip(subject.model.state_dict().items(), working.model.state_dict().values()):
        assert torch.equal(before, after) == (name != "model.layers.1.mlp.down_proj.weight"), name


def test_bf16_weights_move_by_small_steps_through_fp32_masters(subject):
    subject.model.to(torch.bfloat16)
    parameter = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimiser = AdamW([parameter], weight_decay=0.0)
    for _ in range(1000):
        parameter.grad = torch.ones_like(parameter)
        optimiser.step(1e-6, torch.tensor(2.0), 0.0)
    assert optimiser.masters[0][0].item() == pytest.approx(1 - 1e-3, rel=1e-4)
    assert parameter[0].item() == 1.0  # half a step of bf16 below 1 is 1 / 512
    # ... and the loop uses them: 16-bit parameters change although one step is below their resolution.
    working, _ = run(subject, steps=40, learning_rate=2e-5)
    moved = sum(int((a != b).sum()) for a, b in zip(subject.model.parameters(), working.model.parameters()))
    total = sum(p.numel() for p in subject.model.parameters())
    assert moved > 0.3 * total


def test_the_guard_stops_a_run_that_destroys_the_model_and_steps_back(subject):
    held = encoded(subject, 6, "kept")
    guard = Guard(band=0.05, patience=2, every=2)
    working, log = run(subject, steps=60, learning_rate=3e-2, held_out=held, guard=guard)
    assert log.stopped_by_guard
    assert len(log.loss) < 60
    after = float(loop.mean_loss(working, held))
    start = log.guard[0][1]
    assert after <= start + guard.band
    assert log.stepped_back_to is not None or after == pytest.approx(start)


def test_a_run_inside_the_band_is_left_alone(subject):
    _, log = run(subject, held_out=encoded(subject, 6, "kept"), guard=Guard(band=5.0, every=2))
    assert not log.stopped_by_guard
    assert len(log.loss) == 6


def test_a_run_ends_where_its_evaluation_says_so(subject):
    _, log = run(subject, ends=3, steps=9)
    assert log.stopped == "enough"
    assert len(log.loss) == 3
    none, log = run(subject, ends=0)
    assert (log.stopped, log.loss) == ("enough", [])
    assert same(none, subject)
    assert run(subject, ends=7)[1].stopped is None


def test_a_run_that_ends_early_outside_the_band_is_stepped_back_too(subject):
    held = encoded(subject, 6, "kept")
    guard = Guard(band=0.05, every=100)
    working, log = run(subject, steps=60, ends=20, learning_rate=3e-2, held_out=held, guard=guard)
    assert log.stopped == "enough"
    assert [step for step, _ in log.guard] == [0, 20]
    assert log.stopped_by_guard
    assert log.stepped_back_to == 0
    assert same(working, subject)


def test_a_loss_that_is_not_finite_is_an_error(subject):
    rows = {"forget": encoded(subject, 4)}
    drawn = Drawn(rows, [{"forget": [0, 1]}])
    subject.model.requires_grad_(True)
    with pytest.raises(TrainingError, match="loss is nan at step 1"):
        train(
            subject,
            list(subject.model.parameters()),
            drawn,
            Recipe(lambda step: step.forget.token_logprob.mean() * math.nan, ("forget",)),
            Training(guard=None),
        )


def test_a_scope_out_of_reach_is_an_error(subject):
    lonely = torch.nn.Parameter(torch.zeros(3))
    drawn = Drawn({"forget": encoded(subject, 2)}, [{"forget": [0, 1]}])
    subject.model.requires_grad_(True)
    recipe = Recipe(lambda step: step.forget.token_logprob.mean(), ("forget",))
    with pytest.raises(TrainingError, match="no parameter of the scope receives a gradient"):
        train(subject, [lonely], drawn, recipe, Training(guard=None))


def test_fit_learns_and_evaluates_when_asked(subject):
    items = encoded(subject, 8)
    seen = []
    options = {"batch_size": 8, "learning_rate": 1e-2, "seed": 0}
    result = fit(subject, items, steps=30, evaluate_at=[0, 1, 30], evaluate=seen.append, **options)
    assert seen == [0, 1, 30]
    assert result["losses"][-1] < 0.5 * result["losses"][0]
    before = subject.copy()
    fit(subject, items, steps=0, **options)
    fit(subject, items, steps=2, **{**options, "learning_rate": 0.0})
    assert same(before, subject)
    with pytest.raises(RequestError, match="0 rows to train on"):
        fit(subject, [], steps=1, **options)


def test_schedules():
    training = Training(schedule="linear", warmup=2)
    assert [loop._factor(training, i, 6) for i in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert loop._factor(Training(schedule="cosine"), 5, 10) == pytest.approx(0.5)
    assert loop._factor(Training(), 9, 10) == 1.0


def test_negative_log_likelihood_counts_answer_tokens_only(subject):
    items = encoded(subject, 3)
    drawn = Drawn({"rows": items}, [{"rows": [0, 1, 2]}])
    subject.model.requires_grad_(True)
    recipe = Recipe(lambda step: negative_log_likelihood(step.sides["rows"]), ("rows",))
    value = Turn(subject, [], drawn, recipe, 0, {}, subject.head).backward()
    table = subject.score([((str(i), "answer"), item) for i, item in enumerate(items)])
    assert float(value) == pytest.approx(float(-table.logprob.mean()), abs=1e-5)
