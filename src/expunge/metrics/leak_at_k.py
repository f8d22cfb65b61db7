"""leak@k (arXiv:2511.04934): the chance that one of k sampled answers gives the fact away.

Unbiased from n >= k samples of which c leak: 1 - C(n - c, k) / C(n, k). Greedy answers can be safe while samples leak.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from ..registry import metric
from ..tables.view import NotApplicable, View
from .matching import HIT, leak_at, recovered
from .values import Values, averages


@metric(
    paper="arXiv:2511.04934",
    sentence="How often somebody who asks the same question a few times is told the fact at least once.",
    direction="closest_to_gold",
    ideal="the value of a model that never saw the rows, which guesses right now and then",
    range=(0.0, 1.0),
    needs=("samples",),
)
def leak_at_k(view: View, *, rows: str = "forget", k: Annotated[int, Field(ge=1)] = 4) -> Values:
    """Mean over rows of the chance that k answers sampled at temperature 1 hold the row's value.

    Of rows without a value a sample leaks that has the whole answer's words in order (ROUGE-L recall 1).

    Args:
        rows: the row set.
        k: samples somebody draws; at most as many as were drawn. Compare models at the same k: it grows with k.
    """
    table = view.table("samples", rows)
    drawn = min(map(len, table.texts))
    if k > drawn:
        raise NotApplicable(f"{view.name} has {drawn} samples of {rows} rows, leak@{k} needs {k}")
    kept = view.of(rows)
    outputs = dict(zip((key[0] for key in table.keys), table.texts))
    told = [sum(recovered(row, text, row.prompt) >= HIT for text in outputs[row.id]) for row in kept]
    each = np.array([leak_at(k, len(outputs[row.id]), count) for row, count in zip(kept, told)])
    return averages(rows, kept, each, k=k, samples=drawn, leaking=sum(count > 0 for count in told))
