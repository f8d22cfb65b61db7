"""Membership inference: do the forget rows look more familiar to the model than rows it never saw? (specs: metrics 3.5)

Every attack gives each row a score that is larger for a row less likely to be known. AUC is the chance that a forget
row scores lower than a holdout row: 1 where forget rows stand out as members, 0.5 where nothing tells them apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..tables.view import View
from .values import Aggregate, Units, Values

Score = Callable[[View, str, list[str]], np.ndarray]
"""(view, row set, row ids) to (rows,) scores, larger for rows less likely to be known."""

OVER = 50.0
"""PrivLeak beyond which the forget rows look less known than rows never seen can explain."""


def auc_of(members: np.ndarray, others: np.ndarray) -> Aggregate:
    """AUC under weights over members and others together; ties count half."""
    order = np.argsort(others, kind="stable")
    # Others that score lower than each member, without and with those that score the same.
    lower = np.searchsorted(others[order], members, side="left")
    not_higher = np.searchsorted(others[order], members, side="right")

    def auc(weights: np.ndarray) -> np.ndarray:
        member, other = weights[:, : len(members)], weights[:, len(members) :]
        below = np.zeros((len(weights), len(others) + 1))
        np.cumsum(other[:, order], axis=1, out=below[:, 1:])
        pairs = np.einsum("dm,dm->d", member, below[:, lower] + below[:, not_higher]) / 2
        return 1 - pairs / (member.sum(axis=1) * below[:, -1])

    return auc


def membership(view: View, rows: str, holdout: str, score: Score) -> Values:
    """AUC of one attack; with golds also PrivLeak and the difference of AUC, per-row values are the scores."""
    units = Units.of((rows, view.of(rows)), (holdout, view.of(holdout)))
    sides = [(name, [row.id for row in view.of(name)]) for name in (rows, holdout)]
    everyone = np.ones((1, len(units)))
    scores = [score(view, name, ids) for name, ids in sides]
    aggregate = auc_of(*scores)
    auc = float(aggregate(everyone)[0])
    golds = [float(auc_of(*(score(gold, name, ids) for name, ids in sides))(everyone)[0]) for gold in view.golds]
    extra: dict[str, Any] = {"members": len(scores[0]), "others": len(scores[1])}
    if golds:
        gold = float(np.mean(golds))
        leak = 100 * (gold - auc) / (1 - gold) if gold < 1 else None
        extra |= {
            "auc_gold": gold,
            "auc_difference": auc - gold,
            "privleak": leak,
            "privacy": float(np.clip(1 - abs(auc - gold) / gold, 0, 1)) if gold > 0 else None,
        }
    return Values(units, aggregate, np.concatenate(scores), extra, _flag(auc, extra))


def _flag(auc: float, extra: dict[str, Any]) -> str:
    gold = extra.get("auc_gold")
    if gold is not None and not 0.2 <= gold <= 0.8:
        return (
            f"gold itself has AUC {gold:.3f}: the holdout rows are not of the forget rows' kind, AUC says little here"
        )
    if gold is not None and (extra["privleak"] or 0) > OVER:
        return f"PrivLeak {extra['privleak']:+.0f}: forget rows look far stranger than rows never seen, over-forgotten"
    if auc < 0.05:
        return f"AUC {auc:.5f}: forget rows look far stranger than rows never seen, which gives away what was forgotten"
    return ""
