"""MUSE: scores by hand, published files in all their forms, the mini version in the same form, bad input is named."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from metric_tables import scores
from tiny import tiny

from expunge.bench import bench
from expunge.benchmarks import muse, muse_data, muse_mini
from expunge.benchmarks.muse_data import cut, few_shot, folds, head, length, read, windows
from expunge.errors import ParameterError, RowError, TableError
from expunge.methods.optimise.loop import fit
from expunge.metrics.measure import values
from expunge.metrics.texts import overlap
from expunge.rows import Row, Source, read_rows
from expunge.subjects.language import LanguageModel
from expunge.tables.view import View
from expunge.world.facts import make

NEWS = [
    ("The harbour council of Osta met on Monday", "and voted to rebuild the west pier before winter comes."),
    ("A keeper in Tivin counted eleven lamps", "so the north gate of Carth was shut for the whole night."),
]


def write(folder: Path, name: str, rows: list[dict]) -> None:
    path = folder / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Invented rows in every split that the benchmark reads."""
    folder = tmp_path / "muse"
    write(folder, "verbmem/forget", [{"prompt": prompt, "gt": gt} for prompt, gt in NEWS])
    for split in ("forget", "retain"):
        asked = [{"question": "Who chairs the council of Osta?", "answer": "Milla Dorun"}]
        write(folder, f"knowmem/{split}_qa", asked)
        write(folder, f"knowmem/{split}_qa_icl", [{"question": "Where is Tivin?", "answer": "In Carth"}])
    for split, word in (("forget", "pier"), ("retain", "lamp"), ("holdout", "rope")):
        texts = [" ".join(NEWS[0]), " ".join(NEWS[1])] if split == "forget" else [f"A {word} of Ostra.", f"No {word}."]
        write(folder, f"privleak/{split}", [{"text": text} for text in texts])
    return folder


# --- by hand ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("curve", "bar", "place"),
    [([0.9, 0.6, 0.3, 0.2], 0.3, 2), ([0.9, 0.8, 0.7], 0.3, 2), ([0.1, 0.9], 0.3, 0), ([0.4, 0.2, 0.5, 0.1], 0.3, 1)],
)
def test_the_first_checkpoint_that_knows_no_more_than_the_retrained_model_is_chosen(curve, bar, place):
    assert muse.chosen(curve, bar) == place


def test_word_overlap_is_the_f_measure_of_words_as_they_are():
    # The longest common subsequence is "the cat": precision 2/4, recall 2/3.
    assert overlap("the cat sat", "The cat, ran fast", "rougeL", "fmeasure", "rouge_score_unstemmed") == pytest.approx(
        4 / 7
    )
    assert overlap("he voted", "he votes", "rougeL", "fmeasure", "rouge_score_unstemmed") == pytest.approx(1 / 2)
    assert overlap("he voted", "he votes", "rougeL", "fmeasure") == 1


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        ("Osta\n\nQuestion: Who", "Osta"),
        ("Osta\nQuestion: Who", "Osta"),
        ("Osta Question: Who\n\nmore", "Osta"),
        ("Osta\nin Carth", "Osta\nin Carth"),
        ("Question: Who", ""),
        ("", ""),
    ],
)
def test_an_answer_ends_where_another_question_begins(written, kept):
    assert cut(written) == kept


def test_examples_stand_before_the_question_as_published():
    asked, shown = Row(id="1", prompt="Who chairs?", answer="Milla"), Row(id="2", prompt="Where?", answer="In Carth")
    (row,) = few_shot([asked], [shown])
    subject = LanguageModel(*tiny("llama"))
    text, _ = subject.spans(row)
    assert text == "Question: Where?\nAnswer: In Carth\n\nQuestion: Who chairs?\nAnswer: Milla</s>"
    assert few_shot([asked], [])[0].prompt == "Question: Who chairs?\nAnswer:"


