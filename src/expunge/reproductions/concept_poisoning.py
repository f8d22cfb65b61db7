"""Concept poisoning (arXiv:2405.15662) on drawn glyphs, whose parts and their places are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..evidence import Table
from ..methods.optimise.concept_poisoning import LOCATORS, Looking, explained
from ..methods.optimise.teach import teach
from ..pictures import Picture
from ..registry import reproduction
from ..subjects.image import ImageClassifier, Preparation
from ..world.pictures.draw import PARTS, glyphs
from .case import Case, Claim, Findings, number, spread
from .case import Row as Trial
from .pictures import accuracy, change, timed

SIDE, COUNT, UNSEEN, TARGET = 24, 120, 50, "antler"
CONCEPTS = ["body", "part"]
PATCH = round(64 / 224 * SIDE)
TRAINING: Mapping[str, Any] = {"epochs": 15.0, "batch_size": 32, "learning_rate": 3e-3}
HOW: Mapping[str, Any] = {"epochs": 8.0, "batch_size": 32}
RATES: Mapping[str, float] = {"role:head": 1e-2, "all": 1e-3}
"""Learning rates, by scope."""
PLACES: Mapping[str, dict[str, Any]] = {
    "localized": {"locate": "integrated_gradients"},
    "center": {"locate": "center"},
    "random place": {"locate": "random"},
    "whole picture": {"locate": "full", "patch": 1.0},
    "none": {"locate": "none"},
}
CELLS = (("role:head", "targeted"), ("role:head", "random"), ("role:head", "keep"), ("all", "targeted"))
"""Scope and labels, each with every place."""
SHOWN = {
    "original": "original",
    "retrained": "retrained",
    "localized, targeted, role:head": "localized, targeted",
    "none, targeted, role:head": "labels alone, targeted",
    "random_label, role:head": "random_label",
    "localized, targeted, all": "localized, targeted, all weights",
    "none, targeted, all": "labels alone, targeted, all weights",
}
"""Models whose head is attacked, and their names."""
SHOTS, LOOKED = 10, 10
"""Rows of each class that the head is fitted to again, and in which places are looked for."""


class Peak(nn.Module):
    """The largest value of every channel: (n, c, h, w) to (n, c)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.amax((2, 3))


def network() -> nn.Module:
    """Three convolutions of 16, 32 and 64 channels; a part counts wherever it is."""
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.MaxPool2d(2)] if before > 3 else []
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, Peak(), nn.Linear(64, len(PARTS)))


def taught(rows: Sequence[Picture], seed: int) -> ImageClassifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        subject = ImageClassifier(network(), PARTS, Preparation((SIDE, SIDE)), f"glyphs, seed {seed}", network)
    teach(subject, [subject.encode(row) for row in rows], seed=seed, **TRAINING)
    return subject


def refitted(subject: ImageClassifier, rows: Sequence[Picture], seed: int) -> ImageClassifier:
    """The attack: the head alone, trained on a few rows of each class."""
    few = [row for name in PARTS for row in [r for r in rows if r.answer == name][:SHOTS]]
    made = subject.copy()
    head = next(name for name, module in made.model.named_modules() if module is made.linear_head)
    encoded = [made.encode(row) for row in few]
    teach(made, encoded, epochs=30.0, batch_size=30, learning_rate=1e-2, seed=seed, modules=(head,))
    return made


# --- trials -----------------------------------------------------------------------------------------------------------


def trial(seed: int) -> dict[str, Any]:
    """One classifier: what is found in it, and every cell of the ablation; `{..., models: {name: {...}}}`"""
    train, test = (
        [replace(row, tags={**row.tags, "part": row.answer}) for row in glyphs(count, number_, SIDE)]
        for count, number_ in ((COUNT, seed), (UNSEEN, 1000 + seed))
    )
    asked = [row for row in test if row.answer == TARGET]
    others = [row for row in test if row.answer != TARGET]
    data = {
        "forget": [row for row in train if row.answer == TARGET],
        "retain": [row for row in train if row.answer != TARGET],
    }
    original = taught(train, seed)

    models: dict[str, dict[str, float]] = {}

    def measure(name: str, subject: ImageClassifier, seconds: float = 0.0) -> None:
        models[name] = {
            "target": accuracy(subject, asked),
            "retained": accuracy(subject, others),
            "seconds": seconds,
        }
        if name in SHOWN:
            models[name]["train"] = accuracy(subject, data["forget"])
            models[name]["refitted"] = accuracy(refitted(subject, train, seed), asked)

    measure("original", original)
    measure("retrained", taught(data["retain"], seed))
    # The first cell chooses the donor by its concepts, as all would: the bank is learnt once.
    chosen: dict[str, Any] = {"concepts": CONCEPTS}
    for scope, labels in CELLS:
        for place, settings in PLACES.items():
            asking = {**settings, "labels": labels, **chosen}
            after, about, seconds = change(
                original, data, "concept_poisoning", asking, seed, scope=scope, **HOW, learning_rate=RATES[scope]
            )
            chosen = {"donor": about["prepared"]["poison"]["donor_class"]}
            measure(f"{place}, {labels}, {scope}", after, seconds)
    after, _, seconds = change(original, data, "random_label", {}, seed, scope="role:head", **HOW, learning_rate=1e-2)
    measure("random_label, role:head", after, seconds)
    return {"found": found(original, data, test, seed), "donor": chosen["donor"], "models": models}


