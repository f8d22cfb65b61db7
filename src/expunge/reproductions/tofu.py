"""TOFU (arXiv:2401.06121): can a test tell the unlearned model from one that never saw the authors, and at what price?

Authors, questions and wrong answers are the mini version's about the invented world: ten authors to be forgotten, four
questions each. `full` was trained on everybody, gold on everybody else, and `other gold` is gold with another seed:
what perfect forgetting scores. Methods are given the published files forget10 and retain90.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..benchmarks.case import Bench
from ..benchmarks.tofu import tofu as benchmark
from ..benchmarks.tofu_rows import MINI_AUTHOR, find, mini
from ..methods.optimise.loop import Training
from ..methods.optimise.unlearn import unlearn
from ..registry import get, reproduction
from ..rows import read_rows
from ..subjects.language import LanguageModel
from ..world.corpus import training
from ..world.facts import World, make
from ..world.models import Recipe
from .case import Case, Claim, Findings, Row, number, spread
from .curves import gather, table
from .models import lessons, taught

PEOPLE = {"people": 50, "forget": 10, "neighbours": 8, "holdout": 10}
RECIPE = Recipe(hidden_size=48, intermediate_size=96, layers=2, steps=600, batch_size=64, learning_rate=6e-3)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "gradient_ascent": ("gradient_ascent", {}),
    "grad_diff": ("grad_diff", {}),
    "kl_minimisation": ("kl_minimisation", {}),
    "idk": ("idk", {}),
    "npo, beta 0.1": ("npo", {"beta": 0.1}),
    "npo, beta 0.9": ("npo", {"beta": 0.9}),
    "simnpo": ("simnpo", {"beta": 2.5}),
}
"""The paper's four baselines, then OpenUnlearning's; all but gradient_ascent hold retain rows. beta 0.9 is the
published 0.1 scaled to answers of four tokens (see docs/reproductions/npo.md)."""
BASELINES = tuple(METHODS)[:4]
ANSWER = 12
"""Tokens of an answer; the mini version's have about four."""
SCORES = ("forget_quality", "model_utility", "mia_loss", "exact_memorization", "extraction_strength")
COLUMNS = {
    "forget_quality": "log10 p",
    "model_utility": "utility",
    "mia_loss": "AUC",
    "exact_memorization": "EM",
    "extraction_strength": "ES",
    "forget_probability": "forget probability",
}
PASS = math.log10(0.05)


def subjects(seed: int, recipe: Mapping[str, Any] | None = None) -> tuple[World, dict[str, LanguageModel]]:
    """The world, and the models full, gold and other gold."""
    world = make(seed, **PEOPLE)
    known = ("neighbour", "retain")
    curricula = {
        "full": lessons(training(world, "forget", *known)),
        "gold": lessons(training(world, *known)),
        "other gold": lessons(training(world, *known)),
    }
    return world, taught("tofu", curricula, Recipe(**recipe) if recipe else RECIPE, seed)


