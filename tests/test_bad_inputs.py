"""Bad input: one clear line that names file, row or field, a non-zero exit, and nothing half-written."""

import errno
import json
import os
import stat

import pytest
import torch
from tiny import tiny

from expunge import cli
from expunge.errors import ExpungeError
from expunge.request import check, load, read_data
from expunge.subjects.language import LanguageModel

GOOD = [{"id": f"f{i}", "question": f"where was Ilva {i} born?", "answer": "Tivin"} for i in range(9)]
KEPT = [{"id": f"r{i}", "question": f"where was Mo {i} born?", "answer": "Carth"} for i in range(9)]
CHAT = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "Ilva"}]


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def qa(**fields):
    return {"question": "q", "answer": "a", **fields}


# (name of the data file, its content, what the message must contain)
DATA = {
    "missing file": ("forget.jsonl", None, ["forget.jsonl", "does not exist"]),
    "empty file": ("forget.jsonl", "", ["forget.jsonl", "0 rows, expected at least 1"]),
    "not json": ("forget.jsonl", lines(qa()) + "{oops\n", ["forget.jsonl:2", "not JSON"]),
    "a list instead of an object": ("forget.jsonl", "[1]\n", ["forget.jsonl:1", "found list", "expected an object"]),
    "no known field": ("forget.jsonl", lines({"foo": 1}), ["forget.jsonl:1", "found the fields foo", "question"]),
    "answer missing": ("forget.jsonl", lines({"question": "q"}), ["forget.jsonl:1", "'answer' is missing"]),
    "answer empty": ("forget.jsonl", lines(qa(answer="")), ["forget.jsonl:1", "'answer' is empty"]),
    "answer null": ("forget.jsonl", lines(qa(), qa(answer=None)), ["forget.jsonl:2", "'answer' is empty"]),
    "answer blank": ("forget.jsonl", lines(qa(answer="  ")), ["forget.jsonl:1", "'answer' is blank"]),
    "answer is true": ("forget.jsonl", lines(qa(answer=True)), ["forget.jsonl:1", "'answer' holds bool"]),
    "answer is an object": (
        "forget.jsonl",
        lines(qa(answer={"x": 1})),
        ["forget.jsonl:1", "holds dict", "expected text"],
    ),
    "zero byte": ("forget.jsonl", lines(qa(answer="a\x00b")), ["forget.jsonl:1", "zero byte"]),
    "wrong encoding": ("forget.jsonl", '{"question": "é", "answer": "a"}'.encode("latin-1"), ["not UTF-8"]),
    "duplicate ids": ("forget.jsonl", lines(qa(id="x"), qa(id="x")), ["forget.jsonl:2", "'x' was used", "unique"]),
    "perturbed answer is right": (
        "forget.jsonl",
        lines(qa(perturbed_answers=["b", "a"])),
        ["forget.jsonl:1", "perturbed answer 'a' equals the answer"],
    ),
    "perturbed answers hold an object": (
        "forget.jsonl",
        lines(qa(perturbed_answers=[{"a": 1}])),
        ["forget.jsonl:1", "'perturbed_answers' holds dict"],
    ),
    "messages are text": ("forget.jsonl", lines({"messages": "hello"}), ["forget.jsonl:1", "'messages' is not JSON"]),
    "messages are a number": ("forget.jsonl", lines({"messages": 3}), ["forget.jsonl:1", "expected a list of turns"]),
    "turn without role": ("forget.jsonl", lines({"messages": [{"content": "x"}]}), ["turn 1", "role and content"]),
    "no assistant": ("forget.jsonl", lines({"messages": CHAT[:1]}), ["forget.jsonl:1", "no turn of the assistant"]),
    "user speaks last": ("forget.jsonl", lines({"messages": [*CHAT, CHAT[0]]}), ["the last turn is by 'user'"]),
    "answer without question": ("forget.jsonl", lines({"messages": CHAT[1:]}), ["must be the user's"]),
    "csv with too many cells": ("forget.csv", "question,answer\nq,a,b\n", ["forget.csv: row 1", "more cells"]),
    "csv cell missing": ("forget.csv", "question,answer\nq,\n", ["forget.csv: row 1", "'answer' is missing"]),
    "json columns of different lengths": ("forget.json", '{"question": ["q"], "answer": []}', ["different lengths"]),
    "json that is text": ("forget.json", '"hello"', ["forget.json", "found str", "list of rows"]),
    "json broken": ("forget.json", "[{", ["forget.json:1", "not JSON"]),
    "parquet that is none": ("forget.parquet", "hello", ["forget.parquet", "not a readable parquet file"]),
    "unknown suffix": ("forget.xlsx", "x", ["forget.xlsx", "not a data format", ".jsonl"]),
    "folder without data": ("forget", "folder", ["has no data files"]),
    "kept and forgotten": ("forget.jsonl", lines({**KEPT[0], "id": "z"}), ["retain.jsonl:1", "forget.jsonl:1", "same"]),
    "an id of another set": ("forget.jsonl", lines(qa(id="r3")), ["retain.jsonl:4", "'r3' was used in"]),
}
# changes of the request file, what the message must contain
REQUEST = {
    "unknown field": ({"modle": "x"}, ["request.json", "no field 'modle'", "Did you mean model"]),
    "unknown nested field": ({"training": {"epoch": 3}}, ["no field 'training.epoch'", "Did you mean epochs"]),
    "model missing": ({"model": None}, ["field model"]),
    "negative epochs": ({"training": {"epochs": -1}}, ["field training.epochs is -1", "greater than 0"]),
    "learning rate is text": ({"training": {"learning_rate": "fast"}}, ["training.learning_rate is 'fast'"]),
    "unknown schedule": ({"training": {"schedule": "cosin"}}, ["training.schedule is 'cosin'"]),
    "unknown proof": ({"proof": "total"}, ["field proof is 'total'"]),
    "too few resamples": ({"audit": {"bootstrap": 3}}, ["audit.bootstrap is 3"]),
    "template without question": ({"template": {"prompt": "Q:"}}, ["template.prompt", "{question}"]),
    "method without name": ({"method": {"beta": 1}}, ["method is a mapping without a name"]),
    "name with a slash": ({"name": "a/b"}, ["name is 'a/b'", "letters"]),
    "unknown method": ({"method": "nop"}, ["no method is called 'nop'", "npo"]),
    "unknown parameter": ({"method": {"name": "npo", "betta": 1}}, ["no parameter 'betta'", "Did you mean beta"]),
    "parameter of the wrong kind": ({"method": {"name": "npo", "beta": "x"}}, ["parameter beta = 'x'"]),
    "unknown attack": ({"audit": {"attacks": ["relern"]}}, ["no attack is called 'relern'", "Did you mean relearn"]),
    "unknown attack setting": ({"audit": {"attacks": [{"relearn": {"stepps": 1}}]}}, ["no parameter 'stepps'"]),
    "unknown metric": ({"audit": {"metrics": ["rogue"]}}, ["no metric is called 'rogue'", "rouge"]),
    "mapping of an unknown field": ({"fields": {"qestion": "q"}}, ["no field 'qestion'", "question"]),
    "mapping to a missing column": ({"fields": {"question": "qu"}}, ["'qu', which the row does not have"]),
    "holdout that was trained on": ({"data": {"holdout": "retain2.jsonl"}}, ["holdout row", "retain2.jsonl:1"]),
}


