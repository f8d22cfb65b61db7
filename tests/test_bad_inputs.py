"""Bad input: one clear line that names file, row or field, a non-zero exit, and nothing half-written."""

import errno
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny

from expunge import cli, files
from expunge.errors import ExpungeError
from expunge.ledger import Ledger
from expunge.request import check, load, read_data
from expunge.subjects.language import LanguageModel

GOOD = [{"id": f"f{i}", "question": f"where was Ilva {i} born?", "answer": "Tivin"} for i in range(9)]
KEPT = [{"id": f"r{i}", "question": f"where was Mo {i} born?", "answer": "Carth"} for i in range(9)]
MORE = [{"id": f"m{i}", "question": f"where was Ono {i} born?", "answer": "Orsk"} for i in range(9)]
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
    "messages are text": ("forget.jsonl", lines({"messages": "hello"}), ["forget.jsonl:1", "'messages': not JSON"]),
    "messages are a number": ("forget.jsonl", lines({"messages": 3}), ["forget.jsonl:1", "expected a list of turns"]),
    "turn without role": ("forget.jsonl", lines({"messages": [{"content": "x"}]}), ["turn 1", "role and content"]),
    "no assistant": ("forget.jsonl", lines({"messages": CHAT[:1]}), ["forget.jsonl:1", "no turn of the assistant"]),
    "user speaks last": ("forget.jsonl", lines({"messages": [*CHAT, CHAT[0]]}), ["the last turn is by 'user'"]),
    "answer without question": ("forget.jsonl", lines({"messages": CHAT[1:]}), ["must be the user's"]),
    "csv with too many cells": ("forget.csv", "question,answer\nq,a,b\n", ["forget.csv: row 1", "more cells"]),
    "csv cell missing": ("forget.csv", "question,answer\nq,\n", ["forget.csv: row 1", "'answer' is empty"]),
    "json columns of different lengths": ("forget.json", '{"question": ["q"], "answer": []}', ["different lengths"]),
    "json that is text": ("forget.json", '"hello"', ["forget.json", "found str", "list of rows"]),
    "json broken": ("forget.json", "[{\n", ["forget.json: not JSON", "at line 2, column 1"]),
    "parquet that is none": ("forget.parquet", "hello", ["forget.parquet", "not a readable parquet file"]),
    "unknown suffix": ("forget.xlsx", "x", ["forget.xlsx", "not a data format", ".jsonl"]),
    "answer is infinite": ("forget.jsonl", '{"question": "q", "answer": Infinity}\n', ["forget.jsonl:1", "float inf"]),
    "half a character": ("forget.jsonl", lines(qa(answer="a\ud800")), ["forget.jsonl:1", "half a surrogate pair"]),
    "a number without end": ("forget.jsonl", '{"answer": ' + "9" * 5000 + "}", ["forget.jsonl:1", "cannot be used"]),
    "brackets without end": ("forget.json", "[" * 99999, ["forget.json: ", "cannot be used", "recursion"]),
    "question empty": ("forget.jsonl", lines(qa(question="")), ["forget.jsonl:1", "'question' is empty"]),
    "question missing": ("forget.jsonl", lines({"answer": "a"}), ["forget.jsonl:1", "'question' is missing"]),
    "completion missing": ("forget.jsonl", lines({"prompt": "p"}), ["forget.jsonl:1", "'completion' is missing"]),
    "no turns": ("forget.jsonl", lines({"messages": []}), ["'messages' is empty", "list of turns"]),
    "a turn of pictures": (
        "forget.jsonl",
        lines({"messages": [{"role": "user", "content": [{"type": "image"}]}, CHAT[1]]}),
        ["forget.jsonl:1: messages, turn 1", "'content' holds list"],
    ),
    "a list that is none": ("forget.jsonl", lines(qa(aliases="[x")), ["'aliases' begins like a JSON list"]),
    "a very long value": ("forget.jsonl", lines(qa(answer=["x" * 5000])), ["'answer' holds list ['xxx", "..."]),
    "very many fields": ("forget.jsonl", lines({f"f{i}": 1 for i in range(500)}), ["fields f0, f1,", "f11, ...;"]),
    "wide characters": ("forget.jsonl", lines(qa()).encode("utf-16"), ["forget.jsonl: not UTF-8", "save it as UTF-8"]),
    "csv header twice": ("forget.csv", "question,answer,answer\nq,a,b\n", ["the header names 'answer' twice"]),
    "csv quote left open": ("forget.csv", 'question,answer\n"q,a\n', ["forget.csv: line", "not CSV"]),
    "csv of semicolons": ("forget.csv", "question;answer\nq;a\n", ["row 1: found the fields question;answer", "Map"]),
    "csv without rows": ("forget.csv", "question,answer\n", ["forget.csv: 0 rows"]),
    "json of rows in an object": ("forget.json", '{"rows": [{"question": "q"}], "n": 1}', ["list of rows"]),
    "a name too long for the disk": ("x" * 300 + ".jsonl", None, ["does not exist"]),
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
    "template is text": ({"template": "Q {question}"}, ["field template is 'Q {question}'", "a valid mapping"]),
    "seed below zero": ({"training": {"seed": -1}}, ["training.seed is -1", "greater than or equal to 0"]),
    "epochs without end": ({"training": {"epochs": float("inf")}}, ["training.epochs is inf", "finite number"]),
    "batch of a half": ({"training": {"batch_size": 0.5}}, ["training.batch_size is 0.5", "valid integer"]),
    "guard is true": ({"training": {"guard": True}}, ["training.guard is True", "a valid mapping or False"]),
    "guard with a wrong field": ({"training": {"guard": {"bandd": 1}}}, ["training.guard.bandd", "Did you mean band"]),
    "stop is true": ({"training": {"stop": True}}, ["training.stop is True"]),
    "stop with runs of none": (
        {"training": {"stop": {"n": 0}}},
        ["training.stop.n is 0", "greater than or equal to 1"],
    ),
    "stop with a wrong field": (
        {"training": {"stop": {"accurracy": 1}}},
        ["training.stop.accurracy", "Did you mean accuracy"],
    ),
    "gold is text": ({"gold": "gold/0"}, ["field gold is 'gold/0'", "a valid list"]),
    "model is empty": ({"model": ""}, ["field model is ''", "at least 1 character"]),
    "forget is empty": ({"data": {"forget": ""}}, ["field data.forget is ''"]),
    "forget is a list": (
        {"data": {"forget": ["a", "b"]}},
        ["data.forget is ['a', 'b']", "a valid string or a valid map"],
    ),
    "forget has a wrong field": ({"data": {"forget": {"path": "a", "splitt": "b"}}}, ["splitt'. Did you mean split?"]),
    "forget has no path": ({"data": {"forget": {"fields": {}}}}, ["field data.forget.path is missing"]),
    "unknown row set": ({"data": {"retan": "a"}}, ["no field 'data.retan'", "Did you mean retain"]),
    "block of none": ({"data": {"forget": {"path": "forget.jsonl", "entity_every": 0}}}, ["forget.entity_every is 0"]),
    "attacks are text": ({"audit": {"attacks": "relearn"}}, ["audit.attacks is 'relearn'", "a valid list"]),
    "an attack is a number": (
        {"audit": {"attacks": [3]}},
        ["audit.attacks.0 is 3", "a valid string or a valid mapping"],
    ),
    "attack settings are null": ({"audit": {"attacks": [{"relearn": None}]}}, ["audit.attacks.0.relearn is None"]),
    "two attacks in one": ({"audit": {"attacks": [{"relearn": {}, "direct": {}}]}}, ["one name with its settings"]),
    "method is a list": ({"method": ["npo"]}, ["field method is ['npo']", "a valid string or a valid mapping"]),
    "scope is a number": ({"scope": 3}, ["field scope is 3"]),
    "name is dots": ({"name": ".."}, ["name is '..'", "letters"]),
    "reason with half a character": ({"reason": "\ud800"}, ["something other than text"]),
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
    "neighbour that is forgotten": (
        {"data": {"neighbour": "forget2.jsonl"}},
        ["forget2.jsonl:1 is to be kept", "same"],
    ),
    "holdout seen elsewhere": (
        {"data": {"holdout": "retain3.jsonl", "retain": None, "general": "retain2.jsonl"}},
        ["holdout row", "retain3.jsonl:1 also stands in", "retain2.jsonl:1"],
    ),
    "home of nobody": (
        {"data": {"forget": "~nobody-of-that-name/x.jsonl"}},
        ["~nobody-of-that-name", "does not exist"],
    ),
    "holdout that was trained on": ({"data": {"holdout": "retain2.jsonl"}}, ["holdout row", "retain2.jsonl:1"]),
}


