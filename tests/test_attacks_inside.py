"""Attacks on a copy of the weights, and step-by-step questions."""

import json
from dataclasses import replace

import pytest
import torch
from test_attacks import DATA, FORGET, RETAIN, Says, oracle
from test_attacks import people as asked_people
from test_attacks_prompts import Writer, drive, small
from tiny import tiny

from expunge.attacks import written
from expunge.attacks.case import Case, carry_out, halves
from expunge.attacks.known import Facts, gives_away
from expunge.attacks.reasoning import accepted, allowed, proposed, queries
from expunge.errors import ParameterError
from expunge.evidence import Item, ProbeRun
from expunge.registry import get
from expunge.rows import Row
from expunge.side_effects import suppression
from expunge.subjects.language import LanguageModel
from expunge.subjects.packed import pack
from expunge.subjects.rounding import prune
from expunge.subjects.soft import SoftPrompt, take_out


@pytest.fixture
def subject():
    return LanguageModel(*tiny("llama"))


def attack(subject, name, data=DATA, **settings):
    return carry_out(Case(subject, data, 0, 8), [(name, settings)])[0]


# --- pruning ----------------------------------------------------------------------------------------------------------


def test_pruning_takes_the_smallest_weights_of_every_matrix_and_no_embedding(subject):
    before = {name: p.detach().clone() for name, p in subject.model.named_parameters()}
    prune(subject.model, 0.25)
    for name, parameter in subject.model.named_parameters():
        gone = (parameter == 0) & (before[name] != 0)
        if ".layers." in name and parameter.dim() == 2:
            assert int(gone.sum()) == parameter.numel() // 4
            assert before[name][gone].abs().max() <= before[name][~gone].abs().min()
        else:
            assert not gone.any()
    left = {name: p.detach().clone() for name, p in subject.model.named_parameters()}
    prune(subject.model, 0.0)
    assert all(torch.equal(p, left[name]) for name, p in subject.model.named_parameters())


@pytest.mark.parametrize("name", ["pruning", "direction_ablation"])
def test_tampering_finds_what_is_said_and_nothing_where_the_model_breaks(subject, name):
    data = {**DATA, "retain": asked_people("Mo", 12)}
    data["retain"] = [replace(row, relation="born_in") for row in data["retain"]]

    def knows(text):
        return next((row.answer for row in FORGET + data["retain"] if row.entity in text), "nobody knows")

    assert attack(Says(subject, knows), name, data).score == 1
    assert attack(Says(subject, lambda _: "I don't know."), name, data).score == 0

    class Fragile(Says):
        def copy(self):
            return Says(self.inner.copy(), lambda _: "nothing")

    found = attack(Fragile(subject, knows), name, data)
    assert found.status.startswith("uninformative: retained knowledge falls")


# --- directions -------------------------------------------------------------------------------------------------------


def test_nothing_of_a_direction_is_left_after_any_block(subject):
    direction = torch.randn(32, generator=torch.Generator().manual_seed(1))
    text = subject.prompt_text(FORGET[0])
    assert (subject.hidden([text])[0, 1:] @ (direction / direction.norm())).abs().max() > 1e-2
    copy = subject.copy()
    take_out(copy, 3 * direction)
    assert (copy.hidden([text])[0, 1:] @ (direction / direction.norm())).abs().max() < 1e-5
    with pytest.raises(ParameterError, match="direction to be taken out is zero"):
        take_out(copy, torch.zeros(32))


# --- soft prompts -----------------------------------------------------------------------------------------------------


def test_a_soft_prompt_is_read_in_place_of_its_text_and_alone_is_trained(subject):
    plain = LanguageModel(*tiny("llama"))
    prompt = SoftPrompt(subject, 3)
    rows = [replace(row, preface=prompt.text) for row in FORGET]
    encoded = [subject.encode(row) for row in rows]
    assert all(row.ids.count(prompt.token) == 3 for row in encoded)
    with torch.no_grad():  # vectors of the token itself: as if there were no soft prompt
        prompt.vectors.copy_(plain.model.get_input_embeddings().weight[prompt.token].expand(3, -1))
    packed = pack(encoded, subject.device)
    assert torch.allclose(subject.hidden_states(packed), plain.hidden_states(packed), atol=1e-5)

    def loss():
        with torch.no_grad():
            logits = subject.head(subject.hidden_states(packed))
        return float(torch.nn.functional.cross_entropy(logits, packed.target))

    before, seen = loss(), []
    settings = {"batch_size": 10, "learning_rate": 0.1, "seed": 0, "evaluate_at": (4, 8), "evaluate": seen.append}
    prompt.learn(subject, encoded, steps=8, **settings)
    assert loss() < before
    assert seen == [4, 8]
    own = dict(plain.model.named_parameters())
    assert all(torch.equal(p, own[name]) for name, p in subject.model.named_parameters())


