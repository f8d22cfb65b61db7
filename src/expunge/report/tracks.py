"""One row of a dot plot as a small inline SVG.

Positions are percentages of the row's width, so a row is as wide as its table cell and text never scales with it.
Colours come from the page's style sheet. Models differ in shape as well as colour: before is a ring, after a dot,
gold a diamond.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from markupsafe import Markup

from ..evidence import Interval
from .words import measured

HEIGHT = 22
"""Pixels on the screen; the style sheet lowers it in print, so vertical places are percentages as well."""
Mark = Interval | float | None


def svg(parts: Iterable[str], words: str) -> Markup:
    """`parts` (trusted markup) as an image that a screen reader reads out as `words`."""
    return Markup('<svg class="track" width="100%" height="{}" role="img" aria-label="{}">{}</svg>').format(
        HEIGHT, words, Markup("".join(parts))
    )


def position(value: float, domain: tuple[float, float]) -> str:
    """Where `value` lies, as a percentage; values outside the domain stop at its edge."""
    low, high = domain
    return f"{100 * (min(max(value, low), high) - low) / (high - low):.2f}%"


def guide(value: float, domain: tuple[float, float], style: str) -> str:
    at = position(value, domain)
    return f'<line class="{style}" x1="{at}" x2="{at}" y1="-10%" y2="110%"/>'


def span(low: float, high: float, domain: tuple[float, float], style: str, height: float) -> str:
    left, right = position(low, domain), position(high, domain)
    width = f"{max(float(right[:-1]) - float(left[:-1]), 0):.2f}%"
    lift = f'transform="translate(0 {-height / 2:g})"'
    return f'<rect class="{style}" x="{left}" width="{width}" y="50%" height="{height:g}" {lift}/>'


def marker(role: str, value: float, domain: tuple[float, float], style: str = "") -> str:
    at = position(value, domain)
    if role == "gold":
        return f'<svg x="{at}" y="50%" overflow="visible"><path class="gold" d="M0-6.5 6.5 0 0 6.5-6.5 0z"/></svg>'
    radius = 5.5 if role == "before" else 4
    return f'<circle class="{style or role}" cx="{at}" cy="50%" r="{radius}"/>'


def _value(mark: Mark) -> float | None:
    value = mark.value if isinstance(mark, Interval) else mark
    return value if measured(value) else None


def dots(
    before: Mark, after: Mark, gold: Mark, words: str, *, tolerance: float | None = None, raised: bool = False
) -> Markup:
    """Before, after and gold on a line from 0 to 1.

    Args:
        words: what a screen reader says.
        tolerance: shade this much on both sides of before.
        raised: mark after as a finding.
    """
    domain = (0.0, 1.0)
    values = {"before": _value(before), "after": _value(after), "gold": _value(gold)}
    parts = [guide(at, domain, "grid") for at in (0, 0.25, 0.5, 0.75, 1)]
    if tolerance is not None and values["before"] is not None:
        parts.append(span(values["before"] - tolerance, values["before"] + tolerance, domain, "zone", 14))
    if values["before"] is not None and values["after"] is not None:
        start, end = sorted((values["before"], values["after"]))
        parts.append(span(start, end, domain, "move", 1))
    for role, mark in (("before", before), ("gold", gold), ("after", after)):
        if isinstance(mark, Interval) and measured(mark.low) and measured(mark.high):
            parts.append(span(mark.low, mark.high, domain, f"{role} interval", 5))
    for role in ("before", "gold", "after"):
        value = values[role]
        if value is not None:
            parts.append(marker(role, value, domain, "raised" if raised and role == "after" else ""))
    return svg(parts, words)


def recovery(value: Interval, words: str, *, threshold: float, domain: tuple[float, float]) -> Markup:
    """Normalised recovery with its interval: gold's line at 0, the threshold, the original's line at 1."""
    style = state(value, threshold)
    parts = [
        guide(0, domain, "at-gold"),
        guide(threshold, domain, "threshold"),
        guide(1, domain, "at-before"),
    ]
    if measured(value.low) and measured(value.high):
        parts.append(span(value.low, value.high, domain, f"{style} interval", 5))
    if measured(value.value):
        parts.append(f'<circle class="{style}" cx="{position(value.value, domain)}" cy="50%" r="4.5"/>')
    return svg(parts, words)


def scale(ticks: Sequence[tuple[float, str]], domain: tuple[float, float]) -> Markup:
    """Words above the guides of a column of tracks."""
    parts = [
        Markup('<text x="{}" y="78%" text-anchor="middle">{}</text>').format(position(at, domain), text)
        for at, text in ticks
    ]
    return svg(map(str, parts), ", ".join(text for _, text in ticks))


def state(value: Interval, threshold: float) -> str:
    """back: surely above the threshold; open: it may be; held: surely below."""
    if measured(value.low) and value.low > threshold:
        return "back"
    return "held" if measured(value.high) and value.high <= threshold else "open"
