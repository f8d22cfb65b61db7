"""A filter on outputs: the plainest guard, and the known suppressed model of the self-test."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...errors import ParameterError
from ...registry import guard
from ...tables.generations import Generations
from .case import Chain, GuardCase, Guarded, Outlet
from .forbidden import Forbidden, Withholding, answers


class Filtered(Guarded):
    """A subject whose outputs are withheld when something forbidden stands in them."""

    def __init__(self, inner: Any, forbidden: Forbidden, refusal: str) -> None:
        self.forbidden = forbidden
        self.refusal = refusal
        told = sorted(" ".join(run) for run in forbidden.runs)
        super().__init__(inner, "output_filter", "behind an output filter", told, refusal)

    def generate(self, *arguments: Any, **options: Any) -> Generations:
        made = self.inner.generate(*arguments, **options)
        return replace(made, texts=[[self._pass(text) for text in texts] for texts in made.texts])

    def outlet(self, question: str) -> Outlet:
        own = Withholding(self.forbidden, self.refusal)
        inner = super().outlet(question)
        return Chain(inner, own) if inner else own

    def _pass(self, text: str) -> str:
        return self.refusal if self.forbidden.within(text) else text


@guard(
    paper="arXiv:2403.03329",
    level="decoding",
    modality=("image", "language"),
    requires=("forget_data",),
    keeps=("the forgotten answers, as the list of forbidden strings",),
    sequential="free",
    cost="a few look-ups per word of output",
    known_weaknesses=("logit_lens",),
)
def output_filter(case: GuardCase, *, refusal: str = "I don't know.", run: int = 5) -> Filtered:
    """Withhold any output that contains a forgotten value (Thaker et al. 2024). The weights stay as they are.

    Rows without a value forbid their answer: as it stands if it is short, else every run of `run` words of it that no
    retained answer has. Case, accents and punctuation do not matter.

    Args:
        refusal: what is said instead.
        run: number of consecutive words, at least 1.

    Raises:
        ParameterError: `run` is below 1.
    """
    if run < 1:
        raise ParameterError(f"output_filter: run = {run}: at least one word is needed")
    forbidden = Forbidden(
        answers(case.rows.get("forget", [])), allowed=[row.answer for row in case.rows.get("retain", [])], run=run
    )
    return Filtered(case.subject, forbidden, refusal)
