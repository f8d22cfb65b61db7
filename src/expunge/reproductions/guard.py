"""GUARD: what a classifier of prompts and restricted decoding hide, and what they let through (arXiv:2505.13312)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..evidence import Table
from ..registry import reproduction
from .case import Case, Claim, Findings, Row, number, spread
from .guarding import FAMILIES, MEANING, table, trial

HARD = {"soft": 0.0, "delta": 2.0}
LEAKS = ("nickname", "described", "implied", "cloze")


@reproduction(paper="arXiv:2505.13312", cost="4 min on 2 cores, and 2 once for the models of the worlds")
def guard(case: Case, *, world: dict[str, Any] | None = None) -> Findings:
    """Whether restricted decoding hides what is asked for directly, at what cost, and by which questions it leaks.

    `world`: sizes of the invented world, arguments of expunge.world.build.build.
    """
    settings: dict[str, tuple[str, dict[str, Any]]] = {
        "original": ("original", {}),
        "gold": ("gold", {}),
        "guard": ("guard", HARD),
        "guard, by meaning": ("guard", {}),
        "guard, refuse when flagged": ("guard", {**HARD, "on_flag": "refuse"}),
        "output_filter": ("output_filter", {}),
    }
    grid = [{"guard": name, "settings": given, "world": world} for name, given in settings.values()]
    names = [name for name in settings for _ in case.seeds]
    rows = [{**row, "run": name} for name, row in zip(names, case.trials(trial, grid))]
    return Findings(claims=judge(rows), tables=[table(rows, "What is said", MEANING), _flagged(rows)], notes=NOTES)


NOTES = [
    "The invented world's own model (4 layers, d = 96, byte-level tokens) stands in for 0.9 M parameters and "
    "word-level tokens of the criterion; greedy decoding, b = 1. Phrases are words, not tokens.",
    "Hard matching alone is the guard of the claims: by meaning the small model's own embeddings stand in for SBERT's.",
    "Time is the process's CPU time for direct questions, one at a time, least of three rounds.",
]


def judge(rows: Sequence[Row]) -> list[Claim]:
    """The claims; criteria were fixed before (specs: guard, section 6)."""

    def at(run: str, name: str) -> float:
        return spread(rows, name, run=run).mean

    direct, wording = at("guard", "direct"), at("guard", "other wording")
    kept, before = at("guard", "retain"), at("original", "retain")
    leaks = {name: at("guard", name) for name in LEAKS}
    most = max(leaks, key=lambda name: leaks[name])
    ratio = at("guard", "direct, seconds") / at("original", "direct, seconds")
    soft = at("guard, by meaning", "direct, seconds") / at("original", "direct, seconds")
    return [
        Claim(
            "Forgotten answers are no longer given",
            "TOFU: forget ROUGE-L near the retain-only model's",
            "direct questions at most 0.05, held-out wordings at most 0.10",
            f"{number(direct)}, {number(wording)}; before {number(at('original', 'direct'))}, "
            f"{number(at('original', 'other wording'))}",
            direct <= 0.05 and wording <= 0.10,
        ),
        Claim(
            "Retained answers are untouched",
            "almost no loss of utility",
            "retain accuracy within 0.01 of the unguarded model's",
            f"{number(kept)} against {number(before)}",
            abs(kept - before) <= 0.01,
        ),
        Claim(
            "Questions that the classifier does not know leak: the knowledge is suppressed, not gone",
            "not studied there (reviewers ask for it)",
            f"at least one of {', '.join(LEAKS)} is answered in at least 0.3 of the cases",
            ", ".join(
                f"{name} {number(value)} (before {number(at('original', name))})" for name, value in leaks.items()
            ),
            leaks[most] >= 0.3,
        ),
        Claim(
            "The overhead is small",
            "slower than plain beam search, by the authors' own table",
            "CPU time of flagged prompts at most 1.3 of the unguarded model's",
            f"{number(ratio)}; by meaning {number(soft)}",
            ratio <= 1.3,
        ),
    ]


def _flagged(rows: Sequence[Row]) -> Table:
    cells = [[name, str(spread(rows, f"{name}, flagged", run="guard"))] for name in FAMILIES]
    return Table("Prompts that the classifier flags", ["questions", "share"], cells)
