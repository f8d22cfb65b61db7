"""Word overlap of an output with the right answer: ROUGE as published tables compute it, in three dialects.

They disagree on the same pair of texts, so a score names its dialect. Answer "Tivin", output "I think it is Tivin,
maybe.": recall 1 for `rouge_score`, 0 for `rouge`, to which "Tivin," is another word.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import numpy as np

from ..rows import Row
from ..tables.view import View

RougeKind = Literal["rouge1", "rougeL"]
RougeScore = Literal["recall", "fmeasure"]
RougeDialect = Literal["rouge_score", "rouge_score_unstemmed", "rouge"]
"""rouge_score: package rouge-score 0.1.2 with its stemmer (TOFU, OpenUnlearning); rouge_score_unstemmed: without it
(MUSE); rouge: package rouge 1.0.1 (RWKU, ConceptVectors)."""


class _Tokenizer:
    """The package's tokenizer with its Porter stemmer, which is asked once per word."""

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer

        self.stem = cache(PorterStemmer().stem)

    def tokenize(self, text: str) -> list[str]:
        from rouge_score.tokenize import tokenize

        return tokenize(text, self)


@cache
def _scorer(kind: RougeKind, stemmed: bool) -> Any:
    # nltk, which the package needs for its stemmer, takes a second to import.
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], tokenizer=_Tokenizer() if stemmed else None)


def overlap(
    target: str,
    text: str,
    kind: RougeKind = "rougeL",
    score: RougeScore = "recall",
    dialect: RougeDialect = "rouge_score",
) -> float:
    """ROUGE of `text` against `target`; `rouge_score` ignores case and punctuation, `rouge` does not."""
    if dialect == "rouge":
        return _of_word_sets(target, text, kind, score)
    return float(getattr(_scorer(kind, dialect == "rouge_score").score(target, text)[kind], score))


def _of_word_sets(target: str, text: str, kind: RougeKind, score: RougeScore) -> float:
    """As package rouge 1.0.1: words are split at spaces, sentences at full stops, and every word counts once.

    A text without words scores 0, where the package raises.
    """
    wanted, written = (
        [" ".join(part.split()).split(" ") for part in whole.split(".") if part] for whole in (target, text)
    )
    if not wanted or not written:
        return 0.0
    all_wanted, all_written = ({word for words in sentences for word in words} for sentences in (wanted, written))
    if kind == "rouge1":
        common = all_wanted & all_written
    else:
        common = {word for a in wanted for b in written for word in _common_subsequence(a, b)}
    recall, precision = len(common) / len(all_wanted), len(common) / len(all_written)
    return recall if score == "recall" else 2 * precision * recall / (precision + recall + 1e-8)


def _common_subsequence(a: Sequence[str], b: Sequence[str]) -> list[str]:
    """A longest common subsequence; where there are several, the one that leaves words of `b` out first from behind."""
    length = np.zeros((len(a) + 1, len(b) + 1), dtype=np.int64)
    for i, word in enumerate(a, start=1):
        for j, other in enumerate(b, start=1):
            if word == other:
                length[i, j] = length[i - 1, j - 1] + 1
            else:
                length[i, j] = max(length[i - 1, j], length[i, j - 1])
    found: list[str] = []
    i, j = len(a), len(b)
    while i and j:
        if a[i - 1] == b[j - 1]:
            found.append(a[i - 1])
            i, j = i - 1, j - 1
        elif length[i - 1, j] > length[i, j - 1]:
            i -= 1
        else:
            j -= 1
    return found


def overlaps(
    view: View,
    rows: str,
    kept: list[Row],
    kind: RougeKind,
    score: RougeScore,
    dialect: RougeDialect = "rouge_score",
) -> np.ndarray:
    """(rows,) ROUGE of each row's output against its answer; the mean over samples where there are several."""
    outputs = view.outputs(rows, ids=[row.id for row in kept])
    return np.array(
        [
            np.mean([overlap(row.answer, text, kind, score, dialect) for text in texts])
            for row, texts in zip(kept, outputs)
        ]
    )


def empty_outputs(view: View, rows: str) -> str:
    """A flag where most outputs are empty: a failure to generate looks like perfect forgetting."""
    outputs = [text for texts in view.outputs(rows) for text in texts]
    empty = sum(not text.strip() for text in outputs)
    return f"{empty} of {len(outputs)} outputs are empty" if empty * 2 > len(outputs) else ""


ENTROPY_WEIGHTS = {2: 2 / 3, 3: 4 / 3}
_WORD_OR_MARK = re.compile(r"\w+|[^\w\s]")


def entropy(words: Sequence[str], n: int) -> float:
    """H_n in bits; 0 for fewer than n words."""
    counts = np.array(list(Counter(zip(*(words[i:] for i in range(n)))).values()), dtype=np.float64)
    if not len(counts):
        return 0.0
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def text_entropy(text: str) -> float:
    """(2/3 H2 + 4/3 H3) / 2 of one text in bits; words and punctuation marks count."""
    words = _WORD_OR_MARK.findall(text)
    return sum(weight * entropy(words, n) for n, weight in ENTROPY_WEIGHTS.items()) / len(ENTROPY_WEIGHTS)
