"""How far a model's per-row values lie from those of a gold model (specs: metrics 3.6)."""

from __future__ import annotations

from typing import Literal

import numpy as np

from ..registry import metric
from ..tables.view import View
from .golds import golds_of, mean_over
from .quantities import counted, hit_suffix, log_truth_ratio, row_means, with_wrong_answers
from .two_samples import ks_distance, ks_log10_p, wasserstein
from .values import Units, Values

Quantity = Literal["loss", "exact_memorization", "extraction_strength", "log_truth_ratio"]


def _quantity(view: View, rows: str, name: Quantity, ids: list[str]) -> np.ndarray:
    if name == "loss":
        return -view.mean_logprob(rows, ids=ids)
    table = view.candidate(rows, ids=ids)
    keep, offsets = counted(table)
    if name == "exact_memorization":
        return row_means(table.hit[keep], offsets)
    return hit_suffix(table.hit[keep], offsets) / np.diff(offsets)


@metric(
    paper="arXiv:2506.12618",
    sentence="How far the model is from one that never saw the rows, row by row; 0 means nothing tells them apart.",
    direction="lower",
    ideal="0; the distance between two models that both never saw the rows",
    range=(0.0, None),
    needs=("scores.answer", "gold"),
)
def gold_distance(view: View, *, rows: str = "forget", quantity: Quantity = "loss") -> Values:
    """Wasserstein-1 distance between the per-row values of the model and of gold, in the quantity's unit.

    Per-row values are model minus gold; with several golds all numbers are means over them. `extra` holds the KS
    distance D, its log10 p and the mean signed difference.

    Args:
        rows: the row set.
        quantity: what is compared; loss is in nats per token.
    """
    golds = golds_of(view)
    ratio = quantity == "log_truth_ratio"
    kept = with_wrong_answers(view, rows) if ratio else view.of(rows)
    ids = [row.id for row in kept]

    def of(model: View) -> np.ndarray:
        return log_truth_ratio(model, rows, kept) if ratio else _quantity(model, rows, quantity, ids)

    mine, theirs = of(view), [of(gold) for gold in golds]
    all_rows = np.ones((1, len(kept)))
    ks = [float(ks_distance(mine, other)(all_rows)[0]) for other in theirs]
    differences = mine - np.mean(theirs, axis=0)
    same = any(np.array_equal(mine, other) for other in theirs)
    return Values(
        Units.of((rows, kept)),
        mean_over([wasserstein(mine, other) for other in theirs]),
        differences,
        {
            "quantity": quantity,
            "D": float(np.mean(ks)),
            "log10_p": float(np.mean(ks_log10_p(np.array(ks), len(kept)))),
            "mean_difference": float(differences.mean()),
        },
        "equal to a gold model on every row: is it the same model?" if same else "",
    )
