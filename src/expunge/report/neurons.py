"""The page of a neuron map: a search over the strongest neurons and their tokens, in one file that works offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_text

if TYPE_CHECKING:
    from ..subjects.neuron_map import NeuronMap

SHOWN = 100
"""Neurons that stand on the page before any search."""
MARKS = {" ": "·", "\n": "⏎", "\t": "⇥"}
"""What spaces, line ends and tabs are shown as."""
MATRICES = {"up": "rows of the up matrix", "gate": "rows of the gate matrix", "down": "value vectors"}
NORMS = {"none": "as they are", "final": "times the final norm's gain", "input": "times the gain of the norm before"}


def write(of: NeuronMap, folder: Path, most: int = 20_000) -> Path:
    """Write neurons.html.

    Args:
        most: neurons on the page, the strongest ones.

    Raises:
        OutputError: the folder cannot be written.
    """
    from .render import render

    path = Path(folder) / "neurons.html"
    write_text(path, render("neurons.html.j2", content(of, most)))
    return path


def content(of: NeuronMap, most: int) -> dict[str, Any]:
    """What the template shows."""
    words: dict[int, int] = {}
    texts: list[str] = []
    rows: list[list[Any]] = []
    for one in of.strongest(most):
        for token in one.tokens:
            if token not in words:
                words[token] = len(texts)
                texts.append(of.words[token])
        cells = [words[token] for token in one.tokens]
        rows.append([one.address.layer, str(one.address), round(one.z, 2), round(one.cosine, 3), *cells])
    data: dict[str, Any] = {
        "words": [shown(text) for text in texts],
        "plain": [text.strip().casefold() for text in texts],
        "rows": rows,
    }
    strongest = max((abs(row[2]) for row in rows), default=1.0)
    return {
        "map": of,
        "name": Path(of.model).name if Path(of.model).is_absolute() else of.model,
        "about": MATRICES[of.settings.matrix],
        "gain": NORMS[of.settings.norm],
        "total": len(of),
        "rows": [_line(row, data["words"], strongest) for row in rows[:SHOWN]],
        "count": len(rows),
        "layers": _layers(of),
        "most": strongest,
        "data": json.dumps({**data, "most": strongest}, ensure_ascii=False, separators=(",", ":")).replace(
            "<", "\\u003c"
        ),
    }


def shown(text: str) -> str:
    """A token so that nothing of it is invisible."""
    marked = "".join(MARKS.get(c, c) if c in MARKS or c.isprintable() else f"\\x{ord(c):02x}" for c in text)
    return marked or "(empty)"


def _line(row: list[Any], words: list[str], most: float) -> dict[str, Any]:
    return {
        "address": row[1],
        "z": row[2],
        "cosine": row[3],
        "width": round(100 * abs(row[2]) / most),
        "tokens": [words[i] for i in row[4:]],
    }


def _layers(of: NeuronMap) -> list[dict[str, Any]]:
    """Per layer how strong its neurons are: middle, best hundredth, and the best."""
    import torch

    found = []
    for layer in sorted({part.layer for part in of.parts}):
        z = torch.cat([part.z for part in of.parts if part.layer == layer]).abs().double()
        order = z.sort().values
        at = [order[min(len(order) - 1, int(share * len(order)))] for share in (0.5, 0.99)]
        found.append(
            {"layer": layer, "count": len(z), "middle": float(at[0]), "high": float(at[1]), "most": float(order[-1])}
        )
    return found
