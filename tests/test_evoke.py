"""EVOKE and LTI: files, scores by hand, the loss of an imitating value, and what must not change."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import loud as subject
from tiny import tiny

from expunge import registry
from expunge.benchmarks.case import Bench
from expunge.benchmarks.evoke import evoke, judge
from expunge.benchmarks.evoke_data import OVERFIT, Item, read
from expunge.benchmarks.evoke_mini import MAIN, SPECIFICITY, mini
from expunge.edit_scores import questions
from expunge.edits import EditRow, read_edits
from expunge.errors import ParameterError, RequestError, RowError
from expunge.methods.edit.case import EditCase
from expunge.methods.edit.lti import _read
from expunge.methods.edit.values import located, lookup
from expunge.rows import Row, Source
from expunge.subjects.language import LanguageModel
from expunge.subjects.tails import Tails, edited_matrix
from expunge.world.facts import make

EDIT = EditRow("a", "Ilva was born in", "Tivin north", "Ilva", ("Carth",))
PREFIXES = ("So they say.", "In the north.")
MINI = (MAIN, SPECIFICITY)
RECORD = {
    "case_id": 3,
    "requested_rewrite": {
        "prompt": "{} was born in",
        "subject": "Orin Valk",
        "relation_id": "P19",
        "target_new": {"str": "Maretta", "id": "Q1"},
        "target_true": {"str": "Tolsk"},
    },
    "paraphrase_prompts": ["The birthplace of Orin Valk is"],
    "neighborhood_prompts": ["Ilse Moro was born in", {"prompt": "Ada Fenn was born in", "answer": "Pell"}],
    "prefix_distraction": ["Orin Valk was born in Maretta. Ilse Moro was born in"],
    "portability": {"New Question": "Where is he from?", "New Answer": "Sarn", "Original Answer": "Osk"},
}
OTHER = {
    "case_id": 3,
    "requested_rewrite": RECORD["requested_rewrite"],
    "subject_specificity": {"prompt": "{} works as a", "answer": {"value": "weaver"}},
}


pytestmark = pytest.mark.usefixtures("own_cache")


def edit_case(model, **changes):
    return EditCase(model, **{"data": {}, "edits": [EDIT], "prefixes": PREFIXES, **changes})


def run(name, model, **settings):
    return registry.get("methods", name).function(edit_case(model), **settings)


def written(folder, *records, name="evoke.json"):
    (folder / name).write_text(json.dumps(list(records)), encoding="utf-8")
    return folder / name


# --- files ------------------------------------------------------------------------------------------------------------


def test_published_records_of_one_rewrite_are_one_edit(tmp_path):
    paths = [written(tmp_path, RECORD), written(tmp_path, OTHER, {**OTHER, "case_id": 9}, name="specificity.json")]
    (case,) = read(paths, "{question} The answer is")
    assert (case.edit.id, case.edit.prompt, case.edit.target_new) == ("3", "Orin Valk was born in", "Maretta")
    assert case.items == (
        Item("efficacy", "Orin Valk was born in", "Maretta", "Tolsk"),
        Item("paraphrase", "The birthplace of Orin Valk is", "Maretta", "Tolsk"),
        Item("prefix_distraction", "Orin Valk was born in Maretta. Ilse Moro was born in", "Tolsk"),
        Item("relation_specificity", "Ilse Moro was born in", "Tolsk"),
        Item("relation_specificity", "Ada Fenn was born in", "Pell"),
        Item("multi_hop", "Where is he from? The answer is", "Sarn", "Osk"),
        Item("subject_specificity", "Orin Valk works as a", "weaver"),
    )


def test_items_whose_right_answer_is_the_new_object_are_dropped_and_counted(tmp_path):
    near = [{"prompt": "Ada Fenn was born in", "answer": " maretta."}]
    (case,) = read([written(tmp_path, {**RECORD, "neighborhood_prompts": near, "portability": {}})], "{question}")
    assert case.dropped == Counter(relation_specificity=1)
    assert {item.task for item in case.items} == {"efficacy", "paraphrase", "prefix_distraction"}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"requested_rewrite": None}, r"evoke\.json: record 1: field 'requested_rewrite' is None, expected an object"),
        (
            {"case_id": 4, "requested_rewrite": {**RECORD["requested_rewrite"], "target_true": {"str": "Maretta"}}},
            "equals",
        ),
        ({"requested_rewrite": {**RECORD["requested_rewrite"], "subject": 3}}, "requested_rewrite.subject' is 3"),
        (
            {"requested_rewrite": {**RECORD["requested_rewrite"], "prompt": "He was born in"}},
            "does not stand in the prompt",
        ),
        ({"paraphrase_prompts": "x"}, "field 'paraphrase_prompts' is 'x', expected a list"),
        ({"portability": {"New Question": "Where?"}}, "field 'portability.New Answer' is None, expected text"),
        ({"neighborhood_prompts": [{"prompt": "x"}]}, "field 'neighborhood_prompts.answer' is None"),
        ({"subject_specificity": ["x"]}, "expected an object with 'prompt'"),
    ],
)
def test_what_is_wrong_with_a_record_names_file_record_and_field(tmp_path, changes, sentence):
    with pytest.raises(RowError, match=sentence):
        read([written(tmp_path, {**RECORD, **changes})], "{question}")


def test_files_that_cannot_be(tmp_path):
    with pytest.raises(RowError, match=r"none\.json does not exist"):
        read([tmp_path / "none.json"], "")
    with pytest.raises(RowError, match="at least one record"):
        read([written(tmp_path)], "")
    other = {**RECORD, "requested_rewrite": {**RECORD["requested_rewrite"], "target_new": "Pell"}}
    with pytest.raises(RowError, match="record 2: case_id '3' was used in record 1 already"):
        read([written(tmp_path, RECORD, other)], "")


# --- scores -----------------------------------------------------------------------------------------------------------


def known(tmp_path):
    (case,) = read([written(tmp_path, RECORD), written(tmp_path, OTHER, name="b.json")], "{question}")
    return case


def test_measures_by_hand(tmp_path):
    case = known(tmp_path)
    new, old = {"Maretta": (np.log(0.4), np.log(0.1))}, {"Tolsk": (np.log(0.2), np.log(0.2))}
    hop = {"Sarn": (np.log(0.3), np.log(0.3)), "Osk": (np.log(0.35), np.log(0.35)), "Maretta": (np.log(0.1), -5.0)}
    said = [new | old, new | old, new | old, old | {"Maretta": (np.log(0.2), -9.0)}]
    said += [{"Pell": (-0.1, -0.1)} | new, hop, {"weaver": (-2000.0, -2000.0), "Maretta": (-3000.0, -3000.0)}]
    found = judge(case, said)
    assert found[0].measures == {"score": 1.0, "dp": pytest.approx(0.4)}
    assert found[0].exact == {"score": 0.0, "dp": pytest.approx(0.1)}  # whole sequences: 0.1 against 0.2
    assert found[2].measures == {"eos": 0.0, "dp": pytest.approx(0.4), "cap": pytest.approx(0.2)}
    assert found[3].measures["eos"] == 0.0, "a tie fails"
    assert found[4].measures["eos"] == 1.0
    hopped = found[5].measures
    assert (hopped["eos"], hopped["ams"]) == (1.0, 0.0)
    assert (hopped["cap"], hopped["oap"], hopped["dp"]) == pytest.approx((0.3, 0.35, 0.1))
    assert found[6].measures["eos"] == 1.0, "compared before they become 0"


def test_shares_do_not_change_when_all_probabilities_of_an_item_are_scaled(tmp_path):
    case = known(tmp_path)
    draw = np.random.default_rng(0)
    for _ in range(20):
        said = [{a: (v, v) for a, v in zip(("Maretta", "Tolsk", "Pell", "Sarn", "Osk", "weaver"), -draw.random(6))}] * 7
        scaled = [{a: (2 * m - 1, 2 * t - 1) for a, (m, t) in one.items()} for one in said]
        for a, b in zip(judge(case, said), judge(case, scaled)):
            for name in ("score", "eos", "ams"):
                assert a.measures.get(name) == b.measures.get(name)
            assert a.measures["dp"] != b.measures["dp"]


def test_a_model_that_always_answers_the_new_object_is_overfit_everywhere(tmp_path):
    case = known(tmp_path)
    said = [
        {
            a: (0.0, 0.0) if a == "Maretta" else (-9.0, -9.0)
            for a in ("Maretta", "Tolsk", "Pell", "Sarn", "Osk", "weaver")
        }
    ] * 7
    for one in judge(case, said):
        assert one.measures.get("score", 1.0) == 1.0
        assert one.measures.get("eos", 0.0) == 0.0


# --- the benchmark ----------------------------------------------------------------------------------------------------


WORLD = {"people": 20, "forget": 3, "neighbours": 2, "holdout": 3}


def test_an_edit_that_changes_nothing_scores_as_before_and_a_killed_command_goes_on(tmp_path):
    world = make(0, **WORLD)
    model = LanguageModel(*tiny("llama"))
    bench = Bench(model, tmp_path / "bench", world=world, bootstrap=10)
    card = evoke(bench, method={"name": "ft_m", "steps": 0}, limit=3)
    for one in card.measured:
        assert one.after.value == pytest.approx(one.before.value, rel=1e-4), one.metric
    files = list((tmp_path / "bench" / "edits").iterdir())
    assert len(files) == 3
    kept = json.loads(files[0].read_text())
    files[0].write_text(json.dumps({**kept, "warnings": ["from the file"]}))
    assert "from the file" in evoke(bench, method={"name": "ft_m", "steps": 0}, limit=3).notes
    changed = evoke(bench, method={"name": "ft_m", "steps": 3, "learning_rate": 0.1}, limit=3)
    assert changed.value("efficacy_dp") > changed.value("efficacy_dp", "before")
    told_ = next(table for table in card.tables if table.title.startswith("Told"))
    assert [row[:2] for row in told_.rows] == [["efficacy", 3], ["multi hop", 3]]


def test_the_mini_version_follows_from_the_world(tmp_path):
    world = make(1, **WORLD)
    mini(world, tmp_path)
    cases = read([tmp_path / "evoke.json", tmp_path / "subject_specificity.json"], "{question}")
    assert len(cases) == len(world.members("forget", "retain"))
    for case in cases:
        person = world.people[case.edit.subject]
        assert case.edit.ground_truth == (person.born_in,)
        by = {task: [item for item in case.items if item.task == task] for task in OVERFIT}
        (hop,) = by["multi_hop"]
        assert (hop.answer, hop.original) == (world.region[case.edit.target_new], world.region[person.born_in])
        assert [item.answer for item in by["subject_specificity"]] == [person.trade, person.teacher, person.work]
        assert all(item.answer == person.born_in for item in by["relation_specificity"])


def test_editors_that_learn_from_other_facts_are_given_what_is_not_asked(tmp_path):
    world = make(0, **WORLD)
    bench = Bench(LanguageModel(*tiny("llama")), tmp_path / "bench", world=world, bootstrap=0)
    method = {"name": "mend", "layers": [0, 1], "steps": 1, "batch": 2, "rank": 2}
    card = evoke(bench, method=method, limit=1)
    count = 3 * len(world.members("neighbour", "holdout"))
    assert f"mend was given {count} other facts." in card.notes
    folder = Path(bench.source(mini))
    shown = read_edits(Source(str(folder / "demonstrations.jsonl")))
    asked = {item.prompt for case in read([folder / name for name in MINI], "{question}") for item in case.items}
    assert asked.isdisjoint(one.prompt for one in questions(shown))
    for name in (*MINI, "corpus.jsonl"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(RequestError, match=r"mend learns from other facts .* there are 0; give at least 2 edit rows"):
        evoke(Bench(bench.subject, tmp_path / "other", data=str(tmp_path)), method=method, limit=1)


# --- LTI --------------------------------------------------------------------------------------------------------------

QUIET = {"layer": 0, "covariance": False, "steps": 3, "clamp": 50.0}


def test_without_imitation_it_is_the_editor_without_its_essence_term():
    model = subject()
    plain = run("rome", model, **QUIET, kl=0.0)
    same = run("lti", model, editor={"rome": QUIET}, subject_weight=0, output_weight=0, least=0.0)
    other = run("lti", model, editor={"rome": QUIET}, least=0.0)
    name = next(iter(plain.entries))
    assert torch.allclose(plain.difference(name), same.difference(name), atol=1e-6)
    assert not torch.allclose(plain.difference(name), other.difference(name), atol=1e-3)


def test_told_nothing_there_is_nothing_to_learn():
    model = subject()
    quiet = {"rome": {**QUIET, "decay": 0.0}}
    made = edit_case(model)
    delta = registry.get("methods", "lti").function(made, editor=quiet, context="", fact_weight=0.0, least=0.0)
    assert made.summary["rome"]["loss_before"] == pytest.approx([0.0], abs=1e-5)
    assert all(float(delta.difference(name).abs().max()) == 0.0 for name in delta.entries)


def plain_states(model, ids, at, change, middle):
    """(final logits, log-softmax of the head's reading of the stream after `middle`) of one whole pass."""
    streams = []

    def add(_, __, output):
        output = output.clone()
        output[0, at] += change
        return output

    handles = [
        model.model.get_submodule(edited_matrix(model, 0).owner).register_forward_hook(add),
        model.model.get_submodule(model.blocks[middle].name).register_forward_hook(
            lambda _, __, output: streams.append(output[0] if isinstance(output, tuple) else output)
        ),
    ]
    with torch.no_grad():
        logits = model.model(input_ids=torch.tensor([ids])).logits[0]
        stream = streams[0][0] if streams[0].dim() == 3 else streams[0]
        read = model.model.lm_head(model.model.model.norm(stream[at]))
    for handle in handles:
        handle.remove()
    return logits.log_softmax(-1), read.log_softmax(-1)


def divergence(wanted, found):
    return float((wanted.exp() * (wanted - found)).sum())


@pytest.mark.parametrize("middle", [1, 2])
def test_the_loss_is_that_of_the_paper(middle):
    """By hand, from whole passes: two divergences from the told model at its own positions, and the target's NLL."""
    model = subject()
    made = edit_case(model)
    weights = {"subject_weight": 0.7, "output_weight": 1.3, "fact_weight": 0.4}
    editor = {"rome": {**QUIET, "steps": 2, "decay": 0.0}}
    delta = registry.get("methods", "lti").function(made, editor=editor, middle=middle, least=0.0, **weights)
    (fact,) = located(edit_case(model), 2)
    # The change of the value follows from what was written: the key of the average is met exactly.
    change = torch.zeros(32)
    goal_delta = value_of(model, fact, delta)
    apart, further, nll = [], [], 0.0
    for one, preface in zip(fact.lookups, ("", *(f"{text} " for text in PREFIXES))):
        teacher = lookup(model, EDIT.row(preface=EDIT.told() + preface), "Ilva")
        says, reads = plain_states(model, one.tokens.ids[:-1], one.at, goal_delta, middle)
        wants, knows = plain_states(model, teacher.tokens.ids[:-1], teacher.at, change, middle)
        places = range(one.tokens.start - 1, len(one.tokens.ids) - 1)
        shift = teacher.tokens.start - one.tokens.start
        apart.append(divergence(knows, reads))
        further.append(np.mean([divergence(wants[at + shift], says[at]) for at in places]))
        nll -= np.mean([float(says[at, one.tokens.ids[at + 1]]) for at in places]) / len(fact.lookups)
    last = len(fact.essence) - 1
    says, reads = plain_states(model, fact.essence, last, goal_delta, middle)
    wants, knows = plain_states(model, fact.essence, last, change, middle)
    apart.append(divergence(knows, reads))
    further.append(divergence(wants[-1], says[-1]))
    expected = 0.7 * np.mean(apart) + 1.3 * np.mean(further) + 0.4 * nll
    assert made.summary["rome"]["loss_after"][0] == pytest.approx(expected, rel=2e-3)


def value_of(model, fact, delta):
    """The value that was optimised: what the change of the matrix gives at the key it was made for."""
    from expunge.methods.edit.values import keys

    (name,) = delta.entries
    found, _ = keys(model, [fact], [0])
    return delta.difference(name) @ found[0].mean[0]


@pytest.mark.parametrize("term", ["subject_weight", "output_weight", "fact_weight"])
def test_every_term_alone_is_lowered(term):
    """A term whose gradient is lost has the right value and does nothing."""
    model = subject()
    made = edit_case(model)
    weights = dict.fromkeys(("subject_weight", "output_weight", "fact_weight"), 0.0) | {term: 1.0}
    editor = {"rome": {**QUIET, "steps": 25, "learning_rate": 0.1, "decay": 0.0}}
    registry.get("methods", "lti").function(made, editor=editor, least=0.0, **weights)
    (before,), (after,) = (made.summary["rome"][name] for name in ("loss_before", "loss_after"))
    assert after < 0.95 * before


def test_the_reading_of_a_stream_does_not_change_with_its_size():
    model = subject()
    model.model.model.norm.variance_epsilon = 0.0
    states = torch.randn(4, 32)
    assert torch.allclose(_read(model, states), _read(model, 7 * states), atol=1e-3)
    assert torch.allclose(_read(model, states), model.lens(states).log_softmax(-1), atol=1e-5)


def test_streams_above_a_change_are_those_of_whole_passes():
    model = subject()
    texts = [[5, 9, 30, 41, 7], [8, 3, 77, 12]]
    change = torch.randn(2, 32)
    for layer in (1, 2):
        tails = Tails(model, texts, [2, 1], 0, [[3, 4], [2]])
        found = []
        tails.states(torch.zeros_like(change))  # proves tails on this model
        for way in (tails._tail, tails._whole):
            tails._pass = way
            found.append(tails.through(change, layer))
        assert torch.allclose(found[0][0], found[1][0], atol=1e-4)
        assert torch.allclose(found[0][1], found[1][1], atol=1e-4)


def test_the_told_model_is_read_once_and_carries_no_gradient(monkeypatch):
    model = subject()
    seen = []
    states = LanguageModel.states
    monkeypatch.setattr(LanguageModel, "states", lambda *a, **k: seen.append(states(*a, **k)) or seen[-1])
    run("lti", model, editor={"rome": {**QUIET, "steps": 5}}, least=0.0)
    assert len(seen) == 1
    assert not any(t.requires_grad for t in seen[0].values())


def test_a_teacher_that_does_not_know_is_not_imitated_and_said_so():
    model = subject()
    made = edit_case(model)
    delta = registry.get("methods", "lti").function(made, editor={"rome": QUIET}, fact_weight=0.1, least=1.0)
    assert "it has nothing to imitate" in made.warnings[0]
    assert made.summary["lti"]["told"]["a"] < 1.0
    assert delta.entries


def test_lti_goes_with_editors_of_values_and_refuses_others():
    model = subject()
    corpus = [Row(id=f"c{i}", prompt=f"where was Mo {i} born?", answer=f"in Tivin {i}") for i in range(20)]
    made = edit_case(model, corpus=corpus)
    settings = {"layers": (0, 1), "steps": 3, "clamp": 50.0, "weight": 1.0}
    delta = registry.get("methods", "memit_lti").function(made, editor={"memit": settings}, least=0.0)
    assert len(delta.entries) == 2
    for editor, sentence in (("ft_m", "optimises no value"), ("npo", "of kind optimise")):
        with pytest.raises(ParameterError, match=sentence):
            run("lti", model, editor=editor)
    with pytest.raises(ParameterError, match="middle is block 0 of 3 and the value is written at 0"):
        run("lti", model, editor={"rome": QUIET}, middle=0)
    with pytest.raises(ParameterError, match="expected none below 0 and one above it"):
        run("lti", model, subject_weight=0, output_weight=0, fact_weight=0)