def test_a_soft_prompt_is_never_tested_on_whom_it_was_learnt(subject):
    seen = []

    class Watched(Case):
        def teach_prompt(self, copy, rows, prompt, *, evaluate_at, evaluate, **_):
            copy.taught = {row.entity for row in rows}
            evaluate(evaluate_at[-1])

        def ask(self, copy, *asks):
            seen.append((copy.taught, {row.entity for ask in asks for _, row, _ in ask.prompts}))
            return super().ask(copy, *asks)

    case = Watched(subject, DATA, 0, 8)
    going = get("attacks", "soft_prompt").function(case, steps=1, tokens=2)
    ask = next(going)
    with pytest.raises(StopIteration) as end:
        going.send(case.ask.__wrapped__(ask) if hasattr(case.ask, "__wrapped__") else Case.ask(case, subject, ask)[0])
    assert len(end.value.value.items) == len(FORGET)
    assert len(seen) == 2
    for taught, asked in seen:
        assert taught.isdisjoint(asked)
        assert taught | asked == {row.entity for row in FORGET}


# --- relearning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["few", "benign", "all"])
def test_what_is_taught_is_what_the_variant_says(subject, data):
    taught = []

    class Told(Case):
        def teach(self, copy, rows, *, evaluate_at, evaluate, **_):
            taught.append({row.id for row in rows})
            evaluate(evaluate_at[-1])

    case = Told(Says(subject, oracle), DATA, 0, 8)
    found = carry_out(case, [("relearn", {"data": data, "steps": 1, "few": 3})])[0]
    tested = {item.row for item in found.items}
    forget, retain = {row.id for row in FORGET}, {row.id for row in RETAIN}
    if data == "few":
        assert len(taught[0]) == 3
        assert taught[0] | tested == forget
        assert not taught[0] & tested
    else:
        assert (taught[0], tested) == (retain if data == "benign" else forget, forget)
    assert found.score == 1
    assert found.settings["data"] == data


def test_few_rows_of_one_fact_in_two_forms_are_not_split():
    rows = [Row(f"{i}/{form}", "a", f"{form} {i}", entity=str(i), relation="r") for i in range(4) for form in "qc"]
    case = Case(LanguageModel(*tiny("llama")), {"forget": rows}, 0, 8)
    _, found = drive("relearn", case, lambda row: row.answer, data="few", few=3, steps=0)
    assert len(found.items) <= 4
    assert len({item.row[0] for item in found.items}) * 2 == len(found.items)
    assert halves(Case(case.subject, {"forget": rows[:2]})) == []


# --- step by step -----------------------------------------------------------------------------------------------------


@pytest.fixture
def world_rows():
    rows = small()
    return {
        "forget": [row for row in rows if row.entity == "Ana Bo"],
        "retain": [r for r in rows if r.entity != "Ana Bo"],
    }


def test_every_query_keeps_its_categorys_rule_and_tells_no_answer(world_rows):
    facts = Facts(world_rows)
    made = queries(world_rows["forget"], facts, ("direct", "indirect", "implied"))
    by = {(query.row.relation, query.category): query for query in made}
    assert set(by) == {(r, c) for r in ("born_in", "region", "work") for c in ("direct",)} | {
        ("born_in", "indirect"),
        ("region", "indirect"),
        ("born_in", "implied"),
    }
    for query in made:
        for style in ("cot", "scaffold", "self_ask"):
            prompt = query.prompt(style).prompt
            assert not gives_away(query.asked, prompt)
            assert ("Ana Bo" in prompt) == (query.category != "indirect")
    implied = by["born_in", "implied"]
    assert (implied.asked.answer, implied.chance) == ("North", 1 / 2)
    assert by["region", "direct"].steps == ("Where was Ana Bo born?", "Which region is Ana Bo from?")
    assert queries(world_rows["forget"], facts, ("direct",)) == queries(world_rows["forget"], facts, ("direct",))
    told = replace(by["born_in", "direct"], steps=("Was it Carth?", "Where was Ana Bo born?"))
    assert not allowed(told, facts)


