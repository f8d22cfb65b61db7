"""Other answers to forget questions, written by the model that is to forget (AltPO, arXiv:2409.13474)."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import RowError
from ...rows import Row
from ...subjects.language import LanguageModel

ASKED = (
    "Question: {question}\nAnswer: {answer}\n"
    "Write another answer to this question: one that could be true, says something else, and has the same form.\n"
)
OPENING = "Other answer:"
LONGEST = 200
"""Tokens of an answer, as in the paper."""


def written(subject: LanguageModel, rows: Sequence[Row], count: int, seed: int) -> list[list[str]]:
    """Up to `count` answers to every row's question, sampled at temperature 1, the first line of each; those that are
    empty or the row's own are left out, and equal ones count once.

    Raises:
        RowError: of some row nothing is left.
    """
    asked = [
        Row(row.id, "", ASKED.format(question=row.prompt, answer=row.answer), kind="instruction", opening=OPENING)
        for row in rows
    ]
    limit = min(LONGEST, 2 * max(subject.encode(row).scored for row in rows))
    made = subject.generate(
        [((row.id, "alternate"), subject.prompt_text(row)) for row in asked],
        max_new_tokens=limit,
        samples=count,
        temperature=1.0,
        seed=seed,
    )
    found = []
    for row, texts in zip(rows, made.texts):
        lines = dict.fromkeys(text.strip().partition("\n")[0].strip() for text in texts)
        kept = [line for line in lines if line and line != row.answer.strip()]
        if not kept:
            raise RowError(
                f"{row.source or f'row {row.id}'}: {subject.name} wrote no other answer in {count} attempts; give the "
                "row perturbed answers, or a file of alternates"
            )
        found.append(kept)
    return found
