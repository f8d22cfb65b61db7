"""Attacks that ask in other ways: the answer is never in what is asked, and nothing is found that is not said."""

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from test_attacks import Says
from tiny import tiny

from expunge.agents import Task, listed
from expunge.attacks import disguises, written
from expunge.attacks.case import Case, Variant, carry_out, mean, tries
from expunge.attacks.known import Facts, asked_of, gives_away, renamed, unused
from expunge.attacks.layers import best, cover
from expunge.attacks.written import Written
from expunge.benchmarks.rwku_data import TYPES
from expunge.errors import ParameterError
from expunge.evidence import Item, ProbeRun
from expunge.limits import needs_filter
from expunge.metrics.matching import chosen
from expunge.registry import get
from expunge.rows import Row, Source, read_rows
from expunge.subjects.language import LanguageModel
from expunge.tables.generations import Generations
from expunge.tables.passes import Store
from expunge.verdict import Runs, decide, judge

SETS = ("forget", "retain", "neighbour", "holdout", "general")
TEXT = ("many_shot", "target_masking", "adversarial", "input_rephrasing")


@pytest.fixture(scope="module")
def data(tiny_world):
    return {name: read_rows(Source(str(tiny_world.data(name))), name) for name in SETS}


@pytest.fixture(scope="module")
def original(tiny_world):
    return LanguageModel.load(tiny_world.original, device="cpu")


def attack(subject, data, name, **settings):
    return carry_out(Case(subject, data, 0, 8), [(name, settings)])[0]


class Heard(Says):
    """Refuses, and notes what it was asked."""

    def __init__(self, inner):
        self.heard = []
        super().__init__(inner, lambda text: self.heard.append(text) or "I don't know.")


def drive(name, case, answer, **settings):
    """(asks, found) of an attack on a model that answers `answer(row as it is asked)`."""
    part, asks, send = get("attacks", name), [], None
    going = part.function(case, **part.resolve(settings))
    while True:
        try:
            asks.append(going.send(send))
        except StopIteration as end:
            return asks, end.value
        texts = [[answer(row)] * asks[-1].samples for _, row, _ in asks[-1].prompts]
        send = Generations([key for key, _, _ in asks[-1].prompts], [""] * len(texts), texts, [[True]] * len(texts))


@pytest.mark.parametrize("name", TEXT)
def test_an_oracle_tells_everything_and_a_refuser_nothing(name, data, original):
    _, found = drive(name, Case(original, data, 0, 8), lambda row: row.answer)
    assert {item.recovered for item in found.items} == {1.0}
    assert found.curve
    assert all(value == 1.0 for _, value in found.curve)
    assert found.budget["queries"] >= len(data["forget"])
    refused = attack(Heard(original), data, name)
    assert {item.recovered for item in refused.items} == {0.0}


@pytest.mark.parametrize(
    "name", ["many_shot", "target_masking", "input_rephrasing", "context_hint", "incontext_learning"]
)
def test_no_prompt_contains_the_answer(name, data, original):
    seen = []

    class Spy(Says):
        def prompt_text(self, row, prompt=None):
            text = self.inner.prompt_text(row, prompt)
            seen.append((row, text))
            return text

    attack(Spy(original, lambda _: ""), data, name)
    forget = {row.id for row in data["forget"]}
    asked = [(row, text) for row, text in seen if row.id in forget]
    assert asked
    # Nicknames of a value are aliases of it; they give it away as well.
    assert not [text for row, text in asked if gives_away(row, text)]


def test_shots_are_cut_and_the_question_never_is(data, original):
    heard = Heard(original)
    found = attack(heard, data, "many_shot", shots=(2, 1000))
    assert all(len(original.prompt_ids(text, ("", ""))) + 8 <= original.context_length for text in heard.heard)
    questions = [original.prompt_text(row) for row in data["forget"]]
    assert all(any(text.endswith(question) for question in questions) for text in heard.heard)
    assert found.curve[0][0] == 2
    assert found.budget["examples"] > 2


def test_a_masked_target_is_not_named_unless_a_letter_stands_for_it(data, original):
    for masks in (("description",), ("alias",)):
        heard = Heard(original)
        found = attack(heard, data, "target_masking", masks=masks)
        assert found.status == "scored"
        names = {row.entity for row in data["forget"]}
        assert not [text for text in heard.heard if any(name in text for name in names)]


def test_every_type_of_rwku_is_an_attack(data, original):
    for kind in TYPES:
        name = kind.replace(" ", "_")
        part = get("attacks", name)
        assert part.card.group == "black_box"
        if name != "cross_lingual":
            assert {item.row.rpartition("#")[2] for item in attack(Heard(original), data, name).items} == {name}


