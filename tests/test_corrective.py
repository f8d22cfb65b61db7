"""The corrective benchmark: manipulations are what they say, and scores of one-class classifiers are hand-computed."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from expunge.bench import bench
from expunge.benchmarks.corrective_data import identify, manipulate, oracle_rows, read, truly, write
from expunge.errors import MismatchError, ParameterError, RowError
from expunge.subjects.image import ImageClassifier, Preparation
from expunge.subjects.opening import open_subject
from expunge.world.pictures.draw import digits
from expunge.world.pictures.models import Recipe, untrained

CLASSES = [str(i) for i in range(10)]


@pytest.fixture(scope="module")
def rows():
    made = digits(8)
    return {"train": made["train"][:200], "test": made["test"][:80]}


def counts(rows):
    return {name: sum(row.answer == name for row in rows) for name in CLASSES}


def test_a_stamp_changes_its_square_and_nothing_else(rows):
    case = manipulate(rows["train"], rows["test"], "poison", count=20, patch=3, target="0", seed=1)
    assert len(case.manipulated) == 20
    for row, old in zip(case.train, rows["train"]):
        changed = (row.pixels() != old.pixels()).sum()
        if row.tags["manipulated"] == "no":
            assert (changed, row.answer) == (0, old.answer)
        else:
            assert row.answer == "0"
            assert changed <= 3 * 3**2
            assert (row.pixels()[-3:, -3:] == case.about.value).all()
    assert case.about.value == max(row.pixels().max() for row in rows["train"])
    moved = sum(row.tags["clean_label"] != "0" for row in case.manipulated)
    assert counts(case.train)["0"] == counts(rows["train"])["0"] + moved


@pytest.mark.parametrize("kind", ["interclass_confusion", "random_label"])
def test_swaps_and_permutations_leave_the_counts_of_classes(rows, kind):
    case = manipulate(rows["train"], rows["test"], kind, count=20)
    assert counts(case.train) == counts(rows["train"])
    assert len(case.manipulated) == 20
    if kind == "interclass_confusion":
        assert {(row.answer, row.tags["clean_label"]) for row in case.manipulated} == {("0", "1"), ("1", "0")}
        assert {row.answer for row in case.affected()} == {"0", "1"}
        assert not {"0", "1"} & {row.answer for row in case.unaffected}


def test_identified_shares_are_nested_and_their_ends_are_exact(rows):
    case = manipulate(rows["train"], rows["test"], "poison", count=20, patch=2, target="0")
    ids = [{row.id for row in identify(case, gamma).identified} for gamma in (0.01, 0.3, 0.8, 1.0)]
    assert [len(some) for some in ids] == [1, 6, 16, 20]
    assert all(small <= large for small, large in itertools.pairwise(ids))
    whole = identify(case, 1.0)
    assert [row.id for row in whole.retain] == [row.id for row in oracle_rows(case)]
    assert all(row.answer == row.tags["clean_label"].replace("+true", "") for row in truly(case.manipulated))


def test_mistakes_are_named(rows):
    train, test = rows["train"], rows["test"]
    with pytest.raises(ParameterError, match="count is 5, expected an even number"):
        manipulate(train, test, "interclass_confusion", count=5)
    with pytest.raises(ParameterError, match=r"class '3' has .* rows, expected 80"):
        manipulate(train, test, "interclass_confusion", count=160, pair=("3", "4"))
    with pytest.raises(ParameterError, match="patch is 9, expected 1 to 8"):
        manipulate(train, test, "poison", count=5, patch=9)
    with pytest.raises(ParameterError, match="target is 'x', which is no class"):
        manipulate(train, test, "poison", count=5, target="x")
    with pytest.raises(ParameterError, match="identified: 0, expected more than 0"):
        identify(manipulate(train, test, "random_label", count=5), 0.0)


def test_a_written_case_reads_back(rows, tmp_path):
    case = identify(manipulate(rows["train"], rows["test"], "poison", count=20, patch=2, target="0"), 0.3)
    write(case, tmp_path)
    again = read(tmp_path)
    assert again.about == case.about
    assert {row.id for row in again.identified} == {row.id for row in case.identified}
    pixels = {row.id: row.pixels() for row in again.train}
    assert all(np.array_equal(pixels[row.id], row.pixels()) for row in case.train)
    with pytest.raises(RowError, match="holds no case"):
        read(tmp_path / "train")


def always(name):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(nn.functional.one_hot(torch.tensor(CLASSES.index(name)), 10).float())
    return ImageClassifier(model, CLASSES, Preparation((8, 8)), f"always {name}")


def test_a_classifier_that_always_says_the_target_corrects_nothing(rows, tmp_path):
    case = identify(manipulate(rows["train"], rows["test"], "poison", count=20, patch=2, target="0"), 0.5)
    write(case, tmp_path / "case")
    data = {"data": str(tmp_path / "case"), "bootstrap": 100}
    found = bench("corrective", always("0"), original=always("1"), out=tmp_path / "out", **data)
    share = np.mean([row.answer == "0" for row in rows["test"]])
    assert found.value("corrected_accuracy") == 0
    assert found.value("retain_accuracy") == pytest.approx(share)
    assert found.value("manipulated_rate") == 1
    assert found.value("manipulated_rate", "before") == 0
    counted = bench("corrective", always("0"), out=tmp_path / "counted", settings={"include_target": True}, **data)
    assert counted.value("corrected_accuracy") == pytest.approx(share)
    true = np.mean([row.tags["clean_label"] == "0" for row in case.manipulated])
    assert found.value("training_accuracy") == pytest.approx(true)
    assert (tmp_path / "out" / "scorecard.html").is_file()


def test_models_with_other_classes_are_not_compared(tmp_path):
    other = ImageClassifier(always("0").model, [*CLASSES[:9], "nine"], Preparation((8, 8)), "other")
    with pytest.raises(MismatchError, match="other has other classes than always 0"):
        bench("corrective", always("0"), original=other, out=tmp_path)


def test_folders_open_as_what_their_configuration_names(tmp_path):
    from tiny import tiny

    untrained(CLASSES, Recipe(kind="vit", side=8, widths=(8,)), 0).save(tmp_path / "vit")
    model, words = tiny("llama")
    model.save_pretrained(tmp_path / "llama")
    words.save_pretrained(tmp_path / "llama")
    assert open_subject(tmp_path / "vit", device="cpu").modality == "image"
    assert open_subject(tmp_path / "llama", device="cpu").modality == "language"


# --- forgetting tables ------------------------------------------------------------------------------------------------


def test_forgetting_is_measured_on_both_sides_and_against_gold(rows, tmp_path):
    from expunge.benchmarks.image_forgetting import split

    split({"train": rows["train"], "test": rows["test"]}, {"label": "3"}, tmp_path / "data")
    settings = {"data": str(tmp_path / "data"), "bootstrap": 100}
    found = bench(
        "image_forgetting", always("3"), original=always("1"), gold=[always("1")], out=tmp_path / "out", **settings
    )
    assert (found.value("forget_accuracy"), found.value("retain_accuracy")) == (1, 0)
    share = np.mean([row.answer == "1" for row in rows["test"] if row.answer != "3"])
    assert found.value("retain_accuracy", "before") == pytest.approx(share)
    gaps = {line[0]: line[-1] for line in found.tables[0].rows}
    assert gaps["before"] == gaps["gold/0"] == "0.000"
    assert float(gaps["after"]) > 0.2
    assert any("neither a configuration nor a factory" in note for note in found.notes)
    assert "zrf" not in {one.metric for one in found.measured}
    assert "forgotten pictures against unseen ones: before 0.500, after 0.500" in found.notes[0]
    with pytest.raises(RowError, match="has no folder 'forget'; expected forget, retain"):
        bench("image_forgetting", always("3"), data=str(tmp_path), out=tmp_path / "none")


def test_the_attack_tells_what_it_was_taught_to_tell():
    from expunge.benchmarks.image_forgetting import members

    seen, unseen = np.linspace(0, 0.3, 40), np.linspace(0.7, 1, 20)
    for kind in ("logistic", "machine"):
        assert members(seen, unseen, np.array([0.0, 1.0, 0.1]), kind).tolist() == [1, 0, 1]
