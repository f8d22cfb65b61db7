"""Fine-tuning one MLP output matrix on facts: what `ft_l`, `ft_m` and `wise` have in common.

The matrix alone gets a gradient. Blocks below its layer run once, blocks from it on in every step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...deltas import Delta
from ...errors import ParameterError, TrainingError
from ...subjects.entering import laid, start_of, stored
from ...subjects.language import LanguageModel
from ...subjects.packed import Encoded, Pack, pack
from ...subjects.protocol import Taps
from ...subjects.tails import edited_matrix
from ...subjects.value_vectors import ValueMatrix
from .case import EditCase
from .traced import Layer, layer_of
from .values import located

ENOUGH = 1e-2
"""Loss below which no step is made."""

Loss = Callable[[LanguageModel, Pack, Tensor], Tensor]
"""(model, pack, states at the positions that predict answer tokens) to the mean loss over facts."""


def tuned(case: EditCase, loss: Loss, *, layer: Layer, steps: int, learning_rate: float, norm: float) -> Delta:
    """Adam on one matrix.

    Args:
        norm: no weight moves further than this; 0 is no bound.

    Raises:
        ParameterError: a setting that cannot be.
        TrainingError: the loss is not finite.
    """
    if steps < 0 or learning_rate <= 0 or norm < 0:
        raise ParameterError(f"steps {steps}, learning_rate {learning_rate}, norm {norm}: expected >= 0, > 0 and >= 0")
    at = layer_of(case, layer)
    matrix = edited_matrix(case.subject, at)
    facts = located(case, 0)
    rows = [fact.lookups[0].tokens for fact in facts]
    working, weight, start = copied(case.subject, matrix)
    run = below(case.subject, rows, at)
    moving = torch.optim.Adam([weight], lr=learning_rate)
    losses: list[float] = []
    for _ in range(steps):
        with torch.enable_grad():
            value = run(working, loss)
        losses.append(float(value.detach()))
        if not torch.isfinite(value.detach()):
            raise TrainingError(f"the loss is {losses[-1]} after {len(losses) - 1} steps; lower learning_rate")
        if losses[-1] < ENOUGH:
            break
        # Of all that may require a gradient, this matrix alone gets one.
        (weight.grad,) = torch.autograd.grad(value, [weight])
        moving.step()
        if norm:
            with torch.no_grad():
                weight.copy_(weight.float().clamp(start - norm, start + norm).to(weight.dtype))
    case.summary["tuning"] = {"layer": at, "matrix": matrix.name, "facts": len(rows), "steps": len(losses)}
    if losses:
        case.summary["tuning"] |= {"loss_before": losses[0], "loss_after": losses[-1]}
    difference = (weight.detach().float() - start).cpu()
    return Delta(case.base.fingerprint, {matrix.name: {"difference": difference}})


def copied(subject: LanguageModel, matrix: ValueMatrix) -> tuple[LanguageModel, Tensor, Tensor]:
    """A copy that shares all but one matrix, that matrix with a gradient, and fp32 what it is."""
    start = subject.model.get_parameter(matrix.name).detach().float()
    nothing = {matrix.name: {"difference": torch.zeros_like(start, device="cpu")}}
    working = Delta("", nothing).apply(subject, check=False)
    return working, working.model.get_parameter(matrix.name).requires_grad_(True), start


def target_loss(model: LanguageModel, pack_: Pack, states: Tensor) -> Tensor:
    """Cross-entropy of each target token after those before it; facts weigh alike, whatever their length."""
    logprob = model.head(states).float().log_softmax(-1).gather(1, pack_.target[:, None])[:, 0]
    rows = len(pack_.rows)
    length = logprob.new_zeros(rows).index_add(0, pack_.row, logprob.new_ones(len(logprob)))
    return -(logprob.new_zeros(rows).index_add(0, pack_.row, logprob) / length).mean()


def below(subject: LanguageModel, rows: Sequence[Encoded], layer: int) -> Callable[[LanguageModel, Loss], Tensor]:
    """Runs the blocks from `layer` on over all rows in one pass, on what blocks below give."""
    pack_ = pack(rows, subject.device)
    start = start_of(subject, layer, inside=True)
    entry = None if start is None else laid(layer, stored(subject, rows, start), pack_)

    def run(working: LanguageModel, loss: Loss) -> Tensor:
        return loss(working, pack_, working.states(pack_, Taps(), entry)["final"])

    return run
