"""ALU: which answers the agents touch, what they let out, and what happens when they fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import expunge.methods.guard.alu as module
from expunge.agents import Spent
from expunge.errors import AgentError, ParameterError, RequestError
from expunge.methods.guard.alu import Searched, alu, erased
from expunge.methods.guard.case import GuardCase
from expunge.methods.guard.forbidden import Forbidden
from expunge.methods.guard.targets import Targets, cards
from expunge.rows import Row
from expunge.tables.generations import Generations

FORGET = [
    Row("0", "Tivin", "Where was Ilva Morrow born?", entity="Ilva Morrow", value="Tivin"),
    Row("1", "potter", "What is the trade of Ilva Morrow?", entity="Ilva Morrow", value="potter"),
    Row("2", "The Ledger", "What did Bran Oak write?", entity="Bran Oak", value="The Ledger"),
]
RETAIN = [
    Row("3", "Carth", "Where was Mo Hale born?", entity="Mo Hale", value="Carth"),
    Row("4", "potter", "What is the trade of Mo Hale?", entity="Mo Hale", value="potter"),
]


class Said:
    """A subject that answers what it is told to."""

    name, fingerprint = "said", "f"

    def __init__(self, answers: dict[str, str]) -> None:
        self.answers = answers

    def generate(self, prompts: Any, **_: Any) -> Generations:
        texts = [[self.answers[text]] for _, text in prompts]
        return Generations([key for key, _ in prompts], [text for _, text in prompts], texts, [[True]] * len(texts))


class Scripted:
    """An agent that answers by what it is asked for."""

    name = "scripted"

    def __init__(self, **answers: str | Callable[[dict[str, Any]], str]) -> None:
        self.answers = answers
        self.spent = Spent()
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def write(self, tasks: Any) -> list[str]:
        found = []
        for task in tasks:
            (_, system), (_, data) = task.messages[:2]
            kind = {"You": "audit", "Rew": "erase", "Rat": "rate", "Mer": "merge"}[system[:3]]
            self.asked.append((kind, json.loads(data)))
            answer = self.answers[kind]
            found.append(answer if isinstance(answer, str) else answer(json.loads(data)))
        return found


def guarded(monkeypatch: Any = None, writer: Any = None, answers: dict[str, str] | None = None, **options: Any) -> Any:
    if writer is not None:
        monkeypatch.setattr(module, "named", lambda *_, **__: writer)
    return alu(GuardCase(Said(answers or {}), {"forget": FORGET, "retain": RETAIN}), **options)


def touched(question: str, answer: str, **options: Any) -> dict[str, list[str]]:
    return guarded(**options).revise([(question, answer)])[0].audit


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("Where was ILVA MORROW born?", "In Carth.", {"Ilva Morrow": ["names", "similar"]}),
        ("Who lives there?", "Ilva Morrow does.", {"Ilva Morrow": ["names"]}),
        ("Which town is it?", "It is Tivin.", {"Ilva Morrow": ["values"]}),
        ("Who wrote the Ledger?", "Somebody.", {"Bran Oak": ["descriptions"]}),
        ("What is the trade of Ilva?", "A potter.", {"Ilva Morrow": ["similar", "values"]}),
        ("What is the trade of Mo Hale?", "A potter.", {}),  # others are potters too
        ("What is the trade of Mo Hale?", "Tivinson.", {}),
        ("How are you?", "Well.", {}),
    ],
)
def test_rules_find_who_is_touched(question, answer, expected) -> None:
    assert touched(question, answer) == expected


def test_every_rule_can_be_switched_off() -> None:
    off = {"names": False, "values": False, "descriptions": False, "similar": False}
    for rule, question, answer in (
        ("names", "Is it Bran Oak?", "No."),
        ("values", "Which town?", "Tivin."),
        ("descriptions", "Who wrote The Ledger?", "Me."),
        ("similar", "Where was Ilva, Ilva Morr, born?", "Here."),
    ):
        assert touched(question, answer, **off) == {}
        assert [*touched(question, answer, **{**off, rule: True}).values()] == [[rule]]


def test_answers_that_touch_nothing_stay_as_they_are_and_cost_one_call() -> None:
    text = "  Mo Hale, a potter,\nwas born in Carth. "
    guard = guarded(answers={"q": text})
    assert guard.generate([(("0", "question"), "q")]).texts == [[text]]
    trace = guard.revise([("q", text)])[0]
    assert (trace.answer, trace.calls, trace.status) == (text, 1, "passed")
    outlet = guard.outlet("q")
    assert [outlet.feed(text[:5]), outlet.feed(text[5:]), outlet.close(), outlet.withheld] == ["", "", text, False]


NAMES = st.sampled_from(["Ilva Morrow", "Bran Oak", "Mo Hale", "Tivin", "potter", "the ledger", "Morrow"])
TEXTS = st.lists(st.one_of(NAMES, st.sampled_from([". ", ", ", " ", "and", "lives", "by the sea", "\n"])), max_size=12)


@settings(max_examples=200)
@given(TEXTS.map(" ".join), TEXTS.map(" ".join), st.integers(1, 5), st.integers(1, 3))
def test_nothing_of_a_touched_target_comes_out(question, answer, versions, best) -> None:
    guard = guarded(versions=versions, best=best)
    trace = guard.revise([(question, answer)])[0]
    said = [text for target in guard.targets.targets if target.name in trace.audit for text in target.said]
    assert not Forbidden(said).within(trace.answer)
    assert trace.answer == answer or trace.status != "passed"


def test_what_says_nothing_of_them_is_kept() -> None:
    answer = "Mo Hale was born in Carth. Ilva Morrow is from Tivin. Both live by the sea."
    trace = guarded().revise([("Who lives by the sea?", answer)])[0]
    assert trace.answer == "Mo Hale was born in Carth. something is from something. Both live by the sea."
    assert trace.status == "rewritten"


def test_versions_and_their_ratings() -> None:
    searched = Searched(["Ilva Morrow", "Tivin"], ["Ilva Morrow"])
    text = "She is known. Ilva Morrow, a singer, is from Tivin."
    made = erased(text, searched, 5, "No.")
    assert made == [
        "She is known. a singer",
        "She is known. something, a singer, is from something.",
        "She is known.",
        "She is known.",
        "No.",
    ]
    ratings = [searched.rating(version) for version in (text, "Morrow sings.", "She sings.", "")]
    assert ratings == [1, 2, 5, 4]
    assert erased(text, searched, 2, "No.")[-1] == "No."


def test_the_threshold_is_the_mean_of_the_best(monkeypatch) -> None:
    rated = iter(["[5, 5, 2]", "[5]", "[5, 3, 2]"])
    writer = Scripted(audit="[]", erase='["a", "b", "c"]', rate=lambda _: next(rated), merge="a b")
    guard = guarded(monkeypatch, writer, threshold=4.0)
    assert guard.revise([("Ilva Morrow?", "x")])[0].answer == "a b"  # (5 + 5 + 2) / 3 = 4, just enough
    trace = guard.revise([("Ilva Morrow?", "x")])[0]
    assert (round(trace.mean, 2), trace.answer, trace.status) == (3.33, "I don't know.", "refused")


def test_ratings_that_cannot_be_read_let_nothing_out(monkeypatch) -> None:
    writer = Scripted(audit="[]", erase='["a", "b"]', rate="five stars", merge="a b")
    trace = guarded(monkeypatch, writer).revise([("Ilva Morrow?", "x")])[0]
    assert (trace.answer, trace.scores) == ("I don't know.", [1.0, 1.0])
    assert [kind for kind, _ in writer.asked].count("rate") == 3
    short = Scripted(audit="[]", erase='["a", "b"]', rate="[5]", merge="a b")
    assert guarded(monkeypatch, short).revise([("Ilva Morrow?", "x")])[0].answer == "I don't know."


def test_no_agent_talks_a_name_into_an_answer(monkeypatch) -> None:
    writer = Scripted(audit="[]", erase='["Ilva Morrow", "b"]', rate=lambda d: json.dumps([5] * len(d["versions"])),
                      merge="b, by ILVA MORROW of Tivin")  # fmt: skip
    trace = guarded(monkeypatch, writer, best=2, threshold=3.0).revise([("Ilva Morrow?", "x")])[0]
    assert trace.scores == [1.0, 5.0]
    assert (trace.answer, trace.status) == ("I don't know.", "refused")


def test_an_agent_finds_more_than_rules_and_nobody_else(monkeypatch) -> None:
    writer = Scripted(audit='["Bran Oak", "Mo Hale"]', erase='["fine"]', rate="[5]", merge="fine")
    trace = guarded(monkeypatch, writer).revise([("Who wrote that book about what he did?", "He did.")])[0]
    assert trace.audit == {"Bran Oak": ["agent"]}
    assert trace.answer == "fine"
    none = Scripted(audit="[]")
    assert guarded(monkeypatch, none).revise([("How are you?", "Well.")])[0].answer == "Well."
    unclear = Scripted(audit="nonetheless", erase='["fine"]', rate="[5]", merge="fine")
    assert guarded(monkeypatch, unclear, candidates=0).revise([("Where was he born?", "x")])[0].status == "rewritten"


def test_when_an_agent_fails_nothing_goes_out(monkeypatch) -> None:
    class Broken(Scripted):
        def write(self, tasks: Any) -> list[str]:
            raise AgentError("down")

    trace = guarded(monkeypatch, Broken()).revise([("How are you?", "Well.")])[0]
    assert (trace.answer, trace.status) == ("I don't know.", "degraded")


def test_prompts_of_agents_do_not_grow_with_the_targets(monkeypatch) -> None:
    sizes = []
    for count in (30, 1000):
        rows = [Row(str(i), f"town {i}", f"Where was person {i} born?", entity=f"person {i}") for i in range(count)]
        writer = Scripted(audit="[]", erase='["fine"]', rate="[5]", merge="fine")
        monkeypatch.setattr(module, "named", lambda *_, writer=writer, **__: writer)
        guard = alu(GuardCase(Said({}), {"forget": rows, "retain": RETAIN}), likeness=0.9)
        guard.revise([("Where was person 7 born?", "town 7")])
        sizes.append([len(data.get("targets", [])) for _, data in writer.asked])
    assert sizes[0] == sizes[1]
    assert sizes[0][0] == 20


def test_order_and_repetition_of_targets_change_nothing() -> None:
    asked = [("Where was Ilva Morrow born?", "In Tivin, by the sea."), ("Who wrote The Ledger?", "Bran Oak, I think.")]
    first = guarded()
    rows = [FORGET[2], *FORGET[:2], FORGET[2]]
    again = alu(GuardCase(Said({}), {"forget": rows, "retain": RETAIN}))
    assert [trace.answer for trace in first.revise(asked)] == [trace.answer for trace in again.revise(asked)]
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint != guarded(threshold=3.0).fingerprint


def test_rows_that_name_nobody_are_targets_too() -> None:
    (one,) = cards([Row("0", "It is Tivin.", "Where?", entity="0")])
    assert (one.name, one.values) == ("", ("It is Tivin.",))
    assert Targets([one], []).audit("Where?", "Oh, it is Tivin.") == {0: ["values", "similar"]}


def test_what_it_cannot_be_made_of() -> None:
    with pytest.raises(RequestError, match="at least one target"):
        alu(GuardCase(SimpleNamespace(), {"forget": []}))
    with pytest.raises(ParameterError, match="threshold = 6"):
        guarded(threshold=6.0)
    with pytest.raises(ParameterError, match="names no model"):
        guarded(agent="http://127.0.0.1:9/v1")
