"""Word overlap between what a model wrote and the right answer: ROUGE as the package `rouge_score` computes it."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import numpy as np

from ..rows import Row
from ..tables.view import View

RougeKind = Literal["rouge1", "rougeL"]
RougeScore = Literal["recall", "fmeasure"]


class _Tokenizer:
    """The package's tokenizer with its Porter stemmer, which is asked once per word."""

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer

        self.stem = cache(PorterStemmer().stem)

    def tokenize(self, text: str) -> list[str]:
        from rouge_score.tokenize import tokenize

        return tokenize(text, self)


@cache
def _scorer(kind: RougeKind) -> Any:
    # nltk, which the package needs for its stemmer, takes a second to import.
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], tokenizer=_Tokenizer())


def overlap(target: str, text: str, kind: RougeKind = "rougeL", score: RougeScore = "recall") -> float:
    """ROUGE of `text` against `target`, stemmed, case and punctuation ignored."""
    return float(getattr(_scorer(kind).score(target, text)[kind], score))


def overlaps(view: View, rows: str, kept: list[Row], kind: RougeKind, score: RougeScore) -> np.ndarray:
    """(rows,) ROUGE of each row's output against its answer; the mean over samples where there are several."""
    outputs = view.outputs(rows, ids=[row.id for row in kept])
    return np.array(
        [np.mean([overlap(row.answer, text, kind, score) for text in texts]) for row, texts in zip(kept, outputs)]
    )


def empty_outputs(view: View, rows: str) -> str:
    """A flag where most outputs are empty: a failure to generate looks like perfect forgetting."""
    outputs = [text for texts in view.outputs(rows) for text in texts]
    empty = sum(not text.strip() for text in outputs)
    return f"{empty} of {len(outputs)} outputs are empty" if empty * 2 > len(outputs) else ""
