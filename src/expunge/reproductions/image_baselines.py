"""The columns of image tables (SalUn, arXiv:2310.12508; SCRUB, arXiv:2302.09880): every method on three requests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..benchmarks.image_forgetting import measure, zrf
from ..evidence import Table
from ..methods.optimise.teach import teach
from ..pictures import Picture
from ..registry import reproduction
from ..subjects.fresh import fresh
from ..subjects.image import ImageClassifier
from ..tables.passes import Apart, run
from ..world.pictures.draw import digits
from ..world.pictures.models import Recipe, untrained
from .case import Case, Claim, Findings, number, spread
from .case import Row as Trial
from .pictures import CLASSES, Kept, change, score, timed

RECIPE = Recipe(side=16, widths=(16, 32))
ROWS = 700
REQUESTS = ("class", "sub-class", "random")
NOISE = 0.1
"""Share of training rows with a wrong label where single rows are forgotten: what is memorised can be forgotten."""
FIVE = {"steps": 50, "batch_size": 64, "learning_rate": 1e-3}
"""Five passes over the retain rows, with as many forget rows in a step where the method reads them."""
METHODS: Mapping[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "fine-tune": ("fine_tune", {}, FIVE),
    "fine-tune, 1 epoch": ("fine_tune", {}, {**FIVE, "steps": 10}),
    "CF-1": ("cf_k", {}, FIVE),
    "EU-1": ("eu_k", {}, {}),
    "l1-sparse": ("l1_sparse", {}, FIVE),
    "gradient ascent": ("gradient_ascent", {}, {**FIVE, "steps": 10}),
    "NegGrad+": ("neggrad_plus", {}, FIVE),
    "random label": ("random_label", {}, FIVE),
    "amnesiac": ("amnesiac", {}, FIVE),
    "bad teacher": ("bad_teacher", {}, FIVE),
    "SCRUB": ("scrub", {}, FIVE),
    "SalUn": ("salun", {}, FIVE),
    "UNSIR": ("unsir", {}, {}),
    "Fisher forgetting": ("fisher_forgetting", {}, {}),
    "influence, 10 iterations": ("influence", {"iterations": 10}, {}),
    "WoodFisher": ("influence", {"solver": "woodfisher"}, {}),
    "IAU": ("iau", {}, {}),
    "SSD": ("ssd", {}, {}),
}
ONLY = {"UNSIR": "class"}
FOUR = ("training_forget_accuracy", "training_retain_accuracy", "retain_accuracy", "membership_confidence")
"""SalUn's columns, whose mean distance to retraining is the average gap."""


def request(kind: str, seed: int) -> tuple[dict[str, list[Picture]], list[str]]:
    """(forget, retain, test_forget, test_retain; classes)"""
    data = digits(RECIPE.side)
    train, test = data["train"][:ROWS], data["test"]
    if kind == "random":
        rng = np.random.default_rng(seed)
        noisy = set(rng.permutation(ROWS)[: int(NOISE * ROWS)].tolist())
        train = [
            replace(row, answer=str((int(row.answer) + int(rng.integers(1, 10))) % 10)) if i in noisy else row
            for i, row in enumerate(train)
        ]
        order = rng.permutation(ROWS).tolist()
        count = ROWS // 10
        parts = [[train[i] for i in some] for some in (order[:count], order[count:])]
        return {"forget": parts[0], "retain": parts[1], "test_forget": [], "test_retain": list(test)}, CLASSES
    sides = {"": train, "test_": test}
    rows = {
        f"{name}{side}": [row for row in some if (row.answer == "3") == (side == "forget")]
        for name, some in sides.items()
        for side in ("forget", "retain")
    }
    if kind == "class":
        return rows, CLASSES
    coarse = {name: [replace(row, answer=row.tags["group"]) for row in some] for name, some in rows.items()}
    return coarse, sorted({row.answer for row in coarse["retain"]})


