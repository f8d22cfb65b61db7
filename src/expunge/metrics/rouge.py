"""ROUGE (ACL W04-1013) of what the model answers, by default as TOFU and OpenUnlearning take it."""

from __future__ import annotations

import re

from ..registry import metric
from ..tables.view import View
from .texts import RougeDialect, RougeKind, RougeScore, empty_outputs, overlaps
from .values import Values, averages


@metric(
    paper="arXiv:2401.06121",
    sentence="How much of the right answer's wording appears, in order, in what the model writes when asked.",
    direction="closest_to_gold",
    ideal="the value of a model that never saw the rows",
    range=(0.0, 1.0),
    needs=("generations",),
    aliases={
        "verbatim_memorization": {"score": "fmeasure", "dialect": "rouge_score_unstemmed"},
        "knowledge_memorization": {"score": "fmeasure", "dialect": "rouge_score_unstemmed"},
    },
)
def rouge(
    view: View,
    *,
    rows: str = "forget",
    kind: RougeKind = "rougeL",
    score: RougeScore = "recall",
    dialect: RougeDialect = "rouge_score",
) -> Values:
    """Mean over rows of ROUGE of the model's output against the answer.

    `verbatim_memorization` (of continuations) and `knowledge_memorization` (of answers) are MUSE's, arXiv:2407.06460.

    Args:
        rows: the row set.
        kind: rouge1 counts words, rougeL the longest common subsequence of words.
        score: recall (TOFU) or F-measure (MUSE).
        dialect: rouge_score (TOFU, OpenUnlearning), rouge_score_unstemmed (MUSE) or rouge (RWKU, ConceptVectors): the
            package whose words are counted.
    """
    kept = view.of(rows)
    each = overlaps(view, rows, kept, kind, score, dialect)
    flag = empty_outputs(view, rows)
    wordless = 0 if dialect == "rouge" else sum(not re.search("[a-z0-9]", row.answer.lower()) for row in kept)
    if wordless:
        more = f"{wordless} answers have no Latin letter or digit, ROUGE counts them 0"
        flag = f"{flag}; {more}" if flag else more
    return averages(rows, kept, each, flag=flag)
