"""What modules take in and give out at one token of each prompt: one pass, nothing but that token kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from .anatomy import anatomy
from .packed import TOKEN_BUDGET, in_order
from .value_vectors import ValueMatrix, value_matrices

if TYPE_CHECKING:
    from .language import LanguageModel

Place = tuple[str, Literal["in", "out"]]
"""Path of a module, and whether its first input or its first output is read."""


@torch.no_grad()
def watch(
    subject: LanguageModel, prompts: Sequence[str], places: Sequence[Place], ends: Sequence[int | None] | None = None
) -> list[Tensor]:
    """For every place (n, width) in fp32: its value at the last token of each prompt.

    Args:
        prompts: as `prompt_text` gives them.
        ends: per prompt how many of its characters are read: the token that holds the last of them is looked at, in a
            pass over the whole prompt. None: the last token.
    """
    seen: dict[int, Tensor] = {}

    def entering(place: int) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            seen[place] = arguments[0] if arguments else named["hidden_states"]

        return hook

    def leaving(place: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            seen[place] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = []
    for number, (path, side) in enumerate(places):
        module: nn.Module = subject.model.get_submodule(path)
        if side == "in":
            handles.append(module.register_forward_pre_hook(entering(number), with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(leaving(number)))
    tokens = [subject.prompt_ids(text, (str(number), "hidden")) for number, text in enumerate(prompts)]
    at = [len(ids) - 1 for ids in tokens]
    for number, end in enumerate(ends or ()):
        if end is not None:
            at[number] = subject.token_at(prompts[number], end - 1)
    by_length: dict[int, list[int]] = {}
    for index, ids in enumerate(tokens):
        by_length.setdefault(len(ids), []).append(index)
    groups = [
        members[first : first + step]
        for length, members in by_length.items()
        for step in [max(1, TOKEN_BUDGET // length)]
        for first in range(0, len(members), step)
    ]

    def read(group: Sequence[int]) -> list[list[Tensor]]:
        batch = torch.tensor([tokens[i] for i in group], device=subject.device)
        subject.decoder(input_ids=batch, use_cache=False)
        rows, columns = torch.arange(len(group)), torch.tensor([at[i] for i in group])
        # Experts and some MLPs see tokens of all rows in one axis.
        states = [seen[number].reshape(*batch.shape, -1)[rows, columns].float().cpu() for number in range(len(places))]
        return [list(row) for row in zip(*states)]

    try:
        parts = subject.share(groups, read, of=[tokens, at, list(places)], progress=None)
    finally:
        for handle in handles:
            handle.remove()
    found = in_order(groups, parts)
    return [torch.stack([row[i] for row in found]).cpu() if found else torch.zeros(0, 0) for i in range(len(places))]


def residual(subject: LanguageModel) -> list[Place]:
    """The input of every block, and the output of the last."""
    names = [block.name for block in anatomy(subject.model).blocks]
    return [*((name, "in") for name in names), (names[-1], "out")]


def attention(subject: LanguageModel) -> list[Place]:
    """What attention adds to the residual stream, block by block."""
    return [(block.attention_out[0].rpartition(".")[0], "out") for block in anatomy(subject.model).blocks]


def mlp(subject: LanguageModel) -> list[Place]:
    """What the MLP's output matrix gives, block by block; of mixtures of experts the experts' sum."""
    found: dict[int, str] = {}
    for matrix in value_matrices(subject.model):  # experts come after a shared one
        path = matrix.name.rpartition(".")[0]
        if matrix.expert is not None and not matrix.fused:
            path = path.partition(f".{matrix.expert}.")[0].rpartition(".")[0]
        found[matrix.layer] = path
    return [(path, "out") for _, path in sorted(found.items())]


def activations(subject: LanguageModel, prompts: Sequence[str], matrices: Sequence[ValueMatrix]) -> list[Tensor]:
    """For every matrix (n, f): the activations k of its neurons at the last token of each prompt.

    Args:
        matrices: such as have an `owner`: fused experts show no activations.
    """
    return watch(subject, prompts, [(str(matrix.owner), "in") for matrix in matrices])
