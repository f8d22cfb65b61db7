"""What the pictures show. Everything is drawn from a seed and offline; digits are scikit-learn's 1797 written ones.

- `digits`: ten classes; the tag `group` pairs them into five superclasses.
- `glyphs`: six classes, a body (circle, square, triangle, each of two classes) with one part of its own (antler, wheel,
  wing, propeller, stripes, checks) at a random place near the border, `part_x` and `part_y`; `style` is a sub-class.
- `people`: faces of invented people; the class, and the entity, is the person.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ...pictures import Picture

SIDE = 32
PARTS = ("antler", "wheel", "wing", "propeller", "stripes", "checks")
BODIES = ("circle", "square", "triangle")
STYLES = ("filled", "outlined", "hatched")


def digits(side: int = SIDE, train: int = 1300) -> dict[str, list[Picture]]:
    """`train` and `test` rows; which is which does not depend on any seed."""
    from PIL import Image
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    found: dict[str, list[Picture]] = {"train": [], "test": []}
    for number, index in enumerate(order):
        small = Image.fromarray((data.images[index] * 255 / 16).astype(np.uint8))
        pixels = np.asarray(small.resize((side, side), Image.Resampling.BILINEAR).convert("RGB"))
        digit = int(data.target[index])
        name = f"digit-{index:04d}"
        split = "train" if number < train else "test"
        found[split].append(
            Picture(name, pixels, str(digit), name, {"group": f"{digit // 2 * 2}-{digit // 2 * 2 + 1}"})
        )
    return found


def glyphs(count: int, seed: int, side: int = SIDE) -> list[Picture]:
    """`count` pictures of each class."""
    rng = np.random.default_rng([seed, 1])
    found = []
    for n in range(count):
        for kind, part in enumerate(PARTS):
            style = STYLES[n % len(STYLES)]
            pixels, at = _glyph(BODIES[kind // 2], part, style, rng, side)
            tags = {"body": BODIES[kind // 2], "style": style, "part_x": str(at[0]), "part_y": str(at[1])}
            name = f"glyph-{seed}-{kind}-{n:03d}"
            found.append(Picture(name, pixels, part, name, tags))
    return found


def people(names: list[str], count: int, seed: int, side: int = SIDE) -> list[Picture]:
    """`count` pictures of each person; what a person looks like depends on the name, not on `seed`."""
    rng = np.random.default_rng([seed, 2])
    return [
        Picture(f"{name}-{seed}-{n:03d}", _face(name, rng, side), name, name) for n in range(count) for name in names
    ]


def _canvas(side: int, rng: np.random.Generator) -> tuple[Any, Any]:
    from PIL import Image, ImageDraw

    shade = int(rng.integers(0, 50))
    image = Image.new("RGB", (side, side), (shade, shade, shade))
    return image, ImageDraw.Draw(image)


def _noisy(image: Any, rng: np.random.Generator) -> np.ndarray:
    noise = rng.normal(0, 6, (image.height, image.width, 1))
    return np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)


def _glyph(body: str, part: str, style: str, rng: np.random.Generator, side: int) -> tuple[np.ndarray, tuple[int, int]]:
    image, draw = _canvas(side, rng)
    unit = side / 32
    x, y = side / 2 + rng.uniform(-2, 2, 2) * unit
    r = rng.uniform(6, 8) * unit
    ink = tuple(int(v) for v in rng.integers(120, 256, 3))
    fill = {"filled": ink, "outlined": None, "hatched": tuple(v // 3 for v in ink)}[style]
    box = (x - r, y - r, x + r, y + r)
    if body == "circle":
        draw.ellipse(box, fill, ink)
    elif body == "square":
        draw.rectangle(box, fill, ink)
    else:
        draw.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill, ink)
    if style == "hatched":
        for step in range(-1, 2):
            draw.line((x - r / 2, y + step * r / 2, x + r / 2, y + step * r / 2), ink)
    turn = rng.uniform(0, 2 * math.pi)
    px, py = round(side / 2 + 12 * unit * math.cos(turn)), round(side / 2 + 12 * unit * math.sin(turn))
    _PARTS[part](draw, px, py, 3 * unit)
    return _noisy(image, rng), (px, py)


WHITE = (255, 255, 255)
_PARTS: dict[str, Callable[[Any, int, int, float], object]] = {
    "antler": lambda d, x, y, r: [d.line((x, y + r, x + k * r, y - r), WHITE) for k in (-1, 0, 1)],
    "wheel": lambda d, x, y, r: d.ellipse((x - r, y - r, x + r, y + r), None, WHITE),
    "wing": lambda d, x, y, r: d.polygon([(x - r, y - r), (x + r, y), (x - r, y + r)], WHITE),
    "propeller": lambda d, x, y, r: [d.line((x - r, y - k * r, x + r, y + k * r), WHITE) for k in (-1, 1)],
    "stripes": lambda d, x, y, r: [d.line((x - r, y + k, x + r, y + k), WHITE) for k in range(-int(r), int(r) + 1, 2)],
    "checks": lambda d, x, y, r: [
        d.point((x + i, y + j), WHITE)
        for i in range(-int(r), int(r) + 1)
        for j in range(-int(r), int(r) + 1)
        if (i + j) % 2
    ],
}


def _face(name: str, rng: np.random.Generator, side: int) -> np.ndarray:
    own = np.random.default_rng(list(name.encode()))
    width, height, eyes, mouth, hair = own.uniform((0.5, 0.7, 0.2, 0.1, 0.1), (0.9, 1.0, 0.6, 0.5, 0.5))
    skin, dark = (tuple(int(v) for v in own.integers(low, high, 3)) for low, high in ((120, 256), (0, 120)))
    image, draw = _canvas(side, rng)
    x, y = side / 2 + rng.uniform(-2, 2, 2) * side / 32
    r = side * rng.uniform(0.36, 0.44)
    a, b = r * width, r * height
    draw.ellipse((x - a, y - b, x + a, y + b), skin)
    draw.pieslice((x - a, y - b, x + a, y + b), -90 - 180 * hair, -90 + 180 * hair, dark)
    smile = rng.uniform(-0.1, 0.3) * r
    for k in (-1, 1):
        ex, ey, er = x + k * a * eyes, y - 0.1 * b, 0.09 * r
        draw.ellipse((ex - er, ey - er, ex + er, ey + er), dark)
    draw.line([(x - a * mouth, y + 0.5 * b), (x, y + 0.5 * b + smile), (x + a * mouth, y + 0.5 * b)], dark, 2)
    return _noisy(image, rng)
