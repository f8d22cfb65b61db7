"""Soft prompts: vectors that stand in the place of a few tokens before every prompt, and directions taken out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ParameterError
from .language import LanguageModel
from .packed import Encoded, pack


class SoftPrompt:
    """`count` vectors in a model (a copy that is thrown away): wherever `text` stands, they are read in its place.

    The text is a special token that prompts do not hold, `count` times.
    """

    def __init__(self, subject: LanguageModel, count: int) -> None:
        """
        Raises:
            ParameterError: the tokenizer has no special token beside those that begin and end texts.
        """
        words = subject.tokenizer
        spare = [t for t in words.all_special_tokens if t not in (words.bos_token, words.eos_token)]
        if not spare:
            raise ParameterError(f"{subject.name} has no special token that a soft prompt could stand for")
        self.count = count
        self.text = spare[-1] * count
        self.token = words.convert_tokens_to_ids(spare[-1])
        embedding: Any = subject.model.get_input_embeddings()
        draw = torch.Generator().manual_seed(count)
        start = torch.randperm(len(words), generator=draw)[:count].to(subject.device)
        self.vectors = nn.Parameter(embedding.weight.detach()[start].clone())
        embedding.register_forward_hook(self._put)

    def _put(self, _: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        at = arguments[0] == self.token
        place = (at.flatten().cumsum(0) - 1).remainder(self.count).view_as(at)
        return torch.where(at[..., None], self.vectors[place], output)

    def learn(
        self,
        subject: LanguageModel,
        rows: Sequence[Encoded],
        *,
        steps: int,
        batch_size: int,
        learning_rate: float,
        seed: int,
        evaluate_at: Sequence[int] = (),
        evaluate: Callable[[int], None] | None = None,
    ) -> None:
        """Train the vectors, and nothing else, on the answers of rows that begin with `text`."""
        draw = torch.Generator().manual_seed(seed)
        flags = [parameter.requires_grad for parameter in subject.model.parameters()]
        subject.model.requires_grad_(False)
        optimiser = torch.optim.AdamW([self.vectors], lr=learning_rate, weight_decay=0.0)
        for step in range(1, steps + 1):
            chosen = torch.randperm(len(rows), generator=draw)[:batch_size].tolist()
            packed = pack([rows[i] for i in chosen], subject.device)
            logits = subject.head(subject.hidden_states(packed)).float()
            optimiser.zero_grad()
            nn.functional.cross_entropy(logits, packed.target).backward()
            optimiser.step()
            if step in evaluate_at and evaluate is not None:
                evaluate(step)
        for parameter, flag in zip(subject.model.parameters(), flags):
            parameter.requires_grad_(flag)


def take_out(subject: LanguageModel, direction: Tensor) -> None:
    """h <- h - (h . r) r after every block of a model (a copy that is thrown away), r the direction (d,) at length 1.

    Raises:
        ParameterError: the direction is zero.
    """
    if not float(direction.norm()):
        raise ParameterError("the direction to be taken out is zero")
    unit = (direction / direction.norm()).to(subject.device, subject.dtype)

    def without(_: nn.Module, __: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        states = states - (states @ unit)[..., None] * unit
        return (states, *output[1:]) if isinstance(output, tuple) else states

    for block in subject.blocks:
        subject.model.get_submodule(block.name).register_forward_hook(without)