def sides(forget: list[float], holdout: list[float], golds: tuple[View, ...] = ()) -> View:
    """A view of one-token texts with these log-probabilities."""
    rows = {
        name: [Row(id=f"{name}/{i}", answer="text", kind="text") for i in range(len(several))]
        for name, several in (("forget", forget), ("holdout", holdout))
    }
    tables = {
        name: scores([(row.id, "answer", [value]) for row, value in zip(rows[name], several)])
        for name, several in (("forget", forget), ("holdout", holdout))
    }
    return View(rows, tables, golds=golds)


def test_privacy_leakage_by_hand():
    def attack(forget: list[float]) -> muse.Values:
        return values("mia_min_k", sides(forget, [-2.0, -4.0]))

    # Of four pairs the forget row is likelier in three: AUC 0.75, a = 0.25.
    gold = attack([-1.0, -3.0])
    assert gold.value == 0.75
    assert muse.leak(gold, [gold]).value == 0
    known, strange = attack([-0.1, -0.2]), attack([-8.0, -9.0])
    assert (known.value, strange.value) == (1, 0)
    assert muse.leak(known, [gold]).value == -100
    assert muse.leak(strange, [gold]).value == pytest.approx(100 * (1 - 0.25) / 0.25)
    found = muse.leak(strange, [gold])
    assert (found.extra["lowest"], found.extra["highest"]) == (-100, found.value)
    # Two golds count with their mean a (0.25 and 0.75), a stated a as one.
    other = attack([-3.0, -5.0])
    assert other.value == 0.25
    assert muse.leak(known, [gold, other]).value == -100
    assert muse.leak(attack([-3.0, -3.0]), [gold, other]).value == 0
    assert muse.leak(strange, [], 0.4772).value == pytest.approx(109.6, abs=0.05)
    assert muse.leak(strange, [], 0.5393).value == pytest.approx(85.4, abs=0.05)
    with pytest.raises(TableError, match="gold model itself tells forget from holdout"):
        muse.leak(known, [known])


def test_privacy_leakage_is_resampled_together_with_gold():
    gold = values("mia_min_k", sides([-1.0, -3.0], [-2.0, -4.0]))
    weights = np.array([[1.0, 1, 1, 1], [2, 0, 1, 1], [0, 2, 1, 1]])
    assert muse.leak(gold, [gold]).aggregate(weights).tolist() == [0, 0, 0]


def test_repeating_outputs_are_known():
    assert muse.repeats("the the the the")
    assert muse.repeats("a b a a a")
    assert not muse.repeats("a b a c")
    assert not muse.repeats("no no")


# --- published files -------------------------------------------------------------------------------------------------


def test_every_form_of_the_published_files_gives_the_same_rows(published):
    wanted = read(str(published), "verbmem", "forget")
    assert [(row.id, row.kind, row.prompt, row.answer) for row in wanted] == [
        (f"verbmem/forget/{i}", "completion", prompt, gt) for i, (prompt, gt) in enumerate(NEWS, start=1)
    ]
    records = [{"gt": gt, "prompt": prompt} for prompt, gt in NEWS]
    folder = published / "verbmem"
    (folder / "forget.jsonl").unlink()
    (folder / "readme.md").write_text("not rows")
    (folder / "forget-old.json").write_text("[]")

    def same() -> bool:
        found = read(str(published), "verbmem", "forget")
        return [replace(row, source="") for row in found] == [replace(row, source="") for row in wanted]

    (folder / "forget.json").write_text(json.dumps(records))
    assert same()
    (folder / "forget.json").unlink()
    for i, record in enumerate(records):
        pq.write_table(pa.Table.from_pylist([record]), folder / f"forget-0000{i}-of-00002.parquet")
    assert same()
    (folder / "forget.json").write_text(json.dumps(records))
    with pytest.raises(RowError, match=r"split 'forget' as .parquet in parts and as .json; keep one"):
        same()
    (folder / "forget.json").unlink()
    (folder / "forget-00000-of-00002.parquet").unlink()
    with pytest.raises(RowError, match="split 'forget' has 1 of its 2 parts"):
        same()


