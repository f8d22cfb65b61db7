"""A sweep as a static page: methods over seeds, the frontier of usefulness against robustness, every trial."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..files import write_text
from . import charts
from .compare import pareto
from .words import measured, number, percent, plain, verdict_words

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Line:
    """One method with its settings, over seeds."""

    name: str
    rows: Sequence[dict[str, Any]]
    best: bool = False

    def values(self, key: str) -> list[float]:
        return [float(row[key]) for row in self.rows if row.get(key) is not None and measured(float(row[key]))]

    def mean(self, key: str) -> float:
        values = self.values(key)
        return fmean(values) if values else math.nan

    def cell(self, key: str, show: Any = percent) -> str:
        """The mean, and the range over seeds."""
        values = self.values(key)
        if not values:
            return "–"
        spread = f" ({show(min(values))} to {show(max(values))})" if len(values) > 1 else ""
        return f"{show(fmean(values))}{spread}"

    @property
    def verdicts(self) -> list[tuple[str, int]]:
        found: dict[str, int] = {}
        for row in self.rows:
            found[row["verdict"]] = found.get(row["verdict"], 0) + 1
        return list(found.items())


def lines(rows: Sequence[dict[str, Any]]) -> list[Line]:
    """One line for each method, settings and scope; those on the frontier of their means marked, best first."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(_name(row, rows), []).append(row)
    made = [Line(name, members) for name, members in groups.items()]
    front = pareto([(line.mean("utility"), line.mean("stays_gone")) for line in made])
    marked = [Line(line.name, line.rows, on) for line, on in zip(made, front)]
    return sorted(marked, key=lambda line: -_worth(line))


def _worth(line: Line) -> float:
    value = min(line.mean("utility"), line.mean("stays_gone"))
    return value if measured(value) else -math.inf


def _name(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """The method, and of its settings, scope and fields what differs within the sweep."""
    alike = [other for other in rows if other["method"] == row["method"]]
    given = {**row["settings"], **({"scope": row["scope"]} if row["scope"] else {}), **row["fields"]}
    varied = [
        f"{key}={plain(value)}"
        for key, value in given.items()
        if any({**o["settings"], "scope": o["scope"], **o["fields"]}.get(key) != value for o in alike)
    ]
    return f"{row['method']} {' '.join(varied)}".strip()


def scores(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Names of benchmark scores: `tofu.model_utility`."""
    return list(dict.fromkeys(key for row in rows for key in row if "." in key))


def write(results: dict[str, Any], folder: Path, rule: str | None = None) -> Path:
    """Write leaderboard.html; returns its path.

    Args:
        rule: how the search chose, if there was one.

    Raises:
        OutputError: the folder cannot be written.
    """
    from .render import render

    found = lines(results["runs"])
    spots = [
        charts.Spot(
            line.name, line.mean("utility"), line.mean("stays_gone"), 1 - max(line.mean("direct"), 0), line.best
        )
        for line in found
        if measured(line.mean("utility")) and measured(line.mean("stays_gone"))
    ]
    words = "; ".join(f"{s.name} keeps {percent(s.utility)} and {percent(s.robust)} stays gone" for s in spots)
    context = {
        "name": results["name"],
        "lines": found,
        "scores": scores(results["runs"]),
        "plot": charts.frontier(spots, words, "utility kept", "knowledge that stays gone") if spots else "",
        "search": [(_name(row, results["search"]), row) for row in results["search"]],
        "rule": rule,
        "verdict_words": verdict_words,
    }
    path = folder / "leaderboard.html"
    write_text(path, render("leaderboard.html.j2", context))
    return path


def table(results: dict[str, Any]) -> Table:
    """The leaderboard for a terminal; a star marks the frontier."""
    from rich.table import Table

    names = scores(results["runs"])
    columns = ["", "verdicts", "asked directly", "strongest attack", "utility kept", *names, "seconds", "runs"]
    made = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for line in lines(results["runs"]):
        said = ", ".join(f"{verdict_words(verdict).title} x{count}" for verdict, count in line.verdicts)
        made.add_row(
            f"★ {line.name}" if line.best else f"  {line.name}",
            said,
            *(line.cell(key) for key in ("direct", "worst", "utility")),
            *(line.cell(name, number) for name in names),
            number(line.mean("seconds")),
            str(len(line.rows)),
        )
    return made
