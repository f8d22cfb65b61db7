"""SSD (arXiv:2308.07707) on written digits: classes, a sub-class and single rows, and what its alpha depends on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..benchmarks.image_forgetting import members
from ..evidence import Table
from ..methods.edit.ssd import Importances
from ..methods.optimise.importance import importance
from ..pictures import Picture, chosen
from ..registry import reproduction
from ..subjects.image import ImageClassifier
from .case import Case, Claim, Findings, number, spread
from .case import Row as Trial
from .pictures import accuracy, change, mean_loss, rows, score, teach

ASKED = ("3", "7")
SETTINGS: Mapping[str, dict[str, Any]] = {
    "adaptive": {},
    "alpha 20": {"alpha": 20.0},
    "alpha 10": {"alpha": 10.0},
    "alpha 1": {"alpha": 1.0},
    "loss-free, adaptive": {"importance": "loss_free"},
}
GRID = (1.5, 5.0, 20.0, 50.0)
"""Alphas tried on the sub-class, beside adaptive."""
SINGLE = 40
"""Rows of the request for single rows."""


# --- trials -----------------------------------------------------------------------------------------------------------


def classes(seed: int, labels: Sequence[str]) -> dict[str, Any]:
    """Forgetting one class of one original, for each label."""
    data = rows()
    original, _ = teach(data["train"], seed)
    gone, kept = chosen(data["train"], {"label": labels[0]})
    runs = {label: _forgotten(original, data, label, seed) for label in labels}
    return {"runs": runs, "row_wise": _row_wise(original, {"forget": gone, "retain": kept})}


def _forgotten(original: ImageClassifier, data: dict[str, list[Picture]], label: str, seed: int) -> dict[str, Any]:
    """`{model: {forget, retain, membership, seconds, ...}}`"""
    gone, kept = chosen(data["train"], {"label": label})
    request = {"forget": gone, "retain": kept}
    retrained, spent = teach(kept, seed)
    found = {
        "original": {**_measured(original, request, data["test"], label), "seconds": 0.0},
        "retrained": {**_measured(retrained, request, data["test"], label), "seconds": spent},
    }
    for name, settings in SETTINGS.items():
        after, about, seconds = change(original, request, "ssd", settings, seed)
        found[name] = {**_measured(after, request, data["test"], label), "seconds": seconds, **_plain(about["ssd"])}
    return found


def others(seed: int) -> dict[str, Any]:
    """A digit of a superclass of two, and single rows."""
    data = rows()
    coarse = {split: [replace(row, answer=row.tags["group"]) for row in some] for split, some in data.items()}
    gone = [new for new, old in zip(coarse["train"], data["train"]) if old.answer == "3"]
    kept = [new for new, old in zip(coarse["train"], data["train"]) if old.answer != "3"]
    groups = sorted({row.answer for row in coarse["train"]})
    original, _ = teach(coarse["train"], seed, groups)
    sides = {
        name: [new for new, old in zip(coarse["test"], data["test"]) if old.answer == digit]
        for name, digit in (("forget", "3"), ("sibling", "2"))
    }
    sub = {"original": {name: accuracy(original, some) for name, some in sides.items()}}
    for alpha in ("adaptive", *GRID):
        after, _, _ = change(original, {"forget": gone, "retain": kept}, "ssd", {"alpha": alpha}, seed)
        sub[f"alpha {alpha}" if alpha != "adaptive" else alpha] = {
            n: accuracy(after, some) for n, some in sides.items()
        }
    order = np.random.default_rng(seed).permutation(len(data["train"]))
    single = {
        "forget": [coarse["train"][i] for i in order[:SINGLE]],
        "retain": [coarse["train"][i] for i in order[SINGLE:]],
    }
    after, _, _ = change(original, single, "ssd", {}, seed)
    weak = {
        name: {
            "forget": accuracy(model, single["forget"]),
            "loss": mean_loss(model, single["forget"]),
            "test": accuracy(model, coarse["test"]),
        }
        for name, model in (("original", original), ("adaptive", after))
    }
    return {"sub": sub, "single": weak}


def _measured(
    subject: ImageClassifier, request: Mapping[str, list[Picture]], test: Sequence[Picture], label: str
) -> dict[str, float]:
    forget, retain = chosen(test, {"label": label})
    seen, unseen, gone = (
        -np.asarray(score(subject, some).mean, dtype=np.float64)
        for some in (request["retain"], test, request["forget"])
    )
    return {
        "forget": accuracy(subject, forget),
        "retain": accuracy(subject, retain),
        "membership": float(members(seen, unseen, gone, "logistic").mean()),
    }


def _plain(about: Mapping[str, Any]) -> dict[str, float]:
    return {"alpha": float(about["alpha"]), "share": about["dampened"] / about["of"]}


def _row_wise(subject: ImageClassifier, request: Mapping[str, list[Picture]]) -> dict[str, float]:
    """Ratios of the exact Fisher diagonals, and how many weights alpha 20 would select."""
    names = [name for name, _ in subject.model.named_parameters()]
    encoded = {name: [subject.encode(row) for row in some] for name, some in request.items()}
    forget, retain = (importance(subject, encoded[name], names, batch_size=1) for name in ("forget", "retain"))
    share = len(encoded["forget"]) / sum(map(len, encoded.values()))
    # Means over rows: the whole is the weighted mean of its parts.
    every = {name: share * forget[name] + (1 - share) * retain[name] for name in names}
    both = Importances(subject, forget, every)
    return {"largest": float(both.ratios[-1]), "bound": 1 / share, "selected": float(both.counts(20.0, 1.0)[0])}


# --- findings ---------------------------------------------------------------------------------------------------------


@reproduction(paper="arXiv:2308.07707", cost="2 min on 1 core", modality=("image",))
def ssd(case: Case) -> Findings:
    """Selective synaptic dampening of written digits: a class in a fraction of retraining's time, without training."""
    trials = case.trials(classes, [{"labels": list(ASKED)}])
    side = case.trials(others, [{}])
    flat = [
        {"model": model, "label": label, "seed": trial["seed"], **values}
        for trial in trials
        for label, run in trial["runs"].items()
        for model, values in run.items()
    ]
    return Findings(claims=judge(flat, trials, side), tables=[_table(flat), _sub(side), _single(side)], notes=NOTES)


