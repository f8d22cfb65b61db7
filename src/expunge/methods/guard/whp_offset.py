"""Who's Harry Potter at inference, as MUSE uses it: what a reinforced copy likes better is made less likely."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...deltas import Delta
from ...errors import RequestError
from ...registry import guard
from ...subjects.decoding import Started
from ...subjects.language import LanguageModel
from ...subjects.packed import Pack
from ...tables.generations import Generations
from ...tables.scores import Scores
from ...tables.store import content_key
from ..optimise.loop import Training
from ..optimise.reinforce import REINFORCE
from ..optimise.unlearn import unlearn
from .case import GuardCase


class _Both:
    """Prompts that two models have read and go on with."""

    def __init__(self, pair: _Pair, started: Sequence[Started]) -> None:
        self.pair = pair
        self.started = started
        self.logits = pair.lowered(*(one.logits for one in started))

    def keep(self, rows: Tensor) -> None:
        for one in self.started:
            one.keep(rows)

    def follow(self, tokens: Tensor) -> Tensor:
        return self.pair.lowered(*(one.follow(tokens) for one in self.started))


class _Pair(LanguageModel):
    """Two models read and written with as one: hidden states side by side (n, 2 d), one head for both."""

    def __init__(self, subject: LanguageModel, reinforced: LanguageModel, alpha: float, centre: bool) -> None:
        super().__init__(subject.model, subject.tokenizer, subject.name, subject.template)
        self.pair = (subject, reinforced)
        self.alpha = alpha
        self.centre = centre

    def hidden_states(self, pack_: Pack) -> Tensor:
        return torch.cat([one.hidden_states(pack_) for one in self.pair], dim=1)

    def head(self, hidden: Tensor) -> Tensor:
        return self.lowered(*(one.head(part) for one, part in zip(self.pair, hidden.chunk(2, dim=1))))

    def start(self, prompts: Sequence[Sequence[int]], limit: int, samples: int = 1) -> Any:
        return _Both(self, [one.start(prompts, limit, samples) for one in self.pair])

    def lowered(self, z: Tensor, reinforced: Tensor) -> Tensor:
        """z - alpha relu(z_reinforced - z), (n, V) in fp32."""
        z, reinforced = z.float(), reinforced.float()
        if self.centre:
            # Logits that are all higher say nothing; log-probabilities do not have them.
            z, reinforced = z.log_softmax(-1), reinforced.log_softmax(-1)
        return z - self.alpha * (reinforced - z).relu()


class Offset:
    """A subject that answers and is scored with lowered logits; hidden states and weights are the subject's own."""

    def __init__(self, inner: LanguageModel, reinforced: LanguageModel, alpha: float, centre: bool = True) -> None:
        self.inner = inner
        self.reinforced = reinforced
        self.alpha = alpha
        self.centre = centre
        self.pair = _Pair(inner, reinforced, alpha, centre)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    @cached_property
    def fingerprint(self) -> str:
        both = [self.inner.fingerprint, self.reinforced.fingerprint]
        return content_key("whp_offset", self.alpha, self.centre, both)

    @cached_property
    def name(self) -> str:
        return f"{self.inner.name} with lowered logits"

    def generate(self, *arguments: Any, **options: Any) -> Generations:
        return self.pair.generate(*arguments, **options)

    def score(self, *arguments: Any, **options: Any) -> Scores:
        return self.pair.score(*arguments, **options)

    def copy(self) -> Offset:
        return Offset(self.inner.copy(), self.reinforced, self.alpha, self.centre)


@guard(
    paper="arXiv:2310.02238",
    requires=("weights", "gradients", "forget_data"),
    keeps=("a copy of the model that was trained further on the forget rows",),
    cost="6N per token of the reinforcing epochs; then every token costs two models and two caches",
    known_weaknesses=("logit_lens", "relearn"),
)
def whp_offset(
    case: GuardCase,
    *,
    alpha: float = 1.0,
    epochs: float = 10.0,
    learning_rate: float = 1e-5,
    batch_size: int = 32,
    centre: bool = True,
    reinforced: str = "",
    seed: int = 0,
) -> Offset:
    """Answer with z - alpha relu(z_reinforced - z), z the model's logits (Eldan & Russinovich 2023, eq. 1).

    MUSE's form (arXiv:2407.06460): at every token, with the text as it is. `alpha` is 5 in the paper; the reinforced
    copy is trained on the forget rows as MUSE does. `centre` compares log-probabilities in place of logits (off for
    MUSE's own form). `reinforced` names a copy that was trained already: a model folder, or a delta over this model.
    """
    if alpha < 0:
        raise RequestError(f"whp_offset: alpha is {alpha}, expected at least 0")
    if not isinstance(case.subject, LanguageModel):
        raise RequestError("whp_offset trains a copy of the model; put it around the model, not around another guard")
    return Offset(case.subject, _reinforced(case, epochs, learning_rate, batch_size, reinforced, seed), alpha, centre)


def _reinforced(
    case: GuardCase, epochs: float, learning_rate: float, batch_size: int, path: str, seed: int
) -> LanguageModel:
    subject: LanguageModel = case.subject
    if path:
        if (Path(path) / "delta.json").is_file():
            return Delta.load(path).apply(subject)
        return LanguageModel.load(path, device=str(subject.device))
    training = Training(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        schedule="cosine",
        guard=None,
        seed=seed,
    )
    data = {"forget": case.rows.get("forget", [])}
    return unlearn(subject, REINFORCE, {}, scope=None, data=data, training=training).delta.apply(subject)
