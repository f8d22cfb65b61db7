"""Rows come out equal whatever format they were brought in."""

import csv
import json
import logging
import math
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expunge.errors import RowError
from expunge.rows import Row, Source, asked_for, fingerprint, read_rows

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


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def read(path, **options):
    return read_rows(Source(str(path), **options), "forget")


def stripped(rows):
    """Rows without the place they were read from."""
    return [replace(row, source="") for row in rows]


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


def test_one_split_of_a_saved_data_set_is_read(tmp_path, expected):
    datasets = pytest.importorskip("datasets")
    both = {"train": datasets.Dataset.from_list(RECORDS), "test": datasets.Dataset.from_list(RECORDS[:1])}
    datasets.DatasetDict(both).save_to_disk(str(tmp_path / "saved"))
    assert stripped(read(tmp_path / "saved")) == expected
    assert stripped(read(tmp_path / "saved", split="test")) == expected[:1]
    with pytest.raises(RowError, match=r"saved: the saved data set has no split 'tset'\. Did you mean test"):
        read(tmp_path / "saved", split="tset")


def test_a_folder_may_mix_formats_depths_and_capitals(tmp_path, expected):
    (tmp_path / "data" / "deeper").mkdir(parents=True)
    jsonl(tmp_path / "data" / "A.JSONL", RECORDS[:1])
    pq.write_table(pa.Table.from_pylist(RECORDS[1:]), tmp_path / "data" / "deeper" / "b.parquet")
    (tmp_path / "data" / "README.md").write_text("not rows")
    assert stripped(read(tmp_path / "data")) == expected


def test_cells_without_a_value_are_as_if_they_were_not_there(tmp_path):
    table = pa.table({"question": ["q", "r"], "answer": ["a", "b"], "entity": [None, "Mo"], "value": [math.nan, 7.0]})
    pq.write_table(table, tmp_path / "rows.parquet")
    (tmp_path / "rows.csv").write_text("question,answer,entity,value\nq,a,,\nr,b,Mo,7.0\n")
    jsonl(tmp_path / "rows.jsonl", [{"question": "q", "answer": "a", "entity": None, "value": math.nan, "aliases": []}])
    for name in ("rows.parquet", "rows.csv"):
        first, second = read(tmp_path / name)
        assert (first.entity, first.value) == (first.id, "")
        assert (second.entity, second.value) == ("Mo", "7.0")
    assert read(tmp_path / "rows.jsonl") == [replace(first, source=f"{tmp_path}/rows.jsonl:1")]


def test_csv_cells_may_hold_commas_quotes_and_lines(tmp_path):
    (tmp_path / "r.csv").write_bytes(b'\xef\xbb\xbfquestion,answer\r\n"a, b","say ""x""\r\nand y"\r\n\r\nq,z\r\n')
    assert [(row.prompt, row.answer) for row in read(tmp_path / "r.csv")] == [("a, b", 'say "x"\r\nand y'), ("q", "z")]


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


def test_chat_rows_are_equal_in_jsonl_parquet_and_csv(tmp_path):
    turns = [[user("who?"), assistant("Ilva")], [user("a"), assistant("b"), user("c, d"), assistant("e")]]
    jsonl(tmp_path / "r.jsonl", [{"messages": chat} for chat in turns])
    pq.write_table(pa.Table.from_pylist([{"messages": chat} for chat in turns]), tmp_path / "r.parquet")
    with open(tmp_path / "r.csv", "w", newline="") as file:
        csv.writer(file).writerows([["messages"], *([json.dumps(chat)] for chat in turns)])
    rows = read(tmp_path / "r.jsonl")
    assert rows[1].messages == (("user", "a"), ("assistant", "b"), ("user", "c, d"))
    assert [(row.prompt, row.answer) for row in rows] == [("who?", "Ilva"), ("c, d", "e")]
    for name in ("r.parquet", "r.csv"):
        assert stripped(read(tmp_path / name)) == stripped(rows)


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
    records = [{"question": "when?", "answer": 1984}, {"question": 7, "answer": 0.5, "id": 3, "aliases": [1, "one"]}]
    first, second = read(jsonl(tmp_path / "r.jsonl", records))
    assert first.answer == "1984"
    assert (second.prompt, second.answer, second.id, second.aliases) == ("7", "0.5", "3", ("1", "one"))


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


@pytest.mark.parametrize(
    ("name", "where"), [("r.jsonl", "r.jsonl:1"), ("r.json", "r.json")], ids=["a line", "a whole file"]
)
def test_a_field_given_twice_is_not_silently_the_last(tmp_path, name, where):
    text = '{"question": "q", "answer": "a", "answer": "b"}'
    (tmp_path / name).write_text(text if name == "r.jsonl" else f"[{text}]")
    with pytest.raises(RowError, match=rf"{where}: 'answer' is given twice$"):
        read(tmp_path / name)


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1).filter(str.strip)


@settings(max_examples=60)
@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=5))
def test_whatever_is_written_is_read_back(tmp_path_factory, pairs):
    path = tmp_path_factory.mktemp("round") / "rows.jsonl"
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.writelines(json.dumps({"question": q, "answer": a}) + "\n" for q, a in pairs)
    assert [(row.prompt, row.answer) for row in read(path)] == pairs


def test_a_hub_id_without_network_is_one_error_that_says_both(monkeypatch, caplog):
    datasets = pytest.importorskip("datasets")

    def offline(*_, **__):
        logging.getLogger("huggingface_hub.utils").warning("Retrying in 1s")
        raise ConnectionError("Couldn't reach 'nobody/nothing' on the Hub\nand a second line")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        RowError, match=r"^nobody/nothing: no such file or folder, and as a hub data set: Couldn't reach"
    ):
        read("nobody/nothing")
    assert caplog.records == []
    assert logging.getLogger("huggingface_hub").level < logging.CRITICAL


def test_a_hub_id_is_read_with_its_configuration_and_split(monkeypatch, expected):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return datasets.Dataset.from_list(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert stripped(read("some/rows", config="forget01", split="test")) == expected
    assert asked == [(("some/rows", "forget01"), {"split": "test"})]


def test_an_empty_cell_of_a_mapped_column_is_a_missing_value(tmp_path):
    (tmp_path / "r.csv").write_text("question,answer,who\nq,a,Ilva\nr,b,\n")
    rows = read(tmp_path / "r.csv", fields={"entity": "who"})
    assert [row.entity for row in rows] == ["Ilva", "forget/2"]


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        (Row("a", "Vessa was born in Tivin.", kind="text"), "Vessa was ", "born in Tivin."),
        (Row("a", "Vessa was born in Tivin.", kind="text", value="Tivin"), "Vessa was born in ", "Tivin."),
        (Row("a", "Vessa was born in Tivin.", kind="text", value="Vessa"), "Vessa was ", "born in Tivin."),
        (Row("a", "One.\n\nTwo.", kind="text"), "One.\n\n", "Two."),
        (Row("a", "Tivin", kind="text"), "", "Tivin"),
        (Row("a", "in Tivin.", "Vessa was born ", kind="text"), "Vessa was born ", "in Tivin."),
        (Row("a", "in Tivin.", "Where?"), "Where?", "in Tivin."),
    ],
)
def test_of_running_text_the_audit_asks_for_what_follows_its_beginning(row, prompt, answer):
    (made,) = asked_for([row])
    assert (made.prompt, made.answer) == (prompt, answer)
    assert (made is row) == (row.prompt == prompt)