@pytest.fixture
def place(tmp_path):
    (tmp_path / "forget.jsonl").write_text(lines(*GOOD))
    (tmp_path / "retain.jsonl").write_text(lines(*KEPT))
    (tmp_path / "retain2.jsonl").write_text(lines({**KEPT[0], "id": "h0"}))
    (tmp_path / "retain3.jsonl").write_text(lines({**KEPT[0], "id": "h1"}))
    (tmp_path / "forget2.jsonl").write_text(lines({**GOOD[0], "id": "h2"}))
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
    assert len(message) < 600
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
        ("data: {forget: a, forget: b}\n", ["line 1", "'forget' is given twice"]),
        ("? [a]\n: b\n", ["line 1", "where a field name is expected"]),
        ("model: a\ndata: {forget: b}\n1: a\n", ["field 1 is 1"]),
        ("name: 2024-13-45\n", ["month must be in 1..12"]),
        ("name: !!python/object:os.system x\n", ["request.yaml:1", "not YAML", "python/object"]),
        ("a: " + "[" * 9999, ["cannot be read", "recursion"]),
        ("a: &a {b: *a}\n", ["request.yaml:1", "not YAML", "recursive"]),
        ("model: a\n---\nmodel: b\n", ["request.yaml:2", "another document"]),
        ("\tmodel: a\n", ["request.yaml:1", "not YAML"]),
    ],
)
def test_bad_yaml(tmp_path, text, parts):
    (tmp_path / "request.yaml").write_text(text)
    refused(lambda: load(tmp_path / "request.yaml"), "request.yaml", *parts)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{", ["request.json:1", "not JSON"]),
        ('{"model": "a", "model": "b"}', ["'model' is given twice"]),
        ("[" * 99999, ["cannot be read", "recursion"]),
        ("[]", ["found list", "expected fields"]),
    ],
)
def test_bad_json(tmp_path, text, parts):
    (tmp_path / "request.json").write_text(text)
    refused(lambda: load(tmp_path / "request.json"), "request.json", *parts)


