"""The request file: what is in it is what is meant, paths are relative to it, and its page says all of it."""

import json
import math
import re
from pathlib import Path

import pytest
import yaml

from expunge.errors import RequestError
from expunge.request import ENTITIES, Request, check, load, named, read_data, schema, warnings
from expunge.rows import Row

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "request.md"


@pytest.fixture
def write(tmp_path):
    def made(text, name="request.yaml"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    (tmp_path / "data").mkdir()
    for number, part in enumerate(("forget", "retain")):
        records = [{"q": f"{part} {i}?", "answer": "a", "entity": f"e{i // 2}"} for i in range(4 + number)]
        (tmp_path / "data" / f"{part}.jsonl").write_text("\n".join(map(json.dumps, records)))
    return made


SHORT = "model: org/name\ndata: {forget: data/forget.jsonl}\n"


def test_two_fields_are_enough(write):
    request = load(write(SHORT, "erase-ilva.yaml"))
    assert (request.name, request.method_name, request.method_settings) == ("erase-ilva", "npo", {})
    assert request.training.guard.band == 1.0
    assert request.out is None


def test_yaml_json_and_python_values_give_the_same_request(write):
    text = "model: m\ndata: {forget: data/forget.jsonl}\ntraining: {learning_rate: 1e-5, guard: no}\nmethod: idk\n"
    values = {
        "model": "m",
        "data": {"forget": "data/forget.jsonl"},
        "training": {"learning_rate": 1e-5, "guard": False},
        "method": "idk",
    }
    assert load(write(text)) == load(write(json.dumps(values), "request.json"))
    assert load(write("\ufeff" + text.replace("\n", "\r\n"))) == load(write(text))


def test_anchors_and_merges_of_yaml_work(write):
    text = (
        "model: m\ndata:\n  forget: &rows {path: data/forget.jsonl, fields: {question: q}}\n"
        "  retain: {<<: *rows, path: data/retain.jsonl}\n"
    )
    data = load(write(text)).data
    assert data.retain.fields == data.forget.fields == {"question": "q"}
    assert data.retain.path.endswith("retain.jsonl")


def test_paths_are_relative_to_the_file(write, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    request = load(
        write(
            "model: model\ngold: [./gold, org/gold, ~/model]\nout: ../out\n"
            "data: {forget: data/forget.jsonl, retain: org/rows, general: general.csv}\n"
        )
    )
    assert request.model == str(tmp_path / "model")
    assert request.gold == [str(tmp_path / "gold"), "org/gold", str(tmp_path / "model")]
    assert Path(request.out).resolve() == tmp_path.parent / "out"
    assert request.data.forget.path == str(tmp_path / "data" / "forget.jsonl")
    assert request.data.retain.path == "org/rows"
    assert request.data.general.path == str(tmp_path / "general.csv")


def test_field_mappings_of_the_request_are_the_default_of_every_set(write):
    path = write(
        "model: m\nfields: {question: q, answer: x}\n"
        "data: {forget: {path: data/forget.jsonl, fields: {answer: answer}}, retain: data/retain.jsonl}\n"
    )
    request = load(path)
    assert request.data.forget.fields == {"question": "q", "answer": "answer"}
    assert request.data.retain.fields == {"question": "q", "answer": "x"}
    data = read_data(load(path, {"fields.answer": "answer"}))
    assert {name: len(rows) for name, rows in data.items()} == {"forget": 4, "retain": 5}
    assert data["forget"][0].prompt == "forget 0?"


def test_overrides_reach_fields_at_any_depth(write):
    changes = {"training.guard.band": 2, "proof": "quick", "method": {"name": "npo", "beta": 0.2}, "audit.attacks": []}
    request = load(write(SHORT), changes)
    assert request.training.guard.band == 2
    assert (request.proof, request.method_settings, request.audit.attacks) == ("quick", {"beta": 0.2}, [])


def test_free_settings_hold_numbers_only_that_the_record_can_hold(write):
    with pytest.raises(RequestError, match=r"request\.yaml: holds something other than text, numbers"):
        load(write(SHORT), {"method": {"name": "npo", "beta": math.nan}})


def test_defaults_of_training_are_those_of_the_loop():
    from dataclasses import asdict

    from expunge.methods.optimise.loop import Guard, Training

    training = Request(model="m", data={"forget": "f"}).training.model_dump()
    assert training == asdict(Training())
    assert training["guard"] == asdict(Guard())


def test_names_may_carry_settings():
    assert named(None) is None
    assert named(["direct", {"relearn": {"steps": 4}}]) == [("direct", {}), ("relearn", {"steps": 4})]


def test_what_weakens_the_verdict_is_said_beforehand():
    def rows(count, entity):
        return [Row(id=str(i), prompt="q", answer="a", entity=entity or str(i)) for i in range(count)]

    few, unnamed, alone = warnings({"forget": [*rows(2, "")]})
    assert few.startswith(f"The forget rows name 2 entities; below {ENTITIES}")
    assert "every row counts as one" in unnamed
    assert "no retain rows" in alone
    many = [Row(id=f"r{i}", prompt="q", answer="a", entity=f"e{i // 2}") for i in range(2 * ENTITIES)]
    assert warnings({"forget": many, "retain": many}) == []


# --- the page --------------------------------------------------------------------------------------------------------


def fields():
    """(name, description, whether it is needed) of every field in the schema."""
    whole = schema()
    return sorted(
        (name, field.get("description", ""), name in part.get("required", []))
        for part in (whole, *whole["$defs"].values())
        for name, field in part["properties"].items()
    )


def test_the_page_has_every_field_with_its_meaning_and_no_other():
    found = re.findall(r"^\| `(\w+)` \| .+? \| (.+) \| (.*?) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted((name, meaning, default == "needed") for name, default, meaning in found) == fields()


def test_every_field_says_what_it_means():
    below = ("data", "training", "audit")  # described field by field
    assert [name for name, meaning, _ in fields() if not meaning and name not in below] == []


def test_the_example_of_the_page_is_a_request():
    example = re.search(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    values = yaml.safe_load(example[1])
    request = Request.model_validate(values)
    assert request.training.learning_rate == 1e-5
    assert set(values) <= set(Request.model_fields)
    check(request)
