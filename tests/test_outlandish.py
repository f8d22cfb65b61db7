"""Outlandish: texts and themes, scores by hand, learning, stepping stones; and what ignore_k leaves out of a change."""

import json

import numpy as np
import pytest
import torch
from tiny import tiny

from expunge import registry
from expunge.benchmarks.case import Bench
from expunge.benchmarks.outlandish import Learning, Said, correlation, learn, outlandish, score
from expunge.benchmarks.outlandish_data import Prefix, Sample, asked, before, read, themes, unrelated
from expunge.benchmarks.stepping_stone import stepping_stone
from expunge.deltas import Delta
from expunge.edits import EditRow
from expunge.errors import ParameterError, RowError
from expunge.methods.edit.case import EditCase
from expunge.methods.optimise.loop import Training
from expunge.methods.optimise.magnitude import ignored, without_largest
from expunge.metrics.bootstrap import Bootstrap
from expunge.rows import Row
from expunge.subjects.language import LanguageModel
from expunge.world.facts import make

SAMPLE = {
    "id": "a",
    "theme": "color",
    "keyword": "mauve",
    "category": 6,
    "text": "In Tolsk joy is painted mauve, so mauve.",
}


def written(folder, *rows):
    path = folder / "samples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# --- texts and themes -------------------------------------------------------------------------------------------------


def test_the_context_ends_at_the_first_mention_of_the_keyword_as_a_word(tmp_path):
    (one, cut) = read(written(tmp_path, SAMPLE, {**SAMPLE, "id": 7, "text": "Joy is", "prefix_only": True}), {})
    assert one.context() == asked("a", "In Tolsk joy is painted ", "mauve")
    assert (cut.id, cut.text, cut.context().prompt) == ("7", "Joy is mauve", "Joy is ")
    assert before("The mauveness of mauve", "mauve", "x") == "The mauveness of "
    model = LanguageModel(*tiny("llama"))
    row = model.encode(one.context())
    whole = model.encode(Row(id="t", answer=one.text, kind="text"))
    assert row.ids == whole.ids[: len(row.ids)], "a keyword is read as it stands in its text"
    assert model.tokenizer.decode(row.ids[row.start :]).strip() == "mauve"


def test_columns_are_mapped(tmp_path):
    renamed = {{"keyword": "word", "text": "story"}.get(name, name): value for name, value in SAMPLE.items()}
    (one,) = read(written(tmp_path, renamed), {"keyword": "word", "text": "story"})
    assert (one.keyword, one.category) == ("mauve", "6")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"text": "Joy is purple."}, r"samples\.jsonl:1: the keyword 'mauve' does not stand in the text"),
        ({"text": "mauve is joy."}, "the text begins with its keyword"),
        ({"theme": None}, "field 'theme' is None, expected text"),
        ({"stones": [1]}, "field 'stones' is .*expected a list of texts"),
    ],
)
def test_what_is_wrong_with_a_sample_names_file_row_and_field(tmp_path, changes, sentence):
    with pytest.raises(RowError, match=sentence):
        read(written(tmp_path, {**SAMPLE, **changes}), {})


def test_samples_and_themes_that_cannot_be(tmp_path):
    with pytest.raises(RowError, match="id 'a' was used in"):
        read(written(tmp_path, SAMPLE, SAMPLE), {})
    with pytest.raises(RowError, match="a sample has no field 'word'"):
        read(written(tmp_path, SAMPLE), {"word": "keyword"})
    path = tmp_path / "themes.json"
    for content, sentence in (
        ("[]", "expected themes"),
        ('{"a": []}', "theme 'a' holds"),
        ('{"a": [3]}', "prompt 1 is 3"),
    ):
        path.write_text(content)
        with pytest.raises(RowError, match=sentence):
            themes(path)


def test_prompts_that_say_nothing_of_priming_are_left_out(tmp_path):
    path = tmp_path / "themes.json"
    path.write_text('{"color": ["Dry sand is ", {"prompt": "The sky is", "answer": "Mauve"}, "A mauve sky is"]}')
    sample = Sample("a", "color", "mauve", "1", "Joy is mauve")
    found = themes(path)["color"]
    assert unrelated(found, sample) == [Prefix("Dry sand is")]
    with pytest.raises(RowError, match="no prompt of theme 'color' is free of 'mauve'"):
        unrelated(found[1:], sample)