@pytest.mark.parametrize(
    ("name", "value", "parts"),
    [
        ("training.epoch", 3, ["no field 'training.epoch'", "Did you mean epochs"]),
        ("training.epochs.x", 3, ["field training.epochs is {'x': 3}"]),
        ("data.forget.path", "b", ["cannot set data.forget.path", "forget is 'forget.jsonl', not a mapping"]),
    ],
)
def test_bad_overrides(place, name, value, parts):
    refused(lambda: load(write(place), {name: value}), "request.json", *parts)


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


def run(capsys, place, *parts, changes=None, extra=(), started=False):
    """One line on stderr, status 2; nothing written before work starts, and no delta or evidence after that."""
    path = write(place, changes)
    capsys.readouterr()
    code = cli.main(["run", str(path), "--out", str(place / "out" / "run"), "--json", *extra])
    shown = capsys.readouterr()
    assert code == cli.MISTAKE, shown.err
    assert shown.out == ""
    assert shown.err.startswith("error E")
    assert shown.err.count("\n") == 1, shown.err
    for part in parts:
        assert part in shown.err
    left = {str(p.relative_to(place / "out" / "run")) for p in (place / "out" / "run").rglob("*") if p.is_file()}
    assert left - {".lock"} == ({"run.json", "request.json"} if started else set())
    assert (place / "ledger.sqlite").exists() == started
    if started:
        assert [entry.event for entry in Ledger().list()] == ["request_received", "started", "failed"]


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


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model": "forget.jsonl"}, ["E200", "forget.jsonl is a file", "expected a folder"]),
        ({"model": "empty"}, ["E200", "empty", "config.json"]),
        ({"gold": ["./gold-0"]}, ["E200", "gold-0 does not exist"]),
        ({"dtype": "flot32"}, ["E200", "dtype 'flot32'", "float32"]),
        ({"device": "gpu"}, ["E200", "device 'gpu'"]),
        ({"data": {"holdout": "retain2.jsonl"}}, ["E100", "holdout row"]),
    ],
)
def test_what_is_found_before_anything_is_written(road, capsys, changes, parts):
    (road / "empty").mkdir()
    run(capsys, road, *parts, changes=changes)


def test_a_loss_that_is_not_finite(road, capsys):
    run(capsys, road, "E400", "learning_rate", changes={"training": {"steps": 3, "learning_rate": 1e30}}, started=True)


def test_a_method_without_the_rows_it_needs(road, capsys):
    run(capsys, road, "E100", "retain: 0 rows, but npo", changes={"data": {"retain": None}})
    run(
        capsys,
        road,
        "E100",
        "retain: 0 rows, but npo",
        changes={"data": {"retain": None}, "method": {"name": "undo", "objective": "npo"}},
    )


@pytest.mark.parametrize("field", ["answer", "paraphrased_answer", "perturbed_answers"])
@pytest.mark.parametrize("name", ["forget", "retain", "general"])
def test_answer_longer_than_the_context(road, capsys, name, field):
    records = KEPT if name == "retain" else GOOD if name == "forget" else [{**r, "id": f"g{r['id']}"} for r in MORE]
    long = {**records[8], field: "Tivin " * 900}
    (road / f"{name}.jsonl").write_text(lines(*records[:8], long))
    run(
        capsys,
        road,
        "E110",
        f"{name}.jsonl:9",
        "context holds 256",
        changes={"data": {name: f"{name}.jsonl"}},
    )


