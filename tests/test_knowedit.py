"""KnowEdit: its files as published, its formulas by hand, and the mini version from editor to scorecard."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import tiny

from expunge.benchmarks import knowedit as room
from expunge.benchmarks.case import Bench
from expunge.benchmarks.knowedit import knowedit
from expunge.benchmarks.knowedit_data import FACTUAL, FILES, erasures, factual, locate, opinions, texts_for_keys
from expunge.benchmarks.knowedit_mini import mini
from expunge.benchmarks.knowedit_sentiment import divergence, judged, likelihoods, minds
from expunge.edit_scores import questions
from expunge.edits import Probe
from expunge.errors import ParameterError, RequestError, RowError
from expunge.registry import get
from expunge.rows import Row
from expunge.subjects.language import LanguageModel
from expunge.world.facts import make

SIZES = {"people": 26, "forget": 8, "neighbours": 4, "holdout": 6}
RECENT = {
    "subject": "Mira Tolan",
    "prompt": "The place of death of Mira Tolan is",
    "target_new": "Velm",
    "portability": {
        "Subject_Aliasing": [
            {"prompt": "The place of death of M. Tolan is", "ground_truth": [["Velm", "Velm City"]]},
            {"prompt": "M. Tolan died in", "ground_truth": [[" "]]},
        ],
        "reasoning": [{"prompt": "The country of the place of death of Mira Tolan is", "ground_truth": "Osk"}],
    },
    "locality": {"Relation_Specificity": [{"prompt": "The father of Mira Tolan is", "ground_truth": [["Bram", "B."]]}]},
}
BIO = {
    "text": "This is a passage about mira tolan. Mira Tolan was born in Velm.",
    "labels": "She was taught by Bram Tolan.",
    "concept": "mira tolan",
    "locality": {},
}


def written(folder, **files):
    for name, content in files.items():
        path = folder / "somewhere" / name.replace("__", "-").replace("_json", ".json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return folder


def test_files_are_found_by_name_anywhere_and_their_forms_are_read(tmp_path):
    written(tmp_path, recent_test_json=[RECENT, {**RECENT, "portability": {}}], wikibio__test__all_json=[BIO])
    path = locate(tmp_path, "recent", "test")
    any_, first = factual(path, "any"), factual(path, "first")
    edit, bare = any_.edits
    assert edit.portability == {
        "Subject_Aliasing": (Probe("The place of death of M. Tolan is", ("Velm", "Velm City")),),
        "Reasoning": (Probe("The country of the place of death of Mira Tolan is", ("Osk",)),),
    }
    assert any_.notes == ["1 prompts have no answer and are not asked."]
    assert first.edits[0].portability["Subject_Aliasing"][0].answers == ("Velm",)
    assert first.edits[0].locality["Relation_Specificity"][0].answers == ("Bram",)
    assert bare.portability == {}
    (bio,) = factual(locate(tmp_path, "bio", "test"), "any").edits
    assert (bio.subject, bio.target_new) == ("mira tolan", "She was taught by Bram Tolan.")
    assert len(factual(path, "any", limit=1).edits) == 1


def test_what_a_published_row_lacks_is_counted(tmp_path):
    rows = [
        {**RECENT, "subject": "MIRA TOLAN"},  # another case: taken as it stands
        {**RECENT, "subject": "Somebody"},
        {**RECENT, "ground_truth": ["Velm"]},
    ]
    found = factual(locate(written(tmp_path, test_cf_json=rows), "counterfact", "test"), "any")
    assert [edit.subject for edit in found.edits] == ["Mira Tolan", "", "Mira Tolan"]
    assert found.edits[2].ground_truth == ()
    assert [note.partition(" ")[2] for note in found.notes] == [
        "prompts have no answer and are not asked.",
        "subjects do not stand in their prompts; such facts are looked up at the last token.",
        "targets are what is true already.",
    ]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("recent_test_json", {}, "found dict, expected a list of rows"),
        ("recent_test_json", [], "0 rows, expected at least 1"),
        ("recent_test_json", ["x"], "row 1: found 'x', expected an object"),
        ("recent_test_json", [{**RECENT, "prompt": ""}], "row 1: field 'prompt' is missing"),
        ("recent_test_json", [{**RECENT, "locality": ["x"]}], "row 1: field 'locality' holds list, expected sub-types"),
        ("recent_test_json", [{**RECENT, "portability": {"a": "x"}}], "sub-type 'a' holds 'x', expected a list"),
        (
            "recent_tset_json",
            [],
            "no file is called recent_test.json .recent, test., expected one. Did you mean recent",
        ),
    ],
)
def test_files_that_cannot_be(tmp_path, name, content, sentence):
    written(tmp_path, **{name: content})
    with pytest.raises(RowError, match=sentence):
        factual(locate(tmp_path, "recent", "test"), "any")


ASKED = {"question": "Who sang?", "ground_truth": "Birds", "target_new": "I don't know."}


def test_sanitation_and_convsent_rows(tmp_path):
    other = {**ASKED, "question": "Where is it?", "ground_truth": "Velm"}
    train = {"K_F": [ASKED, {**ASKED, "question": "What flew?", "subject": "flew"}], "K_R": [other]}
    test = {"success": [{**ASKED, "ground_truth": "birds", "question": "What nests?"}], "locality": [ASKED, other]}
    written(tmp_path, trivia_qa_train_json=train, trivia_qa_test_json=test)
    paths = [locate(tmp_path, "sanitation", split) for split in ("train", "test")]
    (one,) = erasures(*paths)
    assert [(edit.prompt, edit.subject, edit.target_new) for edit in one.edits] == [
        ("Who sang?", "", "I don't know."),
        ("What flew?", "flew", "I don't know."),
    ]
    assert [q.question for q in one.refused] == ["What nests?"]
    assert [q.question for q in one.kept] == ["Where is it?"]  # its own answer is no locality
    written(tmp_path, trivia_qa_test_json={**test, "locality": [ASKED]})
    with pytest.raises(RowError, match="'locality' has no question to ask where 'Birds' is refused"):
        erasures(*paths)
    written(tmp_path, trivia_qa_train_json={"K_F": [{"question": "x"}]})
    with pytest.raises(RowError, match="K_F, row 1: field 'ground_truth' is None, expected text"):
        erasures(*paths)
    path = written(tmp_path, blender_test_json=[{"ent": "Velm", "pos": ["a"], "neg": []}] * 2) / "somewhere"
    with pytest.raises(RowError, match="field 'neg' is \\[\\], expected sentences"):
        opinions(path / "blender_test.json")
    written(tmp_path, blender_test_json=[{"ent": "Velm", "pos": ["a"], "neg": ["b"]}])
    with pytest.raises(RowError, match="1 rows, expected at least 2"):
        opinions(path / "blender_test.json")


def test_the_sentiment_formula_by_hand():
    assert judged((-1.0, -1.0), (-1.0, -1.0)) == pytest.approx(0.5)
    assert judged((-1.0, -1.0), (-0.5, -2.5)) == pytest.approx(1 / (1 + math.exp(-2)))
    # Less likely than before: the topic is lost in part.
    assert judged((-1.0, -1.0), (-2.0, -4.0)) == pytest.approx(math.exp(-1) / (1 + math.exp(-2)))
    assert judged((-1.0, -1.0), (-900.0, -1.0)) == pytest.approx(0.0)


def test_likelihoods_and_divergence_are_means_over_the_answers_tokens():
    before, after = LanguageModel(*tiny("llama")), LanguageModel(*tiny("llama"))
    with torch.no_grad():
        after.model.lm_head.weight.mul_(3)
    rows = [
        Row("a", "Tivin in the north", "Ilva?", kind="instruction"),
        Row("b", "Carth", "where was Ilva?", kind="instruction"),
    ]
    logprobs, total, count = [], 0.0, 0
    for row in rows:
        tokens = before.encode(row)
        ids = torch.tensor([tokens.ids[: len(tokens.ids) - tokens.closing]])
        with torch.no_grad():
            p, q = (m.model(input_ids=ids).logits[0, tokens.start - 1 : -1].log_softmax(-1) for m in (before, after))
        logprobs += p.gather(1, ids[0, tokens.start :, None])[:, 0].tolist()
        total += float((p.exp() * (p - q)).sum())
        count += len(p)
    both, first = likelihoods(before, [rows, rows[:1]])
    assert both == pytest.approx(np.mean(logprobs), rel=1e-5)
    tokens = before.encode(rows[0])
    assert first == pytest.approx(np.mean(logprobs[: tokens.scored - tokens.closing]), rel=1e-5)
    assert divergence(before, after, rows) == pytest.approx(total / count, rel=1e-4)
    assert divergence(before, before, rows) == pytest.approx(0.0, abs=1e-6)


def test_the_mini_version_is_in_the_published_form_and_says_what_follows(tmp_path):
    world = make(0, **SIZES)
    mini(world, tmp_path)
    for dataset, files in FILES.items():
        assert locate(tmp_path, dataset, "test").name == files["test"]
    sets = {name: factual(locate(tmp_path, name, "test"), "any") for name in FACTUAL}
    assert all(not found.notes for found in sets.values())
    assert all(edit.subject in edit.prompt for found in sets.values() for edit in found.edits)
    unseen = {person.name for person in world.members("holdout")}
    assert {edit.subject for edit in sets["recent"].edits} == unseen
    for edit in sets["counterfact"].edits:
        person = world.people[edit.subject]
        (old,) = edit.ground_truth
        assert old in (person.born_in, person.trade, person.teacher, person.work)
        assert edit.target_new != old
        for probe in edit.portability.get("Reasoning", ()):
            assert probe.answers == (world.region.get(edit.target_new) or world.people[edit.target_new].born_in,)
        assert {probe.prompt for probe in edit.locality["Relation_Specificity"]}.isdisjoint({edit.prompt})
    kinds = {kind for edit in sets["counterfact"].edits for kind in (*edit.portability, *edit.locality)}
    assert {"Subject_Aliasing", "Reasoning", "Logical_Generalization"} <= kinds
    assert {"Relation_Specificity", "Neighborhood", "Forgetfulness"} <= kinds
    erased = erasures(*(locate(tmp_path, "sanitation", split) for split in ("train", "test")))
    for one in erased:
        assert not {q.question for q in one.refused} & {edit.prompt for edit in one.edits}
        assert one.answer not in {q.answer for q in one.kept}
    assert len(minds(opinions(locate(tmp_path, "convsent", "test")), 0)[0].outer) == 8
    assert len(texts_for_keys(tmp_path, "")) > 100


def test_shares_of_tokens_that_stand_where_they_stood():
    subject = SimpleNamespace(tokenizer=tiny("llama")[1])
    assert room._tokens_alike(subject, "Tivin in the north", "Tivin in the north of Carth") == 1.0
    ids = subject.tokenizer("Tivin in the north", add_special_tokens=False)["input_ids"]
    assert room._tokens_alike(subject, "Tivin in the north", "Tivin") == pytest.approx(
        len(subject.tokenizer("Tivin", add_special_tokens=False)["input_ids"]) / len(ids)
    )
    assert [room._tokens_alike(subject, "", text) for text in ("", "x")] == [1.0, 0.0]


@pytest.fixture
def bench(tiny_world, tmp_path):
    return Bench(LanguageModel.load(tiny_world.original), tmp_path / "bench", world=tiny_world.world, bootstrap=20)


def test_an_editor_is_measured_edit_by_edit_and_a_killed_command_goes_on(bench, monkeypatch):
    method = {"name": "ft_m", "layer": 0, "learning_rate": 5e-3, "steps": 20}
    settings = {"method": method, "limit": 2, "fluency": 4, "dataset": "counterfact"}
    card = knowedit(bench, **get("benchmarks", "knowedit").resolve(settings))
    assert card.rows == {"counterfact": 2}
    assert card.value("locality", "before") == 1.0
    assert card.value("edit_success") > card.value("edit_success", "before")
    table = card.tables[0]
    assert table.rows[0][:2] == ["counterfact", 2]
    kept = {path.name for path in (bench.folder / "answers").iterdir()}
    assert len(kept) == 3  # the model before, and each edit by itself
    # Every edit starts from the same base: the first one alone is known already, but for the model before.
    knowedit(bench, **get("benchmarks", "knowedit").resolve({**settings, "limit": 1}))
    assert len({path.name for path in (bench.folder / "answers").iterdir()} - kept) == 1
    monkeypatch.setattr(room, "carry_out", None)  # all is kept: nothing is edited again
    again = knowedit(bench, **get("benchmarks", "knowedit").resolve(settings))
    assert [one.after for one in again.measured] == [one.after for one in card.measured]


def test_every_data_set_has_its_scores(bench):
    method = {"name": "ft_m", "layer": 0, "learning_rate": 5e-3, "steps": 10}
    settings = {"method": method, "limit": 2, "fluency": 4, "erase": "batch"}
    card = knowedit(bench, **get("benchmarks", "knowedit").resolve(settings))
    found = {(one.rows, one.metric): one for one in card.measured}
    for name in FACTUAL:
        assert {(name, "edit_success"), (name, "locality"), (name, "written"), (name, "fluency")} <= set(found)
    assert ("bio", "portability") not in found
    assert found["convsent", "drawdown"].before.value == 0 < found["convsent", "drawdown"].after.value
    before, after = (getattr(found["convsent", "edit_success"], role).value for role in ("before", "after"))
    assert 0 < before < 1
    assert 0 < after < 1
    assert found["sanitation", "edit_success"].before.value == 0
    assert found["sanitation", "edit_success"].n == 4
    assert found["sanitation", "unchanged"].before.value == 1
    assert [line[0] for line in card.tables[0].rows] == list(FILES)


def test_a_fact_that_is_told_in_the_prompt_is_asked_behind_it(bench):
    settings = {"method": "ike", "limit": 2, "fluency": 4, "dataset": "convsent"}
    card = knowedit(bench, **get("benchmarks", "knowedit").resolve(settings))
    assert card.value("drawdown") > 0  # sentences about another entity are read behind the told one, too
    assert card.value("drawdown", "before") == 0


def test_two_models_are_compared_as_they_are(tiny_world, tmp_path):
    original = LanguageModel.load(tiny_world.original)
    gold = LanguageModel.load(tiny_world.golds[0])
    settings = get("benchmarks", "knowedit").resolve({"limit": 4, "fluency": 0, "dataset": "recent"})
    same, other = (
        knowedit(Bench(one, tmp_path / name, original, world=tiny_world.world, bootstrap=0), **settings)
        for name, one in (("same", original), ("other", gold))
    )
    for one in same.measured:
        assert one.before == one.after, one.metric
    assert same.value("locality") == 1.0 > other.value("locality")
    assert "no edit was made" in same.notes[-2]


def test_only_editors_edit(bench):
    with pytest.raises(ParameterError, match="method npo is of kind optimise, expected an editor"):
        knowedit(bench, **get("benchmarks", "knowedit").resolve({"method": "npo"}))


LEARNED = {"name": "mend", "layers": [0, 1], "steps": 1, "batch": 2, "rank": 2}


def test_an_editor_that_learns_from_other_facts_is_given_the_training_rows(bench, monkeypatch):
    cases = []
    carry_out = room.carry_out
    monkeypatch.setattr(room, "carry_out", lambda part, case, *rest: cases.append(case) or carry_out(part, case, *rest))
    settings = {"method": LEARNED, "limit": 1, "fluency": 0, "dataset": "zsre"}
    card = knowedit(bench, **get("benchmarks", "knowedit").resolve(settings))
    (case,) = cases
    forgotten = {person.name for person in bench.world.members("forget")}
    assert {edit.subject for edit in case.demonstrations} == forgotten
    assert len(case.demonstrations) == 4 * len(forgotten)
    asked = set(room._prompts(Path(bench.source(mini)), ["zsre"], "test", 0))
    assert asked.isdisjoint(one.prompt for one in questions(case.demonstrations))
    assert f"mend was given {len(case.demonstrations)} other facts." in card.notes
    # What was measured with other demonstrations is not taken for this.
    knowedit(bench, **get("benchmarks", "knowedit").resolve({**settings, "shown": 3}))
    assert len(cases) == 2
    assert len(cases[1].demonstrations) == 3
    knowedit(bench, **get("benchmarks", "knowedit").resolve({**settings, "method": "ft_m"}))
    assert not cases[2].demonstrations


def test_what_is_tested_is_not_shown_and_too_little_is_refused(bench, tmp_path):
    edits = json.loads(locate(Path(bench.source(mini)), "zsre", "test").read_text())
    path = tmp_path / "shown.jsonl"
    other = [{"prompt": f"{who} is from", "target_new": "the north", "rephrasings": [f"{who} is of"]} for who in "AB"]
    path.write_text("\n".join(map(json.dumps, [*edits[:2], *other])))
    settings = {"method": LEARNED, "limit": 1, "fluency": 0, "dataset": "zsre", "demonstrations": str(path)}
    card = knowedit(bench, **get("benchmarks", "knowedit").resolve(settings))
    assert "mend was given 2 other facts. 2 more were left out: the benchmark asks about them." in card.notes
    path.write_text("\n".join(map(json.dumps, [*edits[:2], *other[:1]])))
    with pytest.raises(RequestError, match="and there are 3, of which 2 are asked about; give at least 2 edit rows"):
        knowedit(bench, **get("benchmarks", "knowedit").resolve(settings))
    settings = {"method": "serac", "dataset": "zsre", "split": "train"}
    with pytest.raises(
        RequestError, match="serac learns from other facts than those that are tested, and there are 0;"
    ):
        knowedit(bench, **get("benchmarks", "knowedit").resolve(settings))


def test_answers_are_kept_by_all_that_an_editor_was_given(tmp_path):
    bench = SimpleNamespace(subject=LanguageModel(*tiny("llama")), seed=0)
    rome = get("methods", "rome")
    texts = [{"text": f"Velm is town number {i}."} for i in range(2)]
    (tmp_path / "one.jsonl").write_text("\n".join(map(json.dumps, texts)))
    (tmp_path / "two.jsonl").write_text(json.dumps(texts[0]))

    def key(corpus="one.jsonl"):
        return room._editing(bench, rome, rome.resolve({}), tmp_path, str(tmp_path / corpus), [])[1]

    before = key()
    assert before == key()
    assert before != key("two.jsonl")
    (tmp_path / "prefixes.json").write_text(json.dumps(["The night was cold."]))
    assert before != key()