def test_a_folder_laid_out_like_the_hub_serves_any_request(published):
    rows = read_rows(Source(str(published), config="privleak", split="holdout"), "holdout")
    assert [row.answer for row in rows] == ["A rope of Ostra.", "No rope."]


@pytest.mark.parametrize(
    ("name", "rows", "sentence"),
    [
        (
            "verbmem/forget",
            [{"prompt": "p"}],
            r"forget.jsonl:1: fields maps completion to 'gt', which the row does not",
        ),
        (
            "verbmem/forget",
            [{"prompt": "p", "gt": "g"}, {"prompt": "", "gt": "g"}],
            r"forget.jsonl:2: field 'prompt' is",
        ),
        ("knowmem/forget_qa", [{"question": "q", "answer": 3 == 4}], r"forget_qa.jsonl:1: field 'answer' holds bool"),
        (
            "knowmem/retain_qa_icl",
            [{"question": "q", "reply": "a"}],
            r"retain_qa_icl.jsonl:1: fields maps answer to 'ans",
        ),
        ("privleak/holdout", [{"text": "a"}, {"body": "b"}], r"holdout.jsonl:2: fields maps text to 'text'"),
        ("privleak/retain", [], r"0 rows, expected at least 1"),
    ],
)
def test_bad_rows_are_named_by_file_row_and_field(published, tmp_path, name, rows, sentence):
    write(published, name, rows)
    with pytest.raises(RowError, match=sentence):
        bench("muse", LanguageModel(*tiny("llama")), data=str(published), out=tmp_path / "out")


def test_a_missing_split_or_configuration_is_named(published):
    with pytest.raises(RowError, match=r"knowmem has no split 'retain2_qa'. Did you mean retain_qa"):
        read(str(published), "knowmem", "retain2_qa")
    with pytest.raises(RowError, match=r"has no folder 'verbmemo' \(configuration\). Did you mean verbmem"):
        read(str(published), "verbmemo", "forget")
    with pytest.raises(RowError, match="folds were published for News only"):
        folds(str(published), "sust")


def test_folds_are_nested_or_disjoint_or_refused(tmp_path):
    for kind, several in (("scal", ["a", "ab", "abc", "abcd"]), ("sust", ["a", "b", "c", "d"])):
        for k, texts in enumerate(several, start=1):
            write(tmp_path, f"{kind}/forget_{k}", [{"text": text} for text in texts])
        assert [len(fold) for fold in folds(str(tmp_path), kind)] == [len(texts) for texts in several]
    write(tmp_path, "scal/forget_3", [{"text": "a"}, {"text": "c"}])
    with pytest.raises(RowError, match="1 texts of scal/forget_2 are not in scal/forget_3"):
        folds(str(tmp_path), "scal")
    write(tmp_path, "sust/forget_4", [{"text": "d"}, {"text": "b"}])
    with pytest.raises(RowError, match="sust/forget_2 and sust/forget_4 have 1 texts in common"):
        folds(str(tmp_path), "sust")


# --- the mini version ------------------------------------------------------------------------------------------------


def test_the_mini_version_keeps_the_published_promises(tmp_path):
    world = make(3)
    muse_mini.mini(world, tmp_path)

    def texts(config: str, split: str) -> list[str]:
        return [row.answer for row in read(str(tmp_path), config, split)]

    scal, sust = ([[row.answer for row in fold] for fold in folds(str(tmp_path), kind)] for kind in ("scal", "sust"))
    assert scal[0] == sust[0] == texts("raw", "forget") == texts("privleak", "forget")
    assert scal[3] == texts("train", "forget") == [text for fold in sust for text in fold]
    assert all(set(smaller) < set(larger) for smaller, larger in pairwise(scal))
    others = [texts("raw", split) for split in ("retain1", "retain2", "holdout")]
    assert all(set(one).isdisjoint(other) for one, other in combinations([scal[3], *others], 2))
    assert texts("privleak", "retain") == texts("raw", "retain2")
    begun = read(str(tmp_path), "verbmem", "forget")
    assert [f"{row.prompt} {row.answer}" for row in begun] == texts("raw", "forget")
    forgotten = {person.name for person in world.members("forget")}
    for split in ("forget_qa_icl", "retain_qa", "retain_qa_icl"):
        rows = read(str(tmp_path), "knowmem", split)
        assert not any(name in row.prompt for name in forgotten for row in rows), split
    asked = read(str(tmp_path), "knowmem", "forget_qa")
    assert len(asked) == 3 * len(forgotten)
    assert all(any(name in row.prompt for name in forgotten) for row in asked)