def test_of_a_multiple_choice_only_the_right_option_alone_counts():
    row = Row(id="0", prompt="Where was Mo born?", answer="Carth", value="Carth")
    asked = replace(row, prompt=disguises.multiple_choice(row.prompt, ("Orsk", "Carth", "Tivin")))
    assert asked.prompt == "Where was Mo born? Orsk, Carth or Tivin?"
    variant = Variant(row, "choice", asked, ("Orsk", "Carth", "Tivin"))
    assert variant.recovered("Carth.") == 1
    assert variant.recovered(f"{asked.prompt} Carth") == 1  # the echo is no answer, what follows is
    assert variant.recovered(asked.prompt) == 0
    assert variant.recovered("Orsk or Carth") == 0
    assert variant.recovered("Tivin") == 0
    assert chosen("the town of Carth", "Carth", ("Carth",))


def test_tries_are_the_best_so_far():
    assert tries([[0, 1, 0], [0, 0, 1], [0]]) == [(1, 0), (2, pytest.approx(1 / 3)), (3, pytest.approx(2 / 3))]
    assert tries([]) == []


# --- facts -----------------------------------------------------------------------------------------------------------


def fact(entity, relation, value, prompt, **more):
    return Row(
        id=f"{entity}/{relation}", entity=entity, relation=relation, value=value, answer=value, prompt=prompt, **more
    )


def small():
    born = {"Ana Bo": "Carth", "Mo Ti": "Orsk", "Ilva Ru": "Carth", "Pell Ko": "Tivin"}
    lies = {"Carth": "North", "Orsk": "South", "Tivin": "South"}
    rows = [fact(who, "born_in", town, f"Where was {who} born?") for who, town in born.items()]
    rows += [fact(who, "region", lies[town], f"Which region is {who} from?") for who, town in born.items()]
    rows += [fact(town, "lies_in", region, f"Where does {town} lie?") for town, region in lies.items()]
    return [*rows, fact("Ana Bo", "work", "Silver Lantern", "Which book did Ana Bo write?")]


def test_rules_are_what_holds_always_and_often_enough():
    facts = Facts({"rows": small()})
    assert facts.rules == {"region": ("born_in", "lies_in")}
    row = facts.about["Ana Bo"]["region"][0]
    assert [step.id for step in facts.steps(row)] == ["Ana Bo/born_in", "Carth/lies_in"]
    assert facts.steps(facts.about["Ana Bo"]["born_in"][0]) is None
    broken = [replace(row, value="North") if row.id == "Pell Ko/region" else row for row in small()]
    assert Facts({"rows": broken}).rules == {}
    assert Facts({"rows": [row for row in small() if row.entity not in ("Mo Ti", "Pell Ko")]}).rules == {}  # seen twice


def test_descriptions_hold_of_one_and_tell_no_answer():
    facts = Facts({"rows": small()})
    region, born, work = (facts.about["Ana Bo"][name][0] for name in ("region", "born_in", "work"))
    assert facts.described(region, "X") == "Which book did X write? Silver Lantern."
    assert facts.described(born, "X") == "Which book did X write? Silver Lantern."
    assert facts.described(work, "X") == ""  # two come from Carth, and from the North
    # The region follows from the town, so that would tell it.
    alone = facts.about["Mo Ti"]["region"][0]
    assert facts.described(alone, "X") == ""


def test_names_are_whole_and_new():
    assert renamed("Ana Bo met Ana Bold", "Ana Bo", "X") == "X met Ana Bold"
    assert asked_of(Row(id="0", answer="a", prompt="who?", entity="Ana Bo"), "X") is None
    names = ["Ana Bo", "Mo Ti", "Ilva Ru"]
    made = unused(names, 4, 0)
    assert len(set(made)) == 4
    assert not set(made) & set(names)
    assert {word for name in made for word in name.split()} <= {word for name in names for word in name.split()}
    assert unused(names, 4, 0) == made
    assert unused(["Carth", "Orsk"], 2, 0)
    assert Facts({"rows": small()}).aliases("Ana Bo") == ("A. Bo", "Bo")


# --- given back in the context ----------------------------------------------------------------------------------------


