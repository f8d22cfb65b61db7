"""ConceptVectors: its files, the measures of a vector, answers compared with those of the model before."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny

from expunge.bench import bench
from expunge.benchmarks.concept_vectors import bleu, locate, questions
from expunge.benchmarks.concept_vectors_data import read
from expunge.errors import RequestError, RowError, SubjectError
from expunge.methods.edit.needle import ablate
from expunge.subjects.language import LanguageModel
from expunge.subjects.projection import Readout, project
from expunge.subjects.traces import trace
from expunge.subjects.value_vectors import Address, find, vector, vectors

PUBLISHED = Path("/work/shared/data/concept_vectors")
ROW = {
    "ID": 7,
    "Concept": "Maretta",
    "Layer": 2,
    "Dim": 31,
    "QA": [" Where is Maretta?\n", "Who founded Maretta?"],
    "text_completion": [{"First_half": "Maretta lies", "Second_half": "on the coast of Sarn."}],
    "unrelated_QA": ["Who is Orin Valk?"],
    "wikipedia_content": "Maretta is a city on the coast of Sarn. Maretta was founded by Ilva.",
}


def written(folder, *rows, name="mini_concepts_test.json"):
    (folder / name).write_text(json.dumps(list(rows)), encoding="utf-8")
    return folder


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="no published sample here")
def test_the_published_file_is_read_whole():
    rows = read(PUBLISHED, "*_dev.json")
    assert [row.name for row in rows[:3]] == ["Poland", "Italy", "Baseball"]
    assert [str(row.address) for row in rows[:3]] == ["23:743", "25:7966", "18:1285"]
    assert all(len(row.questions) == 10 and len(row.unrelated) == 50 for row in rows)
    assert rows[0].questions[0] == "What is the capital city of Poland?"
    assert {len(row.completions) for row in rows} == {1, 10}
    assert len({row.id for row in rows}) == len(rows)
    with pytest.raises(SubjectError, match=r"_dev\.json: row 1: .*the model has layers 0-2"):
        locate(LanguageModel(*tiny("llama")), rows, 10)


def test_a_row_is_read_with_what_it_may_lack(tmp_path):
    german = {"Maretta": ["Wo liegt Maretta?"]}
    (tmp_path / "x_jailbreak_German_qa.json").write_text(json.dumps(german), encoding="utf-8")
    bare = {key: value for key, value in ROW.items() if key not in ("ID", "Layer", "Dim", "text_completion")}
    first, second = read(written(tmp_path, ROW, bare), "*concepts_test.json")
    assert (first.id, first.address, first.german) == ("7", Address(2, 31), ("Wo liegt Maretta?",))
    assert (second.id, second.address, second.completions) == ("row 2", None, ())
    assert first.questions[0] == "Where is Maretta?"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"QA": None}, r"mini_concepts_test\.json: row 1: field 'QA' holds NoneType, expected a list"),
        ({"QA": ["a", ""]}, r"row 1: QA 2: field 'QA' is '', expected text"),
        ({"Layer": -1}, r"row 1: field 'Layer' is -1, expected a whole number"),
        ({"Dim": None}, r"row 1: field 'Dim' is None"),
        ({"Concept": 3}, r"row 1: field 'Concept' is 3, expected text"),
        ({"text_completion": [{"First_half": "a"}]}, r"row 1: text_completion 1: expected an object with First_half"),
        ({"answers": [["x"]]}, r"row 1: field 'answers' holds 1, expected one list for each of 2 QA"),
        ({"unrelated_QA": []}, r"field 'unrelated_QA' holds 0 texts"),
    ],
)
def test_what_is_wrong_with_a_row_names_file_row_and_field(tmp_path, change, sentence):
    with pytest.raises(RowError, match=sentence):
        read(written(tmp_path, {**ROW, **change}), "*.json")


def test_a_folder_must_hold_one_file_of_the_name(tmp_path):
    with pytest.raises(RowError, match="no folder"):
        read(tmp_path / "none", "*.json")
    with pytest.raises(RowError, match=r"no file called 'olmo.json'"):
        read(written(tmp_path, ROW), "olmo.json")
    written(tmp_path, ROW, name="other_concepts_test.json")
    with pytest.raises(RowError, match="2 files"):
        read(tmp_path, "*concepts_test.json")
    with pytest.raises(RowError, match=r"'wikipedia_content' is missing"):
        read(written(tmp_path, {k: v for k, v in ROW.items() if k != "wikipedia_content"}, name="x.json"), "x.json")
    with pytest.raises(RowError, match="used in"):
        read(written(tmp_path, ROW, ROW, name="y.json"), "y.json")
    (tmp_path / "a_jailbreak_German_qa.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(RowError, match="expected an object of lists"):
        read(tmp_path, "x.json")


# --- one vector, before and after -------------------------------------------------------------------------------------


def changed(model, factor):
    made = model.copy()
    with torch.no_grad():
        vectors(made.model, find(made.model, Address(1, 5)))[5] *= factor
    return made


def test_a_vector_compared_with_itself_its_opposite_and_its_triple():
    model, k = LanguageModel(*tiny("llama")), 20
    address = Address(1, 5)
    old = vector(model.model, address)
    best = project(Readout.of(model), old[None], k).tokens[0].tolist()
    same = trace(model, model, address, k=k, text=best[:4])
    assert (same.jaccard, same.cosine, same.l2, same.norm_ratio, same.kept, same.text_ratio) == (1, 1, 0, 1, 1, 1)
    opposite = trace(model, changed(model, -1), address, k=k, text=best[:4])
    assert (opposite.jaccard, opposite.kept, opposite.text_ratio) == (0, 0, 0)
    assert opposite.cosine == pytest.approx(-1)
    assert opposite.l2 == pytest.approx(2 * float(old.norm()))
    triple = trace(model, changed(model, 3), address, k=k)
    assert (triple.jaccard, triple.cosine) == (1, pytest.approx(1))
    assert triple.norm_ratio == pytest.approx(3)
    assert math.isnan(triple.kept)
    gone = trace(model, changed(model, 0), address, k=k, text=best)
    assert (gone.jaccard, gone.cosine, gone.norm_ratio, gone.kept) == (0, 0, 0, 0)


def test_a_head_that_moved_is_told_from_a_vector_that_moved():
    model, address = LanguageModel(*tiny("llama")), Address(1, 5)
    made = model.copy()
    with torch.no_grad():
        made.model.lm_head.weight.copy_(model.model.lm_head.weight.flip(0))
    found = trace(model, made, address, k=20)
    assert found.jaccard < 0.5
    assert (found.jaccard_by_old_head, found.cosine) == (1, 1)


# --- answers ----------------------------------------------------------------------------------------------------------


def test_bleu_by_hand():
    """Smoothed as by NIST: the i-th count that is zero becomes 1 / (2^i x its denominator)."""
    assert bleu("a b c d", "a b c d") == pytest.approx(1)
    # Precisions 4/5, 2/4, 1/2 x 1/3, 1/4 x 1/2; both texts have five words.
    assert bleu("a b x d e", "a b y d e") == pytest.approx((4 / 5 * 2 / 4 * 1 / 6 * 1 / 8) ** 0.25)
    # Too short for longer runs, whose denominators are then 1: 1, 1/2, 1/4, 1/8.
    assert bleu("Tivin", "Tivin") == pytest.approx((1 / 64) ** 0.25)
    assert bleu("", "a") == bleu("a", " ") == 0


def test_questions_are_asked_as_published_and_wrapped_ones_through_the_models_template(tmp_path):
    model = LanguageModel(*tiny("llama"))
    rows = read(written(tmp_path, ROW), "*.json")
    asked = questions(model, rows, 20, 30)
    texts = [model.prompt_text(row) for _, row, _ in asked.ask.prompts]
    assert texts[0] == "Question: Where is Maretta?\n Answer:"
    assert {kind: len(places) for kind, places in asked.kinds.items()} == {
        "concept": 2,
        "completion": 1,
        "unrelated": 1,
        "expert": 2,
        "grandmother": 2,
        "in_context": 2,
    }
    place = asked.kinds["in_context"][1][1]
    assert texts[place].startswith("Question: ")
    assert texts[place].endswith("Who founded Maretta?\nAnswer:")
    assert rows[0].text[:30] in texts[place]
    assert rows[0].text[:31] not in texts[place]
    assert not asked.notes
    long = replace(rows[0], text="coast " * 99)
    short = questions(model, [long], 20, 2000)
    assert "in_context" not in short.kinds
    assert short.notes == ["2 questions of in_context were not asked: they do not fit the model's context."]
    assert set(questions(model, rows, 20, -1).kinds) == {"concept", "completion", "unrelated"}
    with pytest.raises(RowError, match="leaves none for its answer"):
        questions(model, [replace(rows[0], questions=("what " * 200,))], 20, -1)


# --- the whole --------------------------------------------------------------------------------------------------------


def test_on_the_mini_world_a_drowned_vector_is_seen_and_an_untouched_model_is_whole(tiny_world, tmp_path):
    original = LanguageModel.load(tiny_world.original)
    settings = {"max_new_tokens": 8, "context": 200, "k": 20}
    options = {"original": tiny_world.original, "world": tiny_world.path, "settings": settings, "bootstrap": 20}
    same = bench("concept_vectors", original, out=tmp_path / "same", **options)
    assert same.value("jaccard") == same.value("cosine") == 1
    assert same.value("l2") == 0
    for kind in ("concept", "completion", "unrelated", "expert", "grandmother"):
        assert same.value(f"{kind}_rouge") > 0.99
    assert same.value("concept_accuracy") == same.value("concept_accuracy", "before") > 0.5
    assert any("came without a vector" in note for note in same.notes)
    files = sorted((tmp_path / "same" / "data").rglob("mini_concepts_test.json"))
    rows = read(files[0].parent, "*concepts_test.json")
    assert [row.name for row in rows] == [person.name for person in tiny_world.world.members("forget")]
    places = [Address.parse(line[1]) for line in same.tables[0].rows]
    after = ablate(original, places, noise=9.0).apply(original)
    card = bench("concept_vectors", after, out=tmp_path / "noised", **options)
    assert card.value("jaccard") < 0.5
    assert card.value("cosine") < 0.6
    assert card.value("norm_ratio") > 4
    again = bench("concept_vectors", after, out=tmp_path / "again", **options)
    assert [m.after.value for m in again.measured] == [m.after.value for m in card.measured]


def test_it_needs_the_model_before(tiny_world, tmp_path):
    with pytest.raises(RequestError, match="--original MODEL"):
        bench("concept_vectors", tiny_world.original, out=tmp_path)