NOTES = [
    "Residual network of three stages (16, 32, 64 channels), digits of 32 x 32, 8 epochs; batches of 64, shuffled.",
    "Pictures of 16 x 16 are no cheaper test: the network's last stage is then a map of one place, where most of a "
    "filter's weights have no gradient at all, and which weights exceed a threshold means something else.",
    "Membership: share of forgotten training rows that a logistic attack on entropy takes for members, as published.",
    "The paper's own comparison (fine-tune, bad teacher, amnesiac, UNSIR on CIFAR and faces) is not repeated here.",
]


def judge(flat: Sequence[Trial], trials: Sequence[Trial], side: Sequence[Trial]) -> list[Claim]:
    """The claims; criteria were fixed before (specs: ssd, section 6)."""

    def of(model: str, name: str) -> Any:
        return spread(flat, name, model=model)

    def pairs(model: str, name: str) -> list[float]:
        before = {(row["label"], row["seed"]): row[name] for row in flat if row["model"] == "original"}
        return [before[row["label"], row["seed"]] - row[name] for row in flat if row["model"] == model]

    lost = pairs("adaptive", "retain")
    time = of("adaptive", "seconds").mean / of("retrained", "seconds").mean
    broken = pairs("alpha 1", "retain")
    row_wise = [trial["row_wise"] for trial in trials]
    twenty = of("alpha 20", "forget")
    best = [
        max((values["sibling"] for name, values in trial["sub"].items() if values["forget"] <= 0.1), default=0.0)
        for trial in side
    ]
    single = [trial["single"] for trial in side]
    drop = [one["original"]["test"] - one["adaptive"]["test"] for one in single]
    rise = [one["adaptive"]["loss"] / max(one["original"]["loss"], 1e-9) for one in single]
    still = [one["adaptive"]["forget"] for one in single]
    return [
        Claim(
            "A class is forgotten and the others are kept, without training and without tuning",
            "CIFAR-100, ResNet18: forget accuracy to 0 at 1 point or less of retain accuracy",
            "adaptive: forget accuracy at most 0.05 in every run; retain accuracy at most 0.02 below the original's on "
            "average, at most 0.03 in the worst run",
            f"forget {of('adaptive', 'forget')}; retain accuracy falls by {number(float(np.mean(lost)))}, worst "
            f"{number(max(lost))}",
            of("adaptive", "forget").high <= 0.05 and float(np.mean(lost)) <= 0.02 and max(lost) <= 0.03,
        ),
        Claim(
            "It costs a small fraction of retraining",
            "-",
            "CPU time at most a third of retraining's",
            f"{number(time)} of it",
            time <= 1 / 3,
        ),
        Claim(
            "Alpha decides between forgetting and damage",
            "alpha searched per architecture",
            "alpha 1 loses at least 0.5 retain accuracy on average",
            f"loses {number(float(np.mean(broken)))}",
            float(np.mean(broken)) >= 0.5,
        ),
        Claim(
            "An alpha has no meaning without its batches",
            "10 for ResNet18, from batches that hold one class",
            "alpha 20: forget accuracy at most 0.05 on average with shuffled batches, while no weight is selected row "
            "by row, where ratios are bounded by all rows / forget rows",
            f"forget {twenty}; row by row {sum(int(r['selected']) for r in row_wise)} weights, largest ratio "
            f"{number(max(r['largest'] for r in row_wise))} of at most {number(max(r['bound'] for r in row_wise))}",
            twenty.mean <= 0.05 and all(r["selected"] == 0 for r in row_wise),
        ),
        Claim(
            "A sub-class is forgotten and its siblings are kept",
            "CIFAR-20: rocket, mushroom, baby ... with retain accuracy within 1 to 2 points",
            f"for some alpha of adaptive, {', '.join(map(str, GRID))}: digit 3 at most 0.1 and its sibling 2 at least "
            "0.9, on average over seeds",
            f"best sibling accuracy where the digit is forgotten: {', '.join(map(number, best))}",
            float(np.mean(best)) >= 0.9,
        ),
        Claim(
            "Single rows are forgotten weakly",
            "forget accuracy near the original's, membership a little lower",
            f"{SINGLE} rows, adaptive: test accuracy falls by at most 0.02, forget accuracy stays at least 0.9, their "
            "loss rises",
            f"test accuracy falls by {number(float(np.mean(drop)))}; forget accuracy {', '.join(map(number, still))}; "
            f"loss times {', '.join(map(number, rise))}",
            float(np.mean(drop)) <= 0.02 and float(np.mean(still)) >= 0.9 and min(rise) > 1,
        ),
    ]


