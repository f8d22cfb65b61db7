"""Facts spread over the MLPs of several layers: what `memit` and `alphaedit` have in common.

Values z are worked out at the residual stream after the last of the layers. From the lowest layer up, each closes its
share of what is missing, under the changes made below it. How a share is written is the method's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ...deltas import Delta, compose
from ...errors import ParameterError
from ...subjects.tails import residual_matrix
from .case import EditCase
from .traced import Layers, span_of
from .values import Fact, Settings, keys, optimised
from .write import low_rank

Solve = Callable[[int, Tensor], Tensor]
"""(layer, keys (f, n)) to the directions (f, n) along which residuals are written."""


LAYERS = (0.13, 0.25)
"""First and last, by default."""


def within(case: EditCase, layers: Layers) -> list[int]:
    """The layers from the first to the last.

    Raises:
        ParameterError: there are none.
        SubjectError: one is no dense layer, or a norm follows its MLP.
    """
    first, last = span_of(case, layers, LAYERS)
    if first > last:
        raise ParameterError(f"layers is {layers}, which are {first} and {last}; expected the lower one first")
    span = list(range(first, last + 1))
    for layer in span:
        residual_matrix(case.subject, layer)
    return span


def spread(case: EditCase, facts: Sequence[Fact], layers: list[int], settings: Settings, solve: Solve) -> Delta:
    """Values at the last layer, residuals shared out over all of them; keys are read under the changes made below."""
    found = optimised(case.subject, facts, layers[-1], settings, at="stream", goal=case.goal)
    target: Tensor | None = None
    subject, deltas, log = case.subject, list[Delta](), dict[str, Any]()
    for number, layer in enumerate(layers):
        read, bare = keys(subject, facts, sorted({layer, layers[-1]}))
        now = bare.streams[layers[-1]].double().cpu()
        target = now + found.delta.double().cpu() if target is None else target
        residual = (target - now) / (len(layers) - number)
        log[str(layer)] = float((target - now).norm(dim=-1).mean())
        k = read[layer].mean.double().cpu().T
        matrix = residual_matrix(subject, layer)
        entry = low_rank(matrix, residual.T, solve(layer, k).T)
        deltas.append(Delta("", {matrix.name: entry}))
        if layer != layers[-1]:
            subject = compose(deltas).apply(case.subject, check=False)
    case.summary["spread"] = {"layers": layers, "facts": len(facts), "missing_before_layer": log, **found.log}
    return Delta(case.base.fingerprint, compose(deltas).entries, {"layers": layers})
