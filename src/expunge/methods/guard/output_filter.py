"""A filter on outputs: the plainest guard, and the known suppressed model of the self-test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ...registry import guard
from ...tables.generations import Generations
from .case import GuardCase, Guarded


class Filtered(Guarded):
    """A subject whose outputs are withheld when they contain a forbidden string."""

    def __init__(self, inner: Any, forbidden: Sequence[str], refusal: str) -> None:
        self.forbidden = tuple(sorted({text.casefold() for text in forbidden if text.strip()}))
        self.refusal = refusal
        super().__init__(inner, "output_filter", "behind an output filter", list(self.forbidden), refusal)

    def generate(self, *arguments: Any, **options: Any) -> Generations:
        made = self.inner.generate(*arguments, **options)
        return replace(made, texts=[[self._pass(text) for text in texts] for texts in made.texts])

    def _pass(self, text: str) -> str:
        lowered = text.casefold()
        return self.refusal if any(word in lowered for word in self.forbidden) else text


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
