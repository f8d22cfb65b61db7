"""Several models that answer as one: the mean of their logits."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ...subjects.decoding import Started
from ...subjects.image import ImageClassifier
from ...subjects.language import LanguageModel
from ...subjects.packed import Pack
from ...tables.store import content_key


def averaged(members: Sequence[Any]) -> Any:
    """One subject for several of the same kind and size; a single one is itself."""
    if len(members) == 1:
        return members[0]
    name = f"{members[0].name}, {len(members)} shards"
    if isinstance(members[0], ImageClassifier):
        return ImageClassifier(_Classifiers(members), members[0].classes, members[0].processor, name)
    return AveragedLanguageModel(members, name)


class _Classifiers(nn.Module):
    """Features of all members side by side, and one head over them: the mean of their logits is linear in both."""

    def __init__(self, members: Sequence[ImageClassifier]) -> None:
        super().__init__()
        self.members = nn.ModuleList()
        heads = [member.linear_head for member in members]
        for member in members:
            model = copy.deepcopy(member.model, {id(p): p for p in member.model.parameters()})
            model.set_submodule(member._head_name, nn.Identity())
            self.members.append(model)
        weight = torch.cat([head.weight for head in heads], 1).detach() / len(heads)
        self.head = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
        self.head.weight = nn.Parameter(weight)
        none = weight.new_zeros(len(weight))
        biases: list[Tensor] = [none if head.bias is None else head.bias.detach() for head in heads]
        self.head.bias = nn.Parameter(torch.stack(biases).mean(0))

    def forward(self, pixels: Tensor) -> Tensor:
        found = [model(pixels) for model in self.members]
        features = torch.cat([one if isinstance(one, Tensor) else one.logits for one in found], -1)
        return self.head(features)  # type: ignore[no-any-return]


class _Started:
    """Prompts that all members have read and go on with."""

    def __init__(self, started: Sequence[Started]) -> None:
        self.started = started
        self.logits = self._mean([one.logits for one in started])

    def keep(self, rows: Tensor) -> None:
        for one in self.started:
            one.keep(rows)

    def follow(self, tokens: Tensor) -> Tensor:
        return self._mean([one.follow(tokens) for one in self.started])

    @staticmethod
    def _mean(logits: Sequence[Tensor]) -> Tensor:
        return torch.stack([one.float() for one in logits]).mean(0)


class AveragedLanguageModel(LanguageModel):
    """Members read and write as one: hidden states side by side (n, m d), the mean of m heads.

    It is scored and generates; it has no weights or hidden states of its own to be looked into.
    """

    def __init__(self, members: Sequence[LanguageModel], name: str) -> None:
        super().__init__(members[0].model, members[0].tokenizer, name, members[0].template)
        self.members = list(members)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over all members."""
        return content_key("averaged", *(member.fingerprint for member in self.members))

    def hidden_states(self, pack_: Pack) -> Tensor:
        return torch.cat([member.hidden_states(pack_) for member in self.members], dim=1)

    def head(self, hidden: Tensor) -> Tensor:
        parts = hidden.chunk(len(self.members), dim=1)
        return torch.stack([member.head(part).float() for member, part in zip(self.members, parts)]).mean(0)

    def start(self, prompts: Sequence[Sequence[int]], limit: int, samples: int = 1) -> Any:
        return _Started([member.start(prompts, limit, samples) for member in self.members])
