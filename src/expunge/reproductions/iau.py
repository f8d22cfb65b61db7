"""IAU (arXiv:2507.23257) on written digits: one gradient in place of an inverse Hessian, and gradients kept small."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from ..evidence import Table
from ..methods.optimise.curvature import mean_gradient
from ..methods.optimise.teach import teach
from ..metrics.membership import auc_of
from ..pictures import Picture
from ..registry import reproduction
from ..subjects.image import ImageClassifier, Preparation
from ..world.pictures.draw import digits
from .case import Case, Claim, Findings, number, spread
from .case import Row as Trial
from .pictures import CLASSES, Kept, accuracy, answers, change, score, timed

ROWS, FORGOTTEN = 500, 25
TRAINING: Mapping[str, Any] = {"epochs": 100.0, "batch_size": 64, "learning_rate": 1e-3}
STEPS = {"steps": 38, "batch_size": 64, "learning_rate": 1e-3}
"""Five passes over the retain rows."""
METHODS: Mapping[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "iau": ("iau", {}, {}),
    "iau, rate 3e-3": ("iau", {"learning_rate": 3e-3}, {}),
    "iau, rate 1e-2": ("iau", {"learning_rate": 1e-2}, {}),
    "iau, gradient": ("iau", {"rule": "gradient"}, {}),
    "iau, gradient, no correction": ("iau", {"rule": "gradient", "correction": 0.0}, {}),
    "iau, gradient, rate 0.3": ("iau", {"rule": "gradient", "learning_rate": 0.3}, {}),
    "iau, gradient, rate 0.3, no correction": (
        "iau",
        {"rule": "gradient", "learning_rate": 0.3, "correction": 0.0},
        {},
    ),
    "influence": ("influence", {}, {}),
    "influence, a tenth": ("influence", {"scale": 0.1}, {}),
    "fine-tune": ("fine_tune", {}, STEPS),
    "gradient ascent": ("gradient_ascent", {}, {"steps": 5, "batch_size": 64, "learning_rate": 1e-4}),
    "Fisher forgetting": ("fisher_forgetting", {}, {}),
    "SSD": ("ssd", {}, {}),
}
RANKED = ("iau", "influence", "fine-tune", "gradient ascent", "Fisher forgetting", "SSD")
RESTRICTIONS = (0.0, 0.005, 0.02, 0.1)


def network() -> nn.Module:
    """Two hidden layers of 64, the number of places in a picture."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, len(CLASSES))
    )


def taught(rows: Sequence[Picture], seed: int, restriction: float = 0.0) -> tuple[ImageClassifier, float]:
    """(a classifier trained anew on these rows, CPU seconds)"""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        subject = ImageClassifier(network(), CLASSES, Kept(Preparation((8, 8))), f"mlp, seed {seed}", network)
    encoded = [subject.encode(row) for row in rows]
    _, seconds = timed(lambda: teach(subject, encoded, seed=seed, restriction=restriction, **TRAINING))
    return subject, seconds


# --- trials -----------------------------------------------------------------------------------------------------------


def forgetting(seed: int) -> dict[str, Any]:
    """Single rows forgotten by every method: `{model: {test, forget, auc, kl, seconds}}`"""
    data = digits(8)
    order = np.random.default_rng(seed).permutation(len(data["train"]))[:ROWS]
    rows = [data["train"][i] for i in order]
    request = {"forget": rows[:FORGOTTEN], "retain": rows[FORGOTTEN:]}
    original, _ = taught(rows, seed)
    retrained, spent = taught(request["retain"], seed)
    gold = answers(retrained, request["forget"])

    def measured(subject: ImageClassifier, seconds: float) -> dict[str, float]:
        losses = [
            -np.asarray(score(subject, some).logprob, dtype=np.float64) for some in (request["forget"], data["test"])
        ]
        said = answers(subject, request["forget"])
        return {
            "test": accuracy(subject, data["test"]),
            "forget": accuracy(subject, request["forget"]),
            "auc": float(auc_of(*losses)(np.ones((1, sum(map(len, losses)))))[0]),
            "kl": float((gold.exp() * (gold - said)).sum(-1).mean()),
            "seconds": seconds,
        }

    for row in request["retain"] + request["forget"]:
        original.encode(row)  # its pixels are prepared once, before any method's time counts
    found = {"original": measured(original, 0.0), "retrained": measured(retrained, spent)}
    for name, (method, settings, training) in METHODS.items():
        after, _, seconds = change(original, request, method, settings, seed, **training)
        found[name] = measured(after, seconds)
    return {"models": found}