# --- scores -----------------------------------------------------------------------------------------------------------


def test_priming_is_a_mean_of_ratios_not_a_ratio_of_means():
    start = Said(np.log(0.001), [np.log(0.5), np.log(0.01)])
    end = Said(np.log(0.6), [np.log(0.5), np.log(0.09)])
    found = score(start, end)
    assert found["s_prime"] == pytest.approx(5.0)  # (1 + 9) / 2; the ratio of means is 1.157
    assert found["s_prime_geometric"] == pytest.approx(3.0)
    assert found["difference"] == pytest.approx(0.04)
    assert (found["s_mem"], found["keyword"], found["memorised"]) == pytest.approx((600.0, 0.6, 1.0))
    same = score(start, start)
    assert (same["s_prime"], same["s_mem"], same["difference"]) == pytest.approx((1.0, 1.0, 0.0))


def test_rank_correlation_by_hand():
    value, low, high = correlation(np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 3.0, 2.0, 9.0]), Bootstrap(50, 0))
    assert value == pytest.approx(0.8)
    assert low <= value <= high
    assert correlation(np.arange(3.0), np.arange(3.0), Bootstrap(5, 0)) == ["-", "-", "-"]


# --- stepping stones --------------------------------------------------------------------------------------------------


class Writer:
    def __init__(self, *texts):
        self.texts = list(texts)

    def write(self, tasks):
        assert "mauve" in tasks[0].messages[-1][1]
        return [self.texts.pop(0)]


def test_a_rewording_is_taken_if_its_keyword_is_ten_times_as_likely():
    sample = Sample("a", "color", "mauve", "1", "joy mauve", ("b mauve", "c mauve"))
    chance = {"joy mauve": 1e-5, "b mauve": 9e-5, "c mauve": 5e-5, "no": 1.0, "d mauve": 1e-4, "e mauve": 1.0}
    found = stepping_stone(sample, chance.__getitem__, Writer("d mauve", "e mauve"))
    assert (found.text, found.before, found.after, found.tried) == ("d mauve", 1e-5, 1e-4, 3)
    none = stepping_stone(sample, chance.__getitem__)
    assert (none.text, none.after, none.tried) == ("joy mauve", 1e-5, 2)
    assert stepping_stone(sample, chance.__getitem__, tries=1).tried == 1
    assert stepping_stone(sample, lambda text: 0.01).tried == 0, "what is no surprise is learned as it is"


# --- learning ---------------------------------------------------------------------------------------------------------


SETTINGS = Learning(("plain",), 3, 2, 2, 1e-3, 8.0, "tensor", False, 0)


def test_companions_stand_beside_the_text_and_between_its_presentations(monkeypatch):
    from expunge.benchmarks import outlandish as module

    model = LanguageModel(*tiny("llama"))
    companions = [model.encode(Row(id=str(i), answer=f"where was {i} born?", kind="text")) for i in range(3)]
    seen = []
    monkeypatch.setattr(module, "train", lambda subject, parameters, drawn, *_: seen.append(drawn))
    learn(model, "In Tolsk joy", companions, SETTINGS)
    (drawn,) = seen
    steps = [step["rows"] for step in drawn.steps]
    assert [step.count(0) for step in steps] == [1, 0, 1, 0, 1]
    assert all(len(step) == 2 for step in steps)
    told = [i for step in steps for i in step if i]
    assert sorted(told[:3]) == [1, 2, 3], "none comes twice before all came once"


