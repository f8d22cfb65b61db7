"""Neurons held at a constant while the model answers; its weights stay as they are (arXiv:2501.02688)."""

from __future__ import annotations

from typing import Any, Literal

from ...errors import RequestError
from ...registry import guard
from ...subjects.clamping import clamped
from ...subjects.language import LanguageModel
from ...subjects.value_vectors import Address
from .case import GuardCase, Guarded


class Clamped(Guarded):
    """A subject of which some neurons always give the same; every operation runs with them held."""

    def __init__(
        self, inner: LanguageModel, neurons: tuple[str, ...], value: float, matrix: Literal["up", "gate"]
    ) -> None:
        super().__init__(inner, "clamp", f"with {len(neurons)} neurons held", list(neurons), value, matrix)
        self.settings = (neurons, value, matrix)
        self.held = clamped(inner, {Address.parse(name): value for name in neurons}, matrix)

    def __getattr__(self, name: str) -> Any:
        if name in ("inner", "held"):
            raise AttributeError(name)
        return getattr(self.held, name)

    def copy(self) -> Clamped:
        return Clamped(self.inner.copy(), *self.settings)


@guard(
    paper="arXiv:2501.02688",
    level="activations",
    requires=("weights",),
    sequential="free",
    cost="nothing: one number a neuron and token",
    known_weaknesses=("not studied",),
)
def clamp(
    case: GuardCase, *, neurons: tuple[str, ...] = (), value: float = 0.0, matrix: Literal["up", "gate"] = "up"
) -> Clamped:
    """Hold neurons at a constant whatever they read: at 0 they are silent, far from it they insist on their token.

    Args:
        neurons: addresses such as "20:10513" (layer and neuron; in YAML with quotes); `expunge neurons find MODEL WORD`
            lists those that name a word.
        value: what they give.
        matrix: up holds what the up row gives, gate what the gate row gives before its activation.
    """
    if not isinstance(case.subject, LanguageModel):
        raise RequestError("clamp holds neurons of a model; put it around the model, not around another guard")
    if not neurons:
        raise RequestError("clamp: neurons names none, expected at least 1 such as 20:10513 (`expunge neurons find`)")
    return Clamped(case.subject, neurons, value, matrix)