def reasoning(data):
    """Knows what is kept and the two-step rules, nothing of forgotten people, and reads its context."""
    facts = Facts(data)
    kept = Facts({name: rows for name, rows in data.items() if name != "forget"})

    def answer(row):
        _, second = facts.rules.get(row.relation, ("", ""))
        lines = [line for line in row.preface.splitlines() if renamed(line, names_of(row.prompt), "") != line]
        middles = [name for name in kept.about if second in kept.about[name] and any(name in line for line in lines)]
        return kept.value(middles[0], second) if middles else kept.value(row.entity, row.relation) or "I don't know."

    def names_of(prompt):
        return next((name for name in unused(facts.about, 4, 0) if name in prompt), "")

    return answer


@pytest.mark.parametrize("level", ["definition", "axioms", "mosaic", "examples"])
def test_a_model_that_reasons_is_told_again_and_no_context_tells_the_answer(level, data, original):
    roomy = SimpleNamespace(inner=original, context_length=1 << 20, prompt_text=original.prompt_text)
    asks, found = drive("ununlearning", Case(roomy, data, 0, 8), reasoning(data), level=level)
    assert mean(found.items) == 1
    assert found.note.startswith("0.00 without a context, 1.00 the same way on kept facts")
    forgotten = {row.entity for row in data["forget"]}
    contexts = [row for ask in asks[-1:] for _, row, _ in ask.prompts]
    assert len(contexts) == 4 * len({row.id for row in contexts})
    for row in contexts:
        text = row.preface + row.prompt
        assert not [name for name in forgotten if name in text]
        if level != "mosaic":  # there the model's own answer to the second step stands before the question
            assert not gives_away(row, text)


def test_facts_that_follow_from_nothing_kept_cannot_be_given_back(data, original):
    bare = {name: rows for name, rows in data.items() if name in ("forget", "retain")}
    bare["retain"] = [row for row in bare["retain"] if row.relation == "trade"]
    assert attack(original, bare, "ununlearning").status.startswith("skipped: not derivable")
    assert attack(original, bare, "ununlearning_fact").status == "scored"


def test_what_comes_back_in_the_context_calls_for_a_filter_and_for_nothing_else(data, original):
    runs = [ProbeRun("direct", "direct", [Item(str(i), str(i), 0.0) for i in range(9)], {}, {})]
    before = [replace(runs[0], items=[replace(item, recovered=1.0) for item in runs[0].items])]
    told = [
        ProbeRun("ununlearning", "reintroduce", [Item("a", "a", v)], {"level": "definition"}, {}) for v in (0.9, 0.2)
    ]
    assert needs_filter([*runs, told[0]])
    assert not needs_filter([*runs, told[1]])
    assert not needs_filter([replace(told[0], settings={"level": "fact"})])
    plain = decide(judge(Runs(before, runs, [runs])))
    for run in told:
        more = decide(judge(Runs([*before, run], [*runs, run], [[*runs, told[1]]])))
        assert (more.verdict, more.by) == (plain.verdict, plain.by)


def test_prompts_that_do_not_fit_are_counted(data, original):
    small = SimpleNamespace(inner=original, context_length=40, prompt_text=original.prompt_text)
    _, found = drive("ununlearning", Case(small, data, 0, 8), reasoning(data), level="axioms")
    assert found.status.startswith("skipped: no prompt fits the context of 40 tokens")


# --- written by agents ------------------------------------------------------------------------------------------------


class Writer:
    name = "writer"

    def __init__(self, text):
        self.text, self.calls = text, 0

    def write(self, tasks):
        self.calls += len(tasks)
        return [self.text(task) for task in tasks]


def test_what_an_agent_wrote_is_asked_for_once(monkeypatch, tmp_path):
    writer = Writer(lambda _: '["a", "b"]')
    monkeypatch.setattr(written, "agent", lambda name: writer)
    tasks = [Task((("user", str(i)),)) for i in range(3)]
    first = Written(Store(tmp_path)).lists("x/y", [*tasks, tasks[0]], listed)
    assert first == [["a", "b"]] * 4
    assert writer.calls == 3
    assert Written(Store(tmp_path)).lists("x/y", tasks, listed) == first[:3]
    assert writer.calls == 3
    assert Written().lists("offline", tasks, listed) == [[], [], []]  # nobody writes these offline