def abnormal(seed: int, restriction: float) -> dict[str, float]:
    """Rows with wrong labels, trained on with gradient restriction and then forgotten by one step."""
    data = digits(8)
    rng = np.random.default_rng(seed)
    rows = [data["train"][i] for i in rng.permutation(len(data["train"]))[:ROWS]]
    wrong = [replace(row, answer=str((int(row.answer) + int(rng.integers(1, 10))) % 10)) for row in rows[:FORGOTTEN]]
    subject, seconds = taught([*wrong, *rows[FORGOTTEN:]], seed, restriction)
    names = [name for name, _ in subject.model.named_parameters()]
    norms = [
        float(torch.stack([g.norm() for g in mean_gradient(subject, [subject.encode(row)], names)]).norm())
        for row in [*wrong, *rows[FORGOTTEN:]]
    ]
    request = {"forget": wrong, "retain": rows[FORGOTTEN:]}
    after, about, _ = change(subject, request, "iau", {"rule": "gradient"}, seed)
    return {
        "largest": max(norms),
        "forget_gradient": float(about["iau"]["forget_gradient"]),
        "before": accuracy(subject, data["test"]),
        "after": accuracy(after, data["test"]),
        "seconds": seconds,
    }


# --- findings ---------------------------------------------------------------------------------------------------------


@reproduction(paper="arXiv:2507.23257", cost="1 min on 1 core", modality=("image",))
def iau(case: Case) -> Findings:
    """Influence approximation on written digits: one gradient step against Newton's step and retraining."""
    flat = [
        {"model": model, "seed": trial["seed"], **values}
        for trial in case.trials(forgetting, [{}])
        for model, values in trial["models"].items()
    ]
    odd = case.trials(abnormal, [{"restriction": weight} for weight in RESTRICTIONS])
    return Findings(claims=judge(flat, odd), tables=[_table(flat), _restricted(odd)], notes=NOTES)


NOTES = [
    f"A perceptron of 64 and 64 units on pictures of 8 x 8: {ROWS} training rows, of which {FORGOTTEN} are forgotten, "
    "100 epochs of AdamW at 1e-3 on a cosine (the paper: at most 200 of Adam with early stopping). Seconds are CPU "
    "time without preparing pixels.",
    "The paper's tables are of LeNet5, ResNet18, VGG19 and a perceptron on CIFAR, SVHN and Purchase100, its attack "
    "trains shadow models; here the area under the curve of the loss stands for it.",
    "The published code's step is the first one of Adam, so that every weight moves by the learning rate. With plain "
    "gradients of the same rate, 1e-3, next to nothing moves.",
]


