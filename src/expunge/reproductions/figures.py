"""A reproduction's curves, drawn beside its page as an SVG file.

Colours are those of Okabe and Ito (without yellow), which colour-blind readers tell apart, and two more, on white;
every run has a mark of its own as well. The same points give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .case import Figure, Point, Row, spread

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#808080", "#882255")
MARKS = (
    "m-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0",
    "m-3-3h6v6h-6z",
    "m0-4l4 7h-8z",
    "m0-4.5l4.5 4.5-4.5 4.5-4.5-4.5z",
    "m0 4l4-7h-8z",
    "m-1-4h2v3h3v2h-3v3h-2v-3h-3v-2h3z",
    "m-4 0l7 4v-8z",
    "m4 0l-7 4v-8z",
    "m-1.2-5h2.4v10h-2.4z",
    "m-5-1.2h10v2.4h-10z",
)
"""Of the runs, around their points."""
DASHES = ("none", "5 3", "2 2")
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#444;text-anchor:middle}.h{font-weight:600;fill:#222}.e{text-anchor:end}"
    ".s{text-anchor:start}.g{stroke:#e4e4e4}.l{fill:none;stroke-width:1.5}.b{fill:none;opacity:.5}"
)
APART = 2.0
"""By how much runs stand beside one another: where they agree, all are seen."""
COLUMNS = 2
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 250, 56, 390, 30, 200
"""Of a panel, and of the field in it."""
LETTER, LINE, KEY = 7, 20, 48
"""Room for a letter, a line of the legend, and for what stands there before and behind a name."""


def figure(
    rows: Sequence[Row], name: str, title: str, panels: Mapping[str, str], *, run: str, at: str, **words: Any
) -> Figure:
    """Every run at its measuring points, mean and range over seeds.

    Args:
        panels: the title of every quantity.
        run, at: what tells runs and points of the common axis apart in the rows.
        words: other fields of the figure.
    """
    drawn: dict[str, dict[str, list[Point]]] = {panel: {} for panel in panels.values()}
    for quantity, panel in panels.items():
        known = [row for row in rows if quantity in row]
        for one, place in dict.fromkeys((row[run], row[at]) for row in known):
            found = spread(known, quantity, **{run: one, at: place})
            drawn[panel].setdefault(str(one), []).append((place, found.mean, found.low, found.high))
    return Figure(name, title, panels=drawn, **words)


def filled(drawn: Mapping[str, Any]) -> dict[str, dict[str, Sequence[Point]]]:
    """Panels and runs of a figure (as plain values) that have points."""
    panels = {title: {run: points for run, points in each.items() if points} for title, each in drawn["panels"].items()}
    return {title: each for title, each in panels.items() if each}


def svg(drawn: Mapping[str, Any]) -> str:
    """The text of an SVG file.

    Args:
        drawn: a figure as plain values, with a point at least.
    """
    panels = filled(drawn)
    runs = list(dict.fromkeys(run for each in panels.values() for run in each))
    columns = min(COLUMNS, len(panels))
    parts = []
    for i, (title, each) in enumerate(panels.items()):
        place = f"translate({WIDTH * (i % columns)} {HEIGHT * (i // columns)})"
        parts.append(f"<g transform='{place}'>{_panel(drawn, title, each, runs)}</g>")
    width, top = WIDTH * columns, HEIGHT * -(-len(panels) // columns)
    legend, below = _legend(runs, width)
    parts.append(f"<g transform='translate(0 {top + 10})'>{legend}</g>")
    height = top + 10 + below
    colours = "".join(f".r{i}{{stroke:{_look(i)[0]};fill:{_look(i)[0]}}}" for i in range(len(runs)))
    body = "\n".join([f"<title>{escape(drawn['title'])}</title>", f"<style>{STYLE}{colours}</style>", *parts])
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}' viewBox='0 0 {width} {height}' "
        f"role='img'>\n<rect width='{width}' height='{height}' fill='#fff'/>\n{body}\n</svg>\n"
    )


def _look(number: int) -> tuple[str, str, str]:
    """Colour, mark and dashes of a run."""
    return COLOURS[number % len(COLOURS)], MARKS[number % len(MARKS)], DASHES[number // len(COLOURS) % len(DASHES)]


def _panel(drawn: Mapping[str, Any], title: str, each: Mapping[str, Sequence[Point]], runs: Sequence[str]) -> str:
    points = [point for several in each.values() for point in several]
    warp = math.log if drawn["logarithmic"] else float
    places = sorted({point[0] for point in points})
    start, stop = warp(places[0]), warp(places[-1])
    ticks = _ticks([value for point in points for value in point[1:]])
    room = APART * len(runs) / 2 + 6

    def across(place: float) -> float:
        share = (warp(place) - start) / (stop - start) if stop > start else 0.5
        return LEFT + room + share * (RIGHT - LEFT - 2 * room)

    def up(value: float) -> float:
        return BOTTOM - 6 - (value - ticks[0]) / (ticks[-1] - ticks[0]) * (BOTTOM - TOP - 12)

    parts = [_text((LEFT + RIGHT) / 2, TOP - 10, title, "h"), _text((LEFT + RIGHT) / 2, BOTTOM + 34, drawn["x"])]
    parts.append(f"<g transform='translate(14 {(TOP + BOTTOM) / 2:g}) rotate(-90)'>{_text(0, 0, drawn['y'])}</g>")
    for tick in ticks:
        parts.append(f"<path class='g' d='M{LEFT} {up(tick):.1f}H{RIGHT}'/>")
        parts.append(_text(LEFT - 6, up(tick) + 4, f"{tick:g}", "e"))
    last = -math.inf
    for place in places:
        at, half = across(place), LETTER * len(f"{place:g}") / 2
        if at - half > last:
            parts.append(f"<path class='g' d='M{at:.1f} {TOP}V{BOTTOM}'/>")
            parts.append(_text(at, BOTTOM + 16, f"{place:g}"))
            last = at + half + LETTER
    for number, run in enumerate(runs):
        shape, dashes = _look(number)[1:]
        aside = APART * (number - (len(runs) - 1) / 2)
        found = [(across(x) + aside, *map(up, values)) for x, *values in each.get(run, ())]
        bars = "".join(f"M{x:.1f} {low:.1f}V{high:.1f}" for x, _, low, high in found if low > high)
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y, *_ in found)
        marks = "".join(f"M{x:.1f} {y:.1f}{shape}" for x, y, *_ in found)
        if found:
            parts.append(
                f"<g class='r{number}'><path class='b' d='{bars}'/><polyline class='l' stroke-dasharray='{dashes}' "
                f"points='{line}'/><path d='{marks}'/></g>"
            )
    return "\n".join(parts)


def _legend(runs: Sequence[str], width: float) -> tuple[str, float]:
    """Keys in lines of equal columns, and how much room they take."""
    step = KEY + LETTER * max(len(run) for run in runs)
    columns = max(1, min(len(runs), int((width - LEFT) // step)))
    parts = []
    for number, run in enumerate(runs):
        _, shape, dashes = _look(number)
        x, y = LEFT + step * (number % columns), 10 + LINE * (number // columns)
        parts.append(
            f"<g class='r{number}'><path class='l' stroke-dasharray='{dashes}' d='M{x:g} {y:g}h26'/>"
            f"<path d='M{x + 13:g} {y:g}{shape}'/></g>{_text(x + 32, y + 4, run, 's')}"
        )
    return "\n".join(parts), LINE * -(-len(runs) // columns) + 10


def _ticks(values: Sequence[float]) -> list[float]:
    """Round places on an axis, about five; of shares from 0 to 1."""
    least, most = min(values), max(values)
    if least >= 0 and most <= 1:
        return [0, 0.25, 0.5, 0.75, 1]
    rough = (most - least) / 4 or abs(most)
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(one for one in (1, 2, 5, 10) if one * power >= rough * 0.999)
    return [step * i for i in range(math.floor(least / step), math.ceil(most / step) + 1)]


def _text(x: float, y: float, text: str, style: str = "") -> str:
    return f"<text class='{style}' x='{x:.1f}' y='{y:.1f}'>{escape(text)}</text>"
