"""ZRF and the pass behind it: divergences by hand, on pictures and on text."""

import math

import numpy as np
import pytest
import torch
from tiny import tiny

from expunge.errors import MismatchError
from expunge.metrics.measure import values
from expunge.rows import Row
from expunge.subjects.distances import jensen_shannon
from expunge.subjects.fresh import buildable, fresh
from expunge.subjects.image import ImageClassifier
from expunge.subjects.language import LanguageModel
from expunge.tables.distances import Distances
from expunge.tables.passes import Apart, Store, ask_all, run
from expunge.tables.view import NotApplicable, View
from expunge.world.pictures.draw import digits
from expunge.world.pictures.models import Recipe, untrained

CLASSES = [str(i) for i in range(10)]


@pytest.fixture(scope="module")
def pictures():
    return digits(8)["train"][:12]


@pytest.fixture(scope="module")
def network():
    return untrained(CLASSES, Recipe(side=8, widths=(4, 8)), 3)


def test_divergences_by_hand():
    half, sure, other = [0.0, 0.0, -80.0], [0.0, -80.0, -80.0], [-80.0, -80.0, 0.0]
    first, second = (torch.tensor(rows) for rows in ([half, sure, sure], [half, other, half]))
    found = jensen_shannon(first, second)
    # sure against half: m = (3/4, 1/4); (log2(4/3) + (log2(2/3) + log2(2)) / 2) / 2
    last = (math.log2(4 / 3) + (math.log2(2 / 3) + 1) / 2) / 2
    assert torch.allclose(found, torch.tensor([0.0, 1.0, last]), atol=1e-6)
    assert torch.allclose(found, jensen_shannon(second, first), atol=1e-6)


def test_zrf_is_one_for_the_untrained_network_and_less_for_others(network, pictures):
    def seen(model):
        (table,) = run(model, [Apart(tuple(pictures), fresh(network, 0))])
        return values("zrf", View({"forget": pictures}, divergences={"forget": table}))

    pixels = torch.stack([network.encode(row).pixels for row in pictures])
    with torch.no_grad():
        p, q = (model.model(pixels).logits.softmax(-1).double() for model in (network, fresh(network, 0)))
    m = (p + q) / 2
    bits = ((p * (p / m).log2()).sum(-1) + (q * (q / m).log2()).sum(-1)) / 2
    found = seen(network)
    assert np.allclose(found.each, 1 - bits.numpy(), atol=1e-5)
    assert 0 < found.value < 1
    assert seen(fresh(network, 0)).value == pytest.approx(1.0, abs=1e-6)


def test_an_audits_passes_compare_with_one_untrained_network():
    subject = LanguageModel(*tiny("llama"))
    data = {"forget": [Row(id=str(i), prompt=f"where was {i} born?", answer="Tivin") for i in range(3)]}
    view = ask_all(subject, data, 0, more=["divergences"])
    (table,) = run(subject, [Apart(tuple(data["forget"]), fresh(subject, 0))])
    assert np.array_equal(view.divergences["forget"].jensen_shannon, table.jensen_shannon)
    assert values("zrf", view).value == pytest.approx(1 - float(table.jensen_shannon.mean()))
    with pytest.raises(NotApplicable, match="no divergences of forget rows"):
        values("zrf", ask_all(subject, data, 0))


def test_answers_of_several_tokens_count_by_their_mean_and_tables_are_kept(tmp_path):
    subject = LanguageModel(*tiny("llama"))
    other = fresh(subject, 7)
    rows = tuple(Row(id=str(i), prompt=f"where was {i} born?", answer="Tivin" + " Carth" * i) for i in range(4))
    (table,) = run(subject, [Apart(rows, other)], Store(tmp_path))
    for i, row in enumerate(rows):
        encoded = subject.encode(row)
        ids = torch.tensor([encoded.ids])
        with torch.no_grad():
            logits = [m.model(ids).logits[0, encoded.start - 1 : -1].float() for m in (subject, other)]
        assert table.jensen_shannon[i] == pytest.approx(float(jensen_shannon(*logits).mean()), rel=1e-3)
    (kept,) = run(subject, [Apart(rows, other)], Store(tmp_path))
    assert kept.keys == table.keys
    assert np.array_equal(kept.jensen_shannon, table.jensen_shannon)
    assert len(list(tmp_path.iterdir())) == 1
    run(subject, [Apart(rows, fresh(subject, 8))], Store(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2
    assert isinstance(kept, Distances)


def test_models_of_other_classes_cannot_be_compared(network, pictures):
    few = untrained(CLASSES[:4], Recipe(side=8, widths=(4, 8)), 0)
    with pytest.raises(MismatchError, match=r"10 classes or tokens, .* from 4"):
        run(network, [Apart(tuple(pictures), few)])
    bare = ImageClassifier(
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10)), CLASSES, network.processor
    )
    assert not buildable(bare)
