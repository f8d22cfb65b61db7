"""`layer: trace`: causal tracing decides where to edit (subjects/restoring.py).

The layer whose MLPs, put back at the subject's last token, bring back most of what the model says now of the facts that
are to be edited. Where tracing points and where editing works best are only loosely related (arXiv:2301.04213).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from ...errors import RequestError
from ...subjects.restoring import PLACES, causal_trace, locate
from .case import EditCase
from .values import depth

Layer = float | Literal["trace"]
"""A number, a fraction of the depth, or the layer of the largest effect."""
Layers = tuple[float, float] | Literal["trace"]
"""First and last, or as many in a row as by default, where their effects are largest."""
DRAWS = 10


def effects(case: EditCase) -> np.ndarray:
    """(layers,) mean effect of the base's MLPs at the subjects' last tokens, worked out once for all edits.

    What is followed is the base's own first choice, whatever is true.

    Raises:
        RequestError: no edit names a subject.
    """
    edits = [edit for edit in case.memory.get("edits") or case.facts() if edit.subject]
    key = f"effects {[edit.id for edit in edits]}"
    if key not in case.memory:
        if not edits:
            raise RequestError("layer is trace, but no edit names a subject; give subjects, or a layer")
        facts = [replace(locate(case.base, edit), answer=None) for edit in edits]
        found = causal_trace(case.base, facts, kinds=("mlp",), draws=DRAWS, seed=case.seed)
        rows = [one.by_place("mlp")[PLACES[2]] for one in found]
        case.memory[key] = np.mean(rows, axis=0)
    carried: np.ndarray = case.memory[key]
    case.summary["trace"] = {"effects": [round(float(value), 4) for value in carried]}
    return carried


def layer_of(case: EditCase, layer: Layer) -> int:
    """A layer's number.

    Raises:
        ParameterError: there is no such layer.
        RequestError: as `effects`.
    """
    return int(effects(case).argmax()) if isinstance(layer, str) else depth(case.subject, layer)


def span_of(case: EditCase, layers: Layers, default: tuple[float, float]) -> tuple[int, int]:
    """(first, last) layer.

    Args:
        default: whose width a traced span has.
    """
    if not isinstance(layers, str):
        first, last = (depth(case.subject, layer, "layers") for layer in layers)
        return first, last
    low, high = (depth(case.subject, layer) for layer in default)
    width = high - low + 1
    sums = np.convolve(effects(case), np.ones(width), "valid")
    first = int(sums.argmax())
    return first, first + width - 1
