"""The eight baselines of MUSE (arXiv:2407.06460) one by one: what each forgets, and what that costs.

First on MUSE's mini version, by its four scores. Then task vectors (arXiv:2212.04089) and Who's Harry Potter
(2310.02238) on facts of the invented world, whose answers are single values: there forgetting and keeping are exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from .. import registry
from ..evidence import Table
from ..methods.edit.task_vector import GRID
from ..methods.optimise.loop import Training
from ..methods.optimise.unlearn import unlearn
from ..registry import reproduction
from .case import Case, Claim, Findings, Row, Spread, number, spread
from .measures import measure
from .mini import mini
from .muse import table
from .muse_runs import BASELINES, SCORES, by_scale, trial

KEPT = 0.9
"""Share of the target's knowmem_r from which utility counts as kept."""
FACTS: dict[str, dict[str, Any]] = {
    "start": {},
    "tv": {},
    "whp": {},
    "whp_trained": {"retain": "nll"},
    "whp_trained_alone": {"retain": "none"},
}
"""What is measured on facts: whp is the guard, whp_trained the method that learns its answers."""
WORLD: dict[str, Any] = {
    "people": 32,
    "forget": 8,
    "neighbours": 4,
    "holdout": 8,
    "recipe": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "layers": 2,
        "steps": 250,
        "batch_size": 56,
        "learning_rate": 8e-3,
    },
}
"""Sizes of the world of the facts: half the usual one, which is enough for 80 rows to be known by heart."""
OFFSETS = (1.0, 5.0, 20.0, 80.0)
EVERY = 3
"""Each third retain row is measured."""


