"""Rows come out equal whatever format they were brought in."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expunge.errors import RowError
from expunge.rows import Row, Source, fingerprint, read_rows

RECORDS = [
    {"id": "a", "question": "where?", "answer": "Tivin", "entity": "Ilva", "perturbed_answers": ["Carth", "Orsk"]},
    {
        "id": "b",
        "question": "when, and how?",
        "answer": "in spring",
        "entity": "Mo",
        "perturbed_answers": ["in May", "x"],
    },
]


def jsonl(path, records=RECORDS, encoding="utf-8", end="\n"):
    path.write_bytes(end.join(json.dumps(r, ensure_ascii=False) for r in records).encode(encoding))
    return path


def read(path, **options):
    return read_rows(Source(str(path), **options), "forget")


def stripped(rows):
    return [(r.id, r.prompt, r.answer, r.entity, r.perturbed_answers, r.kind) for r in rows]


@pytest.fixture
def expected(tmp_path):
    return stripped(read(jsonl(tmp_path / "expected.jsonl")))


def test_every_format_gives_equal_rows(tmp_path, expected):
    (tmp_path / "list.json").write_text(json.dumps(RECORDS))
    columns = {name: [record[name] for record in RECORDS] for name in RECORDS[0]}
    (tmp_path / "columns.json").write_text(json.dumps(columns))
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "rows.parquet")
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, RECORDS[0])
        writer.writeheader()
        writer.writerows({**r, "perturbed_answers": json.dumps(r["perturbed_answers"])} for r in RECORDS)
    for name in ("list.json", "columns.json", "rows.parquet", "rows.csv"):
        assert stripped(read(tmp_path / name)) == expected, name


def test_a_folder_is_all_its_files_in_order(tmp_path, expected):
    (tmp_path / "data").mkdir()
    for number, record in enumerate(RECORDS):
        jsonl(tmp_path / "data" / f"{number}.jsonl", [record])
    assert stripped(read(tmp_path / "data")) == expected


def test_a_saved_data_set_is_read(tmp_path, expected):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(RECORDS).save_to_disk(str(tmp_path / "saved"))
    assert stripped(read(tmp_path / "saved")) == expected


def test_byte_order_marks_blank_lines_and_windows_ends_do_no_harm(tmp_path, expected):
    path = jsonl(tmp_path / "bom.jsonl", encoding="utf-8-sig", end="\r\n\r\n")
    assert stripped(read(path)) == expected
    assert read(path)[1].source.endswith("bom.jsonl:3")


def test_other_names_are_mapped(tmp_path, expected):
    renamed = [{"q" if k == "question" else "a" if k == "answer" else k: v for k, v in r.items()} for r in RECORDS]
    assert stripped(read(jsonl(tmp_path / "r.jsonl", renamed), fields={"question": "q", "answer": "a"})) == expected


def test_names_of_published_data_are_known(tmp_path):
    record = {
        "question": "q",
        "answer": "a",
        "subject": "Ilva",
        "perturbed_answer": ["x"],
        "paraphrased_question": "p?",
    }
    row = read(jsonl(tmp_path / "r.jsonl", [record]))[0]
    assert (row.entity, row.perturbed_answers, row.paraphrased_prompts) == ("Ilva", ("x",), ("p?",))


def test_kinds_follow_from_the_fields(tmp_path):
    chat = [
        {"role": "system", "content": "brief"},
        {"role": "user", "content": "who?"},
        {"role": "assistant", "content": "Ilva"},
    ]
    records = [{"text": "a passage"}, {"prompt": "Ilva is", "completion": "here"}, {"messages": chat}]
    rows = read(jsonl(tmp_path / "r.jsonl", records))
    assert [row.kind for row in rows] == ["text", "completion", "chat"]
    assert rows[2].messages == (("system", "brief"), ("user", "who?"))
    assert (rows[2].prompt, rows[2].answer) == ("who?", "Ilva")


def test_numbers_are_taken_as_they_are_written(tmp_path):
    assert read(jsonl(tmp_path / "r.jsonl", [{"question": "when?", "answer": 1984}]))[0].answer == "1984"


def test_rows_in_blocks_are_about_one_entity(tmp_path):
    records = [{"question": f"q{i}", "answer": "a"} for i in range(5)]
    rows = read(jsonl(tmp_path / "r.jsonl", records), entity_every=2)
    assert [row.entity for row in rows] == ["forget/block 1"] * 2 + ["forget/block 2"] * 2 + ["forget/block 3"]
    alone = read(tmp_path / "r.jsonl")
    assert [row.entity for row in alone] == [row.id for row in alone] == [f"forget/{i}" for i in range(1, 6)]


def test_fingerprints_are_salted_and_do_not_depend_on_order():
    rows = [Row(id="a", prompt="q", answer="x"), Row(id="b", prompt="r", answer="y")]
    assert fingerprint(rows, "s") == fingerprint(rows[::-1], "s")
    assert fingerprint(rows, "s") != fingerprint(rows, "t")
    assert fingerprint(rows, "s") != fingerprint(rows[:1], "s")


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5))
def test_whatever_is_written_is_read_back(tmp_path_factory, pairs):
    path = tmp_path_factory.mktemp("round") / "rows.jsonl"
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.writelines(json.dumps({"question": q, "answer": a}) + "\n" for q, a in pairs)
    assert [(row.prompt, row.answer) for row in read(path)] == pairs


def test_a_hub_id_without_network_is_an_error_that_says_both(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    with pytest.raises(RowError, match="no such file or folder, and as a hub data set"):
        read("nobody/nothing-of-that-name")
