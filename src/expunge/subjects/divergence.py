"""How differently two models answer: the Jensen-Shannon divergence of what they say at every answer token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import MismatchError
from ..tables.divergences import Divergences
from ..tables.scores import Key
from .packed import LOGIT_ELEMENTS, TOKEN_BUDGET, Encoded, batches, in_order, pack
from .protocol import innermost


@torch.no_grad()
def divergences(subject: Any, other: Any, items: Sequence[tuple[Key, Encoded]], *, progress: Any = None) -> Divergences:
    """Mean over each row's answer tokens of JS(subject || other); both models read a row in one pass each.

    Raises:
        MismatchError: the models have other vocabularies.
    """
    first, second = innermost(subject), innermost(other)
    if first.vocabulary != second.vocabulary:
        raise MismatchError(
            f"{first.name} answers from {first.vocabulary} classes or tokens, {second.name} from {second.vocabulary}"
        )
    rows = [row for _, row in items]
    size = max(1, LOGIT_ELEMENTS // first.vocabulary)

    def read(group: Sequence[int]) -> list[float]:
        packs = [pack([rows[i] for i in group], model.device) for model in (first, second)]
        states = [model.hidden_states(pack_) for model, pack_ in zip((first, second), packs)]
        parts = [
            jensen_shannon(first.head(a).float(), second.head(b).float().to(a.device))
            for a, b in zip(*(state.split(size) for state in states))
        ]
        return [float(part.mean()) for part in torch.cat(parts).split([rows[i].scored for i in group])]

    groups = list(batches(rows, TOKEN_BUDGET))
    found = in_order(groups, first.share(groups, read, of=[row.ids for row in rows], progress=progress))
    about = {"subject": first.name, "other": second.name}
    return Divergences([key for key, _ in items], np.array(found, np.float32), about)


def jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    """(n,) (KL(p || m) + KL(q || m)) / 2 in bits, m = (p + q) / 2, of logits (n, V): 0 alike, 1 nothing in common."""
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    middle = torch.logaddexp(p, q) - math.log(2)
    return ((p.exp() * (p - middle)).sum(-1) + (q.exp() * (q - middle)).sum(-1)) / (2 * math.log(2))
