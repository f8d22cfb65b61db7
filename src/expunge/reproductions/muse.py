"""MUSE (arXiv:2407.06460): eight methods under six criteria.

The mini version's news are texts that the target model has by heart; questions about them are in its training too, as a
model of this size learns no answers from text alone. Forgetting sees the texts only, as published.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from ..evidence import Table
from ..registry import reproduction
from .case import Case, Claim, Figure, Findings, Row, Spread, number, spread
from .muse_runs import BASELINES, SCORES, trial

STOPPED = 0.1
"""A method stopped memorisation where it is at most so far above the retrained model."""
SEVERE = 20.0
"""PrivLeak beyond which anybody can tell, in percent."""
KINDS = {"scal": "Scalability", "sust": "Sustainability"}


@reproduction(paper="arXiv:2407.06460", cost="6 min on 2 cores, models of its own included", systems=("muse",))
def muse(
    case: Case,
    *,
    epochs: int = 10,
    batch_size: int = 2,
    learning_rate: float = 1e-3,
    people: dict[str, int] | None = None,
    recipe: dict[str, Any] | None = None,
) -> Findings:
    """MUSE: which of eight methods stop memorisation, do not leak, keep utility and stand further requests.

    Args:
        epochs: of the gradient methods, and of the reinforced models of the others.
        batch_size: texts to forget in a step, with as many to keep.
        learning_rate: of all methods.
        people: sizes of the world (`expunge.world.facts.make`).
        recipe: of target and retrained model (`expunge.world.models.Recipe`).
    """
    shared = {
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "people": people,
        "recipe": recipe,
    }
    rows = case.trials(trial, [{"method": method, **shared} for method in ("target", "retrained", *BASELINES)])
    found = {
        method: {score: spread(rows, score, method=method) for score in SCORES}
        for method in ("target", "retrained", *BASELINES)
    }
    several = [name for name in BASELINES if name != "whp"]
    return Findings(
        claims=[
            _anchors(found),
            _memorisation(found),
            _privacy(found),
            _signs(found),
            _utility(found),
            *(_falls(rows, kind) for kind in KINDS),
        ],
        tables=[table(rows, found), *(_requests(rows, several, kind) for kind in KINDS)],
        notes=[
            "Texts are news about the invented world (4 folds to forget, as many people kept twice over, holdout); the "
            "paper's are news and books of 0.8 to 3.3 million tokens and Llama-2-7B.",
            "Questions and answers are part of the target's training, which they are not in the paper: a model this "
            "small answers no question about a text it has only read. Methods are given the texts alone.",
            "Every text is a row of its own here; the paper cuts the joined texts into windows of 2,048 tokens.",
            "whp has no curve over requests: a guard leaves the model as it is. Degrees of tv and whp are alpha.",
            _stack(rows, several),
            _reemergence(rows, several),
        ],
        figures=[_curves(rows, several)],
    )


def _anchors(found: Mapping[str, Mapping[str, Spread]]) -> Claim:
    target, gold = found["target"], found["retrained"]
    holds = (
        min(target["verbmem_f"].mean, target["knowmem_f"].mean) >= 0.9
        and gold["knowmem_f"].mean <= 0.5
        and gold["verbmem_f"].mean <= target["verbmem_f"].mean - 0.3
        and target["privleak"].mean <= -80
    )
    return Claim(
        "Verbatim memorisation, knowledge memorisation and privacy leakage tell the target from a model retrained "
        "without the texts.",
        "News (VerbMem / KnowMem / PrivLeak): target 58 / 64 / -99.8, retrained 20 / 33 / 0",
        "Target: verbmem_f and knowmem_f at least 0.9, privleak at most -80. Retrained: knowmem_f at most 0.5, "
        "verbmem_f at least 0.3 below the target's.",
        f"target {_three(target)}; retrained {_three(gold)}",
        holds,
    )


def _three(scores: Mapping[str, Spread]) -> str:
    return " / ".join(number(scores[name].mean) for name in SCORES[:3])


def _memorisation(found: Mapping[str, Mapping[str, Spread]]) -> Claim:
    gold = found["retrained"]
    target = found["target"]
    stopped = {
        score: [m for m in BASELINES if found[m][score].mean <= gold[score].mean + STOPPED] for score in SCORES[:2]
    }
    lower = {score: sum(found[m][score].mean <= target[score].mean - STOPPED for m in BASELINES) for score in stopped}
    return Claim(
        "Most methods stop verbatim and knowledge memorisation to some degree.",
        "most of eight; GA 0 / 0, GradDiff 0.9 / 41 against 20 / 33 retrained (News, VerbMem / KnowMem)",
        f"At least five of eight end with verbmem_f at most {STOPPED} above the retrained model's, and at least five "
        "with knowmem_f so.",
        "; ".join(
            f"{score}: {len(names)} ({', '.join(names) or 'none'}), {lower[score]} at least {STOPPED} below the target"
            for score, names in stopped.items()
        ),
        all(len(names) >= 5 for names in stopped.values()),
    )


def _privacy(found: Mapping[str, Mapping[str, Spread]]) -> Claim:
    safe = [m for m in BASELINES if abs(found[m]["privleak"].mean) <= SEVERE]
    return Claim(
        "Only one method avoids severe privacy leakage.",
        "one of eight; others between -99.8 and +109.6 (News)",
        f"At most two of eight end within +-{SEVERE:.0f} % (mean over seeds).",
        "; ".join(f"{m} {number(found[m]['privleak'].mean)}" for m in BASELINES) + f"; within: {len(safe)}",
        len(safe) <= 2,
    )


def _signs(found: Mapping[str, Mapping[str, Spread]]) -> Claim:
    means = {m: found[m]["privleak"].mean for m in BASELINES}
    over = [m for m in means if means[m] > SEVERE]
    under = [m for m in means if means[m] < -SEVERE]
    return Claim(
        "Leakage comes from forgetting too little and from forgetting too much.",
        "News: NPO with retain loss -86, GradDiff +93, GA +52",
        f"At least one method ends above +{SEVERE:.0f} and at least one below -{SEVERE:.0f}.",
        f"above: {', '.join(over) or 'none'}; below: {', '.join(under) or 'none'}",
        bool(over and under),
    )


def _utility(found: Mapping[str, Mapping[str, Spread]]) -> Claim:
    start = found["target"]["knowmem_r"].mean
    means = {m: found[m]["knowmem_r"].mean for m in BASELINES}
    kept = [m for m, value in means.items() if value > start - 0.05]
    return Claim(
        "All methods lose utility.",
        "News, KnowMem_r: target 56; GA 0, GradDiff 37, NPO with retain loss 51",
        "knowmem_r of all eight at least 0.05 below the target's.",
        f"target {number(start)}; {', '.join(f'{m} {number(value)}' for m, value in means.items())}"
        + (f"; not below: {', '.join(kept)}" if kept else ""),
        not kept,
    )


def _falls(rows: Sequence[Row], kind: str) -> Claim:
    series = {m: _series(rows, m, kind, "knowmem_r") for m in ("ga_gdr", "npo_gdr")}
    first, *_, last = series["ga_gdr"]
    said = {
        "scal": ("Utility falls further with the size of the request.", "KnowMem_r falls from 0.8M to 3.3M tokens"),
        "sust": ("Utility falls further with every request in turn.", "KnowMem_r falls over four requests"),
    }
    claim, published = said[kind]
    return Claim(
        claim,
        published,
        "knowmem_r of ga_gdr after the fourth fold at least 0.2 below that after the first (mean over seeds).",
        "; ".join(f"{m}: {', '.join(number(value.mean) for value in several)}" for m, several in series.items()),
        last.mean <= first.mean - 0.2,
    )


def _series(rows: Sequence[Row], method: str, kind: str, score: str) -> list[Spread]:
    """A score after each fold."""
    curves = [row[kind] for row in rows if row["method"] == method]
    return [Spread(tuple(point[score] for point in points)) for points in zip(*curves)]


# --- tables and notes ------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row], found: Mapping[str, Mapping[str, Spread]]) -> Table:
    """The four scores of every model."""
    lines = []
    for method, scores in found.items():
        degree = str(spread(rows, "degree", method=method)) if method in BASELINES else ""
        lines.append([method, degree, *map(str, scores.values()), str(spread(rows, "repeating", method=method))])
    return Table(
        "Four scores at the degree that counts as unlearned: mean (lowest to highest seed)",
        ["model", "epochs or alpha", *SCORES, "repeating answers"],
        lines,
        "The first degree whose knowmem_f is at most the retrained model's, else the last one.",
    )


def _requests(rows: Sequence[Row], methods: Sequence[str], kind: str) -> Table:
    lines = [[m, *(str(value) for value in _series(rows, m, kind, "knowmem_r"))] for m in methods]
    texts = [int(point["texts"]) for point in next(row[kind] for row in rows if kind in row)]
    if kind == "scal":
        columns = [f"{count} texts at once" for count in texts]
    else:
        columns = [f"request {i}: {count} texts" for i, count in enumerate(texts, start=1)]
    return Table(f"{KINDS[kind]}: knowmem_r", ["method", *columns], lines)


def _curves(rows: Sequence[Row], methods: Sequence[str]) -> Figure:
    panels = {}
    for kind, title in KINDS.items():
        texts = [int(point["texts"]) for point in next(row[kind] for row in rows if kind in row)]
        places = texts if kind == "scal" else list(accumulate(texts))
        panels[f"{title}: knowmem_r"] = {
            m: [(x, one.mean, one.low, one.high) for x, one in zip(places, _series(rows, m, kind, "knowmem_r"))]
            for m in methods
        }
    note = "Scalability: all texts in one request; sustainability: one request after another. Bars: lowest to highest."
    return Figure("requests", "As more is forgotten", "texts forgotten", "ROUGE-L F1", panels, note=note)


def _stack(rows: Sequence[Row], methods: Sequence[str]) -> str:
    gaps = [
        abs(row["sust"][-1]["stacked_knowmem_r"] - row["sust"][-1]["knowmem_r"])
        for row in rows
        if row["method"] in methods
    ]
    return (
        "Four requests in turn are kept as one delta over the untouched target; its knowmem_r differs from that of the "
        f"models made one from the other by at most {max(gaps):.2f}."
    )


def _reemergence(rows: Sequence[Row], methods: Sequence[str]) -> str:
    parts = []
    for m in methods:
        first, *_, last = _series(rows, m, "sust", "knowmem_f")
        parts.append(f"{m} {number(first.mean)} to {number(last.mean)}")
    return f"knowmem_f of the first fold, after it and after three more requests: {', '.join(parts)}."
