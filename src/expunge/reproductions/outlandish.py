"""Whether one surprising text primes its keyword elsewhere, and what dilutes that.

Sun et al., How new data permeates LLM knowledge and how to dilute it, arXiv:2504.09522: learning one text makes its
keyword likelier after unrelated prompts; leaving out the largest changes of the weights takes most of that away and
keeps the text; so do rewordings that lead up to the keyword.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from ..benchmarks.case import Bench
from ..benchmarks.outlandish import outlandish as benchmark
from ..evidence import Scorecard, Table
from ..registry import reproduction
from .case import Case, Claim, Findings, Row, number, spread
from .mini import SMALL, mini

LEARNED = ("plain", "ignore_k", "random_k", "ignore_k_gradient", "stepping_stone")
ELSEWHERE: dict[str, dict[str, Any]] = {"all tensors together": {"granularity": "global"}, "k = 8": {"k": 8.0}}
"""Ways of leaving out the largest changes that stand beside the one that is judged."""


def trial(seed: int, k: float, presentations: int) -> dict[str, Any]:
    """Scores of every variant on the texts of one world, text by text."""
    made = mini(seed, {**SMALL})
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="expunge-outlandish-") as folder:

        def card(**settings: Any) -> Scorecard:
            bench = Bench(made.original, Path(folder), world=made.world, bootstrap=0)
            chosen: dict[str, Any] = {"k": k, "presentations": presentations, **settings}
            return benchmark(bench, **chosen)

        whole = card(variants=LEARNED)
        for name in LEARNED:
            found[name] = _scores(whole, name)
        for name, settings in ELSEWHERE.items():
            found[name] = _scores(card(variants=("ignore_k",), **settings), "ignore_k")
        for column in ("surprise", "stones"):
            found[column] = _column(whole, column)
    return found


def _scores(card: Scorecard, variant: str) -> dict[str, list[float]]:
    """Per text."""
    prefix = "" if variant == "plain" else f"{variant}_"
    by = {one.metric: one.extra["each"]["after"] for one in card.measured}
    names = ("s_prime", "s_prime_geometric", "difference", "s_mem", "keyword")
    return {name: by[f"{prefix}{name}"] for name in names}


def _column(card: Scorecard, column: str) -> list[float]:
    """`surprise`: log P(keyword) before, from S_mem and P after; `stones`: how often a rewording was accepted."""
    if column == "stones":
        table = next(one for one in card.tables if one.title == "Stepping stones")
        return [float(row[3] != "-") for row in table.rows]
    plain = _scores(card, "plain")
    return [float(np.log(p / ratio)) for p, ratio in zip(plain["keyword"], plain["s_mem"])]


@reproduction(
    paper="arXiv:2504.09522", cost="2 min on 1 core, and 1 once for the models of the worlds", systems=("outlandish",)
)
def outlandish(case: Case, *, k: float = 15.0, presentations: int = 12) -> Findings:
    """Whether one surprising text primes its keyword elsewhere, and whether leaving out large changes dilutes that.

    `k`: per cent of the change that ignore-k leaves out. `presentations`: times that each text is shown.
    """
    found = case.trials(trial, [{"k": k, "presentations": presentations}])
    add(found)
    return Findings(claims=judge(found, k), tables=tables(found, k), notes=NOTES)


NOTES = [
    "Twelve texts in each of three invented worlds (26 people, 2 blocks, d = 64): two towns and two trades, each said "
    "of somebody unknown, of somebody of whom the model knows something else, and in the wrong place. Every text is "
    "learned alone from the same weights, by Adam at 2e-3 in batches of 8 with seven passages about known people.",
    "The paper's layout, step counts and k are recalled, not checked; its models, keywords and texts are others.",
    "Gradients: the largest k % of each gradient left out before Adam's step, where ignore-k leaves them out of the "
    "finished change.",
    "Stones are put together from what the world says of a town's region and of who works as what; no language model "
    "wrote any.",
]


def add(rows: Sequence[Row]) -> None:
    """Medians over texts, and of paired reductions against plain learning."""
    for row in rows:
        plain = row["plain"]
        for name in (*LEARNED, *ELSEWHERE):
            one = row[name]
            cut = [1 - a / b for a, b in zip(one["s_prime"], plain["s_prime"])]
            row |= {
                f"{name}: s_prime": float(np.median(one["s_prime"])),
                f"{name}: geometric": float(np.median(one["s_prime_geometric"])),
                f"{name}: difference": float(np.mean(one["difference"])),
                f"{name}: s_mem": float(np.median(one["s_mem"])),
                f"{name}: keyword": float(np.median(one["keyword"])),
                f"{name}: cut": float(np.median(cut)),
            }
        row["rho"] = float(spearmanr(row["surprise"], np.log(plain["s_prime"])).statistic)
        row["accepted"] = float(np.mean(row["stones"]))


def judge(rows: Sequence[Row], k: float) -> list[Claim]:
    """The claims; criteria were fixed before (specs: outlandish, section 6), but for those of stones and surprise."""
    value = {name: spread(rows, name) for name in rows[0] if ": " in name or name in ("rho", "accepted")}
    plain, ignored, random, stone = (
        {part: value[f"{name}: {part}"] for part in ("s_prime", "s_mem", "keyword", "cut")}
        for name in ("plain", "ignore_k", "random_k", "stepping_stone")
    )
    kept = ignored["s_mem"].mean / plain["s_mem"].mean
    likely = ignored["keyword"].mean / plain["keyword"].mean
    return [
        Claim(
            "Learning one text makes its keyword appear after unrelated prompts",
            "priming in PALM-2, Gemma and Llama, after as few as three presentations",
            "median S_prime at least 5, and P(keyword) in the text at least 0.5",
            f"{plain['s_prime']}; P {plain['keyword']}",
            plain["s_prime"].mean >= 5 and plain["keyword"].mean >= 0.5,
        ),
        Claim(
            "Leaving out the largest changes takes priming away and keeps the text",
            "up to about 95 % less priming, memorisation kept",
            f"k = {k:g}: median S_prime cut by at least 50 %, S_mem at least 0.7 and P(keyword) at least 0.8 of "
            "plain's",
            f"cut by {ignored['cut']}; S_mem {number(kept)}, P {number(likely)} of plain's",
            ignored["cut"].mean >= 0.5 and kept >= 0.7 and likely >= 0.8,
        ),
        Claim(
            "It is the largest changes that matter",
            "-",
            f"leaving out {k:g} % drawn at random cuts median S_prime by at least 30 points less",
            f"cut by {random['cut']}",
            ignored["cut"].mean - random["cut"].mean >= 0.3,
        ),
        Claim(
            "The more surprising a keyword is before, the more it primes",
            "negative in every model, threshold about 1e-3",
            "Spearman of log P(keyword) before and log S_prime below 0 for every seed",
            f"{value['rho']}",
            value["rho"].high < 0,
        ),
        Claim(
            "Stepping stones dilute priming and keep the text",
            "median priming less by 75 % (PALM-2), about 50 % (Gemma, Llama)",
            "median S_prime cut by at least 50 %, median P(keyword) in the text as it was at least 0.8 of plain's; "
            "rewordings accepted for at least half of the texts, else not testable",
            f"cut by {stone['cut']}, P {stone['keyword']}; accepted for {value['accepted']} of the texts",
            None
            if value["accepted"].mean < 0.5
            else stone["cut"].mean >= 0.5 and stone["keyword"].mean >= 0.8 * plain["keyword"].mean,
        ),
    ]


def tables(rows: Sequence[Row], k: float) -> list[Table]:
    words = {
        "plain": "all of the change",
        "ignore_k": f"without the largest {k:g} % of each tensor",
        "all tensors together": f"without the largest {k:g} % of all tensors",
        "k = 8": "without the largest 8 % of each tensor",
        "random_k": f"without {k:g} % drawn at random",
        "ignore_k_gradient": f"trained without the largest {k:g} % of each gradient",
        "stepping_stone": "a rewording learned",
    }
    parts = ("s_prime", "geometric", "difference", "s_mem", "keyword", "cut")
    lines = [[text, *(str(spread(rows, f"{name}: {part}")) for part in parts)] for name, text in words.items()]
    columns = ["weights", "S_prime", "geometric", "P gained", "S_mem", "P(keyword) in the text", "S_prime cut by"]
    note = "Medians over texts (P gained: mean); mean (lowest to highest) over seeds. Cut: median of text-by-text cuts."
    return [Table("Priming and memory", columns, lines, note)]