@pytest.mark.parametrize("method", ["npo", "rmu", "task_vector", "undo"])
def test_scope_that_matches_nothing(road, capsys, method):
    run(capsys, road, "E300", "Nearest names", extra=("--scope", "regex:nothing", "--method", method))


def test_an_audit_of_rows_that_do_not_fit_the_model(road, capsys):
    (road / "retain.jsonl").write_text(lines({**KEPT[0], "question": "where " * 900}))
    folder = road / "out" / "audit"
    command = ["audit", "model", "--request", str(write(road)), "--out", str(folder), "--json"]
    assert cli.main(command) == cli.MISTAKE
    assert "retain.jsonl:1" in capsys.readouterr().err
    assert not folder.exists()
    assert not (road / "ledger.sqlite").exists()


def test_unknown_parameter_on_the_command_line(road, capsys):
    run(capsys, road, "betta", extra=("--set", "betta=1"))


def test_unknown_method_on_the_command_line(road, capsys):
    run(capsys, road, "E310", "npo", extra=("--method", "nppo"))


@pytest.mark.parametrize("extra", [("--set", "beta"), ("--set", "beta=[1"), ("--set", "training.epoch=1")])
def test_settings_that_cannot_be_read(road, capsys, extra):
    run(capsys, road, "epochs" if "epoch" in extra[1] else "--set", extra=extra)


def test_output_that_is_a_file(road, capsys):
    (road / "out").write_text("a file")
    run(capsys, road, "E500", "out/run", "Choose another place with --out")


def mounted(place, options):
    """A small disk of its own where that is allowed."""
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")


@pytest.fixture
def disk(road):
    yield road / "out"
    if os.path.ismount(road / "out"):
        subprocess.run(["umount", "-l", str(road / "out")], check=True)


def test_read_only_output(road, disk, capsys):
    if os.geteuid() == 0:
        mounted(disk, "ro,size=64k")
    else:
        disk.mkdir()
        disk.chmod(stat.S_IRUSR | stat.S_IXUSR)
    run(capsys, road, "E500", "out/run", "Choose another place with --out")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a disk")
def test_a_disk_that_is_too_small(road, disk, capsys):
    mounted(disk, "size=64k")
    run(capsys, road, "E500", "No space left", started=True)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_is_full(road, capsys, monkeypatch, call):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, call, full)
    path = write(road)
    assert cli.main(["run", str(path), "--out", str(road / "out" / "run"), "--json"]) == cli.MISTAKE
    error = capsys.readouterr().err
    assert error.startswith("error E500: cannot write ")
    assert "No space left" in error
    assert error.count("\n") == 1
    assert [p for p in (road / "out").rglob("*") if p.is_file() and p.name != ".lock"] == []


def test_a_ledger_that_cannot_be_written(road, capsys, monkeypatch):
    monkeypatch.setenv("EXPUNGE_LEDGER", str(road / "forget.jsonl" / "ledger.sqlite"))
    run(capsys, road, "E510", "forget.jsonl/ledger.sqlite", "cannot be used")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.json", '{"key": "other", "method": "idk"}', "out/run holds another run (method idk)"),
        ("run.json", '{"key": "oth', "run.json is damaged"),
        ("run.json", "[]", "run.json is damaged"),
        ("run.json", "\x00\xff", "run.json is damaged"),
        ("thesis.txt", "mine", "out/run is not empty and holds no run (thesis.txt)"),
    ],
)
def test_an_output_folder_that_holds_something_else_is_left_as_it_is(road, capsys, name, content, message):
    folder = road / "out" / "run"
    folder.mkdir(parents=True)
    (folder / name).write_text(content, encoding="latin-1")
    assert cli.main(["run", str(write(road)), "--out", str(folder), "--json"]) == cli.MISTAKE
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert (folder / name).read_text(encoding="latin-1") == content
    assert {p.name for p in folder.iterdir()} == {name, ".lock"}
    assert not (road / "ledger.sqlite").exists()


def test_a_mistake_ends_the_process_with_status_2(road):
    command = [sys.executable, "-m", "expunge", "run", str(write(road, {"modle": "x"}))]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stdout) == (cli.MISTAKE, "")
    assert done.stderr.startswith("error E100: ")
    assert "Did you mean model" in done.stderr
    assert done.stderr.count("\n") == 1


def test_every_error_code_has_a_section_with_cause_and_fix():
    page = (Path(__file__).parent.parent / "docs" / "errors.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (E\d+)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    codes = {one.code for one in (ExpungeError, *ExpungeError.__subclasses__())}
    assert set(sections) == codes | {"E010", "E520", "E999"}
    for code, section in sections.items():
        assert re.search(r"^- Cause: .+^- Fix: .+", section, re.MULTILINE | re.DOTALL), code
        assert set(re.findall(r"error (E\d+):", section)) <= {code}