def _table(flat: Sequence[Trial]) -> Table:
    names = list(dict.fromkeys(row["model"] for row in flat))
    lines = []
    for name in names:
        cells = [str(spread(flat, column, model=name)) for column in ("forget", "retain", "membership", "seconds")]
        known = [row for row in flat if row["model"] == name and "alpha" in row]
        cells += [str(spread(known, column)) for column in ("alpha", "share")] if known else ["", ""]
        lines.append([name, *cells])
    columns = ["model", "forget accuracy", "retain accuracy", "membership", "CPU seconds", "alpha", "weights dampened"]
    return Table("Classes", columns, lines, f"Digits {' and '.join(ASKED)}; mean (lowest to highest) over runs.")


def _sub(side: Sequence[Trial]) -> Table:
    lines = []
    for name in side[0]["sub"]:
        runs = [trial["sub"][name] for trial in side]
        lines.append([name, *(str(spread(runs, column)) for column in ("forget", "sibling"))])
    return Table("Sub-class", ["model", "digit 3", "its sibling 2"], lines, "The model's classes are pairs of digits.")


def _single(side: Sequence[Trial]) -> Table:
    lines = []
    for name in ("original", "adaptive"):
        runs = [trial["single"][name] for trial in side]
        lines.append([name, *(str(spread(runs, column)) for column in ("forget", "loss", "test"))])
    return Table("Single rows", ["model", "forget accuracy", "forget loss", "test accuracy"], lines)