def trial(seed: int, kind: str) -> dict[str, Any]:
    """Every method on one request: `{model: {column: mean, seconds}}`, the two retrained models first."""
    rows, classes = request(kind, seed)
    data = {"forget": rows["forget"], "retain": rows["retain"]}
    # The pixels of all rows are prepared once; no time below counts them.
    kept = Kept(untrained(classes, RECIPE, 0).processor)

    def learnt(some: Sequence[Picture], seed_: int) -> tuple[ImageClassifier, float]:
        subject = untrained(classes, RECIPE, seed_)
        subject.processor = kept
        encoded = [subject.encode(row) for row in some]
        training = {name: getattr(RECIPE, name) for name in ("epochs", "batch_size", "learning_rate")}
        _, seconds = timed(lambda: teach(subject, encoded, seed=seed_, **training))
        return subject, seconds

    original, _ = learnt([*rows["forget"], *rows["retain"]], seed)
    gold, spent = learnt(rows["retain"], seed)
    again, _ = learnt(rows["retain"], seed + 100)
    blank = fresh(original, 0)

    def measured(subject: ImageClassifier, seconds: float) -> dict[str, float]:
        each = measure({name: score(subject, some) for name, some in rows.items()}, rows)
        (table,) = run(subject, [Apart(tuple(rows["test_forget"] or rows["forget"]), blank)])  # type: ignore[arg-type]
        return {**{name: float(values.mean()) for name, values in each.items()}, "zrf": float(zrf(table).mean())} | {
            "seconds": seconds
        }

    found = {
        "original": measured(original, 0.0),
        "retrained": measured(gold, spent),
        "retrained, another seed": measured(again, spent),
    }
    for name, (method, settings, training) in METHODS.items():
        if ONLY.get(name, kind) == kind:
            after, _, seconds = change(original, data, method, settings, seed, **training)
            found[name] = measured(after, seconds)
    for values in found.values():
        values["gap"] = float(np.mean([abs(values[name] - found["retrained"][name]) for name in FOUR]))
        values["cost"] = values["seconds"] / spent
    return {"models": found}


@reproduction(paper="arXiv:2310.12508", cost="3 min on 1 core", modality=("image",))
def image_baselines(case: Case) -> Findings:
    """Eighteen methods on a class, a sub-class and random rows of written digits, beside two retrained models."""
    flat = [
        {"model": model, "kind": one["kind"], "seed": one["seed"], **values}
        for one in case.trials(trial, [{"kind": kind} for kind in REQUESTS])
        for model, values in one["models"].items()
    ]
    return Findings(claims=judge(flat), tables=[_table(flat, kind) for kind in REQUESTS], notes=NOTES)


NOTES = [
    f"Digits of 16 x 16, {ROWS} training rows; residual network of two stages (16, 32 channels), 8 epochs. Class: the "
    "digit 3. Sub-class: the digit 3 of a model whose five classes are pairs of digits. Random: a tenth of the rows, "
    f"where a share of {NOISE:g} of all training labels is wrong.",
    "Methods run at one setting each, not at the best of a grid: five passes over the retain rows with AdamW at 1e-3 "
    "where they train, else their defaults: WoodFisher at scale 1, which tables tune; UNSIR at 1e-4, the rate of SSD's "
    "tables, while its own paper impairs at 0.02. EU-1 trains eight epochs at retraining's rate.",
    "Average gap: mean distance to retraining in accuracy on forgotten and kept training rows, on unseen kept rows, "
    "and in an attack on confidence (SalUn's four). Differences below the gap of the second retrained model are none.",
    "Unlearning leaves running statistics of batch norms alone, EU-1 and retraining learn their own. The papers' own "
    "tables are of CIFAR and faces.",
]