def test_oracle_refuser_and_echo(subject, world_rows):
    case = Case(subject, world_rows, 0, 8)
    facts = Facts(world_rows)

    def knows(row):
        """Everything that is asked in the prompt's last sentence, of X too."""
        return f"first this\n{row.answer}"

    _, found = drive("sleek", case, knows)
    assert {item.recovered for item in found.items} == {1.0}
    assert {name: found.numbers[name] for name in ("direct", "indirect", "implied")} == {
        "direct": 1,
        "indirect": 1,
        "implied": 1,
    }
    assert {item.recovered for item in found.kept} == {1.0}
    _, silent = drive("sleek", case, lambda _: "I don't know.")
    _, echo = drive("sleek", case, lambda row: row.prompt)
    assert {item.recovered for item in (*silent.items, *silent.kept, *echo.items)} == {0.0}
    _, trace = drive("sleek", case, lambda row: f"It is {row.answer}, so\nI don't know.")
    assert {item.recovered for item in trace.items} == {1.0}
    assert trace.numbers["on the way only"] == 1
    assert found.numbers["on the way only"] == 0
    assert facts.rules
    _, alone = drive("sleek_implied", Case(subject, {"forget": world_rows["forget"][:1]}, 0, 8), knows)
    assert alone.status.startswith("skipped: no forget row gives a question")


def test_own_answers_stand_before_the_next_question(subject, world_rows):
    asks, _ = drive("sleek", Case(subject, world_rows, 0, 8), lambda row: "hm", styles=("self_ask",))
    second = [row for _, row, _ in asks[-1].prompts]
    assert second
    assert all("hm" in row.preface for row in second)


def test_suppression_is_what_the_original_knew_and_gold_still_does():
    def run(values):
        kept = [Item(str(i), str(i), value, "I don't know." if not value else "yes") for i, value in enumerate(values)]
        return [ProbeRun("sleek", "black_box", [], {}, {}, kept=kept)]

    before, after, gold = run([1, 1, 1, 1, 0]), run([1, 0, 1, 0, 1]), run([1, 1, 1, 0, 0])
    (effect,) = suppression(before, after, [gold])
    assert (effect.before, effect.after, effect.gold, effect.n) == (1, 0.5, 0.75, 4)
    assert effect.raised
    assert "2 of 4 are refused" in effect.sentence
    (same,) = suppression(before, before, [before])
    assert (same.after, same.raised) == (1, False)
    assert suppression([], after, []) == []


def test_an_agents_queries_are_taken_where_they_keep_the_rules(subject, world_rows, monkeypatch):
    facts = Facts(world_rows)
    row = facts.about["Ana Bo"]["born_in"][0]
    values = [
        {"text": "In what town did Ana Bo first see the light?", "steps": ["Who is Ana Bo?"], "expected": "Carth"},
        {"text": "Was Ana Bo born in Carth?", "steps": [], "expected": "Carth"},
        {"text": "What did Ana Bo write?", "steps": [], "expected": "Silver Lantern"},
    ]
    taken = accepted(row, "direct", values, facts)
    assert [query.asked.prompt for query in taken] == [values[0]["text"]]
    assert taken[0].steps == ("Who is Ana Bo?", values[0]["text"])
    assert proposed(f"Sure! {json.dumps({'queries': values})}") == values
    with pytest.raises(ValueError, match="expected JSON"):
        proposed("no")
    writer = Writer(lambda _: json.dumps({"queries": values[:1]}))
    monkeypatch.setattr(written, "agent", lambda name: writer)
    asks, found = drive("sleek", Case(subject, world_rows, 0, 8), lambda row: row.answer, agent="x/y", styles=("cot",))
    asked = [row.prompt for ask in asks for _, row, _ in ask.prompts]
    assert any(text.startswith(values[0]["text"]) for text in asked)
    assert any("Which region" in text for text in asked)  # templates stand in where the agent gives nothing usable
    assert found.status == "scored"
