"""Concept poisoning: hand-computed margins, attributions, patches and labels, and what the head learns of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from expunge import registry
from expunge.errors import ParameterError, RequestError, RowError
from expunge.methods.optimise import concept_poisoning as file
from expunge.methods.optimise.bottleneck import Bank, Bottleneck, fit, learn
from expunge.methods.optimise.loop import Training
from expunge.methods.optimise.unlearn import set_up, unlearn
from expunge.pictures import Picture
from expunge.subjects.image import ImageClassifier, Preparation
from expunge.world.pictures.draw import PARTS, glyphs

SIDE = 16


def make():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(),
        nn.Linear(8 * 64, 6),
    )  # fmt: skip


@pytest.fixture(scope="module")
def subject():
    torch.manual_seed(0)
    return ImageClassifier(make(), PARTS, Preparation((SIDE, SIDE)), "net", make)


@pytest.fixture(scope="module")
def data():
    rows = [replace(row, tags={**row.tags, "part": row.answer}) for row in glyphs(12, 0, SIDE)]
    return {
        "forget": [row for row in rows if row.answer == "wing"],
        "retain": [row for row in rows if row.answer != "wing"],
    }


def settings(**own):
    return registry.get("methods", "concept_poisoning").resolve(own)


def prepared(subject, data, scope=None, seed=3, **own):
    part = registry.get("methods", "concept_poisoning")
    return set_up(subject, part, own, scope=scope, data=data, training=Training(seed=seed, guard=None, steps=1)).case


def stack(subject, rows):
    return torch.stack([subject.encode(row).pixels for row in rows])


# --- concepts ---------------------------------------------------------------------------------------------------------


def test_margins_are_distances_to_the_hyperplane_whatever_its_scale():
    weights, intercepts = np.array([[3.0, 4.0], [0.0, 2.0]]), np.array([5.0, -1.0])
    features = np.array([[1.0, 1.0], [0.0, 0.0]])
    bank = Bank.of(["a", "b"], weights, intercepts)
    np.testing.assert_allclose(bank.margins(features), [[12 / 5, 0.5], [1.0, -0.5]])
    scaled = Bank.of(["a", "b"], 7 * weights, 7 * intercepts)
    np.testing.assert_allclose(scaled.margins(features), bank.margins(features))


def test_a_vector_points_to_the_pictures_that_show_the_concept():
    rng = np.random.default_rng(0)
    shown = [bool(i % 2) for i in range(60)]
    features = rng.normal(0, 0.1, (60, 3))
    features[:, 1] += np.where(shown, 1, -1)
    bank = learn(features, {"here": shown, "there": [not one for one in shown]}, seed=0)
    assert bank.vectors[0, 1] > 0.95
    assert bank.vectors[1, 1] < -0.95
    np.testing.assert_allclose(np.linalg.norm(bank.vectors, axis=1), 1)


def test_a_picture_of_which_nothing_is_known_teaches_nothing():
    rng = np.random.default_rng(0)
    features = rng.normal(0, 0.1, (60, 3))
    features[:20, 1] += 1
    features[20:40, 1] -= 1
    features[40:, 0] += 9
    shown = [True] * 20 + [False] * 20 + [None] * 20
    changed = features.copy()
    changed[40:] = -50
    assert np.array_equal(learn(features, {"a": shown}, 0).vectors, learn(changed, {"a": shown}, 0).vectors)
    with pytest.raises(RowError, match=r"'b': 3 pictures show it and 57 are known not to"):
        learn(features, {"b": [True] * 3 + [False] * 57}, 0)


def test_attributions_of_the_bottleneck_are_weights_times_differences_and_complete():
    bank = Bank.of(["a", "b"], np.eye(2), np.zeros(2))
    weights = np.array([[2.0, -1.0], [0.5, 4.0]])
    bottleneck = Bottleneck(bank, np.array([1.0, 1.0]), np.array([1.0, 2.0]), weights, 1.0)
    features = np.array([[2.0, 3.0], [4.0, 7.0]])  # inputs (1, 1) and (3, 3), mean 2
    np.testing.assert_allclose(bottleneck.attributions(features, 0), [4.0, -2.0])
    score = bottleneck.inputs(features) @ weights.T
    base = bottleneck.inputs(np.array([[1.0, 1.0]])) @ weights.T
    np.testing.assert_allclose(bottleneck.attributions(features, 1).sum(), (score - base)[:, 1].mean())


def test_concepts_that_do_not_explain_the_classes_are_refused():
    rng = np.random.default_rng(0)
    features, classes = rng.normal(size=(90, 4)), np.arange(90) % 3
    bank = Bank.of(["noise"], np.ones((1, 4)), np.zeros(1))
    with pytest.raises(RequestError, match="the concepts noise explain only"):
        fit(bank, features, classes, 3, reached=1.0, short=0.1)
    features[:, 0] = 10 * (classes == 1)
    features[:, 1] = 10 * (classes == 2)
    found = fit(Bank.of(["one", "two"], np.eye(4)[:2], np.zeros(2)), features, classes, 4, reached=1.0, short=0.1)
    assert found.accuracy == 1
    assert found.weights.shape == (4, 2)
    assert found.weights[1].argmax() == 0
    assert found.weights[2].argmax() == 1
    assert not found.weights[3].any()  # a class without rows


# --- places -----------------------------------------------------------------------------------------------------------


def test_integrated_gradients_sum_to_the_difference_of_logits(subject, data):
    pixels = stack(subject, data["forget"][:3])
    black = subject.encode(Picture("black", np.zeros((SIDE, SIDE, 3), np.uint8), "wing")).pixels[None]
    with torch.no_grad():
        moved = subject.model(pixels) - subject.model(black)
    kind = int(moved.abs().mean(0).argmax())
    wanted = moved[:, kind]
    found = file.integrated_gradients(subject, pixels, kind, steps=64).sum((1, 2, 3))
    assert (found - wanted).abs().max() <= 0.01 * wanted.abs().max()


def test_integrated_gradients_of_a_linear_model_are_exact_in_any_number_of_steps():
    make_ = lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, 6))  # noqa: E731
    linear = ImageClassifier(make_(), PARTS, Preparation((4, 4)), "linear", make_)
    pixels = torch.randn(2, 3, 4, 4)
    found = file.integrated_gradients(linear, pixels, 2, steps=2)
    weight = linear.linear_head.weight[2].detach().view(3, 4, 4)
    torch.testing.assert_close(found, weight * (pixels + 1))  # black is -1 as prepared


def looking(subject=None, side=3, bottleneck=None):
    return file.Looking(subject, bottleneck, 3, side, np.random.default_rng(0))


def test_the_fullest_window_is_found_and_stays_within_the_picture():
    maps = torch.zeros(2, 8, 10)
    maps[0, 2, 5] = maps[0, 4, 7] = 1.0  # only the window at (2, 5) holds both
    maps[1, 7, 9] = 1.0
    assert looking().fullest(maps).tolist() == [[2, 5], [5, 7]]


def test_places_that_look_at_nothing():
    pixels = torch.zeros(200, 3, 8, 10)
    assert file.LOCATORS["center"](looking(), pixels, 0, None)[0].tolist() == [2, 3]
    drawn = file.LOCATORS["random"](looking(), pixels, 0, None)
    assert drawn.min(0).values.tolist() == [0, 0]
    assert drawn.max(0).values.tolist() == [5, 7]


def test_places_that_look_at_the_model_find_the_one_thing_it_reads():
    class Bright(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Conv2d(3, 1, 1, bias=False), nn.Linear(1, 2)
            with torch.no_grad():
                self.first.weight.fill_(1.0)
                self.head.weight.copy_(torch.tensor([[1.0], [-1.0]]))

        def forward(self, x):
            return self.head(torch.relu(torch.relu(self.first(x + 1))).sum((2, 3)))

    bright = ImageClassifier(Bright(), ["yes", "no"], Preparation((12, 12)), "bright", Bright)
    pixels = torch.full((1, 3, 12, 12), -1.0)
    pixels[0, :, 4:7, 8:11] = 1.0
    bank = Bank.of(["light"], np.ones((1, 1)), np.zeros(1))
    seen = looking(bright, 3, Bottleneck(bank, np.zeros(1), np.ones(1), np.array([[1.0], [-1.0]]), 1.0))
    for name in ("integrated_gradients", "margin"):
        assert file.LOCATORS[name](seen, pixels, 0, "light").tolist() == [[4, 8]], name


def test_gradcam_reads_the_last_map(subject, data):
    pixels = stack(subject, data["forget"][:2])
    assert file._last_map(subject, pixels) is subject.model[3]
    places = file.LOCATORS["gradcam"](looking(subject, 5), pixels, 2, None)
    assert places.shape == (2, 2)
    assert 0 <= int(places.min()) <= int(places.max()) <= SIDE - 5


# --- poison -----------------------------------------------------------------------------------------------------------


def test_a_patch_comes_from_the_donors_place():
    pixels, sources = torch.zeros(1, 3, 5, 5), torch.arange(75.0).view(1, 3, 5, 5)
    made = file.pasted(pixels, torch.tensor([[1, 2]]), sources, torch.tensor([[3, 0]]), 2)
    assert made[0, 0, 1:3, 2:4].tolist() == [[15.0, 16.0], [20.0, 21.0]]
    assert int((made != 0).sum()) == 3 * 4
    assert not pixels.any()


@pytest.mark.parametrize("locate", ["integrated_gradients", "gradcam", "center", "random", "full"])
def test_pictures_change_within_their_patch_alone(subject, data, locate):
    case = prepared(subject, data, locate=locate)
    side = case.summary["poison"]["patch"]
    assert side == {"center": 7, "random": 7, "full": 11}.get(locate, 5)
    changed = (torch.stack([row.pixels for row in case.rows["forget"]]) != stack(subject, data["forget"])).any(1)
    assert 0 < int(changed.flatten(1).sum(1).max()) <= side**2
    for one in changed:
        down, across = (torch.nonzero(one.any(axis)).flatten() for axis in (1, 0))
        if len(down):
            assert int(down.max() - down.min()) < side
            assert int(across.max() - across.min()) < side


def test_full_keeps_no_pixel_where_the_patch_is_the_picture(subject, data):
    case = prepared(subject, data, locate="full", patch=1.0, donor="wheel")
    donors = {subject.encode(row).ids[0] for row in data["retain"] if row.answer == "wheel"}
    assert {row.ids[0] for row in case.rows["forget"]} <= donors


def test_labels(subject, data):
    plain = [subject.encode(row) for row in data["forget"]]
    kept = prepared(subject, data, locate="none", labels="keep").rows["forget"]
    assert [row.ids for row in kept] == [row.ids for row in plain]
    targeted = prepared(subject, data, locate="none", donor="checks").rows["forget"]
    assert {row.text for row in targeted} == {"checks"}
    assert {row.ids[1] for row in targeted} == {PARTS.index("checks")}
    drawn = file.relabelled(2, 0, 6, 600, "random", np.random.default_rng(0))
    assert min(drawn.count(kind) for kind in range(6)) > 60  # the true class among them


def test_the_donor_is_what_the_class_is_confused_with(subject, data):
    with torch.no_grad():
        said = subject.model(stack(subject, data["forget"])).softmax(-1).mean(0)
    said[PARTS.index("wing")] = -1
    about = prepared(subject, data, locate="none").summary["poison"]
    assert about["donor_class"] == PARTS[int(said.argmax())]
    assert about["target_class"] == "wing"


def test_with_concepts_the_donor_shares_the_classes_first():
    weights = np.array([[0.0, 1.0, 0.2], [9.0, 0.0, 3.0], [1.0, 0.1, 0.5]])
    net = ImageClassifier(make(), ["a", "b", "c"], Preparation((SIDE, SIDE)), "net", make)
    bottleneck = Bottleneck(Bank.of(["x", "y", "z"], np.eye(3), np.zeros(3)), np.zeros(3), np.ones(3), weights, 1.0)

    def row(kind):
        return file.EncodedPicture((0, kind), 1, 0, "", torch.zeros(3, SIDE, SIDE))

    found = file.choose(net, bottleneck, [row(1)], [row(0), row(2)], settings(top=2))
    assert (found.donor, found.concept, found.donor_concept, found.ranked) == (2, "x", "x", ("x", "z"))
    asked = file.choose(net, bottleneck, [row(1)], [row(0), row(2)], settings(concept="y"))
    assert (asked.donor, asked.concept, asked.donor_concept) == (0, "y", "y")


def test_keeping_labels_without_a_patch_is_plain_training(subject, data):
    training = Training(steps=3, batch_size=4, learning_rate=1e-2, guard=None)
    part = registry.get("methods", "concept_poisoning")
    own = {"locate": "none", "labels": "keep"}
    outcome = unlearn(subject, part, own, scope=None, data=data, training=training)
    assert set(outcome.delta.entries) == {"5.weight", "5.bias"}
    drawn = set_up(subject, part, own, scope=None, data=data, training=training).drawn
    head = subject.copy()
    optimiser = torch.optim.AdamW(head.linear_head.parameters(), lr=1e-2, weight_decay=0.0)
    for step in drawn.steps:
        loss = 0.0
        for side, places in step.items():
            rows = [drawn.rows[side][i] for i in places]
            said = head.model(torch.stack([row.pixels for row in rows])).log_softmax(-1)
            loss = loss - said[range(len(rows)), [row.ids[1] for row in rows]].mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(head.linear_head.parameters(), 1.0)
        optimiser.step()
    after = outcome.delta.apply(subject).linear_head
    torch.testing.assert_close(after.weight, head.linear_head.weight, rtol=1e-3, atol=2e-5)


# --- requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "error", "text"),
    [
        ({"donor": "wing"}, ParameterError, "donor 'wing' is the class to be forgotten"),
        ({"donor": "whel"}, ParameterError, r"donor 'whel' has no retain rows. Did you mean wheel\?"),
        ({"locate": "clip_patch"}, ParameterError, "clip_patch needs concepts"),
        ({"concept": "antler"}, ParameterError, "concept = 'antler' needs concepts"),
        ({"concepts": ["colour"]}, RequestError, "the column 'colour', which no row has"),
        ({"patch": 1.5}, ParameterError, "patch is 1.5 of the picture's side"),
    ],
)
def test_what_cannot_be_is_said(subject, data, own, error, text):
    with pytest.raises(error, match=text):
        prepared(subject, data, **own)


def test_an_unknown_concept_is_named(subject, data, monkeypatch):
    monkeypatch.setattr(file, "SHORT", 1.0)
    with pytest.raises(ParameterError, match=r"no concept 'antlr'. Did you mean antler"):
        prepared(subject, data, concepts=["part", "body"], concept="antlr")
    about = prepared(subject, data, concepts=["part", "body"], locate="margin", rank="integrated_gradients").summary
    assert set(about["poison"]["top_concepts"]) < {*PARTS, "circle", "square", "triangle"}


def test_rows_of_several_classes_are_refused(subject, data):
    mixed = {"forget": [*data["forget"], data["retain"][0]], "retain": data["retain"][1:]}
    with pytest.raises(RequestError, match="found antler, wing"):
        prepared(subject, mixed)


def test_free_weights_under_a_local_patch_are_warned_of(subject, data):
    assert "hinders forgetting" in prepared(subject, data, scope="all").warnings[0]
    assert not prepared(subject, data).warnings
    assert not prepared(subject, data, scope="all", locate="none").warnings
