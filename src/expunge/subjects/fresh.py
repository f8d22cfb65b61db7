"""The same architecture with weights that nothing was taught."""

from __future__ import annotations

import copy
from typing import Any

import torch


def buildable(subject: Any) -> bool:
    """Whether `fresh` can build the subject's architecture."""
    return getattr(subject, "factory", None) is not None or getattr(subject.model, "config", None) is not None


def fresh(subject: Any, seed: int) -> Any:
    """A copy of a subject with newly initialised weights, drawn by the seed; all modules, however deep.

    A transformers model is built anew from its configuration, any other one by the subject's `factory`.

    Raises:
        SubjectError: there is neither.
    """
    from ..errors import SubjectError

    if not buildable(subject):
        raise SubjectError(f"{subject.name} cannot be built anew: it has no configuration and was given no factory")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        factory = getattr(subject, "factory", None)
        model = factory() if factory is not None else type(subject.model)(copy.deepcopy(subject.model.config))
    return subject.with_model(model.to(subject.device, subject.dtype))
