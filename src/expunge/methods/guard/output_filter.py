"""A filter on outputs: the plainest guard, and the known suppressed model of the self-test."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from ...registry import guard
from ...tables.generations import Generations
from ...tables.store import content_key
from .case import GuardCase


class Filtered:
    """A subject whose outputs are withheld when they contain a forbidden string; everything else is the subject's."""

    def __init__(self, inner: Any, forbidden: Sequence[str], refusal: str) -> None:
        self.inner = inner
        self.forbidden = tuple(sorted({text.casefold() for text in forbidden if text.strip()}))
        self.refusal = refusal

    def __getattr__(self, name: str) -> Any:
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    @property
    def fingerprint(self) -> str:
        own = content_key("output_filter", list(self.forbidden), self.refusal, self.inner.fingerprint)
        return hashlib.sha256(own.encode()).hexdigest()

    @cached_property
    def name(self) -> str:
        return f"{self.inner.name} behind an output filter"

    def generate(self, *arguments: Any, **options: Any) -> Generations:
        made = self.inner.generate(*arguments, **options)
        return replace(made, texts=[[self._pass(text) for text in texts] for texts in made.texts])

    def _pass(self, text: str) -> str:
        lowered = text.casefold()
        return self.refusal if any(word in lowered for word in self.forbidden) else text

    def copy(self) -> Filtered:
        return Filtered(self.inner.copy(), self.forbidden, self.refusal)


@guard(
    paper="arXiv:2403.03329",
    level="decoding",
    requires=("forget_data",),
    keeps=("the forgotten answers, as the list of forbidden strings",),
    sequential="free",
    cost="one string search per output",
    known_weaknesses=("logit_lens",),
)
def output_filter(case: GuardCase, *, refusal: str = "I don't know.") -> Filtered:
    """Withhold any output that contains a forgotten value (Thaker et al. 2024). The weights stay as they are."""
    forget = case.rows.get("forget", [])
    return Filtered(case.subject, [text for row in forget for text in (row.value or row.answer, *row.aliases)], refusal)