def trial(
    method: str,
    seed: int,
    epochs: int = 0,
    batch_size: int = 16,
    learning_rate: float = 1e-3,
    at: Sequence[int] = (),
    recipe: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The benchmark's scores after some epochs; `full` and `other gold` are measured as they are."""
    world, models = subjects(seed, recipe)
    points: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="expunge-tofu-") as place:
        mini(world, Path(place))

        def scored(model: LanguageModel, step: int) -> None:
            # Gold's answers are kept beside the data for all points. They are kept by the weights' fingerprint, which
            # a model in training takes once: a copy takes its own.
            model = model.copy()
            with tempfile.TemporaryDirectory(prefix="expunge-tofu-") as folder:
                case = Bench(model, Path(folder), None, [models["gold"]], place, shared=Path(place), bootstrap=0)
                card = benchmark(case, author=MINI_AUTHOR, max_new_tokens=ANSWER)
            known = next(one for one in card.measured if one.metric == "answer_probability" and one.rows == "forget")
            assert known.after is not None
            assert known.gold is not None
            found = {name: card.value(name) for name in SCORES}
            found |= {"forget_probability": known.after.value, "gold_probability": known.gold.value}
            points.append({"step": step, **found})

        if method in models:
            scored(models[method], 0)
            return {"points": points}
        rows = {}
        for side, config in (("forget", "forget10"), ("retain", "retain90")):
            source = find(place, config)
            assert source is not None
            rows[side] = read_rows(source, side)
        per_epoch = -(-len(rows["forget"]) // batch_size)
        name, settings = METHODS[method]
        unlearn(
            models["full"],
            get("methods", name),
            settings,
            scope=None,
            data=rows,
            training=Training(epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, seed=seed, guard=None),
            evaluate_at=[epoch * per_epoch for epoch in at],
            evaluate=lambda model, step: scored(model, step // per_epoch),
        )
    return {"points": points}


@reproduction(paper="arXiv:2401.06121", cost="3 min on 2 cores, models of its own included")
def tofu(
    case: Case,
    *,
    epochs: int = 10,
    batch_size: int = 16,
    learning_rate: float = 1e-3,
    recipe: dict[str, Any] | None = None,
) -> Findings:
    """TOFU: baselines lose utility before they pass for gold, NPO keeps more, and what forget quality cannot show.

    Args:
        epochs: over the forget rows; scores are taken after 1, 2, 3, half and all of them.
        batch_size: forget rows in a step, with as many retain rows.
        learning_rate: of all methods.
        recipe: of all models (`expunge.world.models.Recipe`).
    """
    at = sorted({epoch for epoch in (1, 2, 3, epochs // 2, epochs) if 0 < epoch <= epochs})
    shared = {"epochs": epochs, "batch_size": batch_size, "learning_rate": learning_rate, "at": at, "recipe": recipe}
    runs: dict[str, dict[str, Any]] = {name: {"method": name, "recipe": recipe} for name in ("full", "other gold")}
    runs |= {name: {"method": name, **shared} for name in METHODS}
    rows = gather(case, trial, runs)
    note = (
        "Steps are epochs. log10 p: forget quality against gold (0: not to be told apart; 0.05 is -1.3); utility: "
        "harmonic mean of nine numbers about what is kept; AUC: members against holdout by loss; EM, ES: exact "
        "memorisation and extraction strength on forget rows. Mean (lowest to highest) over seeds."
    )
    return Findings(claims=judge(rows), tables=[table(rows, "Scores", note, COLUMNS)], notes=[*NOTES, _ruined(rows)])


NOTES = [
    "40 forget rows; p-values depend on their number (the published 4.4e-25 are of 400 rows), so they compare methods "
    "here with each other and with the other gold, not with published figures.",
    "An answer is the bare value, a paraphrase or wrong answer a sentence: truth ratios compare sentences that no "
    "model was trained on.",
    "Values come from short lists (12 cities, trades and teachers each), so a model that never saw an author guesses "
    "parts of them: extraction strength of gold is well above 0.",
    "Truth ratios are geometric. The paper's preference optimisation is idk here: likelihood of refusals and of retain "
    "rows.",
]


def _last(rows: Sequence[Row], run: str) -> int:
    return max(row["step"] for row in rows if row["run"] == run)


def _way(rows: Sequence[Row], run: str) -> list[tuple[int, float, float]]:
    """(epoch, log10 p, utility) along a run, means over seeds."""
    steps = sorted({row["step"] for row in rows if row["run"] == run})
    return [
        (step, *(spread(rows, name, run=run, step=step).mean for name in ("forget_quality", "model_utility")))
        for step in steps
    ]


def _ruined(rows: Sequence[Row]) -> str:
    step, quality, utility = max(_way(rows, "gradient_ascent"), key=lambda one: one[1])
    auc = spread(rows, "mia_loss", run="gradient_ascent", step=step)
    ends = ", ".join(f"{m} {number(spread(rows, 'mia_loss', run=m, step=_last(rows, m)).mean)}" for m in METHODS)
    return (
        f"Forget quality alone proves nothing: gradient_ascent's highest log10 p is {number(quality)}, after {step} "
        f"epochs, with utility {number(utility)} and AUC {auc}. AUC after the last epoch: {ends}; far below 0.5 the "
        "forget rows look stranger than rows that no model saw, which the test on truth ratios does not see."
    )


def judge(rows: Sequence[Row]) -> list[Claim]:
    """The claims; criteria were fixed before (specs: tofu, section 6)."""

    def at(run: str, name: str, step: int | None = None) -> float:
        return spread(rows, name, run=run, step=_last(rows, run) if step is None else step).mean

    full = {name: at("full", name) for name in COLUMNS}
    other = {name: at("other gold", name) for name in COLUMNS}
    ways = {run: _way(rows, run) for run in METHODS}

    def said(points: Sequence[tuple[int, float, float]]) -> str:
        return "; ".join(f"epoch {step}: {number(p)} / {number(utility)}" for step, p, utility in points)

    ascent = ways["gradient_ascent"]
    useless = next((step for step, _, utility in ascent if utility < 0.2), None)
    passed = next((step for step, p, _ in ascent if p >= PASS), None)
    both = [(m, one) for m in BASELINES for one in ways[m] if one[1] > PASS and one[2] >= 0.9 * full["model_utility"]]
    nearest = {m: max(ways[m], key=lambda one: one[1]) for m in BASELINES}
    preferences = [m for m in METHODS if m.startswith("npo")]
    kept = {
        m: [
            one
            for one in ways[m]
            if (one[1] >= -2 or at(m, "forget_probability", one[0]) <= at("full", "gold_probability"))
            and one[2] >= 0.6 * full["model_utility"]
        ]
        for m in preferences
    }
    ends = {m: ways[m][-1] for m in ("gradient_ascent", "grad_diff", *preferences)}
    return [
        Claim(
            "A model trained on the authors is told from one that never saw them, two that never saw them are not",
            "Llama-2-7B, forget10: full 4.4e-25, gold 1",
            "log10 p of full at most -3, of another gold at least -2",
            f"full {number(full['forget_quality'])}, other gold {number(other['forget_quality'])}",
            full["forget_quality"] <= -3 and other["forget_quality"] >= -2,
        ),
        Claim(
            "Membership attacks see it too",
            "OpenUnlearning: AUC of full near 1, of gold near 0.5",
            "AUC by loss of full at least 0.9, of the other gold within 0.25 of 0.5",
            f"full {number(full['mia_loss'])}, other gold {number(other['mia_loss'])}",
            full["mia_loss"] >= 0.9 and abs(other["mia_loss"] - 0.5) <= 0.25,
        ),
        Claim(
            "What was trained on can be extracted, what was not cannot",
            "OpenUnlearning: extraction strength separates full from gold",
            "exact memorisation and extraction strength of full at least 0.9, extraction strength of the other gold at "
            "most 0.2",
            f"full {number(full['exact_memorization'])} / {number(full['extraction_strength'])}, other gold "
            f"{number(other['exact_memorization'])} / {number(other['extraction_strength'])}",
            min(full["exact_memorization"], full["extraction_strength"]) >= 0.9 and other["extraction_strength"] <= 0.2,
        ),
        Claim(
            "Gradient ascent buys forgetting with utility",
            "GradAscent: p 1e-239, utility 0.00 (full 0.63)",
            "gradient_ascent's utility is below 0.2 no later than its p reaches 0.05",
            f"log10 p / utility: {said(ascent)}; full {number(full['model_utility'])}",
            useless is not None and (passed is None or useless <= passed),
        ),
        Claim(
            "None of the four baselines passes without losing utility",
            "no p above 0.05 at full utility in forget05 and forget10",
            f"no measuring point of {', '.join(BASELINES)} has p above 0.05 and at least 0.9 of full's utility",
            "; ".join(f"{m}, {said([one])}" for m, one in both or nearest.items()),
            not both,
        ),
        *(
            Claim(
                f"NPO with a retain term forgets and keeps utility ({m.partition(', ')[2]})",
                "NPO: p 0.42, utility 0.54 (full 0.63)",
                "at some point p is at least 0.01 or the forget rows' probability at most gold's, and utility at least "
                "0.6 of full's",
                said(kept[m] or ways[m]),
                bool(kept[m]),
            )
            for m in preferences
        ),
        Claim(
            "NPO ends closer to gold than gradient ascent and GradDiff",
            "p 0.42 against 1e-239 and 1.8e-229",
            "after the last epoch log10 p of both npo runs at least 1 above that of gradient_ascent and of grad_diff",
            "; ".join(f"{m} {number(p)}" for m, (_, p, _) in ends.items()),
            all(ends[m][1] >= ends[other_][1] + 1 for m in preferences for other_ in ("gradient_ascent", "grad_diff")),
        ),
    ]