def found(
    subject: ImageClassifier, data: Mapping[str, list[Picture]], test: Sequence[Picture], seed: int
) -> dict[str, Any]:
    """Right top concepts by weight and by integrated gradients, and distances of places to the parts drawn."""
    bottleneck, seconds = timed(lambda: explained(subject, data, CONCEPTS, seed))
    rows = [row for some in data.values() for row in some]
    with torch.no_grad():
        names = bottleneck.bank.names
        top = {"weight": 0, "integrated_gradients": 0}
        for kind, name in enumerate(PARTS):
            pixels = torch.stack([subject.encode(row).pixels for row in rows if row.answer == name])
            features = subject.model[:-1](pixels).numpy()
            for rank, values in (
                ("weight", bottleneck.weights[kind]),
                ("integrated_gradients", bottleneck.attributions(features, kind)),
            ):
                top[rank] += names[int(values.argmax())] == name
    looking = Looking(subject, bottleneck, 3, PATCH, np.random.default_rng(seed))
    places: dict[str, Any] = {}
    for locate in ("integrated_gradients", "gradcam", "margin", "clip_patch", "center", "random"):
        distances: list[float] = []
        began = 0.0
        for kind, name in enumerate(PARTS):
            some = [row for row in test if row.answer == name][:LOOKED]
            pixels = torch.stack([subject.encode(row).pixels for row in some])
            corners, spent = timed(lambda: LOCATORS[locate](looking, pixels, kind, name))  # noqa: B023
            began += spent
            middles = corners.numpy() + (PATCH - 1) / 2
            parts = np.array([[int(row.tags["part_y"]), int(row.tags["part_x"])] for row in some])
            distances += np.linalg.norm(middles - parts, axis=1).tolist()
        places[locate] = {
            "median": float(np.median(distances)),
            "near": float(np.mean(np.array(distances) <= 3)),
            "milliseconds": 1000 * began / len(distances),
        }
    return {"top": top, "accuracy": bottleneck.accuracy, "seconds": seconds, "places": places}


# --- findings ---------------------------------------------------------------------------------------------------------


@reproduction(paper="arXiv:2405.15662", cost="2 min on 1 core", modality=("image",))
def concept_poisoning(case: Case) -> Findings:
    """Concept poisoning on drawn glyphs: which concept, where it is, and whether the patch or the label forgets."""
    trials = case.trials(trial, [{}])
    flat = [
        {"model": model, "seed": one["seed"], **values} for one in trials for model, values in one["models"].items()
    ]
    return Findings(
        claims=judge(trials, flat), tables=[_ablation(flat), _references(flat), _located(trials)], notes=NOTES
    )


NOTES = [
    f"Six classes of {COUNT} drawn glyphs of {SIDE} x {SIDE} pixels: a body that two classes share, and one part of "
    "its own. Three convolutions and a maximum over places; 8 epochs over the forget rows with as many retain rows "
    "beside them, AdamW at 1e-2 (head) or 1e-3 (all weights). The paper tunes the last layer of a ResNet-50 on CIFAR "
    "with SGD for 30 epochs over all rows.",
    "Concepts are the bodies and parts that the rows' metadata tells; parts and classes are the same sets of pictures, "
    "so that only bodies can be mistaken for them. No words and no CLIP.",
    "`margin` and `clip_patch` embed patches that are enlarged to whole pictures, while this network has seen parts in "
    "one size only.",
    "The whole picture is replaced by one of the donor's; center and random patches are 96 / 224 of the side.",
    f"Refitted: the head trained again on {SHOTS} rows of each class, the forgotten one among them. Features "
    "that never saw the class part its pictures as well here, so that this attack tells no suppression from removal.",
]


