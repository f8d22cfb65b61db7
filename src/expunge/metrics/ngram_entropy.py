"""n-gram entropy (arXiv:2202.05262, arXiv:2406.10890): how varied the outputs are; low means they repeat themselves.

(2/3 H2 + 4/3 H3) / 2 with H_n = -sum f log2 f over the frequencies f of the n-grams of one output.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from ..registry import metric
from ..tables.view import View
from .texts import empty_outputs
from .values import Values, averages

WEIGHTS = {2: 2 / 3, 3: 4 / 3}
_WORD = re.compile(r"\w+|[^\w\s]")


def entropy(words: Sequence[str], n: int) -> float:
    """H_n in bits; 0 for fewer than n words."""
    counts = np.array(list(Counter(zip(*(words[i:] for i in range(n)))).values()), dtype=np.float64)
    if not len(counts):
        return 0.0
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def text_entropy(text: str) -> float:
    """(2/3 H2 + 4/3 H3) / 2 of one text in bits; words and punctuation marks count."""
    words = _WORD.findall(text)
    return sum(weight * entropy(words, n) for n, weight in WEIGHTS.items()) / len(WEIGHTS)


@metric(
    paper="arXiv:2202.05262",
    sentence="How varied the model's sentences are; a low value means that it repeats itself.",
    direction="closest_to_gold",
    ideal="the value of a model that never saw the forget rows",
    range=(0.0, None),
    needs=("generations",),
)
def ngram_entropy(view: View, *, rows: str = "forget") -> Values:
    """Mean over outputs of the weighted 2- and 3-gram entropy in bits; short answers have little whatever the model."""
    each = np.array([np.mean([text_entropy(text) for text in texts]) for texts in view.outputs(rows)])
    return averages(rows, view.of(rows), each, flag=empty_outputs(view, rows))