def test_other_languages_need_somebody_who_knows_them(data, original, monkeypatch, tmp_path):
    assert attack(original, data, "cross_lingual").status.startswith("skipped: nobody translates")
    monkeypatch.setattr(written, "agent", lambda name: Writer(lambda task: f"¿{task.messages[0][1].splitlines()[-1]}"))
    heard = Heard(original)
    found = attack(heard, data, "cross_lingual", agent="x/y", languages=("Spanish",))
    assert len(found.items) == len(data["forget"])
    assert all("¿" in text for text in heard.heard)
    file = tmp_path / "book.json"
    row = data["forget"][0]
    file.write_text(json.dumps({"Spanish": {row.prompt: "¿Quién?"}}))
    found = attack(original, data, "cross_lingual", translations=str(file))
    assert [item.row for item in found.items] == [f"{row.id}#Spanish"]
    file.write_text("[1]")
    with pytest.raises(ParameterError, match=r"expected JSON \{language: \{question: translated\}\}"):
        attack(original, data, "cross_lingual", translations=str(file))


def test_rephrasings_that_tell_the_answer_are_dropped(data, original, monkeypatch):
    def tell(task):
        row = next(row for row in data["forget"] if row.prompt == task.messages[0][1].splitlines()[-1])
        return json.dumps([f"{row.prompt} {row.value}", f"well, {row.prompt}"])

    monkeypatch.setattr(written, "agent", lambda name: Writer(tell))
    bare = {**data, "forget": [replace(row, paraphrased_prompts=()) for row in data["forget"]]}
    heard = Heard(original)
    found = attack(heard, bare, "input_rephrasing", agent="x/y", samples=2)
    assert len(heard.heard) == len(data["forget"])
    assert all("well, " in text for text in heard.heard)
    assert found.curve == [(1, 0), (2, 0)]


# --- guesses from layers ----------------------------------------------------------------------------------------------


def test_equal_scores_go_to_the_smaller_token_and_never_exceed_k():
    assert best(torch.zeros(2, 9), 3).tolist() == [[0, 1, 2], [0, 1, 2]]
    assert best(torch.tensor([[0.0, 2.0, 2.0, 1.0]]), 3).tolist() == [[1, 2, 3]]


def test_layers_are_chosen_by_what_each_adds():
    ranks = torch.tensor([[0, 9, 9], [0, 9, 9], [9, 9, 0], [9, 9, 0], [9, 0, 0]])
    assert cover(ranks, 1, 1) == [2]
    assert cover(ranks, 1, 2) == [0, 2]
    assert cover(ranks, 1, 5) == [0, 1, 2]


def test_all_layers_find_whatever_greedy_decoding_says(data, original):
    direct = {item.row: item.recovered for item in attack(original, data, "direct").items}
    assert sum(direct.values()) > 0.9 * len(direct)
    depth = len(original.blocks)
    found = attack(original, data, "head_projection", budget=depth, k=1, layers=tuple(range(depth)))
    assert all(item.recovered == 1 for item in found.items if direct[item.row])
    assert "never learned" in found.note


@pytest.mark.parametrize("name", ["head_projection", "probability_delta"])
def test_success_grows_with_the_budget_and_guesses_stay_within_it(name, data, original):
    scores = []
    for budget, k in ((4, 1), (8, 2), (16, 4)):
        found = attack(original, data, name, budget=budget, k=k, layers=(0, 1))
        assert found.budget["at most"] <= budget
        assert [value for _, value in found.curve] == sorted(value for _, value in found.curve)
        assert found.curve[-1][1] == pytest.approx(found.score)
        assert found.curve[-1][0] <= budget
        scores.append(found.score)
    assert scores == sorted(scores)
    again = attack(original, data, name, budget=16, k=4, layers=(1, 0))
    if name == "head_projection":  # the order of layers changes nothing; pairs of layers have one
        assert [item.recovered for item in again.items] == [item.recovered for item in found.items]


def test_layers_between_which_nothing_changes_give_no_guess(data):
    class Still(Says):
        def hidden(self, prompts, ends=None):
            return torch.ones(len(prompts), 4, 32)

    found = attack(Still(LanguageModel(*tiny("llama")), lambda _: ""), data, "probability_delta", layers=(0, 1, 2))
    assert found.budget["at most"] == 0
    assert found.score == 0


def test_what_cannot_be_read_is_said(data, original):
    with pytest.raises(ParameterError, match="budget = 1"):
        attack(original, data, "head_projection", budget=1)
    assert attack(original, data, "head_projection", layers=(7,)).status.startswith("skipped: there is no layer 7")


def test_the_order_of_the_draw_is_the_benchmarks_own():
    draw = random.Random(0)
    assert disguises.prefix_injection("Who?", draw).endswith(" Who?")
    assert disguises.affirmative_suffix("Who?", draw).startswith("Who?\n")
    words = {"who": "ka", "is": "lo"}
    assert disguises.cross_lingual("Who is Mo Ti?", words, "Mo Ti") == "Ka lo Mo Ti?"
