"""What a change of a model did to one value vector: the intrinsic measures of ConceptVectors (arXiv:2406.11614).

T is the set of a vector's k best tokens under its own model's head, before (0) and after (1).

    jaccard  |T0 n T1| / |T0 u T1|          cosine  v0.v1 / |v0||v1|          l2  |v0 - v1|

Removed knowledge shows as jaccard and cosine near 0: two unrelated vectors share k / (2V - k) of their best tokens.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch

from .language import LanguageModel
from .projection import Readout, project
from .value_vectors import Address, vector

NOTHING = 1e-8
"""A vector of this norm or less is gone: its best tokens would be arbitrary."""


@dataclass(frozen=True)
class Trace:
    """One vector, before and after."""

    jaccard: float
    jaccard_by_old_head: float
    """Both projected with the head of the model before: the head may have moved, not the vector."""
    cosine: float
    l2: float
    norm_ratio: float
    """|v1| / |v0|: a vector that was only scaled has jaccard and cosine 1."""
    kept: float
    """Share of those of T0 that stand in the concept's text which are still in T1; NaN where none does."""
    text_ratio: float
    """The reference's other count, which may pass 1: tokens of T1 in the text, per token of T0 in the text."""


def trace(
    before: LanguageModel, after: LanguageModel, address: Address, *, k: int = 200, text: Collection[int] = ()
) -> Trace:
    """Compare one value vector of two models.

    Args:
        k: best tokens that are compared.
        text: tokens of the concept's reference text.

    Raises:
        SubjectError: there is no such vector.
    """
    old, new = (vector(model.model, address).float().cpu() for model in (before, after))
    heads = Readout.of(before), Readout.of(after)
    first = _best(heads[0], old, k)
    second, by_old = (_best(head, new, k) for head in (heads[1], heads[0]))
    spelt = first & set(text)
    cosine = 0.0
    if min(float(old.norm()), float(new.norm())) > NOTHING:
        cosine = float(torch.nn.functional.cosine_similarity(old.double(), new.double(), dim=0).clamp(-1, 1))
    return Trace(
        jaccard=_jaccard(first, second),
        jaccard_by_old_head=_jaccard(first, by_old),
        cosine=cosine,
        l2=float((old - new).norm()),
        norm_ratio=float(new.norm()) / max(float(old.norm()), NOTHING),
        kept=len(spelt & second) / len(spelt) if spelt else math.nan,
        text_ratio=len(second & set(text)) / len(spelt) if spelt else math.nan,
    )


def _best(readout: Readout, vector: torch.Tensor, k: int) -> set[int]:
    if float(vector.norm()) <= NOTHING:
        return set()
    return set(project(readout, vector[None], k).tokens[0].tolist())


def _jaccard(first: set[int], second: set[int]) -> float:
    return len(first & second) / len(first | second) if first | second else 0.0