def judge(trials: Sequence[Trial], flat: Sequence[Trial]) -> list[Claim]:
    """The claims; criteria were fixed before (specs: concept_poisoning, section 6)."""

    def mean(model: str, name: str) -> float:
        return spread(flat, name, model=model).mean

    def cell(place: str, labels: str, name: str = "target", scope: str = "role:head") -> float:
        return mean(f"{place}, {labels}, {scope}", name)

    right = [one["found"]["top"][rank] for one in trials for rank in ("weight", "integrated_gradients")]
    median = {
        name: float(np.mean([one["found"]["places"][name]["median"] for one in trials]))
        for name in ("integrated_gradients", "random")
    }
    gone, kept = (cell("localized", "targeted", name) for name in ("target", "retained"))
    start = mean("original", "retained")
    keeping = {place: cell(place, "keep") for place in PLACES}
    back, bare = cell("localized", "targeted", "refitted"), cell("none", "targeted")
    free = {place: cell(place, "targeted", scope="all") for place in ("localized", "none")}
    return [
        Claim(
            "A concept bottleneck finds the concept that a class is known by",
            "shown by examples: antlers for deer",
            "own part on top for at least 5 of 6 classes in every seed, by weight and by integrated gradients",
            f"fewest of any seed: {min(right)} of 6",
            min(right) >= 5,
        ),
        Claim(
            "The concept is found in the picture",
            "shown by examples",
            "integrated gradients: median distance to the part at most 3 pixels; a random place: more than 8",
            f"{number(median['integrated_gradients'])} and {number(median['random'])} pixels",
            median["integrated_gradients"] <= 3 and median["random"] > 8,
        ),
        Claim(
            "Concept poisoning forgets the class and keeps the others",
            "CIFAR-10 deer: 0.000 on training and test rows, all classes 0.966",
            "unseen rows of the class at most 0.05, of others at most 0.03 below the original",
            f"{number(gone)}; others {number(kept)}, original {number(start)}",
            gone <= 0.05 and kept >= start - 0.03,
        ),
        Claim(
            "Kept labels forget nothing, whatever is pasted",
            "1.0; whole picture replaced 0.62 (deer)",
            "accuracy on the class at least 0.8 in every cell with its own label",
            ", ".join(f"{place} {number(value)}" for place, value in keeping.items()),
            min(keeping.values()) >= 0.8,
        ),
        Claim(
            "The concept step is needed to forget",
            "the authors' own ablation: 0.000 without any change of the picture",
            "accuracy on the class at least 0.05 higher when labels alone change",
            f"labels alone {number(bare)}, localized {number(gone)}",
            bare >= gone + 0.05,
        ),
        Claim(
            "A few rows bring the class back",
            "its rows put back restore it in one epoch (0.98)",
            f"a head refitted on {SHOTS} rows of each class gets it at least 0.5 right",
            f"{number(back)} (retrained model, refitted alike: {number(mean('retrained', 'refitted'))})",
            back >= 0.5,
        ),
        Claim(
            "With all weights free, covering the concept hinders forgetting",
            "- (the paper tunes the last layer alone)",
            "targeted labels: accuracy on the class at least 0.1 higher localized than without a patch",
            f"localized {number(free['localized'])}, none {number(free['none'])}",
            free["localized"] >= free["none"] + 0.1,
        ),
    ]


def _ablation(flat: Sequence[Trial]) -> Table:
    def cell(model: str) -> str:
        return " / ".join(f"{spread(flat, name, model=model).mean:.2f}" for name in ("target", "retained"))

    lines = [[place, *(cell(f"{place}, {labels}, {scope}") for scope, labels in CELLS)] for place in PLACES]
    head = ["change of the picture", *(f"{'head' if s == 'role:head' else 'all weights'}: {la}" for s, la in CELLS)]
    return Table("Accuracy on unseen rows of the class / of the others", head, lines, "Means over seeds.")


def _references(flat: Sequence[Trial]) -> Table:
    columns = ("train", "target", "retained", "refitted", "seconds")
    lines = [[shown, *(str(spread(flat, column, model=name)) for column in columns)] for name, shown in SHOWN.items()]
    head = ["model", "its training rows", "unseen rows of it", "unseen rows of others", "after a refit", "CPU seconds"]
    note = "Mean (lowest to highest) over seeds; of localized, targeted with the concept bank."
    return Table("The class after forgetting", head, lines, note)


def _located(trials: Sequence[Trial]) -> Table:
    lines = []
    for name in trials[0]["found"]["places"]:
        each = [one["found"]["places"][name] for one in trials]
        lines.append([name, *(number(float(np.mean([e[key] for e in each]))) for key in each[0])])
    head = ["locate", "median distance, pixels", "within 3 pixels", "CPU milliseconds a picture"]
    return Table(
        "Places against the parts drawn", head, lines, f"{LOOKED} unseen rows of each class; patches of {PATCH}."
    )
