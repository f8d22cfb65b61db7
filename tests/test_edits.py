"""Edit rows: what they may look like, and what is said of those that cannot be."""

import json

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