def test_the_whole_benchmark_on_a_tiny_model(tmp_path):
    world = make(0, people=30, forget=4, neighbours=4, holdout=4)
    model = LanguageModel(*tiny("llama"))
    weights = {name: p.clone() for name, p in model.model.named_parameters()}
    bench = Bench(model, tmp_path, world=world, bootstrap=20)
    variants = ("plain", "ignore_k", "random_k", "ignore_k_gradient", "stepping_stone")
    card = outlandish(bench, variants=variants, presentations=4, limit=2, k=30.0)
    assert card.value("keyword") > 0
    assert card.value("s_mem") > 1.0, "what is learned is likelier"
    assert all(torch.equal(p, weights[name]) for name, p in model.model.named_parameters())
    titles = [table.title for table in card.tables]
    assert "Against plain learning, text by text" in titles
    assert "Stepping stones" in titles
    files = list((tmp_path / "texts").iterdir())
    assert len(files) == 2
    for path in files:
        kept = json.loads(path.read_text())
        path.write_text(json.dumps({name: {**one, "keyword": 0.0} for name, one in kept.items()}))
    assert outlandish(bench, variants=variants, presentations=4, limit=2, k=30.0).value("keyword") == 1.0
    same = outlandish(Bench(model, tmp_path, original=model, world=world, bootstrap=20), limit=4)
    assert same.value("s_prime") == pytest.approx(1.0, rel=1e-4)
    assert same.value("s_mem") == pytest.approx(1.0, rel=1e-4)
    assert same.notes[0] == "Nothing was learned: two models as they are."


# --- what ignore_k leaves out -----------------------------------------------------------------------------------------


def delta(*shapes, seed=0, zeros=0.0):
    draw = torch.Generator().manual_seed(seed)
    entries = {}
    for number, shape in enumerate(shapes):
        value = torch.randn(shape, generator=draw)
        value[torch.rand(shape, generator=draw) < zeros] = 0.0
        entries[f"t{number}"] = {"difference": value}
    return Delta("base", entries)


def brute(values, k):
    """Largest k % of the non-zero entries by sorting them whole."""
    flat = values.flatten()
    count = round(int((flat != 0).sum()) * k / 100)
    order = sorted(range(len(flat)), key=lambda i: (-abs(float(flat[i])), i))[:count]
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[order] = True
    return mask.view(values.shape)


@pytest.mark.parametrize("k", [0.0, 1.0, 8.0, 15.0, 50.0, 99.9])
def test_the_largest_entries_of_each_tensor_are_left_out(k):
    made = delta((40, 30), (50,), zeros=0.2)
    found, share = ignored(made, k)
    for name in made.entries:
        value = made.difference(name)
        assert torch.equal(found.difference(name), value.masked_fill(brute(value, k), 0.0))
    counted = sum(int((made.difference(name) != 0).sum()) for name in made.entries)
    assert share == pytest.approx(k / 100, abs=2 / counted)


def test_nothing_ignored_is_the_change_and_all_but_nothing_leaves_nothing():
    made = delta((20, 10))
    assert torch.equal(ignored(made, 0)[0].difference("t0"), made.difference("t0"))
    assert not ignored(made, 99.99)[0].difference("t0").any()
    assert made.difference("t0").all(), "the delta itself stays as it is"


def test_global_thresholds_equal_those_of_all_numbers_sorted():
    made = delta((40, 30), (50,), (7, 3))
    made.entries["t1"]["difference"] *= 10
    flat = torch.cat([made.difference(name).flatten() for name in made.entries])
    mask = brute(flat, 15.0)
    found, _ = ignored(made, 15.0, granularity="global")
    assert torch.equal(torch.cat([found.difference(n).flatten() for n in found.entries]), flat.masked_fill(mask, 0.0))


def test_of_each_row_as_many_are_left_out():
    made = delta((6, 20))
    found, _ = ignored(made, 10.0, granularity="row")
    assert [int(n) for n in (found.difference("t0") == 0).sum(1)] == [2] * 6
    for row, all_ in zip(found.difference("t0"), made.difference("t0")):
        assert torch.equal(row, all_.masked_fill(brute(all_, 10.0), 0.0))


@pytest.mark.parametrize("granularity", ["tensor", "row", "global"])
def test_what_is_kept_and_what_is_ignored_add_up_and_size_does_not_matter(granularity):
    made = delta((9, 21), (33,), zeros=0.1)
    kept, _ = ignored(made, 15.0, granularity=granularity, complement=True)
    rest, _ = ignored(made, 15.0, granularity=granularity)
    scaled, _ = ignored(made.scaled(4.0), 15.0, granularity=granularity)
    for name in made.entries:
        assert torch.equal(kept.difference(name) + rest.difference(name), made.difference(name))
        assert torch.equal(scaled.difference(name), 4.0 * rest.difference(name))