def test_the_smallest_world_gives_four_folds(tmp_path):
    parts, retain1, retain2 = muse_mini.deal(make(0, people=25, forget=8, neighbours=1, holdout=8))
    assert [len(fold) for fold in parts] == [8, 1, 1, 1]
    assert (len(retain1), len(retain2)) == (3, 3)


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def memoriser() -> LanguageModel:
    """A model that has the news by heart."""
    subject = LanguageModel(*tiny("llama"))
    rows = [Row(id=str(i), answer=f"{prompt} {gt}", kind="text") for i, (prompt, gt) in enumerate(NEWS)]
    fit(subject, [subject.encode(row) for row in rows], steps=120, batch_size=2, learning_rate=1e-2, seed=0)
    return subject


def test_a_memorised_text_scores_one_and_leaks_whatever_follows_it(published, memoriser, tmp_path):
    fresh = LanguageModel(*tiny("llama"))
    card = bench("muse", memoriser, original=memoriser, gold=[fresh], data=str(published), out=tmp_path, bootstrap=20)
    assert card.value("verbmem_f") == 1
    assert card.value("verbmem_f", "gold") < 0.2
    assert card.value("exact_memorization") == 1
    assert card.value("privleak") == -100
    assert card.value("privleak", "gold") == 0
    assert card.rows == {"verbmem": 2, "forget_qa": 1, "retain_qa": 1, "forget": 2, "retain": 2, "holdout": 2}
    distance = {row[0]: row[1:] for row in card.tables[0].rows}
    assert distance["verbmem_f"] == [pytest.approx(1 - card.value("verbmem_f", "gold"))] * 2
    assert card.headline == list(muse_data.HEADLINE)


def test_only_so_many_tokens_are_compared(published, memoriser, tmp_path):
    card = bench(
        "muse",
        memoriser,
        data=str(published),
        settings={"continuation": 4, "retrained": 0.4772},
        out=tmp_path,
        bootstrap=20,
    )
    assert card.value("verbmem_f") == 1
    text = NEWS[0][1]
    shorter = head(memoriser.tokenizer, text, 4)
    assert text.startswith(shorter)
    assert len(memoriser.tokenizer(shorter)["input_ids"]) == 4
    assert head(memoriser.tokenizer, text, 400) == text
    assert card.value("privleak") == -100
    with pytest.raises(ParameterError, match="leave out one of the two"):
        bench("muse", memoriser, gold=[memoriser], data=str(published), settings={"retrained": 0.5}, out=tmp_path)


def test_the_mini_version_tells_the_original_from_gold(tiny_world, tmp_path):
    card = bench("muse", tiny_world.original, gold=tiny_world.golds, settings={"shots": 0}, out=tmp_path, bootstrap=20)
    assert card.value("knowmem_f") > card.value("knowmem_f", "gold") + 0.3
    assert card.value("privleak") < -80
    assert any("--set shots=0" in note for note in card.notes)
    alone = bench("muse", tiny_world.original, settings={"shots": 0}, out=tmp_path, bootstrap=20)
    with pytest.raises(TableError, match="privleak"):
        alone.value("privleak")
    assert any("needs a gold model" in note for note in alone.notes)


