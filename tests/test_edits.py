"""Edit rows: what they may look like, and what is said of those that cannot be."""

import json
from pathlib import Path

import pytest

from expunge.edits import Probe, read_edits
from expunge.errors import RowError
from expunge.rows import Source

PLAIN = {"prompt": "Orin Valk was born in", "target_new": "Maretta", "subject": "Orin Valk"}


def read(tmp_path, *records, **fields):
    path = tmp_path / "edits.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return read_edits(Source(str(path), fields=fields))


def test_our_names_and_the_published_ones_say_the_same(tmp_path):
    ours, easyedit, knowedit = read(
        tmp_path,
        {
            **PLAIN,
            "id": "a",
            "ground_truth": "Tolsk",
            "rephrasings": ["The birthplace of Orin Valk is"],
            "locality": {"near": [["Ilse Moro was born in", "Pell"]]},
            "portability": {"hop": [{"prompt": "Orin Valk's country is", "ground_truth": ["Sarn", "Sarnland"]}]},
        },
        {
            **PLAIN,
            "case_id": 7,
            "prompt": "{} was born in",
            "ground_truth": ["Tolsk"],
            "rephrase_prompt": "The birthplace of Orin Valk is",
            "locality": {"near": {"prompt": ["Ilse Moro was born in"], "ground_truth": ["Pell"]}},
            "portability": {"hop": {"prompt": ["{}'s country is"], "ground_truth": [["Sarn", "Sarnland"]]}},
        },
        {
            **PLAIN,
            "ground_truth": [["Tolsk"]],
            "rephrase": ["The birthplace of Orin Valk is"],
            "locality": {"near": [{"prompt": "Ilse Moro was born in", "ground_truth": [["Pell"]]}], "none": []},
            "portability": {"hop": {"prompt": "Orin Valk's country is", "ground_truth": [["Sarn", "Sarnland"]]}},
        },
    )
    assert (ours.id, easyedit.id, knowedit.id) == ("a", "7", "edits/3")
    assert ours.portability == {"hop": (Probe("Orin Valk's country is", ("Sarn", "Sarnland")),)}
    for other in (easyedit, knowedit):
        for name in ("prompt", "target_new", "subject", "ground_truth", "rephrasings", "locality", "portability"):
            assert getattr(other, name) == getattr(ours, name), name
    assert ours.row("Who?", "Nobody", preface="So. ").preface == "So. "
    assert ours.row().answer == "Maretta"


def test_an_empty_target_asks_for_a_deletion_and_csv_cells_hold_json(tmp_path):
    (edit,) = read(tmp_path, {**PLAIN, "target_new": None, "ground_truth": "Tolsk"})
    assert edit.target_new == ""
    path = tmp_path / "edits.csv"
    path.write_text('stem,target_new,locality\nA b,c,"{""near"": [[""D"", ""e""]]}"\n')
    (edit,) = read_edits(Source(str(path), fields={"prompt": "stem"}))
    assert edit.locality == {"near": (Probe("D", ("e",)),)}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompt": None}, r"edits.jsonl:1: field 'prompt' is missing; found the fields prompt, target_new, subject"),
        ({"subject": "Ilse"}, "the subject 'Ilse' does not stand in the prompt"),
        ({"prompt": "{} sleeps", "subject": None}, "leaves room for a subject"),
        ({"ground_truth": "Maretta"}, "equals ground_truth"),
        ({"target_new": ["a", "b"]}, "field 'target_new' holds 2 texts, expected one"),
        ({"target_new": {"str": "a"}}, "field 'target_new' holds dict"),
        ({"rephrasings": [True]}, "field 'rephrasings' holds bool True, expected text"),
        ({"rephrasings": ["  "]}, "field 'rephrasings' is blank"),
        ({"locality": ["a"]}, "field 'locality' holds list, expected sub-types"),
        ({"locality": {"near": "a"}}, "field 'locality.near' holds str, expected a list of prompts"),
        ({"locality": {"near": [{"prompt": "a"}]}}, "field 'locality.near' holds .*, expected a prompt and its"),
        ({"portability": {"hop": {"prompt": ["a", "b"], "ground_truth": ["c"]}}}, "has 2 prompts and 1 ground_truth"),
        ({"kind": "chat"}, "field 'kind' is 'chat', expected completion, qa, instruction"),
    ],
)
def test_rows_that_cannot_be(tmp_path, changes, sentence):
    with pytest.raises(RowError, match=sentence):
        read(tmp_path, {**PLAIN, **changes})


def test_files_that_cannot_be(tmp_path):
    with pytest.raises(RowError, match=r"edits.jsonl:2: id 'a' was used in .*edits.jsonl:1 already"):
        read(tmp_path, {**PLAIN, "id": "a"}, {**PLAIN, "id": "a"})
    with pytest.raises(RowError, match="0 edits, expected at least 1"):
        read(tmp_path)
    with pytest.raises(RowError, match="field 'target_new' is missing; leave it empty"):
        read(tmp_path, {"prompt": "a"})
    with pytest.raises(RowError, match=r"an edit has no field 'targets'. Did you mean target_new"):
        read(tmp_path, PLAIN, targets="x")
    with pytest.raises(RowError, match="fields maps prompt to 'stem', which the row does not have"):
        read(tmp_path, PLAIN, prompt="stem")


REWRITE = {
    "prompt": "{} was born in",
    "relation_id": "P19",
    "subject": "Orin Valk",
    "target_new": {"str": "Maretta", "id": "Q1"},
    "target_true": {"str": "Tolsk", "id": "Q2"},
}


