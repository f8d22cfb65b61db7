"""What the gradients of edits are made of: what goes into matrices, and the loss's gradient at what comes out.

The gradient of -log p(target) with respect to a matrix W is the sum over tokens of g h^T, h (f,) what goes into W at a
token, g (d,) the loss's gradient at what comes out there. One pass forward and one back give both, for all matrices and
all facts that fit together; no gradient goes below the lowest matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...subjects.language import LanguageModel
from ...subjects.packed import Encoded
from ...subjects.tails import hooked, padded
from ...subjects.value_vectors import ValueMatrix
from ..optimise.importance import flowing
from .values import Fact, groups

Tokens = Literal["all", "target"]
"""All tokens of prompt and target that are fed, or those that predict the target."""


def observed(
    subject: LanguageModel, facts: Sequence[Fact], matrices: Sequence[ValueMatrix], tokens: Tokens = "all"
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """What edits show at matrices: for each what goes in (n, f) and the loss's gradient at what comes out (n, d),
    float64 on the CPU.

    Returns:
        that, and the losses (facts,): -log p(target), the mean over its tokens. Gradients are those of their sum, so
        that no fact's depend on how many others there are.
    """
    parts = [_group(subject, [fact.lookups[0].tokens for fact in group], matrices, tokens) for group in groups(facts)]
    columns = zip(*(seen for seen, _ in parts))
    joined = [(torch.cat([h for h, _ in column]), torch.cat([g for _, g in column])) for column in columns]
    return joined, torch.cat([losses for _, losses in parts])


def _group(
    subject: LanguageModel, rows: Sequence[Encoded], matrices: Sequence[ValueMatrix], tokens: Tokens
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    inputs: dict[str, Tensor] = {}
    shifts: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., Tensor]:
        def hook(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
            inputs[name] = arguments[0].detach()
            shifts[name] = torch.zeros_like(output, requires_grad=True)  # its gradient is the output's
            return output + shifts[name]

        return hook

    def places(first: Sequence[int]) -> tuple[Tensor, Tensor]:
        found = [(i, place) for i, row in enumerate(rows) for place in range(first[i], len(row.ids) - 1)]
        lines, columns = torch.tensor(found, device=subject.device).T
        return lines, columns

    starts = [row.start - 1 for row in rows]
    lines, columns = places(starts)
    target = torch.tensor([token for row in rows for token in row.ids[row.start :]], device=subject.device)
    owners = [subject.model.get_submodule(str(matrix.owner)) for matrix in matrices]
    handles = [owner.register_forward_hook(watch(matrix.name)) for owner, matrix in zip(owners, matrices)]
    with flowing(subject.model, []), hooked(handles):
        ids = padded([row.ids[:-1] for row in rows], subject.device)
        states = subject.decoder(input_ids=ids, use_cache=False).last_hidden_state[lines, columns]
        said = subject.head(states).float().log_softmax(-1).gather(1, target[:, None])[:, 0]
        losses = -said.new_zeros(len(rows)).index_add(0, lines, said) / torch.bincount(lines)
        gradients = torch.autograd.grad(losses.sum(), [shifts[matrix.name] for matrix in matrices])
    lines, columns = places(starts if tokens == "target" else [0] * len(rows))

    def picked(tensor: Tensor) -> Tensor:
        # Some MLPs see tokens of all rows in one axis.
        return tensor.reshape(len(rows), -1, tensor.shape[-1])[lines, columns].double().cpu()

    seen = [(picked(inputs[matrix.name]), picked(gradient)) for matrix, gradient in zip(matrices, gradients)]
    return seen, losses.detach().cpu()