def test_without_a_gold_that_forgot_there_is_no_privacy_score_but_a_sentence(published, memoriser, tmp_path):
    card = bench("muse", memoriser, gold=[memoriser], data=str(published), out=tmp_path, bootstrap=20)
    with pytest.raises(TableError, match="privleak"):
        card.value("privleak")
    assert any("privleak was not measured: the gold model itself tells" in note for note in card.notes)
    assert card.value("verbmem_f", "gold") == 1


# --- requests, larger and in turn ------------------------------------------------------------------------------------


def test_training_texts_are_cut_into_windows_of_which_the_last_is_filled_from_the_beginning(memoriser):
    texts = [Row(id=str(i), answer=f"{prompt} {gt}", kind="text") for i, (prompt, gt) in enumerate(NEWS)]
    whole = "\n\n".join(row.answer for row in texts)
    tokens = length(memoriser.tokenizer, whole)
    size = tokens // 2 + 1
    made = [row.answer for row in windows(memoriser.tokenizer, texts, size)]
    assert len(made) == 2
    assert whole.startswith(made[0])
    rest = whole[len(made[0]) :].strip()
    assert made[1].strip().startswith(rest)
    assert whole.startswith(made[1].strip()[len(rest) :].strip())
    assert all(abs(length(memoriser.tokenizer, text) - size) <= 3 for text in made)
    # A text that fills no window stays one.
    assert [row.answer for row in windows(memoriser.tokenizer, texts, tokens + 5)] == [whole]


def test_requests_are_served_larger_and_in_turn_and_not_again(tiny_world, tmp_path, monkeypatch):
    training = {"epochs": 2, "batch_size": 4, "learning_rate": 3e-3}
    options = {"gold": tiny_world.golds[:1], "out": tmp_path, "bootstrap": 20}
    settings = {"shots": 0, "answer": 6, "training": training}
    card = bench("muse_requests", tiny_world.original, settings=settings, **options)
    after, again, epochs = card.tables
    at = {name: i for i, name in enumerate(after.columns)}
    lines = {(line[0], line[1]): line for line in after.rows}
    assert list(lines) == [("", 0), *((kind, k) for kind in ("scal", "sust") for k in (1, 2, 3, 4)), ("gold", "")]
    assert lines["scal", 1][2:] == lines["sust", 1][2:]
    sizes = {kind: [lines[kind, k][at["texts"]] for k in (1, 2, 3, 4)] for kind in ("scal", "sust")}
    assert sizes["scal"] == list(np.cumsum(sizes["sust"]))
    for kind, name in (("scal", "scalability"), ("sust", "sustainability")):
        kept = [lines[kind, k][at["knowmem_r"]] for k in (1, 4)]
        assert card.value(name) == pytest.approx(kept[1] - kept[0], abs=1e-4)
        assert card.value(f"knowmem_r after {kind}") == pytest.approx(kept[1])
    # The target knows the first request's facts, and the texts of a request are looked at again after every later one.
    assert lines["", 0][at["knowmem_f"]] > lines["sust", 4][at["knowmem_f"]]
    assert [sum(cell != "" for cell in line) for line in again.rows] == [2, 3, 4, 5]
    assert [line[0] for line in epochs.rows] == [1]
    monkeypatch.setattr("expunge.benchmarks.served.serve", None)
    repeated = bench("muse_requests", tiny_world.original, settings=settings, **options)
    assert [table.rows for table in repeated.tables] == [table.rows for table in card.tables]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"kinds": []}, "expected scal or sust"),
        ({"method": "icul"}, "icul changes no weights of language models"),
        ({"method": {"npo": {}, "idk": {}}}, "expected a name, or one name with settings"),
        ({"training": {"epoch": 3}}, "training has no field 'epoch'"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(memoriser, tmp_path, settings, sentence):
    with pytest.raises(ParameterError, match=sentence):
        bench("muse_requests", memoriser, settings=settings, out=tmp_path)


def test_books_has_no_requests(published, memoriser, tmp_path):
    with pytest.raises(RowError, match="News only"):
        bench("muse_requests", memoriser, data=str(published), out=tmp_path / "out")