@pytest.fixture
def place(tmp_path):
    (tmp_path / "forget.jsonl").write_text(lines(*GOOD))
    (tmp_path / "retain.jsonl").write_text(lines(*KEPT))
    (tmp_path / "retain2.jsonl").write_text(lines({**KEPT[0], "id": "h0"}))
    return tmp_path


def write(place, changes=None, forget="forget.jsonl"):
    request = {"model": "model", "data": {"forget": forget, "retain": "retain.jsonl"}, "training": {"steps": 1}}
    for name, value in (changes or {}).items():
        request[name] = {**request[name], **value} if isinstance(request.get(name), dict) else value
    path = place / "request.json"
    path.write_text(json.dumps({k: v for k, v in request.items() if v is not None}))
    return path


def refused(action, *parts):
    with pytest.raises(ExpungeError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize("case", DATA)
def test_bad_data(place, case):
    name, content, parts = DATA[case]
    (place / "forget.jsonl").unlink()
    if content == "folder":
        (place / name).mkdir()
    elif isinstance(content, bytes):
        (place / name).write_bytes(content)
    elif content is not None:
        (place / name).write_text(content)
    refused(lambda: read_data(load(write(place, forget=name))), *parts)


@pytest.mark.parametrize("case", REQUEST)
def test_bad_requests(place, case):
    changes, parts = REQUEST[case]

    def read():
        request = load(write(place, changes))
        check(request)
        read_data(request)

    refused(read, *parts)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["found nothing"]),
        ("- a\n", ["found list", "expected fields"]),
        ("model: [\n", ["request.yaml:2", "not YAML"]),
        ("model: a\nmodel: b\n", ["line 2", "'model' is given twice"]),
        ("model: a\n", ["field data is missing"]),
    ],
)
def test_bad_yaml(tmp_path, text, parts):
    (tmp_path / "request.yaml").write_text(text)
    refused(lambda: load(tmp_path / "request.yaml"), "request.yaml", *parts)


