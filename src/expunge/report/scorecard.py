"""A benchmark's scorecard: scorecard.json, a page with its figures and tables, and a table for the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..evidence import Interval, Scorecard
from ..files import write_text
from .words import number, with_interval

if TYPE_CHECKING:
    from rich.table import Table

ROLES = ("before", "after", "gold")


def write(card: Scorecard, folder: Path) -> dict[str, Path]:
    """Write scorecard.json and scorecard.html into `folder`; returns their paths by name.

    Raises:
        OutputError: the folder cannot be written.
    """
    from .render import render

    paths = {name: Path(folder) / name for name in ("scorecard.json", "scorecard.html")}
    card.save(paths["scorecard.json"])
    write_text(paths["scorecard.html"], render("scorecard.html.j2", {"card": card, **content(card)}))
    return paths


def content(card: Scorecard) -> dict[str, Any]:
    """What the page shows: roles that were measured, and one line a score with the headline first."""
    roles = [role for role in ROLES if any(getattr(one, role) is not None for one in card.measured)]
    first = {name: place for place, name in enumerate(card.headline)}
    ordered = sorted(card.measured, key=lambda one: first.get(one.metric, len(first)))
    lines = [
        {
            "name": one.metric.replace("_", " "),
            "headline": one.metric in first,
            "rows": one.rows,
            "n": one.n,
            "cells": [_cell(getattr(one, role)) for role in roles],
            "ideal": one.ideal,
            "sentence": one.sentence,
            "flag": one.flag,
        }
        for one in ordered
    ]
    tables = [
        {"title": t.title, "columns": t.columns, "rows": [[_plain(c) for c in r] for r in t.rows], "note": t.note}
        for t in card.tables
    ]
    return {"roles": roles, "lines": lines, "tables": tables}


def _cell(interval: Interval | None) -> str:
    return "" if interval is None else with_interval(interval, number)


def _plain(value: Any) -> str:
    return number(value) if isinstance(value, float) else str(value)


def table(card: Scorecard) -> Table:
    """The scores, for a terminal."""
    from rich.table import Table

    shown = content(card)
    made = Table(title=f"{card.benchmark} ({card.data})", title_justify="left")
    for column in ("score", "rows", *shown["roles"], "n", "ideal"):
        made.add_column(column, justify="right" if column in (*ROLES, "n") else "left")
    for line in shown["lines"]:
        name = f"[b]{line['name']}[/b]" if line["headline"] else line["name"]
        made.add_row(name, line["rows"], *line["cells"], str(line["n"]), line["ideal"])
    return made


def tables(card: Scorecard) -> list[Table]:
    """The benchmark's own tables, for a terminal."""
    from rich.table import Table

    found = []
    for one in content(card)["tables"]:
        made = Table(*map(str, one["columns"]), title=one["title"], title_justify="left", caption=one["note"] or None)
        for row in one["rows"]:
            made.add_row(*row)
        found.append(made)
    return found
