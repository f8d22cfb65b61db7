"""What a reproduction gets and what it gives back.

A reproduction is one function that runs small experiments and compares them with what a paper claims:

    @reproduction(paper="arXiv:2404.05868", cost="4 min on 2 cores")
    def npo(case: Case, *, steps: int = 60) -> Findings:
        rows = case.trials(trial, [{"method": "npo", "steps": steps}, {"method": "gradient_ascent", "steps": steps}])
        ...
        return Findings(claims=[...], tables=[...], figures=[figure(rows, ...)])

Claims that do not hold at this scale are findings too: `holds` is False and the page says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan
from pathlib import Path
from statistics import fmean
from typing import Any

from ..errors import TableError
from ..evidence import Table
from ..trials import Progress, Result, run_trials, spent

Row = dict[str, Any]
"""Settings, seed and results of one trial together."""


@dataclass(frozen=True)
class Claim:
    """One statement of a paper, and what became of it here."""

    claim: str
    published: str
    """The paper's own figures."""
    criterion: str
    """What is checked here, in words, decided before anything is measured."""
    measured: str
    holds: bool | None
    """None: cannot be tested at this scale; `measured` says why."""


Point = tuple[float, float, float, float]
"""Place on the common axis; mean, least and most over seeds."""


@dataclass(frozen=True)
class Figure:
    """Curves over one common quantity: a panel for every measure, in each a line for every run."""

    name: str
    """Of its file, behind the reproduction's."""
    title: str
    x: str
    """What the common axis counts."""
    y: str
    """What is measured; the panels' titles say where."""
    panels: Mapping[str, Mapping[str, Sequence[Point]]]
    """Title to run to points."""
    logarithmic: bool = False
    """The common axis; its places are above 0 then."""
    note: str = ""


@dataclass(frozen=True)
class Findings:
    claims: Sequence[Claim]
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()
    """What differs from the paper, and what was noticed."""
    figures: Sequence[Figure] = ()


@dataclass
class Case:
    """Where a reproduction runs."""

    folder: Path
    seeds: Sequence[int] = (0, 1, 2)
    version: int = 1
    workers: int | None = None
    progress: Progress | None = None
    seconds: float = field(default=0.0, init=False)
    """CPU time of the trials, those of earlier commands included."""

    def trials(self, function: Callable[..., Result], grid: Iterable[Mapping[str, Any]]) -> list[Row]:
        """`function(seed=..., **settings)` for all settings and seeds; each row holds settings, seed and results.

        The function stands at the top of its module, takes and returns plain JSON values.
        """
        asked = [{**settings, "seed": seed} for settings in grid for seed in self.seeds]
        found = run_trials(
            function,
            asked,
            self.folder / "trials",
            version=self.version,
            workers=self.workers,
            progress=self.progress,
        )
        self.seconds += spent(function, asked, self.folder / "trials", version=self.version)
        return [{**settings, **result} for settings, result in zip(asked, found)]


@dataclass(frozen=True)
class Spread:
    """A quantity over seeds; NaN where a seed could not tell it."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)

    def __str__(self) -> str:
        told = Spread(tuple(value for value in self.values if not isnan(value)))
        if not told.values:
            return "not measured"
        some = f"; {len(told.values)} of {len(self.values)} seeds" if len(told.values) < len(self.values) else ""
        return f"{number(told.mean)} ({number(told.low)} to {number(told.high)}{some})"


def spread(rows: Sequence[Row], name: str, **where: Any) -> Spread:
    """The quantity `name` of all rows whose settings are `where`, over their seeds.

    Raises:
        TableError: there is no such row.
    """
    found = tuple(float(row[name]) for row in rows if all(row.get(key) == value for key, value in where.items()))
    if not found:
        raise TableError(f"no trial has {where} and {name}")
    return Spread(found)


def number(value: float) -> str:
    """Three digits that matter."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