def test_counterfact_rows_keep_old_answers_of_neighbours_and_new_ones_of_those_who_had_them(tmp_path):
    row = {
        "case_id": 3,
        "pararel_idx": 9,
        "requested_rewrite": REWRITE,
        "paraphrase_prompts": ["He slept. Orin Valk's birthplace is"],
        "neighborhood_prompts": ["Ilse Moro was born in", "Bram Tolan was born in"],
        "attribute_prompts": ["Ada Fenn was born in"],
        "generation_prompts": ["{} grew up", "Orin Valk lives"],
    }
    (edit,) = read(tmp_path, row)
    assert (edit.id, edit.subject, edit.prompt) == ("3", "Orin Valk", "Orin Valk was born in")
    assert (edit.target_new, edit.ground_truth) == ("Maretta", ("Tolsk",))
    assert edit.rephrasings == ("He slept. Orin Valk's birthplace is",)
    assert edit.locality == {
        "neighborhood": (Probe("Ilse Moro was born in", ("Tolsk",)), Probe("Bram Tolan was born in", ("Tolsk",))),
        "attribute": (Probe("Ada Fenn was born in", ("Maretta",)),),
    }
    assert edit.generation == ("Orin Valk grew up", "Orin Valk lives")


def test_mquake_zsre_easyedit_and_editattack_rows(tmp_path):
    asked = ["In which country was Orin Valk born?"]
    mquake, zsre, portable, flat, attack = read(
        tmp_path,
        {"requested_rewrite": [REWRITE], "questions": asked, "new_answer": "Sarn", "new_answer_alias": ["Sarnland"]},
        {
            "subject": "Orin Valk",
            "src": "Where was Orin Valk born?",
            "pred": "Pell",
            "rephrase": "What is the birthplace of Orin Valk?",
            "alt": "Maretta",
            "answers": ["Tolsk"],
            "loc": "who sang it",
            "loc_ans": "Ilse Moro",
            "cond": "Pell >> Maretta || Where was Orin Valk born?",
        },
        {
            "subject": "Orin Valk",
            "src": "Where was Orin Valk born?",
            "alt": "Maretta",
            "answers": ["Tolsk"],
            "portability": {"Recalled Relation": "(a, b, c)", "New Question": asked[0], "New Answer": "Sarn"},
        },
        {**PLAIN, "locality_prompt": "who sang it", "locality_ground_truth": "Ilse Moro"},
        {
            "questions": "Where was Orin Valk born?",
            "targets": "Maretta",
            "subjects": "Orin Valk",
            "paraphrased_questions": "What is the birthplace of Orin Valk?",
            "portability_questions": "Where was O. Valk born?",
        },
    )
    assert mquake.portability == {"multi_hop": (Probe(asked[0], ("Sarn", "Sarnland")),)}
    assert (zsre.prompt, zsre.target_new, zsre.ground_truth) == ("Where was Orin Valk born?", "Maretta", ("Tolsk",))
    assert zsre.rephrasings == ("What is the birthplace of Orin Valk?",) == attack.rephrasings
    assert zsre.locality == {"neighborhood": (Probe("who sang it", ("Ilse Moro",)),)} == flat.locality
    assert portable.portability == {"one_hop": (Probe(asked[0], ("Sarn",)),)}
    assert (attack.target_new, attack.ground_truth) == ("Maretta", ())
    assert attack.portability == {"hop": (Probe("Where was O. Valk born?", ("Maretta",)),)}


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"requested_rewrite": [REWRITE, REWRITE]}, "edits.jsonl:1: field 'requested_rewrite' holds 2 edits"),
        ({"requested_rewrite": "x"}, "field 'requested_rewrite' is 'x', expected an object"),
        ({"requested_rewrite": {**REWRITE, "subject": ""}}, "field 'requested_rewrite.subject' is missing"),
        ({"requested_rewrite": {**REWRITE, "target_new": {"id": "Q1"}}}, "target_new' is {'id': 'Q1'}, expected {str"),
        (
            {"requested_rewrite": {**REWRITE, "target_true": None}, "neighborhood_prompts": ["a"]},
            "'neighborhood_prompts' needs an answer",
        ),
        ({"requested_rewrite": {**REWRITE, "prompt": "He was born in"}}, "the subject 'Orin Valk' does not stand in"),
        ({"src": "Where is Orin Valk?", "alt": "Pell", "loc": "who"}, "field 'locality.neighborhood' holds"),
    ],
)
def test_published_rows_that_cannot_be(tmp_path, row, sentence):
    with pytest.raises(RowError, match=sentence):
        read(tmp_path, row)


def test_facts_that_nobody_edits_need_no_target(tmp_path):
    path = tmp_path / "known_1000.jsonl"
    fact = {"known_id": 0, "subject": "Orin Valk", "attribute": "Tolsk", "prompt": "Orin Valk was born in"}
    path.write_text(json.dumps({**fact, "template": "{} was born in", "relation_id": "P19"}) + "\n")
    (edit,) = read_edits(Source(str(path)), targets=False)
    assert (edit.subject, edit.ground_truth, edit.target_new) == ("Orin Valk", ("Tolsk",), "")
    with pytest.raises(RowError, match="field 'target_new' is missing"):
        read_edits(Source(str(path)))


DATA = Path("/work/shared/data/edit_attack")


@pytest.mark.skipif(not DATA.is_dir(), reason="the published rows are not on this machine")
@pytest.mark.parametrize("name", ["long_tail_100", "commonsense_100"])
def test_published_editattack_rows_are_read(name):
    edits = read_edits(Source(str(DATA / f"{name}.csv")))
    assert len(edits) == 100
    assert all(edit.rephrasings and edit.portability and edit.subject in edit.prompt for edit in edits)
