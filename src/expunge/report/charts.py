"""Line charts and the frontier plot, as small inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from .words import measured, number

Points = Sequence[tuple[float, float]]


def _image(width: float, height: float, words: str, parts: Sequence[str], style: str) -> Markup:
    return Markup('<svg class="{}" viewBox="0 0 {:g} {:g}" role="img" aria-label="{}">{}</svg>').format(
        style, width, height, words, Markup("".join(parts))
    )


def _text(x: float, y: float, text: str, style: str = "", anchor: str = "middle") -> str:
    return str(
        Markup('<text x="{:.1f}" y="{:.1f}" class="{}" text-anchor="{}">{}</text>').format(x, y, style, anchor, text)
    )


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places as near as possible to `wanted`, at least `gap` apart and between `low` and `high`."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [0.0] * len(wanted)
    at = -math.inf
    for index in order:
        at = placed[index] = max(wanted[index], at + gap, low)
    ceiling = high
    for index in reversed(order):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - gap
    return placed


def x_scale(values: Sequence[float], left: float, right: float) -> Callable[[float], float]:
    """A linear scale, or one in which each doubling takes equal room where the values grow by doubling."""
    positive = [value for value in values if value > 0]
    doubling = len(positive) > 2 and min(values) >= 0 and max(positive) >= 8 * min(positive)

    def warp(value: float) -> float:
        return math.log2(1 + value / min(positive)) if doubling else value

    start, end = warp(min(values)), warp(max(values))

    def place(value: float) -> float:
        return left + (right - left) * ((warp(value) - start) / (end - start) if end > start else 0.5)

    return place


def curves(lines: Mapping[str, Points], x_label: str, words: str) -> Markup:
    """Recovery against budget for before, after and gold, each line labelled at its end."""
    width, height, left, right, top, bottom = 320.0, 140.0, 34.0, 266.0, 6.0, 102.0
    lines = {role: [point for point in points if measured(point[1])] for role, points in lines.items()}
    lines = {role: points for role, points in lines.items() if points}
    values = sorted({x for points in lines.values() for x, _ in points})
    place_x = x_scale(values, left + 6, right - 6)

    def place_y(value: float) -> float:
        return bottom - (bottom - top) * min(max(value, 0), 1)

    parts = []
    for tick in (0, 0.5, 1):
        y = place_y(tick)
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(left - 6, y + 4, f"{100 * tick:.0f}%", "tick", "end"))
    last = -math.inf
    for value in values:
        text, at = number(value), place_x(value)
        half = 3.2 * len(text) + 3
        if at - half > last:
            parts.append(_text(at, bottom + 16, text, "tick"))
            last = at + half
    parts.append(_text((left + right) / 2, height - 6, x_label, "axis"))
    ends = spread([place_y(points[-1][1]) for points in lines.values()], 14, top + 2, bottom)
    for (role, points), end in zip(lines.items(), ends):
        path = " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in points)
        parts.append(f'<polyline class="{role}" points="{path}"/>')
        for x, y in points:
            if role == "gold":
                parts.append(f'<path class="gold" d="M{place_x(x):.1f} {place_y(y) - 4:.1f}l4 4-4 4-4-4z"/>')
            else:
                parts.append(f'<circle class="{role}" cx="{place_x(x):.1f}" cy="{place_y(y):.1f}" r="3"/>')
        parts.append(_text(right + 6, end + 4, role, f"name {role}", "start"))
    return _image(width, height, words, parts, "chart")


class Spot(NamedTuple):
    """One run on the frontier plot; `robust` and `direct` are shares of the knowledge that stay gone."""

    name: str
    utility: float
    robust: float
    direct: float
    best: bool


def frontier(spots: Sequence[Spot], words: str, x_label: str, y_label: str) -> Markup:
    """Utility kept to the right, forgetting upwards: a ring where asked directly, a disc under the strongest attack."""
    width, height, left, right, top, bottom = 720.0, 370.0, 56.0, 560.0, 12.0, 324.0
    low = min([0.9, *(math.floor(10 * spot.utility) / 10 for spot in spots)])
    high = max([1.0, *(math.ceil(20 * spot.utility) / 20 for spot in spots)])

    def place_x(value: float) -> float:
        return left + 14 + (right - left - 28) * (value - low) / (high - low)

    def place_y(value: float) -> float:
        return bottom - 10 - (bottom - top - 20) * min(max(value, 0), 1)

    parts = []
    step = 0.1 if high - low <= 0.61 else 0.2
    for index in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1):
        x = place_x(index * step)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
        parts.append(_text(x, bottom + 18, f"{100 * index * step:.0f}%", "tick"))
    for tick in (0, 0.25, 0.5, 0.75, 1):
        y = place_y(tick)
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(left - 8, y + 4, f"{100 * tick:.0f}%", "tick", "end"))
    parts.append(_text((left + right) / 2, height - 8, x_label, "axis"))
    parts.append(
        f'<g transform="translate(14 {(top + bottom) / 2:.0f}) rotate(-90)">{_text(0, 0, y_label, "axis")}</g>'
    )
    best = sorted((spot for spot in spots if spot.best), key=lambda spot: spot.utility)
    if len(best) > 1:
        path = " ".join(f"{place_x(spot.utility):.1f},{place_y(spot.robust):.1f}" for spot in best)
        parts.append(f'<polyline class="frontier" points="{path}"/>')
    names = spread([place_y(spot.robust) for spot in spots], 18, top + 6, bottom - 4)
    for spot, at in zip(spots, names):
        x, y = place_x(spot.utility), place_y(spot.robust)
        style = "best" if spot.best else "other"
        parts.append(f'<line class="leader" x1="{x + 8:.1f}" y1="{y:.1f}" x2="{right + 8}" y2="{at:.1f}"/>')
        if measured(spot.direct):
            parts.append(f'<line class="fall" x1="{x:.1f}" x2="{x:.1f}" y1="{place_y(spot.direct):.1f}" y2="{y:.1f}"/>')
            parts.append(f'<circle class="direct" cx="{x:.1f}" cy="{place_y(spot.direct):.1f}" r="5"/>')
        parts.append(f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="6.5"/>')
        short = spot.name if len(spot.name) <= 22 else spot.name[:21] + "…"
        parts.append(_text(right + 14, at + 4, short, f"name {style}", "start"))
    return _image(width, height, words, parts, "chart frontier-chart")


def heat(rows: Sequence[str], columns: Sequence[object], values: Any, words: str) -> Markup:
    """A heat map: `values` (rows, columns) from 0, empty, to 1, full; what is below 0 has another colour."""
    left, side, wide = 150.0, 18.0, max(9.0, min(30.0, 260.0 / max(1, len(columns))))
    step = max(1, math.ceil(22 / wide))
    parts = []
    for place, name in enumerate(rows):
        y = side * place
        short = name if len(name) <= 24 else name[:23] + "…"
        parts.append(_text(left - 6, y + 12.5, short, "tick", "end"))
        for at, column in enumerate(columns):
            value = float(values[place][at])
            if not math.isfinite(value):
                continue
            style = "heat less" if value < 0 else "heat"
            parts.append(
                str(
                    Markup(
                        '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" fill-opacity="{:.3f}">'
                        "<title>{}, {}: {}</title></rect>"
                    ).format(
                        style, left + wide * at, y, wide - 1, side - 1, min(abs(value), 1), name, column, number(value)
                    )
                )
            )
    for at in range(0, len(columns), step):
        parts.append(_text(left + wide * at + (wide - 1) / 2, side * len(rows) + 12, str(columns[at]), "tick"))
    width, height = left + wide * len(columns) + 4, side * len(rows) + 18
    return _image(width, height, words, parts, "chart")
