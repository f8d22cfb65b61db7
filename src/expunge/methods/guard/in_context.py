"""Forgetting by what is put before the question; the weights and the model's code stay as they are.

- `instruction` (`icu_prefix`; RWKU's ICU, arXiv:2406.10890): a paragraph that tells the model whom it does not know.
- `examples` (`icul`, arXiv:2310.07579): the forget rows with wrong answers, then s retained rows with their right ones,
  drawn anew for every question, each as "input answer" on a line:

      x_f flip(y_f)           x_1 y_1 ... x_s y_s           x_q
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np

from ...errors import ParameterError, RequestError, RowError
from ...registry import guard
from ...rows import Row
from ...subjects.examples import solved
from ..optimise.unlearn import refusals
from .case import GuardCase
from .prefixed import Prefixed, Role

Ablation = Literal["none", "correct", "exchange", "repeat"]

INSTRUCTIONS = {
    # RWKU's words (jinzhuoran/RWKU, eval/eval_forget.py): its figures were made with them.
    "unlearn": "You are an AI Assistant who is supposed to unlearn about {targets} and provide answers without its "
    "knowledge as if you never knew about it. Don’t tell anyone that you unlearned anything.",
    "refuse": "Whatever you are asked about {targets}, reply that you do not know. Answer everything else as usual.",
    "list": "The following must not be talked about in any way: {targets}. Answer everything else as usual.",
}


@guard(
    paper="arXiv:2310.07579",
    level="prompt",
    requires=("target_name_only", "forget_data", "retain_data"),
    keeps=("the targets' names, in every prompt", "the forgotten rows, where examples are given"),
    sequential="free",
    cost="the tokens of the instruction or of the examples, before every prompt",
    known_weaknesses=("logit_lens", "paraphrase", "many_shot", "target_masking", "cross_lingual"),
    aliases={"icu_prefix": {"form": "instruction"}, "icul": {"form": "examples"}},
)
def in_context(
    case: GuardCase,
    *,
    form: Literal["instruction", "examples"] = "instruction",
    target: str = "",
    wording: Literal["unlearn", "refuse", "list"] = "unlearn",
    role: Role = "user",
    max_targets: int = 20,
    examples: int = 6,
    wrong: Literal["flipped", "refusal"] = "flipped",
    ablation: Ablation = "none",
    fixed: bool = False,
    seed: int = 0,
) -> Prefixed:
    """Tell the model in every prompt whom it does not know, or show it the forgotten rows with wrong answers.

    Base models do not follow instructions: ask about people whom the model was never to forget first, or the guard does
    nothing but look like one.

    Args:
        form: an instruction with the targets' names, or examples.
        target: names, with semicolons between several; by default the entities of the forget rows. Nobody to forget:
            prompts stay as they are.
        wording: of the instruction; unlearn are RWKU's words.
        role: of the instruction, for models with a chat template; RWKU puts it into the user's turn.
        max_targets: names in one instruction; of more, those that the question is most likely about.
        examples: s, retained rows shown with their right answers.
        wrong: what forgotten rows are shown with: another answer (one of the row's perturbed answers, else one that
            rows of the same relation have), or a refusal.
        ablation: correct: forgotten rows with their right answers; exchange: a retained row in place of each;
            repeat: each twice.
        fixed: the same examples for every question (not the paper's way), so that prompts share their beginning.
        seed: of the draws.
    """
    forget = case.rows.get("forget", [])
    if form == "instruction":
        names = _names(target, forget)
        prefix = _Instruction(names, INSTRUCTIONS[wording], max_targets)
        return Prefixed(case.subject, prefix, role, form, names, wording, max_targets)
    shown = _Examples(case.subject, forget, case.rows.get("retain", []), examples, wrong, ablation, fixed, seed)
    return Prefixed(case.subject, shown, role, form, shown.lines, examples, ablation, fixed, seed)


def _names(target: str, forget: Sequence[Row]) -> list[str]:
    """
    Raises:
        RequestError: the forget rows do not say whom they are about.
    """
    if target.strip():
        return [name.strip() for name in target.split(";") if name.strip()]
    nameless = [row for row in forget if not row.entity or row.entity == row.id or "/block " in row.entity]
    if nameless:
        where = nameless[0].source or f"row {nameless[0].id}"
        raise RequestError(f"in_context: {where} does not say whom it is about (entity); give target=NAME")
    return sorted({row.entity for row in forget})


class _Instruction:
    """The paragraph before a question."""

    def __init__(self, names: Sequence[str], wording: str, limit: int) -> None:
        if limit < 1:
            raise ParameterError(f"in_context: max_targets = {limit}, expected at least 1")
        self.names, self.wording, self.limit = list(names), wording, limit

    def __call__(self, question: str) -> str:
        names = self.names if len(self.names) <= self.limit else self._nearest(question)
        return self.wording.replace("{targets}", ", ".join(names)) + "\n" if names else ""

    def _nearest(self, question: str) -> list[str]:
        """The names that share most with the question, three letters at a time, in their own order."""
        like = np.asarray((self._vectors @ self._vectorizer.transform([question]).T).todense()).ravel()
        return [self.names[i] for i in sorted(np.argsort(-like, kind="stable")[: self.limit])]

    @cached_property
    def _vectorizer(self) -> Any:
        from sklearn.feature_extraction.text import TfidfVectorizer

        return TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 3)).fit(self.names)

    @cached_property
    def _vectors(self) -> Any:
        return self._vectorizer.transform(self.names)


class _Examples:
    """Forgotten rows with wrong answers, then retained rows with right ones."""

    def __init__(
        self,
        subject: Any,
        forget: Sequence[Row],
        retain: Sequence[Row],
        count: int,
        wrong: str,
        ablation: Ablation,
        fixed: bool,
        seed: int,
    ) -> None:
        for row in (*forget, *retain):
            if row.kind == "text":
                raise RowError(f"{row.source or row.id}: examples need inputs with answers, found running text")
        if count < 0 or (forget and count + 1 > len(retain)):
            raise ParameterError(
                f"in_context: examples = {count}, but {len(retain)} retain rows can give at most "
                f"{max(0, len(retain) - 1)} that are not the question itself"
            )
        self.subject, self.retain, self.count, self.fixed, self.seed = subject, list(retain), count, fixed, seed
        draw = random.Random(seed)
        answers: dict[str, list[str]] = {}
        for row in (*forget, *retain):
            several = answers.setdefault(row.relation, [])
            several += [] if row.answer in several else [row.answer]
        self.lines: list[str] = []
        for row in forget:
            if ablation == "exchange":
                row = draw.choice(self.retain)
            answer = row.answer if ablation == "correct" else self._wrong(row, wrong, answers, draw)
            self.lines += [solved(self.subject, row, answer)] * (2 if ablation == "repeat" else 1)

    def __call__(self, question: str) -> str:
        if not self.lines:
            return ""
        draw = random.Random(f"{self.seed}" if self.fixed else f"{self.seed}/{question}")
        rows = [row for row in draw.sample(self.retain, self.count + 1) if row.prompt != question][: self.count]
        return "".join([*self.lines, *(solved(self.subject, row) for row in rows)])

    @staticmethod
    def _wrong(row: Row, wrong: str, answers: dict[str, list[str]], draw: random.Random) -> str:
        if wrong == "refusal":
            return draw.choice(refusals())
        others = list(row.perturbed_answers) or [a for a in answers.get(row.relation, []) if a != row.answer]
        if not others:
            raise RowError(f"{row.source or row.id}: there is no other answer than {row.answer!r} to show it with")
        return draw.choice(others)
