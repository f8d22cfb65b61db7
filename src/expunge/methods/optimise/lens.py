"""What objectives see of what a model would say after each of some blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...errors import ParameterError
from ...subjects.anatomy import anatomy
from ...subjects.protocol import Taps
from .terms import Side, Step, chunked
from .unlearn import Preparation


def read_layers(case: Preparation) -> None:
    """Tap the blocks named by the parameter `layers`, by default the upper half and the last, at answer tokens."""
    parts = anatomy(case.subject.model)
    depth = len(parts.blocks)
    layers = tuple(case.settings["layers"]) or tuple(range(depth // 2, depth))
    wrong = [at for at in layers if not -depth <= at < depth]
    if wrong:
        raise ParameterError(f"layers: there is no block {wrong[0]}; the model has 0-{depth - 1}")
    case.taps = Taps(layers=tuple(sorted({at % depth for at in layers})), positions="answer")
    # The norm as it was: the lens must not be what moves.
    case.given["lens"] = [part[1] for part in (parts.final_norm, parts.narrowing) if part is not None]
    case.summary["layers"] = list(case.taps.layers)


def per_answer(step: Step, term: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """(layers x n,) `term` of the probabilities (k, V) of each row's first answer token after every tapped block.

    Args:
        term: (probabilities (k, V), the answer's tokens (k,)) -> (k,).
    """
    side = step.forget
    first = torch.cat([side.row.new_ones(1, dtype=torch.bool), side.row.diff() > 0])
    return torch.cat([_read(step, side, states[first], side.target[first], term) for states in side.layers.values()])


def _read(step: Step, side: Side, states: Tensor, target: Tensor, term: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    def of(hidden: Tensor, tokens: Tensor) -> Tensor:
        for module in step.given["lens"]:
            hidden = module(hidden)
        return term(side.head(hidden).float().softmax(-1), tokens)

    return chunked(of, states, target, side.vocabulary)