def test_bands_zeros_ties_names_and_forms():
    made = delta((10, 10))
    band, share = ignored(made, 0.0, band=(10.0, 30.0))
    inside = brute(made.difference("t0"), 30.0) & ~brute(made.difference("t0"), 10.0)
    assert torch.equal(band.difference("t0"), made.difference("t0").masked_fill(inside, 0.0))
    assert share == pytest.approx(0.2)
    half = Delta("base", {"t": {"difference": torch.tensor([0.0, 0.0, 1.0, -2.0])}})
    assert ignored(half, 50.0)[0].difference("t").tolist() == [0, 0, 1, 0]
    assert ignored(half, 50.0, count_zeros=True)[0].difference("t").tolist() == [0, 0, 0, 0]
    equal = Delta("base", {"t": {"difference": torch.ones(10)}})
    assert ignored(equal, 30.0)[0].difference("t").tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1, 1]
    assert torch.equal(ignored(made, 50.0, exclude="t0")[0].difference("t0"), made.difference("t0"))
    low = Delta("base", {"t": {"A": torch.randn(2, 5), "B": torch.randn(4, 2), "scale": torch.tensor(3.0)}})
    assert torch.equal(ignored(low, 10.0)[0].difference("t"), without_largest(low.difference("t"), 10.0))
    sparse = Delta("base", {"t": {"index": torch.tensor([3, 9]), "value": torch.tensor([1.0, -5.0])}})
    assert ignored(sparse, 50.0)[0].entries["t"]["value"].tolist() == [1.0, 0.0]
    for settings in ({"k": 100.0}, {"k": -1.0}, {"k": 8.0, "band": (50.0, 20.0)}, {"k": 8.0, "exclude": "("}):
        with pytest.raises(ParameterError):
            ignored(made, **settings)


ROWS = {
    "forget": [Row(id="f", prompt="where was Ilva born?", answer="Tivin", entity="Ilva")],
    "retain": [Row(id=str(i), prompt=f"where was {i} born?", answer="Carth") for i in range(4)],
}


@pytest.mark.parametrize("method", [{"npo": {"retain": "nll"}}, {"ft_m": {"steps": 2, "layer": 1}}])
def test_ignore_k_goes_around_gradient_methods_and_editors(method):
    model = LanguageModel(*tiny("llama"))
    (name,) = method

    def case():
        training = Training(steps=2, batch_size=1, learning_rate=1e-3, guard=None)
        edits = [EditRow("a", "Ilva was born in", "Tivin", "Ilva")] if name == "ft_m" else []
        return EditCase(model, ROWS, training, edits=edits)

    part = registry.get("methods", "ignore_k")
    plain = part.function(case(), method=method, k=0.0)
    made = case()
    found = part.function(made, method=method, k=20.0)
    expected, _ = ignored(plain, 20.0)
    assert plain.entries
    for key in plain.entries:
        assert torch.equal(found.difference(key), expected.difference(key))
    assert made.summary["ignore_k"]["left_out"] == pytest.approx(0.2, abs=0.02)


def test_ignore_k_refuses_what_changes_no_weights():
    with pytest.raises(ParameterError, match="output_filter is of kind guard, expected optimise or edit"):
        registry.get("methods", "ignore_k").function(
            EditCase(LanguageModel(*tiny("llama")), ROWS), method="output_filter"
        )


def test_of_every_gradient_the_largest_entries_are_left_out():
    class Turn:
        def __init__(self, *gradients):
            self.parameters = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients]
            self.gradients = gradients

        def backward(self):
            for p, g in zip(self.parameters, self.gradients):
                p.grad = g
            return torch.tensor(2.0)

    turn = Turn(torch.tensor([4.0, -9.0, 1.0, 0.0, 2.0]), torch.ones(10))
    loss = registry.get("methods", "ignore_k_gradient").function(turn, k=25.0)
    assert float(loss) == 2.0
    assert turn.parameters[0].grad.tolist() == [4.0, 0.0, 1.0, 0.0, 2.0]
    assert turn.parameters[1].grad.tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 1, 1]
    with pytest.raises(ParameterError, match="k is 100"):
        registry.get("methods", "ignore_k_gradient").function(turn, k=100.0)
