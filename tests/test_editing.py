"""`expunge edit`: scores by hand, and the whole way from a request file to deltas that can be left out again."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import loud, tiny

from expunge import cli, editing, registry
from expunge.deltas import Delta, compose
from expunge.edit_scores import Answers, ask, first_choices, questions, says, scores
from expunge.edits import EditRow, Probe
from expunge.errors import OutputError, ParameterError, RequestError, RowError
from expunge.evidence import Scorecard
from expunge.ledger import Ledger
from expunge.subjects.language import LanguageModel

EDITS = [
    EditRow(
        "a",
        "Ilva was born in",
        "Tivin north",
        "Ilva",
        rephrasings=("where was Ilva born?",),
        locality={"near": (Probe("Carth was born in", ("the north",)),)},
        portability={"hop": (Probe("Ilva lives", ("in Tivin", "north")),), "alias": (Probe("I lives", ("north",)),)},
    ),
    EditRow("b", "Carth was born in", "the Tivin", "Carth"),
]


def test_an_unchanged_model_keeps_everything_and_its_choices_are_the_likeliest_tokens():
    model = LanguageModel(*tiny("llama"))
    asked = questions(EDITS)
    said = ask(model, EDITS, asked, fluency=8)
    card = scores(EDITS, asked, {"before": said, "after": said}, models=[])
    assert [card.value("locality", role) for role in ("before", "after")] == [1, 1]
    for one in card.measured:
        assert one.before == one.after, one.metric
    assert [one.part for one in asked].count("portability") == 2
    row = model.encode(EDITS[0].row())
    with torch.no_grad():
        logits = model.model(input_ids=torch.tensor([row.ids])).logits[0]
    (choice,) = first_choices(model, [row])
    assert choice.tolist() == logits.argmax(-1)[row.start - 1 : -1].tolist()
    right = np.array(row.ids[row.start : -row.closing or None])
    assert said.accuracy[0] == pytest.approx(float((choice[: len(right)] == right).mean()))


def answers(choices, accuracy, written):
    return Answers([[np.array(c)] for c in choices], accuracy, written, [1.0, 3.0])


def test_scores_are_means_of_sub_types_then_of_edits_and_locality_is_agreement_with_before():
    asked = questions(EDITS)  # edit, rephrase, hop, alias, near; then b's edit
    before = answers([[1], [1], [1], [1], [7, 8], [1]], [0, 0, 0, 0, 0, 0], [""] * 6)
    written = ["Tivin north!", "tivin  NORTH of", "in Tivinia", "north", "", "Tivin"]
    after = answers([[2], [2], [2], [2], [7, 9], [2]], [1.0, 0.5, 1.0, 0.0, 1.0, 0.5], written)
    card = scores(EDITS, asked, {"before": before, "after": after}, models=[])
    values = {one.metric: one.after.value for one in card.measured}
    assert values == {
        "edit_success": 0.75,
        "rephrase": 0.5,
        "portability": 0.5,  # b has none and is left out
        "locality": 0.5,
        "written": 0.5,
        "written_rephrase": 1.0,
        "written_portability": 0.5,
        "fluency": 2.0,
    }
    assert {one.metric: one.n for one in card.measured}["portability"] == 1
    by_kind = {row[1]: row[3:] for row in card.tables[0].rows}
    assert by_kind == {"hop": [0.0, 1.0], "alias": [0.0, 0.0], "near": [1.0, 0.5]}
    assert "Harmonic mean" in card.notes[1]
    # What was right before does not enter edit success, and locality is symmetric.
    other = scores(EDITS, asked, {"before": after, "after": before}, models=[])
    assert other.value("locality") == 0.5
    assert other.value("edit_success") == 0.0


def test_a_written_answer_counts_as_whole_words_at_the_beginning():
    assert says("Tivin, in the north", ("Tivin",))
    assert says("  the\n TIVIN", ("x", "the Tivin"))
    assert not says("Tivinia", ("Tivin",))
    assert not says("in Tivin", ("Tivin",))


@pytest.fixture
def request_file(tmp_path, monkeypatch):
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("EXPUNGE_LEDGER", str(tmp_path / "ledger"))
    loud().save(tmp_path / "model")
    rows = [
        {"id": "a", "prompt": "{} was born in", "subject": "Ilva", "target_new": "Tivin", "rephrase": "Ilva is from"},
        {"id": "b", "prompt": "Carth was born in", "subject": "Carth", "target_new": "north", "ground_truth": "Tivin"},
    ]
    (tmp_path / "edits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(f"where was Mo {i} born?") + "\n" for i in range(9)))
    file = tmp_path / "edits.yaml"
    file.write_text(
        "model: model\nedits: edits.jsonl\ncorpus: corpus.jsonl\nprefixes: [So they say.]\nfluency: 6\nbootstrap: 0\n"
        "method: {name: rome, layer: 1, steps: 3, clamp: 50}\n"
    )
    return file


def test_a_request_becomes_deltas_and_a_scorecard_and_any_step_can_be_left_out(request_file, tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(["edit", str(request_file), "--out", str(out), "--set", "contexts=1"]) == cli.DONE
    shown = capsys.readouterr()
    assert "edit success" in shown.out
    assert "scorecard.html" in shown.out
    card = Scorecard.load(out / "scorecard.json")
    assert card.rows == {"edits": 2, "questions": 3}
    assert {role["role"] for role in card.models} == {"before", "after"}
    base = LanguageModel.load(tmp_path / "model")
    first, second, whole = (Delta.load(out / name) for name in ("deltas/0001", "deltas/0002", "delta"))
    assert first.lineage["edits"] == ["a"]
    assert whole.apply(base).fingerprint == whole.result == compose([first, second]).apply(base).fingerprint
    assert second.apply(base).fingerprint != whole.result  # without the first
    about = json.loads((out / "method.json").read_text())
    assert [step["rome"]["layer"] for step in about["steps"]] == [1, 1]
    for mode, count, together in (("one", 2, False), ("batch", 1, True)):
        folder = tmp_path / mode
        assert cli.main(["edit", str(request_file), "--out", str(folder), "--mode", mode, "--json"]) == cli.DONE
        printed = json.loads(capsys.readouterr().out)
        assert printed["cost"]["edit"]["seconds"] > 0
        assert len(list((folder / "deltas").iterdir())) == count
        assert (folder / "delta").is_dir() is together
    assert editing.edit(request_file, out=out, settings={"contexts": 1}) == card  # finished: nothing is made again
    with pytest.raises(OutputError, match="holds other edits"):
        editing.edit(request_file, out=out, settings={"contexts": 0})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(OutputError, match=r"is not empty and holds no edits \(thesis.tex\)"):
        editing.edit(request_file, out=tmp_path / "mine")
    events = [entry.event for entry in Ledger(tmp_path / "ledger").list()]
    assert events == ["request_received", "started", "finished"] * 3
    assert "Ilva" not in Ledger(tmp_path / "ledger").export()


def test_rows_in_the_request_are_those_of_a_file(request_file, tmp_path):
    rows = [json.loads(line) for line in (tmp_path / "edits.jsonl").read_text().splitlines()]
    rows[0]["noted"] = "on"
    inside = tmp_path / "inside.yaml"
    lines = [line for line in request_file.read_text().splitlines() if not line.startswith("edits:")]
    written = "".join(f"  - {json.dumps(row)}\n" for row in rows).replace('"on"', "2026-11-30")  # a date in YAML
    inside.write_text("\n".join([*lines, "edits:", written]))
    settings = {"contexts": 1}
    editing.edit(request_file, out=tmp_path / "file", settings=settings, mode="batch")
    card = editing.edit(inside, out=tmp_path / "inside", settings=settings, mode="batch")
    made = [Delta.load(tmp_path / name / "delta").result for name in ("file", "inside")]
    assert made[0] == made[1]
    kept = json.loads((tmp_path / "inside" / "request.json").read_text())
    assert [row["subject"] for row in kept["edits"]] == ["Ilva", "Carth"]
    kept = {name: value for name, value in kept.items() if value is not None and name != "template"}
    (tmp_path / "again.json").write_text(json.dumps(kept))
    again = editing.edit(tmp_path / "again.json", out=tmp_path / "inside", mode="batch")
    assert again.models == card.models  # one and the same run


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ("[{prompt: a b, target_new: c}, {target_new: c}]", "edits: row 2: field 'prompt' is missing"),
        ("[{prompt: a b, target_new: no}]", "edits: row 1: field 'target_new' holds bool False, expected text"),
        ("[a b]", "edits: row 1: found str, expected an object with named fields"),
        ("[{id: x, prompt: a, target_new: c}, {id: x, prompt: b, target_new: c}]", "edits: row 2: id 'x' was used in"),
        ("[]", "edits: 0 edits, expected at least 1"),
    ],
)
def test_mistakes_in_rows_of_the_request_name_it_and_the_row(tmp_path, rows, sentence):
    file = tmp_path / "edits.yaml"
    file.write_text(f"model: nowhere\nedits: {rows}\n")
    with pytest.raises(RowError) as caught:
        editing.edit(file)
    assert str(caught.value).startswith(f"{file}: {sentence}")


@pytest.mark.parametrize("method", ["rome", "alphaedit", "grace", "wise", "ultraedit"])
def test_a_stopped_sequence_goes_on_behind_its_last_edit_to_the_same_bits(request_file, tmp_path, monkeypatch, method):
    settings: dict = {
        "rome": {},
        "alphaedit": {"layers": (1, 1), "steps": 3, "learning_rate": 1.0, "clamp": 50.0},
        "grace": {"layer": 1, "steps": 3},
        "wise": {"layer": 1, "steps": 3, "unrelated": 2},
        "ultraedit": {"layers": (1, 2), "learning_rate": 1e-2},
    }[method]
    rows = [json.loads(line) for line in (tmp_path / "edits.jsonl").read_text().splitlines()]
    rows.append({"id": "c", "prompt": "Mo was born in", "subject": "Mo", "target_new": "Carth"})
    (tmp_path / "edits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = [{"prompt": f"where was Mo {i} born?", "completion": "in Tivin"} for i in range(9)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    whole = editing.edit(request_file, out=tmp_path / "whole", method=method, settings=settings)
    part = registry.get("methods", method)
    made = []

    def stopping(case, **chosen):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(case.edits[0].id)
        return part.function(case, **chosen)

    get = registry.get
    monkeypatch.setattr(registry, "get", lambda room, name: replace(get(room, name), function=stopping))
    with pytest.raises(KeyboardInterrupt):
        editing.edit(request_file, out=tmp_path / "part", method=method, settings=settings)
    assert made == ["a", "b"]
    assert len(list((tmp_path / "part" / "deltas").iterdir())) == 2
    made[:] = [""]  # one more is let through
    editing.edit(request_file, out=tmp_path / "part", method=method, settings=settings)
    assert made == ["", "c"]
    deltas = [Delta.load(tmp_path / name / "delta") for name in ("whole", "part")]
    assert deltas[0].result == deltas[1].result
    for name, entry in deltas[0].entries.items():
        assert all(torch.equal(tensor, deltas[1].entries[name][key]) for key, tensor in entry.items())
    again = Scorecard.load(tmp_path / "part" / "scorecard.json")
    assert [one.after.value for one in again.measured] == [one.after.value for one in whole.measured]
    events = [entry.event for entry in Ledger(tmp_path / "ledger").list()]
    assert events[3:] == ["request_received", "started", "interrupted", "resumed", "finished"]


def test_facts_are_told_from_a_request(request_file, tmp_path):
    card = editing.edit(request_file, out=tmp_path / "told", method="ike", settings={"k": 0})
    assert card.rows["edits"] == 2
    delta = Delta.load(tmp_path / "told" / "delta")
    assert [one["id"] for one in delta.config["edits"]] == ["a", "b"]
    with pytest.raises(RequestError, match="0 demonstrations"):
        editing.edit(request_file, out=tmp_path / "shown", method="ike", settings={"k": 2})


@pytest.mark.parametrize(
    ("line", "error", "sentence"),
    [
        ("modes: one", RequestError, "there is no field 'modes'. Did you mean mode"),
        ("mode: all", RequestError, "field mode is 'all'"),
        ("fluency: -1", RequestError, "field fluency is -1"),
        ("method: {layer: 1}", RequestError, "method is a mapping without a name"),
        ("method: npo", ParameterError, "npo is of kind optimise, expected an editor"),
        ("method: {name: rome, layr: 1}", ParameterError, "edit rome has no parameter 'layr'"),
        ("mode: one\nmode: batch", RequestError, "'mode' is given twice"),
    ],
)
def test_requests_that_cannot_be(tmp_path, line, error, sentence):
    file = tmp_path / "edits.yaml"
    file.write_text(f"model: nowhere\nedits: none.jsonl\n{line}\n")
    with pytest.raises(error, match=sentence):
        editing.edit(file)
    file.write_text("model: nowhere\n")
    with pytest.raises(RequestError, match="field edits is missing"):
        editing.load(file)
    file.write_text("model: nowhere\nedits: {path: a.jsonl, feld: b}\n")
    with pytest.raises(RequestError, match=r"no field 'edits\.feld'. Did you mean fields"):
        editing.load(file)
    file.write_text("model: nowhere\nedits: 5\n")
    with pytest.raises(RequestError, match=r"field edits is 5: input should be .* or a valid list"):
        editing.load(file)
