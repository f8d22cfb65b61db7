"""Templates and the filters they use."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any

from .page import mean, unusable
from .words import DIRECTIONS, label, number, percent, with_interval

if TYPE_CHECKING:
    from jinja2 import Environment


def render(template: str, context: dict[str, Any]) -> str:
    """A template of this folder with `context`; HTML is escaped wherever it is not made here."""
    return _environment().get_template(template).render(**context, directions=DIRECTIONS)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("expunge.report"),
        autoescape=lambda name: name is not None and not name.endswith(".md.j2"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "number": number,
        "percent": percent,
        "label": label,
        "md": markdown,
        "mean": mean,
        "unusable": unusable,
        "interval": with_interval,
        "interval_percent": lambda interval: with_interval(interval, percent),
    }
    return environment


def markdown(value: object) -> str:
    """Text that means nothing special in Markdown, in HTML or in a table."""
    text = " ".join(str(value).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|]|(?<!\w)_|_(?!\w)|^[#+-])", r"\\\1", text)
