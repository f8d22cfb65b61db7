"""Retrieval: do the pictures whose features lie nearest to a forgotten one have its class?"""

from __future__ import annotations

import numpy as np

from ..registry import attack
from .case import Attack, Case, Found
from .features import beyond_untrained, spread


@attack(
    group="latent",
    access="hidden",
    modality=("image",),
    paper="arXiv:1904.12627",
    caveat="Compared with gold: pictures that look alike lie near one another in any network.",
)
def nearest_features(case: Case) -> Attack:
    """Recall at full precision, by cosine similarity of features: how many of the other pictures of its class lie
    nearer to a forgotten picture than any picture of another class.

    Looked through are forget, retain and holdout rows, at most 64 of each class; the score counts beyond an untrained
    network's. Precision among the nearest few tells less: pictures that look alike are neighbours in any network.
    """
    rows = [*case.forget, *case.rows.get("retain", []), *case.rows.get("holdout", [])]
    looked = spread(rows, case.seed)
    count = len(case.forget)
    order = [*range(count), *(i for i in looked if i >= count)]
    rows = [rows[i] for i in order]
    gallery = np.array([i for i, place in enumerate(order) if place in set(looked)])
    answers = np.array([row.answer for row in rows])
    same = answers[:count, None] == answers[gallery]
    itself = np.arange(count)[:, None] == gallery
    wanted = (same & ~itself).sum(1)
    if len(set(answers[gallery])) < 2 or not wanted.all():
        return Found(status="skipped: retrieval needs pictures of other classes, and others of each forgotten class")

    def tell(features: np.ndarray) -> np.ndarray:
        near = features[:count] @ features[gallery].T
        near[itself] = -np.inf
        ranked = np.take_along_axis(same, np.argsort(-near, axis=1, kind="stable"), axis=1)
        return np.asarray(ranked.argmin(axis=1) / wanted)  # the place of the first picture of another class

    told = f"{len(gallery)} pictures looked through"
    return (yield from beyond_untrained(case, rows, tell, told))
