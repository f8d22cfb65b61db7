"""Membership inference: do the forget rows look more familiar to the model than rows it never saw? (specs: metrics 3.5)

Every attack gives each row a score that is larger for a row less likely to be known. AUC is the chance that a forget
row scores lower than a holdout row: 1 where forget rows stand out as members, 0.5 where nothing tells them apart.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from ..errors import TableError
from ..tables.view import NotApplicable, View
from .golds import golds_of, mean_over
from .quantities import counted, smallest_means
from .values import Aggregate, Units, Values

Score = Callable[[View, str, list[str]], np.ndarray]
"""(view, row set, row ids) to (rows,) scores, larger for rows less likely to be known."""
TableAttack = Literal["loss", "zlib", "min_k", "min_k_plus_plus", "gradnorm", "reference"]
Share = Annotated[float, Field(gt=0, le=1)]

LEAST_VARIANCE = 1e-6
OVER = 50.0
"""PrivLeak beyond which the forget rows look less known than rows never seen can explain."""
LEAST_LEFT = 1e-10
"""What 1 - AUC of gold is taken for where it is 0 (a resample in which gold tells all rows apart)."""


# --- scores ----------------------------------------------------------------------------------------------------------


def attack(name: TableAttack, view: View, k: float = 0.4) -> Score:
    """The scores of an attack by name, on a model and on its golds.

    Args:
        k: the share of tokens that the two min_k attacks take.
    """
    plain: dict[str, Score] = {"loss": loss, "zlib": compressed, "gradnorm": gradnorm}
    if name in plain:
        return plain[name]
    if name == "reference":
        return against_reference(view)
    standardised = name == "min_k_plus_plus"
    return lambda view, rows, ids: hardest(view, rows, ids, k, standardised)


def loss(view: View, rows: str, ids: list[str]) -> np.ndarray:
    """(rows,) mean negative log-likelihood of the answer, end token included."""
    return -view.mean_logprob(rows, ids=ids)


def compressed(view: View, rows: str, ids: list[str]) -> np.ndarray:
    """(rows,) loss by the bytes of the zlib-compressed answer."""
    texts = [view.scores[rows].texts[i] for i in view.positions(rows, ids=ids)]
    return loss(view, rows, ids) / [len(zlib.compress(text.encode())) for text in texts]


def hardest(view: View, rows: str, ids: list[str], k: float, standardised: bool) -> np.ndarray:
    """(rows,) minus the mean of the K smallest token scores, K = max(1, floor(k n)); end tokens do not count."""
    table = view.candidate(rows, ids=ids)
    keep, offsets = counted(table)
    values = table.logprob[keep]
    if standardised:
        if np.isnan(table.mean[keep]).any():
            raise TableError(f"scores of {rows}: no moments of its answers, which min_k_plus_plus is made of")
        values = (values - table.mean[keep]) / np.sqrt(np.maximum(table.variance[keep], LEAST_VARIANCE))
    return -smallest_means(values, offsets, k)


def gradnorm(view: View, rows: str, ids: list[str]) -> np.ndarray:
    """(rows,) mean over parameter tensors of the norm of the gradient of the answer's loss."""
    table = view.table("gradients", rows)
    at = {key[0]: i for i, key in enumerate(table.keys)}
    means = np.nanmean(table.norm.astype(np.float64), axis=1)
    return means[[at[i] for i in ids]]


def against_reference(view: View) -> Score:
    """(rows,) loss minus the mean loss of the view's golds; of a gold itself minus that of the others."""

    def score(model: View, rows: str, ids: list[str]) -> np.ndarray:
        others = [gold for gold in view.golds if gold is not model] or [model]
        return loss(model, rows, ids) - np.mean([loss(gold, rows, ids) for gold in others], axis=0)

    return score


# --- AUC -------------------------------------------------------------------------------------------------------------


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


def sides(view: View, rows: str, holdout: str, score: Score) -> tuple[Units, list[np.ndarray], Aggregate]:
    """Units, the scores of forget and of holdout rows, and their AUC."""
    units = Units.of((rows, view.of(rows)), (holdout, view.of(holdout)))
    scores = [score(view, name, [row.id for row in view.of(name)]) for name in (rows, holdout)]
    return units, scores, auc_of(*scores)


def whole(aggregate: Aggregate, units: Units) -> float:
    """An aggregate's value on all rows."""
    return float(aggregate(np.ones((1, len(units))))[0])


def leak(auc: np.ndarray | float, gold: np.ndarray | float) -> np.ndarray:
    """PrivLeak in percent: how much larger 1 - AUC is than gold's (arXiv:2407.06460)."""
    left = np.maximum(1 - np.asarray(gold), LEAST_LEFT)
    return 100 * (1 - auc - left) / left


def privacy(auc: np.ndarray | float, gold: np.ndarray | float) -> np.ndarray:
    """1 where AUC is gold's, 0 where it is off by gold's own size or more (arXiv:2506.12618)."""
    return np.clip(1 - np.abs(auc - np.asarray(gold)) / np.maximum(gold, LEAST_LEFT), 0, 1)


def membership(view: View, rows: str, holdout: str, score: Score) -> Values:
    """AUC of one attack; with golds also PrivLeak and the difference of AUC, per-row values are the scores."""
    units, scores, aggregate = sides(view, rows, holdout, score)
    auc = whole(aggregate, units)
    extra: dict[str, Any] = {"members": len(scores[0]), "others": len(scores[1])}
    if view.golds:
        gold = float(np.mean([whole(sides(one, rows, holdout, score)[2], units) for one in view.golds]))
        extra |= {
            "auc_gold": gold,
            "auc_difference": auc - gold,
            "privleak": float(leak(auc, gold)) if gold < 1 else None,
            "privacy": float(privacy(auc, gold)) if gold > 0 else None,
        }
    return Values(units, aggregate, np.concatenate(scores), extra, _flag(auc, extra))


def against_gold(view: View, rows: str, holdout: str, scores: Sequence[Score]) -> tuple[Units, list[Aggregate]]:
    """Units, and for every attack weights to (2, draws): AUC of the model, mean AUC of the golds.

    Raises:
        NotApplicable: there is no gold model, or it tells all rows apart, so that nothing can be relative to it.
    """
    golds = golds_of(view)
    found = []
    for score in scores:
        units, _, mine = sides(view, rows, holdout, score)
        theirs = mean_over([sides(gold, rows, holdout, score)[2] for gold in golds])
        if not 0 < whole(theirs, units) < 1:
            raise NotApplicable(f"gold's AUC is exactly 0 or 1: {holdout} rows are not of the {rows} rows' kind")
        found.append(_both(mine, theirs))
    return units, found


def _both(mine: Aggregate, theirs: Aggregate) -> Aggregate:
    return lambda weights: np.stack([mine(weights), theirs(weights)])


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
