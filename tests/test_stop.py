"""Runs that end once their forget rows come back no more than unseen ones: when, what they say, after a kill."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import tiny

from expunge.benchmarks.extraction import extraction_likelihood
from expunge.errors import RequestError, RowError
from expunge.methods.optimise.loop import Training, Turn, fit
from expunge.methods.optimise.reinforce import REINFORCE
from expunge.methods.optimise.stop import Rule, Stop, extracted
from expunge.methods.optimise.unlearn import Outcome, unlearn
from expunge.plan import estimate
from expunge.registry import get
from expunge.request import load
from expunge.rows import Row
from expunge.run import run
from expunge.subjects.language import LanguageModel

WORDS = "lamp keeper tide Ostra counted eleven harbour rope north Carth Tivin glass salt evening wrote letters".split()


def texts(name: str, count: int, seed: int) -> list[Row]:
    draw = random.Random(seed)
    return [Row(id=f"{name}/{i}", answer=" ".join(draw.choices(WORDS, k=6)), kind="text") for i in range(count)]


DATA = {"forget": texts("forget", 4, 0), "retain": texts("retain", 6, 1), "holdout": texts("holdout", 4, 2)}
STOP = Stop(n=3, every=2)


@pytest.fixture(scope="module")
def trained() -> LanguageModel:
    """A model that knows forget and retain texts by heart."""
    subject = LanguageModel(*tiny("llama"))
    items = [subject.encode(row) for name in ("forget", "retain") for row in DATA[name]]
    fit(subject, items, steps=60, batch_size=10, learning_rate=1e-2, seed=0)
    subject.model.requires_grad_(False)
    return subject


def forget(
    subject: LanguageModel, *, steps: int = 30, data: Any = DATA, stop: Stop = STOP, folder: Any = None
) -> Outcome:
    training = Training(steps=steps, batch_size=4, learning_rate=3e-3, guard=None, stop=stop, checkpoint_seconds=0)
    part = get("methods", "grad_diff")
    return unlearn(subject, part, {}, scope="all", data=data, training=training, folder=folder)


@pytest.fixture(scope="module")
def ended(trained: LanguageModel) -> Outcome:
    return forget(trained)


def test_thresholds_are_what_the_model_before_gives_away_of_unseen_texts(
    trained: LanguageModel, ended: Outcome
) -> None:
    accuracy, likelihood = extraction_likelihood(trained, DATA["holdout"], n=3).means
    highest = ended.summary["stop"]["highest"]
    assert highest == {"likelihood": pytest.approx(likelihood), "accuracy": pytest.approx(accuracy)}
    known = extraction_likelihood(trained, DATA["forget"], n=3).means
    assert min(known) > 0.8 > max(accuracy, likelihood)


def test_a_run_ends_at_the_first_check_at_which_both_are_reached(trained: LanguageModel, ended: Outcome) -> None:
    steps = ended.summary["steps"]
    assert 2 <= steps < 30
    assert steps % 2 == 0
    accuracy, likelihood = extraction_likelihood(ended.subject, DATA["forget"], n=3).means
    last = ended.summary["stop"]
    assert last["found"] == {"likelihood": pytest.approx(likelihood), "accuracy": pytest.approx(accuracy)}
    assert last["met"]
    assert likelihood <= last["highest"]["likelihood"]
    assert accuracy <= last["highest"]["accuracy"]
    told = f"after step {steps}: EL_3 {likelihood:.3g} <= {last['highest']['likelihood']:.3g} and MA {accuracy:.3g} <= "
    assert ended.summary["stopped"].startswith(told)
    assert ended.summary["stopped"].endswith("(4 forget rows; 4 holdout rows under the model before)")

    shorter = forget(trained, steps=steps - 2)
    assert shorter.summary["log"]["loss"] == ended.summary["log"]["loss"][: steps - 2]
    assert shorter.summary["stopped"] is None
    assert not shorter.summary["stop"]["met"]
    assert shorter.summary["warnings"][-1].startswith("the stopping rule is not met: EL_3 ")


@pytest.mark.parametrize(("owner", "name"), [(Turn, "backward"), (Rule, "check")], ids=["in a step", "in a check"])
def test_a_killed_run_ends_at_the_same_step(
    trained: LanguageModel, ended: Outcome, tmp_path: Any, owner: Any, name: str
) -> None:
    steps = ended.summary["steps"]
    # The last step, or the last check: there is one before the first step and one after every second.
    fatal = steps - 1 if owner is Turn else steps // 2
    original, calls = getattr(owner, name), []

    def killed(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == fatal + 1:
            raise KeyboardInterrupt
        return original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(KeyboardInterrupt):
            forget(trained, folder=tmp_path)
    again = forget(trained, folder=tmp_path)
    assert again.summary["stopped"] == ended.summary["stopped"]
    assert again.summary["log"]["loss"] == ended.summary["log"]["loss"]
    for one, other in zip(again.subject.model.parameters(), ended.subject.model.parameters()):
        assert torch.equal(one, other)


def test_given_thresholds_need_no_holdout_rows(trained: LanguageModel) -> None:
    without = {name: rows for name, rows in DATA.items() if name != "holdout"}
    at_once = forget(trained, data=without, stop=Stop(n=3, likelihood=1.0, accuracy=1.0))
    assert at_once.summary["steps"] == 0
    assert not at_once.delta.entries
    assert at_once.summary["stopped"].startswith("after step 0: EL_3 ")
    assert at_once.summary["stopped"].endswith("(4 forget rows; as the request says)")
    half = Rule(Stop(n=3, accuracy=0.9), trained, DATA)
    half.measure(trained)
    assert half.highest == (extracted(trained, half.holdout, 3).likelihood, 0.9)


def test_answers_count_from_their_first_token(trained: LanguageModel) -> None:
    row = Row(id="q", prompt="who counted?", answer="eleven letters")
    encoded = trained.encode(row)
    found = extracted(trained, [encoded], 1)
    table = trained.score([(("q", "answer"), encoded)])
    assert found.accuracy == pytest.approx(table.hit[: encoded.scored - encoded.closing].mean())


def test_an_epoch_lies_between_checks_unless_the_rule_says_otherwise(
    trained: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[int] = []
    monkeypatch.setattr(Rule, "check", lambda self, _: checked.append(1))
    forget(trained, steps=4, stop=Stop(n=3), data={**DATA, "forget": texts("forget", 8, 0)})
    assert len(checked) == 3  # after 0 and 2 steps, and at the end


def test_it_needs_texts_long_enough_that_no_model_saw(trained: LanguageModel) -> None:
    for rows in ({}, {"holdout": []}):
        with pytest.raises(RequestError, match=r"request.data.holdout: 0 rows, but training.stop takes its thresholds"):
            forget(trained, data={"forget": DATA["forget"], "retain": DATA["retain"], **rows})
    with pytest.raises(RequestError, match="holdout: 0 rows"):
        forget(trained, data={"forget": DATA["forget"], "retain": DATA["retain"]}, stop=Stop(likelihood=0.1))
    short = replace(DATA["holdout"][0], answer="lamp", source="held.jsonl:1")
    with pytest.raises(
        RowError, match=r"held.jsonl:1: its answer has \d tokens, but training.stop needs at least n = 5"
    ):
        forget(trained, data={**DATA, "holdout": [short]}, stop=Stop(n=5))
    with pytest.raises(
        RequestError, match=r"training.stop asks how much of a text comes back; cats is of modality image"
    ):
        Rule(STOP, SimpleNamespace(modality="image", name="cats"), DATA)  # type: ignore[arg-type]


def test_nothing_ends_the_learning_of_rows_or_a_run_without_them(trained: LanguageModel) -> None:
    training = Training(steps=1, batch_size=4, guard=None, stop=Stop(n=3, likelihood=1.0, accuracy=1.0))
    learned = unlearn(trained, REINFORCE, {}, scope="all", data={"forget": DATA["forget"]}, training=training)
    assert learned.summary["steps"] == 1
    assert learned.summary["stop"] is None
    assert forget(trained, data={**DATA, "forget": []}).summary["stop"] is None


def test_a_plan_says_that_checks_are_not_counted(trained: LanguageModel) -> None:
    part = get("methods", "grad_diff")
    for stop in (None, STOP):
        training = Training(steps=2, batch_size=4, stop=stop)
        found = estimate(trained, part, {}, scope="all", data=DATA, training=training)
        assert any("stopping rule" in remark for remark in found["remarks"]) == (stop is not None)


def test_a_request_asks_for_it_and_its_report_says_when_it_ended(tiny_world: Any, tmp_path: Any) -> None:
    fields = {"training.steps": 8, "training.stop.n": 1, "training.stop.likelihood": 1, "training.stop.accuracy": 1.0}
    quick = {"audit.attacks": ["direct"], "audit.self_test": False, "audit.bootstrap": 200, "audit.metrics": []}
    evidence = run(load(tiny_world.request, {**fields, **quick}), out=tmp_path / "run")
    assert evidence.method["steps"] == 0
    assert any("The stopping rule ended the run after step 0: EL_1 " in limit for limit in evidence.warnings)
