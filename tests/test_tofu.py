"""TOFU: the published format, what must hold between its files, and its protocol on the invented world."""

import json
from pathlib import Path
from statistics import harmonic_mean

import pytest
import torch

from expunge.bench import bench
from expunge.benchmarks import tofu_rows
from expunge.errors import ExpungeError, RowError, TableError
from expunge.rows import Source, read_rows
from expunge.subjects.language import LanguageModel
from expunge.world.facts import RELATIONS, make

WORLD = make(0)
SAMPLE = Path("/work/shared/data/tofu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tofu")
    tofu_rows.mini(WORLD, path)
    return path


def lines(folder: Path, config: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{config}.json").read_text(encoding="utf-8").splitlines()]


def rewrite(folder: Path, config: str, rows: list[dict]) -> None:
    (folder / f"{config}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


# --- files -----------------------------------------------------------------------------------------------------------


def test_splits_are_nested_and_complements(folder):
    full = lines(folder, "full")
    for split, retain in tofu_rows.RETAIN.items():
        assert lines(folder, retain) + lines(folder, split) == full
    smaller, middle, larger = (lines(folder, split) for split in tofu_rows.RETAIN)
    assert larger[-len(middle) :] == middle
    assert middle[-len(smaller) :] == smaller
    assert len(smaller) < len(middle) < len(larger)


def test_holdout_shares_no_author_with_the_training_data(folder):
    said = json.dumps([lines(folder, name) for name in ("full", "retain_perturbed", "real_authors", "world_facts")])
    people = WORLD.members("holdout")
    assert len(lines(folder, "holdout10")) == len(RELATIONS) * len(people)
    for person in people:
        assert person.name not in said
        assert person.name in json.dumps(lines(folder, "holdout10"))


@pytest.mark.parametrize("config", ["forget10", "retain"])
def test_wrong_answers_are_wrong_and_different_and_the_paraphrase_is_right(folder, config):
    truth = {p.name: p for p in WORLD.people.values()}
    for number, row in enumerate(lines(folder, f"{config}_perturbed")):
        wrong = row["perturbed_answer"]
        assert len({*wrong, row["answer"], row["paraphrased_answer"]}) == 7
        person = next(p for name, p in truth.items() if name in row["question"])
        assert row["answer"] == person.value(RELATIONS[number % len(RELATIONS)])
        assert row["answer"] in row["paraphrased_answer"]
        assert not any(row["answer"] in text for text in wrong)


def test_options_are_three_wrong_short_answers(folder):
    for config in ("real_authors_perturbed", "world_facts_perturbed"):
        for row in lines(folder, config):
            assert set(row) == {"question", "answer", "perturbed_answer"}
            assert len({row["answer"], *row["perturbed_answer"]}) == 4


def test_the_hub_gives_the_rows_of_the_folder(folder, monkeypatch):
    import datasets

    asked = []

    def load(path, config, *, split):
        asked.append((path, config, split))
        return datasets.Dataset.from_list(lines(folder, config))

    monkeypatch.setattr(datasets, "load_dataset", load)
    ours, notes = tofu_rows.read(str(folder), "forget05", 4)
    theirs, _ = tofu_rows.read("locuslab/TOFU", "forget05", 4)
    assert notes == []
    assert ("locuslab/TOFU", "forget05_perturbed", "train") in asked
    assert ours.keys() == theirs.keys() == {"forget", "retain", "real_authors", "world_facts", "holdout"}
    for name, rows in ours.items():
        assert [(r.prompt, r.answer, r.paraphrased_answer, r.perturbed_answers, r.entity) for r in rows] == [
            (r.prompt, r.answer, r.paraphrased_answer, r.perturbed_answers, r.entity) for r in theirs[name]
        ]


def test_rows_of_one_author_are_one_entity(folder):
    data, _ = tofu_rows.read(str(folder), "forget10", 4)
    for name in tofu_rows.ABOUT_AUTHORS:
        assert len({row.entity for row in data[name]}) == len(data[name]) // 4
    assert len({row.entity for row in data["world_facts"]}) == len(data["world_facts"])


def test_a_holdout_row_that_was_trained_on_is_named_with_both_places(copy):
    rows = lines(copy, "holdout10")
    rewrite(copy, "holdout10", [*rows[:2], lines(copy, "full")[6]])
    with pytest.raises(RowError, match=r"holdout10\.json:3 is a holdout row.*full\.json:7"):
        tofu_rows.read(str(copy), "forget10", 4)


def test_a_forget_row_that_is_retained_is_named_with_both_places(copy):
    row = lines(copy, "forget10_perturbed")[4]
    rewrite(copy, "retain_perturbed", [*lines(copy, "retain_perturbed"), row])
    with pytest.raises(RowError, match=r"forget10_perturbed\.json:5 is to be forgotten and retained .*:113"):
        tofu_rows.read(str(copy), "forget10", 4)


def test_files_of_two_splits_are_told_apart(copy):
    rewrite(copy, "forget10_perturbed", lines(copy, "forget05_perturbed"))
    with pytest.raises(RowError, match=r"are 20 rows, forget10 has 40: not one split"):
        tofu_rows.read(str(copy), "forget10", 4)


@pytest.mark.parametrize(
    ("config", "field", "sentence"),
    [
        ("forget10_perturbed", "perturbed_answer", "forget10_perturbed.json:2: field 'perturbed_answer' is missing"),
        ("retain_perturbed", "paraphrased_answer", "retain_perturbed.json:2: field 'paraphrased_answer' is missing"),
        ("world_facts_perturbed", "perturbed_answer", "world_facts_perturbed.json:2: field 'perturbed_answer'"),
        ("real_authors_perturbed", "answer", "real_authors_perturbed.json:2: field 'answer' is missing"),
    ],
)
def test_a_malformed_row_names_file_line_and_field(copy, config, field, sentence):
    rows = lines(copy, config)
    del rows[1][field]
    rewrite(copy, config, rows)
    with pytest.raises(RowError, match=sentence):
        tofu_rows.read(str(copy), "forget10", 4)


def test_every_missing_file_is_named_at_once(copy):
    for config in ("forget10_perturbed", "world_facts_perturbed"):
        (copy / f"{config}.json").unlink()
    with pytest.raises(RowError, match=r"lacks forget10_perturbed.json, world_facts_perturbed.json and holds forget01"):
        tofu_rows.read(str(copy), "forget10", 4)


def test_what_could_not_be_checked_or_is_odd_is_told(copy):
    for config in ("full", "holdout10"):
        (copy / f"{config}.json").unlink()
    rows = lines(copy, "forget10_perturbed")
    rows[3]["perturbed_answer"][0] = rows[3]["paraphrased_answer"]
    rows[5]["perturbed_answer"][0] = rows[5]["perturbed_answer"][1]
    rewrite(copy, "forget10_perturbed", rows)
    data, notes = tofu_rows.read(str(copy), "forget10", 4)
    assert "holdout" not in data
    told = " ".join(notes)
    assert "no full.json: splits were not compared" in told
    assert "No membership attacks" in told
    assert "1 of 40 forget rows have the right answer among the wrong ones, first" in told
    assert "1 of 40 forget rows have a wrong answer twice" in told


def test_rows_out_of_place_are_told(copy):
    rows = lines(copy, "full")
    rewrite(copy, "full", [rows[-1], *rows[:-1]])
    _, notes = tofu_rows.read(str(copy), "forget10", 4)
    assert any(note.startswith("40 rows of forget10 do not stand where full has them") for note in notes)


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="published sample data is not here")
def test_the_published_sample_says_what_it_lacks():
    with pytest.raises(RowError, match=r"lacks forget10_perturbed.json, retain_perturbed.json.*holds forget10_sample"):
        tofu_rows.read(str(SAMPLE), "forget10", 20)


# --- the benchmark ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def card(tiny_world, tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    original, first, second = tiny_world.original, *tiny_world.golds
    return bench("tofu", original, original=original, gold=[first, second], out=out, bootstrap=100), out


def test_the_original_is_told_from_gold_and_gold_from_gold_is_not(card):
    found, _ = card
    assert found.value("forget_quality") < -3
    assert found.value("forget_quality", "gold") > -2
    assert found.value("privleak") < -80
    assert found.value("mia_loss") > 0.9
    assert abs(found.value("mia_loss", "gold") - 0.5) < 0.25
    assert found.value("exact_memorization") > 0.9 > found.value("exact_memorization", "gold")
    assert found.rows == {"forget": 32, "retain": 32, "real_authors": 16, "world_facts": 18, "holdout": 24}


def test_model_utility_is_the_harmonic_mean_of_the_nine_numbers_in_the_table(card):
    found, _ = card
    table = next(table for table in found.tables if table.title == "By row set")
    nine = [value for row in table.rows if row[0] != "forget" and row[1] == "after" for value in row[2:]]
    assert len(nine) == 9
    assert found.value("model_utility") == pytest.approx(harmonic_mean(nine))


def test_forget_quality_comes_with_d_n_and_the_paired_test(card):
    found, _ = card
    table = next(table for table in found.tables if table.title.startswith("Forget quality"))
    assert list(table.columns)[1:4] == ["log10 p", "D", "n"]
    before = dict(zip(table.columns, table.rows[0]))
    assert before["log10 p"] == pytest.approx(found.value("forget_quality", "before"))
    assert before["n"] == 32
    assert before["paired p, rows"] < 0.01
    assert [row[0] for row in table.rows] == ["before", "after", "gold 0", "gold 1"]


def test_gold_against_itself_is_one_and_flagged(card, tiny_world):
    _, out = card
    gold = bench("tofu", tiny_world.golds[0], gold=tiny_world.golds[:1], out=out, bootstrap=0)
    same = next(one for one in gold.measured if one.metric == "forget_quality")
    assert same.after.value == 0
    assert "is it the same model?" in same.flag


def test_forget_quality_against_a_gold_log_of_open_unlearning(card, tiny_world, tmp_path):
    _, out = card
    log = tmp_path / "TOFU_EVAL.json"

    def run(ratios):
        by_index = {str(i): {"score": ratio} for i, ratio in enumerate(ratios)}
        log.write_text(json.dumps({"forget_truth_ratio": {"agg_value": 0.5, "value_by_index": by_index}}))
        found = bench("tofu", tiny_world.original, settings={"gold_log": str(log)}, out=out, bootstrap=0)
        return found, next(table for table in found.tables if str(log) in table.title)

    # All of gold's ratios are above the model's: the largest distance there is.
    found, table = run([50.0 + i for i in range(32)])
    assert table.rows[0][1:] == (1.0, 32)
    assert table.rows[0][0] == pytest.approx(-17.96, abs=0.01)  # 2 / C(64, 32)
    assert any("forget_quality was not measured" in note for note in found.notes)
    with pytest.raises(TableError, match=r"has 1 forget rows, this split has 32"):
        run([1.0])
    with pytest.raises(TableError, match="not numbers, or negative"):
        run([-1.0] * 32)


def test_a_model_that_finds_all_answers_alike_has_truth_ratio_one_and_no_utility(tiny_world, tmp_path):
    subject = LanguageModel.load(tiny_world.original)
    with torch.no_grad():
        subject.model.get_output_embeddings().weight.zero_()
    found = bench("tofu", subject, world=tiny_world.path, settings={"max_new_tokens": 2}, out=tmp_path, bootstrap=0)
    table = {row[0]: row[2:] for row in found.tables[0].rows}
    assert table["forget"][2] == pytest.approx(1, abs=1e-5)
    assert table["retain"][2] == pytest.approx(0, abs=1e-5)
    assert found.value("model_utility") == pytest.approx(0, abs=1e-4)


def test_short_contexts_are_told(card):
    found, _ = card
    assert any("instead of 200: the context holds 128" in note for note in found.notes)


def test_an_unknown_split_is_refused(tiny_world):
    with pytest.raises(ExpungeError, match="split"):
        bench("tofu", tiny_world.original, settings={"split": "forget20"})


# --- JSON lines in .json ---------------------------------------------------------------------------------------------


def test_json_files_may_hold_one_object_a_line(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('{"question": "a", "answer": "b"}\n{"question": "c", "answer": "d"}\n')
    rows = read_rows(Source(str(path)), "x")
    assert [(row.prompt, row.answer) for row in rows] == [("a", "b"), ("c", "d")]
    assert rows[1].source.endswith("rows.json:2")
    path.write_text('{"question": "a", "answer": "b"}\n{"question": "c", oops}\n')
    with pytest.raises(RowError, match=r"rows\.json:2: not JSON"):
        read_rows(Source(str(path)), "x")
