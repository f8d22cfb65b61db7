"""How far a model's predictions lie from gold's, token by token over the whole vocabulary (specs: metrics 3.6).

Scores of right answers cannot show it: two models that give an answer the same probability may share out the rest
differently. Both models read the same rows for it, so it is measured where it is asked for only.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from ..registry import metric
from ..tables.distances import NUMBERS
from ..tables.view import View
from .golds import golds_of
from .values import Values, averages

Kind = Literal["total_variation", "jensen_shannon", "kl", "disagreement"]


@metric(
    paper="arXiv:2506.12618",
    sentence=(
        "How differently the model and one that never saw the rows would go on at each word piece of the answers; 0 "
        "means they say the same."
    ),
    direction="lower",
    ideal="0; what two models reach that both never saw the rows",
    range=(0.0, None),
    needs=("distances", "gold"),
    standard=False,
)
def gold_divergence(view: View, *, rows: str = "forget", kind: Kind = "total_variation") -> Values:
    """Mean over rows of the distance between the next-token distributions of the model and of gold, of several golds
    their mean; `extra` holds all four.

    Args:
        rows: the row set.
        kind: total_variation (0 to 1), jensen_shannon (bits, 0 to 1), kl (KL(gold || model), nats) or disagreement
            (share of tokens whose likeliest candidate differs).
    """
    tables = [view.distance(gold.name, rows) for gold in golds_of(view)]
    means = {name: np.mean([getattr(table, name) for table in tables], axis=0, dtype=float) for name in NUMBERS}
    extra: dict[str, Any] = {name: float(each.mean()) for name, each in means.items()}
    return averages(rows, view.of(rows), means[kind], **extra)
