"""IKE: a new fact told in the prompt, behind demonstrations of how new facts are taken (arXiv:2305.12740).

    New Fact: {fact} {answer}           copy     asked in the fact's own words, the new answer
    Prompt: {question} {its answer}     update   asked in other words, the new answer
                                        retain   something else asked, its old answer
    ... k of these, those most like the fact last
    New Fact: {fact} {answer}
    Prompt: {what is asked}

With k = 0 it is in-context editing without demonstrations (ICE). One fact is told, whatever is asked, as published; of
several the one most like the question, by cosine of TF-IDF vectors of character trigrams (the paper uses a sentence
encoder). Models that do not read contexts this way ignore it: ask the demonstrations themselves first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from ...edits import EditRow
from ...errors import ParameterError, RequestError
from ...registry import guard
from ..edit.case import targeted
from .case import GuardCase
from .prefixed import Prefixed

SHARES = (1, 3, 4)
"""Of every eight demonstrations so many copy, update and retain (the published mix)."""


@guard(
    paper="arXiv:2305.12740",
    level="prompt",
    needs=("edits",),
    requires=("forget_data",),
    keeps=("the new facts, and the demonstrations, in every prompt",),
    sequential="free",
    cost="the tokens of k demonstrations and one fact, before every prompt",
    known_weaknesses=("logit_lens", "relearn", "paraphrase"),
)
def ike(
    case: GuardCase,
    *,
    k: int = 0,
    fact: str = "New Fact: {fact}",
    question: str = "Prompt: ",
    seed: int = 0,
) -> Prefixed:
    """Tell the model the new fact in front of every prompt, behind k demonstrations (Zheng et al. 2023; published: 16).

    `fact` and `question` are the frame's two lines; {fact} stands for prompt and answer. With k above 0 the request
    must give demonstrations: edit rows of other facts, with rephrasings and locality. Forget rows are facts whose new
    answer is a refusal, drawn by `seed`; without facts prompts stay as they are.
    """
    if k < 0 or "{fact}" not in fact:
        raise ParameterError(f"ike: k is {k} and fact {fact!r}; expected k >= 0 and a text with {{fact}}")
    if k and not case.demonstrations:
        raise RequestError(
            f"ike: k is {k} and there are 0 demonstrations; give edit rows as demonstrations, or set k=0"
        )
    facts = targeted(case.edits, case.rows.get("forget", []), seed)
    prefix = _Told(facts, case.demonstrations, k, fact, question)
    told = [[one.prompt, one.target_new] for one in facts]
    shown = [[one.id, one.prompt, one.target_new] for one in case.demonstrations] if k else []
    return Prefixed(case.subject, prefix, "user", "a new fact", told, shown, k, fact, question)


class _Told:
    """What stands before a question."""

    def __init__(
        self, edits: Sequence[EditRow], demonstrations: Sequence[EditRow], k: int, fact: str, question: str
    ) -> None:
        self.edits, self.demonstrations, self.k = list(edits), list(demonstrations) if k else [], k
        self.fact, self.question = fact + "\n", question

    def __call__(self, question: str) -> str:
        if not self.edits:
            return ""
        new = self.edits[0] if len(self.edits) == 1 else self.edits[self._order(self._facts, question)[-1]]
        shown = ""
        if self.k:
            near = self._order(self._shown, new.prompt)[-self.k :]
            for number, place in enumerate(near):
                one = self.demonstrations[place]
                asked, answer = self._kind(one, number)
                shown += self._said(one) + self.question + f"{asked} {answer}\n\n"
        return shown + self._said(new) + self.question

    def _said(self, one: EditRow) -> str:
        return self.fact.replace("{fact}", f"{one.prompt} {one.target_new}")

    @staticmethod
    def _kind(one: EditRow, number: int) -> tuple[str, str]:
        """What is asked behind a demonstration's fact, and the answer; its copy stands in for what a row lacks."""
        place = number % sum(SHARES)
        kept = [probe for several in one.locality.values() for probe in several]
        if place >= SHARES[0] + SHARES[1] and kept:
            return kept[0].prompt, kept[0].answers[0]
        if place >= SHARES[0] and one.rephrasings:
            return one.rephrasings[0], one.target_new
        return one.prompt, one.target_new

    def _order(self, vectors: Any, text: str) -> list[int]:
        """Places from the least like the text to the most."""
        like = np.asarray((vectors @ self._vectorizer.transform([text]).T).todense()).ravel()
        return [int(i) for i in np.argsort(like, kind="stable")]

    @cached_property
    def _vectorizer(self) -> Any:
        from sklearn.feature_extraction.text import TfidfVectorizer

        texts = [one.prompt for one in (*self.edits, *self.demonstrations)]
        return TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 3)).fit(texts)

    @cached_property
    def _facts(self) -> Any:
        return self._vectorizer.transform([one.prompt for one in self.edits])

    @cached_property
    def _shown(self) -> Any:
        return self._vectorizer.transform([one.prompt for one in self.demonstrations])