def judge(flat: Sequence[Trial], odd: Sequence[Trial]) -> list[Claim]:
    """The claims; criteria were fixed before (specs: iau, section 6)."""

    def mean(model: str, name: str) -> float:
        return spread(flat, name, model=model).mean

    def loses(model: str) -> float:
        return mean("original", "test") - mean(model, "test")

    closer = mean("iau", "kl") / mean("original", "kl")
    against = [mean("iau", "seconds") / mean(other, "seconds") for other in ("retrained", "influence")]
    ranks = _ranks(flat)
    best = min(ranks, key=lambda name: ranks[name])
    guarded = [mean(f"iau, gradient, rate 0.3{rest}", "test") for rest in ("", ", no correction")]
    plain, strong = ({name: spread(odd, name, restriction=w).mean for name in odd[0]} for w in (0.0, 0.1))
    return [
        Claim(
            "Learning opposite rows brings the model near to retraining on forgotten rows",
            "smallest difference to retraining in membership on most data sets",
            "KL(retrained || model) on them at most 0.75 of the original's, test accuracy at most 0.01 lower",
            f"{number(closer)} of the original's {number(mean('original', 'kl'))}; test accuracy falls by "
            f"{number(loses('iau'))}",
            closer <= 0.75 and loses("iau") <= 0.01,
        ),
        Claim(
            "It costs a small fraction of retraining and of an inverse Hessian",
            "LeNet5 on CIFAR10: 13 s against 1294 s of Fisher forgetting",
            "CPU time at most 1/20 of retraining's and 1/5 of the conjugate gradients'",
            f"{number(against[0])} and {number(against[1])}",
            against[0] <= 1 / 20 and against[1] <= 1 / 5,
        ),
        Claim(
            "The inverse Hessian adds nothing",
            "-",
            "influence at its textbook scale stays no nearer to retraining than iau (KL)",
            f"influence {number(mean('influence', 'kl'))}, iau {number(mean('iau', 'kl'))}",
            mean("influence", "kl") >= mean("iau", "kl"),
        ),
        Claim(
            "Best average rank over utility, removal and time",
            "first on average",
            f"lowest mean rank among {', '.join(RANKED)}, by distance to retraining in test accuracy and in the area "
            "under the curve of the loss, and by seconds",
            "; ".join(f"{name} {number(rank)}" for name, rank in sorted(ranks.items(), key=lambda pair: pair[1])),
            best == "iau",
        ),
        Claim(
            "The gradient correction guards against forgetting too much",
            "ablation: utility falls without it",
            "plain gradient steps at rate 0.3: test accuracy with it at least 0.01 above without",
            f"{number(guarded[0])} with, {number(guarded[1])} without",
            guarded[0] >= guarded[1] + 0.01,
        ),
        Claim(
            "Gradient restriction in training makes forgetting odd rows less harmful",
            "higher utility after unlearning",
            "rows with wrong labels, weight 0.1 against 0: largest gradient of a row at most 0.9 times, test accuracy "
            "after the same step at least 0.04 higher, before it at most 0.02 lower",
            f"largest gradient {number(strong['largest'])} against {number(plain['largest'])}; accuracy after "
            f"{number(strong['after'])} against {number(plain['after'])}, before {number(strong['before'])} against "
            f"{number(plain['before'])}",
            strong["largest"] <= 0.9 * plain["largest"]
            and strong["after"] >= plain["after"] + 0.04
            and strong["before"] >= plain["before"] - 0.02,
        ),
    ]


def _ranks(flat: Sequence[Trial]) -> dict[str, float]:
    """Mean rank of each method over seeds and three orders; ties share the mean of their places."""
    found: dict[str, list[float]] = {name: [] for name in RANKED}
    for seed in dict.fromkeys(row["seed"] for row in flat):
        of = {row["model"]: row for row in flat if row["seed"] == seed}
        gold = of["retrained"]
        for key in ("test", "auc", "seconds"):
            value = {name: of[name][key] if key == "seconds" else abs(of[name][key] - gold[key]) for name in RANKED}
            for name in RANKED:
                below = sum(other < value[name] for other in value.values())
                same = sum(other == value[name] for other in value.values())
                found[name].append(below + (same + 1) / 2)
    return {name: float(np.mean(ranks)) for name, ranks in found.items()}


def _table(flat: Sequence[Trial]) -> Table:
    columns = ("test", "forget", "auc", "kl", "seconds")
    lines = [
        [name, *(str(spread(flat, column, model=name)) for column in columns)]
        for name in dict.fromkeys(row["model"] for row in flat)
    ]
    head = ["model", "test accuracy", "forget accuracy", "AUC of the loss", "KL to retrained", "CPU seconds"]
    return Table(
        f"{FORGOTTEN} of {ROWS} rows",
        head,
        lines,
        "Mean (lowest to highest) over seeds. AUC: forgotten against unseen rows.",
    )


def _restricted(odd: Sequence[Trial]) -> Table:
    columns = ("largest", "forget_gradient", "before", "after", "seconds")
    lines = [
        [f"{weight:g}", *(str(spread(odd, column, restriction=weight)) for column in columns)]
        for weight in RESTRICTIONS
    ]
    head = [
        *("restriction", "largest gradient of a row", "gradient of the forget rows"),
        *("test accuracy before", "after the step", "CPU seconds of training"),
    ]
    return Table(
        f"Gradient restriction, {FORGOTTEN} of {ROWS} rows with wrong labels",
        head,
        lines,
        "The step is iau's plain gradient at rate 0.1.",
    )