def test_missing_request_files_suggest_the_nearest(tmp_path):
    (tmp_path / "request.yaml").write_text("model: a\n")
    refused(lambda: load(tmp_path / "requst.yaml"), "does not exist", "Did you mean request.yaml")
    refused(lambda: load(tmp_path), "is a folder")
    (tmp_path / "latin.yaml").write_bytes("reason: é".encode("latin-1"))
    refused(lambda: load(tmp_path / "latin.yaml"), "not UTF-8")


# --- through the command line ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    LanguageModel(*tiny("llama")).save(folder)
    return folder


@pytest.fixture
def road(place, model_folder, monkeypatch):
    (place / "model").symlink_to(model_folder)
    monkeypatch.setenv("EXPUNGE_LEDGER", str(place / "ledger.sqlite"))
    monkeypatch.chdir(place)
    return place


def run(capsys, place, *parts, changes=None, extra=(), written=False):
    path = write(place, changes)
    code = cli.main(["run", str(path), "--out", str(place / "out" / "run"), *extra])
    err = capsys.readouterr().err.strip().splitlines()
    assert code == cli.MISTAKE, err
    assert err[-1].startswith("error E")
    assert sum(line.startswith("error") for line in err) == 1
    for part in parts:
        assert part in err[-1], err[-1]
    folder = place / "out" / "run"
    assert not (folder / "evidence.json").exists()
    assert not (folder / "delta").exists()
    if not written:
        left = [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")] if folder.exists() else []
        assert left == []
        assert not (place / "ledger.sqlite").exists()


def test_model_folder_that_is_not_there(road, capsys):
    run(capsys, road, "E200", "no-such-model", changes={"model": "./no-such-model"})


def test_weights_that_are_not_finite(road, capsys):
    broken = LanguageModel(*tiny("llama"))
    with torch.no_grad():
        broken.model.lm_head.weight[0, 0] = float("inf")
    broken.save(road / "broken")
    run(capsys, road, "E200", "lm_head.weight", "not finite", changes={"model": "broken"})


def test_gold_with_another_tokenizer(road, capsys):
    from tokenizers import Tokenizer

    model, tokenizer = tiny("llama")
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = data["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(data))
    LanguageModel(model, tokenizer).save(road / "stranger")
    run(capsys, road, "E210", "another tokenizer", changes={"gold": ["stranger"]})


def test_answer_longer_than_the_context(road, capsys):
    (road / "forget.jsonl").write_text(lines(*GOOD[:8], {**GOOD[8], "answer": "Tivin " * 900}))
    run(capsys, road, "E110", "forget.jsonl:9", "context holds 256", written=True)


def test_scope_that_matches_nothing(road, capsys):
    run(capsys, road, "E300", "Nearest names", extra=("--scope", "regex:nothing"), written=True)


def test_unknown_parameter_on_the_command_line(road, capsys):
    run(capsys, road, "betta", extra=("--set", "betta=1"))


def test_unknown_method_on_the_command_line(road, capsys):
    run(capsys, road, "E310", "npo", extra=("--method", "nppo"))


def test_output_that_is_a_file(road, capsys):
    (road / "out").write_text("a file")
    path = write(road)
    assert cli.main(["run", str(path), "--out", str(road / "out" / "run")]) == cli.MISTAKE
    assert "error E500" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_output(road, capsys):
    (road / "out").mkdir()
    (road / "out").chmod(stat.S_IRUSR | stat.S_IXUSR)
    run(capsys, road, "E500", "Choose another place with --out")


def test_full_disk(road, capsys, monkeypatch):
    from expunge import files

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    run(capsys, road, "E500", "No space left", written=True)
    assert not list((road / "out").rglob("*.partial"))


def test_output_of_another_run(road, capsys):
    (road / "out" / "run").mkdir(parents=True)
    (road / "out" / "run" / "run.json").write_text(json.dumps({"key": "other", "method": "idk"}))
    path = write(road)
    assert cli.main(["run", str(path), "--out", str(road / "out" / "run")]) == cli.MISTAKE
    assert "holds another run (method idk)" in capsys.readouterr().err


def test_there_are_many_bad_inputs():
    assert len(DATA) + len(REQUEST) >= 45
