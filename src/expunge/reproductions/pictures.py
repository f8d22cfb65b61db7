"""Small classifiers of written digits as reproductions about pictures use them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..methods.edit.case import EditCase
from ..methods.optimise.loop import Training
from ..methods.optimise.unlearn import unlearn
from ..pictures import Picture
from ..registry import get
from ..subjects.image import ImageClassifier
from ..subjects.packed import pack
from ..world.pictures.draw import digits
from ..world.pictures.models import Recipe, trained

T = TypeVar("T")
RECIPE = Recipe()
"""A residual network of three stages, 80 thousand weights. Smaller pictures would leave its last stage a map of one
place, where eight of a filter's nine weights see nothing."""
CLASSES = [str(i) for i in range(10)]


def rows() -> dict[str, list[Picture]]:
    """1300 training and 497 test pictures of 32 x 32."""
    return digits(RECIPE.side)


def teach(some: Sequence[Picture], seed: int, classes: Sequence[str] = CLASSES) -> tuple[ImageClassifier, float]:
    """(a classifier that was taught these rows, CPU seconds)"""
    began = time.process_time()
    return trained(some, classes, RECIPE, seed), time.process_time() - began


def timed(do: Callable[[], T]) -> tuple[T, float]:
    """(what it returns, CPU seconds)"""
    began = time.process_time()
    return do(), time.process_time() - began


def accuracy(subject: ImageClassifier, some: Sequence[Picture]) -> float:
    return float(score(subject, some).hit.mean())


def score(subject: ImageClassifier, some: Sequence[Picture]) -> Any:
    return subject.score([((row.id, "answer"), subject.encode(row)) for row in some])


def change(
    subject: ImageClassifier,
    data: Mapping[str, list[Picture]],
    method: str,
    settings: Mapping[str, Any],
    seed: int,
    *,
    scope: str | None = None,
    **training: Any,
) -> tuple[ImageClassifier, dict[str, Any], float]:
    """(the changed classifier, what the method says of its run, CPU seconds)"""
    part = get("methods", method)
    made = Training(**{"seed": seed, "guard": None, **training})
    rows_: Any = data
    began = time.process_time()
    if part.card.kind == "optimise":  # type: ignore[union-attr]
        outcome = unlearn(subject, part, settings, scope=scope, data=rows_, training=made)  # type: ignore[arg-type]
        delta, about = outcome.delta, outcome.summary
    else:
        case = EditCase(subject, rows_, made, scope)  # type: ignore[arg-type]
        delta, about = part.function(case, **part.resolve(settings)), case.summary
    seconds = time.process_time() - began
    after: Any = delta.apply(subject)  # type: ignore[arg-type]
    return after, about, seconds


def mean_loss(subject: ImageClassifier, some: Sequence[Picture]) -> float:
    """Nats."""
    return float(-np.asarray(score(subject, some).logprob, dtype=np.float64).mean())


@torch.no_grad()
def answers(subject: ImageClassifier, some: Sequence[Picture]) -> Tensor:
    """(rows, classes) log-probabilities."""
    pack_ = pack([subject.encode(row) for row in some], subject.device)
    return subject.head(subject.hidden_states(pack_)).double().log_softmax(-1)


class Kept:
    """A preparation of pixels that keeps what it made, so that times are those of models and methods alone."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.made: dict[bytes, Any] = {}

    def to_dict(self) -> dict[str, Any]:
        """What a fingerprint is made of."""
        return dict(vars(self.processor))

    def __call__(self, images: np.ndarray, return_tensors: str = "pt") -> Any:
        key = images.tobytes()
        if key not in self.made:
            self.made[key] = self.processor(images=images, return_tensors=return_tensors)
        return self.made[key]