def judge(flat: Sequence[Trial]) -> list[Claim]:
    """The claims; criteria were fixed before (specs: baselines, section 6)."""

    def mean(model: str, name: str, kind: str) -> float:
        return spread(flat, name, model=model, kind=kind).mean

    weak = mean("fine-tune, 1 epoch", "forget_accuracy", "class")
    strong = {
        name: mean(name, "forget_accuracy", "class")
        for name in ("gradient ascent", "random label", "SCRUB", "bad teacher", "UNSIR")
    }
    before = mean("original", "retain_accuracy", "class")
    kept = {name: mean(name, "retain_accuracy", "class") for name in ("SCRUB", "NegGrad+", "SalUn")}
    ascent = mean("gradient ascent", "retain_accuracy", "class")
    gaps = {name: mean(name, "gap", "random") for name in ("SalUn", "random label")}
    noise = {kind: mean("retrained, another seed", "gap", kind) for kind in REQUESTS}
    unsure = {name: mean(name, "zrf", "random") for name in ("bad teacher", "random label", "retrained")}
    costs = {
        name: np.mean([mean(name, "cost", kind) for kind in REQUESTS if ONLY.get(name, kind) == kind])
        for name in METHODS
    }
    slowest = max(costs, key=lambda name: costs[name])
    return [
        Claim(
            "Fine-tuning barely forgets a class, the others do",
            "fine-tune keeps forget accuracy in every table",
            "unseen pictures of the class: fine-tune at least 0.5 after 1 epoch; gradient ascent, random label, SCRUB, "
            "bad teacher and UNSIR at most 0.2",
            f"fine-tune {number(weak)}; " + ", ".join(f"{name} {number(value)}" for name, value in strong.items()),
            weak >= 0.5 and max(strong.values()) <= 0.2,
        ),
        Claim(
            "SCRUB, NegGrad+ and SalUn keep the rest, ascent alone does not",
            "retain accuracy near the original's",
            "class: accuracy on unseen kept pictures at most 0.03 below the original's; gradient ascent below NegGrad+",
            ", ".join(f"{name} {number(value)}" for name, value in kept.items())
            + f"; gradient ascent {number(ascent)}, original {number(before)}",
            min(kept.values()) >= before - 0.03 and ascent < kept["NegGrad+"],
        ),
        Claim(
            "A saliency mask costs random labels nothing in distance to retraining",
            "average gap about 2 points or less on CIFAR-10, half of the weights held",
            "random rows: average gap of SalUn at most that of random label + 0.01",
            ", ".join(f"{name} {number(value)}" for name, value in gaps.items()),
            gaps["SalUn"] <= gaps["random label"] + 0.01,
        ),
        Claim(
            "Two seeds of retraining agree, so that gaps can be read",
            "-",
            "average gap between two seeds of retraining at most 0.02 on every request",
            ", ".join(f"{kind} {number(value)}" for kind, value in noise.items()),
            max(noise.values()) <= 0.02,
        ),
        Claim(
            "Bad teaching and random labels leave a model that is less sure than a retrained one",
            "forget accuracy below retraining's, visible to membership attacks",
            "random rows: ZRF of both above retraining's",
            ", ".join(f"{name} {number(value)}" for name, value in unsure.items()),
            min(unsure["bad teacher"], unsure["random label"]) > unsure["retrained"],
        ),
        Claim(
            "Fisher forgetting is the slowest by far",
            "1294 s against 13 s of IAU (LeNet5, CIFAR10)",
            "highest CPU time of all methods, on average over requests",
            f"{slowest} {number(float(costs[slowest]))} of retraining's time, Fisher forgetting "
            f"{number(float(costs['Fisher forgetting']))}, IAU {number(float(costs['IAU']))}",
            slowest == "Fisher forgetting",
        ),
    ]


def _table(flat: Sequence[Trial], kind: str) -> Table:
    columns = ["training_forget_accuracy", "training_retain_accuracy", "retain_accuracy", "membership_confidence"]
    head = ["forgotten rows", "kept rows", "unseen kept rows", "membership"]
    if kind != "random":
        columns, head = ["forget_accuracy", *columns], ["unseen rows like the forgotten", *head]
    columns, head = [*columns, "zrf", "gap", "cost"], [*head, "ZRF", "average gap", "time / retraining"]
    lines = []
    for name in dict.fromkeys(row["model"] for row in flat if row["kind"] == kind):
        found = [str(spread(flat, column, model=name, kind=kind)) for column in columns]
        lines.append([name, *found])
    return Table(
        f"Request: {kind}",
        ["model", *head],
        lines,
        "Accuracies, share taken for members, ZRF; mean (lowest to highest) over seeds.",
    )
