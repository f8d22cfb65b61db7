"""Distances from gold: by hand, beside what both models say separately, and where there are none."""

import math

import numpy as np
import pytest
import torch
from tiny import tiny

from expunge.errors import MismatchError
from expunge.metrics.measure import default_metrics, measure_all, more_tables, values
from expunge.registry import get
from expunge.rows import Row
from expunge.subjects.distances import apart, distances
from expunge.subjects.language import LanguageModel
from expunge.tables.distances import Distances
from expunge.tables.passes import Apart, Store, ask_all, run
from expunge.tables.view import NotApplicable, View

ROWS = [
    Row(id="a", prompt="Where was Vessa born?", answer="Vessa was born in Tivin.", entity="Vessa"),
    Row(id="b", prompt="Who taught her?", answer="Olma.", entity="Olma"),
    Row(id="c", prompt="What is sold in Osta?", answer="Salt and rope.", entity="Osta"),
]


@pytest.fixture(scope="module")
def subjects() -> list[LanguageModel]:
    made = [LanguageModel(*tiny("llama")) for _ in range(3)]
    for seed, subject in enumerate(made):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in subject.model.parameters():
                weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return made


def test_distances_by_hand():
    half, sure = torch.tensor([[0.0, 0.0, -80.0]]), torch.tensor([[0.0, -80.0, -80.0]])
    js = (math.log2(4 / 3) + (math.log2(2 / 3) + 1) / 2) / 2
    variation, found, kl, differ = apart(half, sure)[0].tolist()
    # KL(sure || half) is log 2; the other way round a certain loss of half the mass costs 80 nats.
    assert (variation, found, kl, differ) == pytest.approx((0.5, js, math.log(2), 0.0), abs=1e-5)
    assert apart(sure, half)[0, 2].item() == pytest.approx((math.log(0.5) + math.log(0.5) + 80) / 2, rel=1e-4)
    assert apart(sure, sure)[0].tolist() == pytest.approx([0, 0, 0, 0], abs=1e-6)
    assert apart(sure, sure.flip(1))[0].tolist() == pytest.approx([1, 1, 80, 1], rel=1e-4)


def test_distances_are_means_over_tokens_of_what_both_models_say(subjects, monkeypatch):
    first, second = subjects[:2]
    items = [((row.id, "answer"), first.encode(row)) for row in ROWS]
    table = distances(first, second, items)
    for i, (_, item) in enumerate(items):
        at = slice(item.start - 1, len(item.ids) - 1)
        logits = [model.model(torch.tensor([item.ids])).logits[0, at].detach().float() for model in (first, second)]
        p, q = (each.softmax(-1) for each in logits)
        assert table.total_variation[i] == pytest.approx(float((p - q).abs().sum(-1).mean()) / 2, abs=1e-5)
        assert table.kl[i] == pytest.approx(float((q * (q / p).log()).sum(-1).mean()), abs=1e-5)
        differ = (logits[0].argmax(-1) != logits[1].argmax(-1)).float().mean()
        assert table.disagreement[i] == pytest.approx(float(differ))
    monkeypatch.setattr("expunge.subjects.distances.LOGIT_ELEMENTS", 1)
    monkeypatch.setattr("expunge.subjects.distances.TOKEN_BUDGET", 1)
    small = distances(first, second, items[::-1])
    assert np.allclose(small.total_variation[::-1], table.total_variation, atol=1e-6)
    assert np.allclose(small.jensen_shannon[::-1], table.jensen_shannon, atol=1e-6)


def test_a_model_is_measured_against_every_gold_and_a_gold_against_the_others(subjects, tmp_path):
    after, *golds = subjects
    named = {f"gold/{i}": gold for i, gold in enumerate(golds)}
    asked = [("gold_divergence", {"kind": kind}) for kind in ("total_variation", "kl")]
    views = {
        name: ask_all(model, {"forget": ROWS}, 0, Store(tmp_path), more=more_tables(asked), golds=named, name=name)
        for name, model in {"after": after, **named}.items()
    }
    assert set(views["after"].distances) == {"gold/0", "gold/1"}
    assert set(views["gold/0"].distances) == {"gold/1"}
    measured, notes = measure_all(None, views["after"], [views[name] for name in named], metrics=asked, bootstrap=20)
    assert notes == []
    variation, kl = measured
    each = [views["after"].distance(name, "forget").total_variation for name in named]
    assert variation.after.value == pytest.approx(float(np.mean(each)))
    assert variation.gold.value == pytest.approx(
        float(views["gold/0"].distance("gold/1", "forget").total_variation.mean())
    )
    assert kl.after.value == pytest.approx(variation.extra["after"][0]["kl"])
    kept = run(after, [Apart(tuple(ROWS), golds[0])], Store(tmp_path))[0]
    assert isinstance(kept, Distances)
    assert np.array_equal(kept.kl, views["after"].distance("gold/0", "forget").kl)


def test_it_is_measured_where_it_is_asked_for_only(subjects):
    view = ask_all(subjects[0], {"forget": ROWS}, 0, more=more_tables(), golds={"gold/0": subjects[1]})
    assert not view.distances
    names = {name for name, _ in default_metrics(view)}
    assert "gold_distance" in names
    assert names.isdisjoint({"gold_divergence", "memorization_accuracy", "verbatim_memorization"})
    golded = View({"forget": ROWS}, golds=[View({"forget": ROWS}, name="gold/0")])
    with pytest.raises(NotApplicable, match="no distances from gold/0 of forget rows"):
        values("gold_divergence", golded)


def test_models_with_other_vocabularies_are_refused(subjects):
    class Other:
        vocabulary, name = 7, "small"

    with pytest.raises(MismatchError, match="small from 7"):
        distances(subjects[0], Other(), [])


def test_names_of_papers_are_settings_of_one_metric():
    assert get("metrics", "verbatim_memorization").resolve()["score"] == "fmeasure"
    assert get("metrics", "knowledge_memorization").resolve()["dialect"] == "rouge_score_unstemmed"
    assert get("metrics", "memorization_accuracy").function is get("metrics", "exact_memorization").function
