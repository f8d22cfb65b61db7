"""Forgotten pictures a little changed: what is only hidden may show in another view."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from ..evidence import Item
from ..pictures import Picture
from ..registry import attack
from ..tables.passes import Generate
from .case import Attack, Case, Found, tries


@attack(
    group="black_box",
    access="text",
    modality=("image",),
    paper="arXiv:2007.14321",
    caveat="Views of one picture are alike; what a model says of them counts together, picture by picture.",
)
def transformed(case: Case) -> Attack:
    """Ask about every forgotten picture shifted, turned, closer, brighter, darker and blurred.

    Items: one for each view, called `ROW#VIEW`. Curve: the share of pictures whose class one of their first k views
    brought back. Views keep what a picture shows: none is mirrored.
    """
    rows: list[Any] = case.forget
    asked = [(row, name, _seen(row, view)) for row in rows for name, view in VIEWS.items()]
    outputs = yield Generate(tuple(((row.id, name), seen, None) for row, name, seen in asked), case.max_new_tokens)
    items, told = [], dict[str, list[float]]()
    for (row, name, _), texts in zip(asked, outputs.texts):
        found = float(texts[0] == row.answer)
        items.append(Item(row.entity or row.id, f"{row.id}#{name}", found, texts[0]))
        told.setdefault(row.id, []).append(found)
    budget = {"queries": len(items), "samples": 1, "queries per row": len(VIEWS)}
    return Found(items, budget, tries(list(told.values())), "queries per row")


def _seen(row: Picture, view: Callable[[Any], Any]) -> Any:
    from PIL import Image

    return replace(row, image=np.asarray(view(Image.fromarray(row.pixels()))))


def _placed(image: Any, turn: float = 0.0, scale: float = 1.0, shift: float = 0.0) -> Any:
    """Turned (degrees) and enlarged about the middle, shifted by a share of the sides, borders continued."""
    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    angle = np.deg2rad(turn)
    y, x = np.mgrid[:height, :width].astype(np.float64)
    y, x = (y - (height - 1) / 2 - shift * height) / scale, (x - (width - 1) / 2 - shift * width) / scale
    rows = np.cos(angle) * y + np.sin(angle) * x + (height - 1) / 2
    columns = np.cos(angle) * x - np.sin(angle) * y + (width - 1) / 2
    at = [np.clip(np.rint(v), 0, n - 1).astype(int) for v, n in ((rows, height), (columns, width))]
    return pixels[at[0], at[1]]


def _light(image: Any, factor: float) -> Any:
    return np.clip(np.asarray(image) * factor, 0, 255).astype(np.uint8)


def _blurred(image: Any) -> Any:
    from PIL import ImageFilter

    return image.filter(ImageFilter.GaussianBlur(max(image.size) / 64))


VIEWS: dict[str, Callable[[Any], Any]] = {
    "shifted": lambda image: _placed(image, shift=0.06),
    "turned left": lambda image: _placed(image, turn=10),
    "turned right": lambda image: _placed(image, turn=-10),
    "closer": lambda image: _placed(image, scale=1.15),
    "brighter": lambda image: _light(image, 1.3),
    "darker": lambda image: _light(image, 0.7),
    "blurred": _blurred,
}
