"""A causal trace as trace.json, as a page with heat maps, and as a table for the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..files import write_text
from . import charts
from .words import number

if TYPE_CHECKING:
    from ..causal_trace import TraceReport

SHOWN = 6
"""Facts that have heat maps of their own."""
KINDS = {
    "block": "Residual stream after one block",
    "mlp": "MLP outputs",
    "attention": "Attention outputs",
}


def write(report: TraceReport, folder: Path) -> dict[str, Path]:
    """Write trace.json, which holds every value, and trace.html; returns their paths by name.

    Raises:
        OutputError: the folder cannot be written.
    """
    from .render import render

    paths = {name: folder / name for name in ("trace.json", "trace.html")}
    write_text(paths["trace.json"], json.dumps(report.document(), indent=1, ensure_ascii=False) + "\n")
    write_text(paths["trace.html"], render("trace.html.j2", {"report": report, **content(report)}))
    return paths


def content(report: TraceReport) -> dict[str, Any]:
    """Maps on average and of single facts."""
    layers = list(range(len(report.averages[0].effects)))
    maps = []
    for kind in dict.fromkeys(one.kind for one in report.averages):
        rows = [one for one in report.averages if one.kind == kind]
        shares = np.array([one.shares for one in rows])
        row, layer = np.unravel_index(np.nanargmax(shares), shares.shape)
        words = f"{KINDS[kind]}: most comes back at the {rows[row].place}, layer {layer}: {shares[row, layer]:.0%}"
        maps.append({"title": KINDS[kind], "map": charts.heat([one.place for one in rows], layers, shares, words)})
    facts = [
        {
            "prompt": one.fact.edit.prompt,
            "clean": number(one.clean),
            "low": number(one.low),
            "maps": [
                {
                    "title": KINDS[kind],
                    "map": charts.heat(
                        [repr(token)[1:-1] for token in tokens],
                        layers,
                        found / one.total if one.total else found * np.nan,
                        f"{KINDS[kind]} of {one.fact.edit.prompt}",
                    ),
                }
                for kind, found in one.effects.items()
            ],
        }
        for one, tokens in list(zip(report.traced, report.tokens))[:SHOWN]
    ]
    return {"maps": maps, "facts": facts}


def table(report: TraceReport) -> tuple[list[str], list[list[str]]]:
    """(columns, rows) for a terminal: shares of the total effect, layer by layer."""
    columns = ["restored", "at", "facts", *(f"layer {layer}" for layer in range(len(report.averages[0].effects)))]
    rows = []
    for one in report.averages:
        shown = [
            f"{share:.2f}" + (f" [{effect.low / one.total:.2f}, {effect.high / one.total:.2f}]" if one.total else "")
            for share, effect in zip(one.shares, one.effects)
        ]
        rows.append([one.kind, one.place, str(one.facts), *shown])
    return columns, rows