def facts(
    method: str,
    seed: int,
    steps: int = 60,
    learning_rate: float = 5e-4,
    reinforcing_rate: float = 1e-3,
    world: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What a model knows of facts after task vectors and Who's Harry Potter of several scales."""
    made = mini(seed, world or WORLD)
    forget, retain = made.data["forget"], made.data["retain"]
    data = {"forget": forget, "retain": retain[::EVERY], "holdout": made.data["holdout"]}
    training = Training(steps=steps, batch_size=16, learning_rate=learning_rate, seed=seed, guard=None)
    epochs = steps * training.batch_size / len(forget)
    if method == "start":
        return {"points": [{"alpha": 0.0, **measure(made.original, data)}]}
    if method in ("tv", "whp"):
        reinforcing = Training(epochs=epochs, batch_size=16, learning_rate=reinforcing_rate, seed=seed, guard=None)
        to_degree = by_scale(method, made.original, forget, reinforcing)
        alphas = GRID if method == "tv" else OFFSETS
        return {"points": [{"alpha": alpha, **measure(to_degree(alpha), data)} for alpha in alphas]}
    settings = {"alpha": 5.0, "epochs": epochs, "learning_rate": reinforcing_rate, **FACTS[method]}
    outcome = unlearn(
        made.original,
        registry.get("methods", "whp"),
        settings,
        scope=None,
        data={"forget": forget, "retain": retain},
        training=training,
    )
    return {"points": [{"alpha": 5.0, **measure(outcome.delta.apply(made.original), data)}]}


@reproduction(paper="arXiv:2407.06460", cost="8 min on 2 cores, models of its own included", systems=("muse",))
def muse_baselines(
    case: Case,
    *,
    epochs: int = 10,
    batch_size: int = 2,
    learning_rate: float = 1e-3,
    people: dict[str, int] | None = None,
    recipe: dict[str, Any] | None = None,
    steps: int = 60,
    facts_rate: float = 5e-4,
    reinforcing_rate: float = 1e-3,
    world: dict[str, Any] | None = None,
) -> Findings:
    """MUSE's baselines: ascent destroys or over-forgets, NPO under-forgets, scaled methods forget or keep, not both.

    Args:
        epochs: of the gradient methods on texts, and of the reinforced models of the others.
        batch_size: texts to forget in a step, with as many to keep.
        learning_rate: of all methods on texts.
        people: sizes of the world of the texts (`expunge.world.facts.make`).
        recipe: of target and retrained model (`expunge.world.models.Recipe`).
        steps: of all training on facts, 16 rows each.
        facts_rate: learning rate of Who's Harry Potter on facts.
        reinforcing_rate: of the reinforced models on facts.
        world: sizes of the world of the facts (`expunge.world.build.build`), by default `WORLD`.
    """
    texts = {
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "people": people,
        "recipe": recipe,
    }
    models = ("target", "retrained", *BASELINES)
    rows = case.trials(trial, [{"method": method, **texts} for method in models])
    found = {method: {score: spread(rows, score, method=method) for score in SCORES} for method in models}
    asked = {"steps": steps, "learning_rate": facts_rate, "reinforcing_rate": reinforcing_rate, "world": world}
    known = case.trials(facts, [{"method": method, **asked} for method in FACTS])
    return Findings(
        claims=[
            _ascent(found),
            _retain(found),
            _npo(rows),
            _under(found),
            _over(found),
            _scales(rows, found),
            _vectors(known),
            _offsets(known),
            _trained(known),
            _alone(known),
        ],
        tables=[table(rows, found), _ways(rows), _facts(known)],
        notes=[
            "MUSE's own NPO and KLR work on raw logits and are other methods (muse_bench, issue 2); here both are as "
            "defined, and the published figures are those of a corrected implementation.",
            "whp is MUSE's form: logits are lowered at every token when the model answers, with the text as it is. "
            "whp_trained learns its answers, with names replaced, as in arXiv:2310.02238.",
        ],
    )


# --- texts -----------------------------------------------------------------------------------------------------------

Found = Mapping[str, Mapping[str, Spread]]


def _pairs(found: Found, methods: Sequence[str], *scores: str) -> str:
    return "; ".join(f"{m} {' / '.join(number(found[m][score].mean) for score in scores)}" for m in methods)


def _ascent(found: Found) -> Claim:
    ga, gold = found["ga"], found["retrained"]
    return Claim(
        "Gradient ascent alone forgets, and destroys utility.",
        "News (KnowMem_f / KnowMem_r): 0 / 0, target 64 / 56",
        "ga: knowmem_f at most the retrained model's, knowmem_r at most 0.7.",
        _pairs(found, ("ga", "retrained"), "knowmem_f", "knowmem_r"),
        ga["knowmem_f"].mean <= gold["knowmem_f"].mean and ga["knowmem_r"].mean <= 0.7,
    )


def _retain(found: Found) -> Claim:
    plain, kept = found["ga"], found["ga_gdr"]
    return Claim(
        "A retain term saves part of the utility.",
        "News (KnowMem_f / KnowMem_r): GA 0 / 0, GradDiff 41 / 37",
        "ga_gdr: knowmem_f at most 0.6, knowmem_r at least 0.2 above ga's.",
        _pairs(found, ("ga", "ga_gdr", "ga_klr"), "knowmem_f", "knowmem_r"),
        kept["knowmem_f"].mean <= 0.6 and kept["knowmem_r"].mean >= plain["knowmem_r"].mean + 0.2,
    )


def _npo(rows: Sequence[Row]) -> Claim:
    gaps = []
    for row in (row for row in rows if row["method"] == "ga"):
        other = next(one for one in rows if one["method"] == "npo" and one["seed"] == row["seed"])
        at = next(i for i, (degree, *_) in enumerate(row["curve"]) if degree == row["degree"])
        gaps.append(other["curve"][at][2] - row["curve"][at][2])
    gap = Spread(tuple(gaps))
    degrees = {m: spread(rows, "degree", method=m) for m in ("ga", "npo")}
    return Claim(
        "NPO leaves the start model more slowly than gradient ascent.",
        "exponentially more slowly (arXiv:2404.05868); both need one epoch on News",
        "At the epoch at which ga counts as unlearned, npo's knowmem_r is at least 0.1 above ga's, and npo needs no "
        "fewer epochs.",
        f"knowmem_r above ga's by {gap}; epochs: ga {degrees['ga']}, npo {degrees['npo']}",
        gap.mean >= 0.1 and degrees["npo"].mean >= degrees["ga"].mean,
    )


def _under(found: Found) -> Claim:
    several, gold = ("npo_gdr", "npo_klr"), found["retrained"]
    return Claim(
        "NPO with a retain term forgets too little.",
        "News (KnowMem_f / PrivLeak): 56 / -86, retrained 33 / 0",
        "npo_gdr and npo_klr: knowmem_f at least 0.1 above the retrained model's, privleak at most -50.",
        _pairs(found, (*several, "retrained"), "knowmem_f", "privleak"),
        all(
            found[m]["knowmem_f"].mean >= gold["knowmem_f"].mean + 0.1 and found[m]["privleak"].mean <= -50
            for m in several
        ),
    )


def _over(found: Found) -> Claim:
    several = ("ga_gdr", "ga_klr")
    return Claim(
        "Gradient ascent with a retain term forgets too much: the texts look stranger than any.",
        "News, PrivLeak: GradDiff +93",
        "ga_gdr and ga_klr: privleak at least +20.",
        _pairs(found, several, "privleak"),
        all(found[m]["privleak"].mean >= 20 for m in several),
    )


def _scales(rows: Sequence[Row], found: Found) -> Claim:
    floor = KEPT * found["target"]["knowmem_r"].mean
    best = {}
    for m in ("tv", "whp"):
        curves = [row["curve"] for row in rows if row["method"] == m]
        means = [[sum(values) / len(values) for values in zip(*points)] for points in zip(*curves)]
        kept = [(alpha, forgotten) for alpha, forgotten, utility in means if utility >= floor]
        best[m] = min(kept, key=lambda one: one[1], default=None)
    return Claim(
        "Task vectors and Who's Harry Potter barely forget at a scale that keeps utility.",
        "verbatim and knowledge memorisation close to the target's",
        f"No alpha of 1, 2, 4 ... 256 whose knowmem_r is at least {KEPT} of the target's has knowmem_f at most 0.7.",
        "; ".join(
            f"{m}: lowest knowmem_f {number(one[1])} at alpha {number(one[0])}"
            if one
            else f"{m}: no alpha keeps utility"
            for m, one in best.items()
        ),
        all(one is None or one[1] > 0.7 for one in best.values()),
    )


def _ways(rows: Sequence[Row]) -> Table:
    lines = []
    for m in BASELINES:
        curves = [row["curve"] for row in rows if row["method"] == m]
        for points in zip(*curves):
            forgotten, kept = (Spread(tuple(point[i] for point in points)) for i in (1, 2))
            lines.append([m, number(points[0][0]), str(forgotten), str(kept)])
    return Table("The way of every method", ["method", "epochs or alpha", "knowmem_f", "knowmem_r"], lines)


# --- facts -----------------------------------------------------------------------------------------------------------


def _points(rows: Sequence[Row], method: str) -> list[dict[str, Spread]]:
    """Measures over seeds, by scale."""
    runs = [row["points"] for row in rows if row["method"] == method]
    return [{name: Spread(tuple(point[name] for point in points)) for name in points[0]} for points in zip(*runs)]


def _line(point: Mapping[str, Spread]) -> str:
    return (
        f"alpha {number(point['alpha'].mean)}: forget {number(point['forget_accuracy'].mean)}, retain "
        f"{number(point['retain_accuracy'].mean)} (NLL {number(point['retain_nll'].mean)})"
    )


def _vectors(rows: Sequence[Row]) -> Claim:
    points = _points(rows, "tv")
    accuracy = [(p["forget_accuracy"].mean, p["retain_accuracy"].mean) for p in points]
    falls = all(later[0] <= earlier[0] + 0.05 for earlier, later in pairwise(accuracy))
    both = [p for p, (forget, retain) in zip(points, accuracy) if forget <= 0.1 and retain >= 0.9]
    return Claim(
        "Facts: no task vector forgets memorised rows and keeps the others.",
        "close to the target at a scale that keeps utility (MUSE)",
        "Of 12 alphas from 0.1 to 10 none has forget accuracy at most 0.1 and retain accuracy at least 0.9; forget "
        "accuracy never rises with alpha by more than 0.05.",
        "; ".join(map(_line, both or points[-5:])) + ("" if falls else "; forget accuracy rises with alpha somewhere"),
        falls and not both,
    )


def _offsets(rows: Sequence[Row]) -> Claim:
    points = _points(rows, "whp")
    good = [p for p in points if p["forget_accuracy"].mean <= 0.1 and p["retain_accuracy"].mean >= 0.85]
    return Claim(
        "Facts: lowered logits can hide them, while retained ones survive by rank only.",
        "WHP at inference: utility falls with alpha (MUSE)",
        "Some alpha of 1, 5, 20, 80 has forget accuracy at most 0.1 and retain accuracy at least 0.85, and there the "
        "retain NLL is above 1.",
        "; ".join(map(_line, good or points)),
        any(p["retain_nll"].mean > 1 for p in good),
    )


def _trained(rows: Sequence[Row]) -> Claim:
    (point,) = _points(rows, "whp_trained")
    (start,) = _points(rows, "start")
    ratio = point["forget_probability"].mean / start["holdout_probability"].mean
    return Claim(
        "Facts: trained on generic answers with retain rows beside them, a model answers as if it had never known.",
        "familiarity 0.290 to 0.007, general benchmarks nearly unchanged",
        "whp, alpha 5, retain NLL: forget accuracy at most 0.15 in both wordings, retain accuracy at least 0.95, "
        "probability of the value within a factor of 2 of a held-out person's.",
        f"{_line(point)}, held-out wording {number(point['held_out_accuracy'].mean)}, probability "
        f"{number(point['forget_probability'].mean)} against {number(start['holdout_probability'].mean)}",
        point["forget_accuracy"].mean <= 0.15
        and point["held_out_accuracy"].mean <= 0.15
        and point["retain_accuracy"].mean >= 0.95
        and 0.5 <= ratio <= 2,
    )


def _alone(rows: Sequence[Row]) -> Claim:
    (point,) = _points(rows, "whp_trained_alone")
    (start,) = _points(rows, "start")
    lost = start["retain_accuracy"].mean - point["retain_accuracy"].mean
    return Claim(
        "Facts: without retain rows generic answers leak to everybody.",
        "not in the paper, which trains on two books and measures other tasks",
        "whp, alpha 5, no retain term: retain accuracy falls by at least 0.3.",
        f"{_line(point)}; falls by {number(lost)}",
        lost >= 0.3,
    )


def _facts(rows: Sequence[Row]) -> Table:
    columns = {
        "forget_accuracy": "forget",
        "held_out_accuracy": "forget, other wording",
        "forget_probability": "value probability",
        "retain_accuracy": "retain",
        "retain_nll": "retain NLL",
    }
    lines = [
        [m, number(point["alpha"].mean), *(str(point[name]) for name in columns)]
        for m in FACTS
        for point in _points(rows, m)
    ]
    return Table("Facts: accuracy, probability of the value, NLL", ["method", "alpha", *columns.values()], lines)
