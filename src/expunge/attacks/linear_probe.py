"""A new head on frozen features: is the forgotten class still there for the taking?"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from ..registry import attack
from .case import Attack, Case, Found
from .features import beyond_untrained, spread

STRENGTH = 100.0
"""C of the regression; features have length 1, so that little regularisation is much."""


@attack(
    group="latent",
    access="hidden",
    modality=("image",),
    paper="arXiv:1610.01644",
    caveat="Compared with gold at equal examples: features that were taught other classes part a new one too, with "
    "enough examples.",
)
def linear_probe(
    case: Case, *, shots: Annotated[int, Field(ge=1)] = 1, draws: Annotated[int, Field(ge=1)] = 16
) -> Attack:
    """Train a linear classifier on features to tell a few forgotten pictures of a class from retained ones of the
    others, and ask it about the forgotten pictures it was not shown (Alain and Bengio 2016). The model stays as it is.

    A model that only no longer says a class keeps its pictures in one place, so that a few examples name them all. A
    picture's score is the share of draws in which it is told from the retained, beyond an untrained network's.

    Args:
        shots: forgotten pictures of a class that are shown.
        draws: choices of them.
    """
    retain = case.rows.get("retain", [])
    kept = [retain[i] for i in spread(retain, case.seed)]
    answers = np.array([row.answer for row in (*case.forget, *kept)])
    count = len(case.forget)
    members = {name: np.flatnonzero(answers[:count] == name) for name in dict.fromkeys(answers[:count])}
    others = {name: count + np.flatnonzero(answers[count:] != name) for name in members}
    if min(map(len, members.values())) <= shots or not all(map(len, others.values())):
        return Found(
            status=f"skipped: a probe needs more than {shots} forget rows of a class, and retain rows of others"
        )
    draw = np.random.default_rng(case.seed)
    shown = [(name, draw.permutation(some)[:shots]) for name, some in members.items() for _ in range(draws)]

    def tell(features: np.ndarray) -> np.ndarray:
        from sklearn.linear_model import LogisticRegression

        right, asked = np.zeros(count), np.zeros(count)
        for name, examples in shown:
            taught = np.concatenate([examples, others[name]])
            rest = np.setdiff1d(members[name], examples)
            probe = LogisticRegression(C=STRENGTH, max_iter=1000).fit(features[taught], answers[taught] == name)
            right[rest] += probe.predict(features[rest])
            asked[rest] += 1
        # A picture that every draw shows is never asked about: it counts like the mean of the others.
        return np.divide(right, asked, out=np.full(count, right.sum() / asked.sum()), where=asked > 0)

    told = f"{shots} pictures of a class shown against {len(kept)} retained ones, {draws} times"
    return (yield from beyond_untrained(case, [*case.forget, *kept], tell, told))
