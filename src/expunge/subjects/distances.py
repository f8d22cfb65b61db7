"""How far two models' predictions lie apart at every answer token, over the whole vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import MismatchError
from ..tables.distances import NUMBERS, Distances
from ..tables.scores import Key
from .packed import LOGIT_ELEMENTS, TOKEN_BUDGET, Encoded, batches, in_order, pack
from .protocol import innermost


@torch.no_grad()
def distances(subject: Any, other: Any, items: Sequence[tuple[Key, Encoded]], *, progress: Any = None) -> Distances:
    """Means over each row's answer tokens; both models read a row in one pass each, and logits are held in blocks.

    Raises:
        MismatchError: the models have other vocabularies.
    """
    subject, other = innermost(subject), innermost(other)
    if subject.vocabulary != other.vocabulary:
        raise MismatchError(
            f"{subject.name} answers from {subject.vocabulary} classes or tokens, {other.name} from {other.vocabulary}"
        )
    rows = [row for _, row in items]
    size = max(1, LOGIT_ELEMENTS // subject.vocabulary)

    def read(group: Sequence[int]) -> list[list[float]]:
        models = (subject, other)
        states = [model.hidden_states(pack([rows[i] for i in group], model.device)) for model in models]
        found = [
            apart(*(model.head(part).float().to(subject.device) for model, part in zip(models, parts)))
            for parts in zip(*(state.split(size) for state in states))
        ]
        return [part.mean(0).tolist() for part in torch.cat(found).split([rows[i].scored for i in group])]

    groups = list(batches(rows, TOKEN_BUDGET))
    means = in_order(groups, subject.share(groups, read, of=[row.ids for row in rows], progress=progress))
    columns: dict[str, Any] = dict(zip(NUMBERS, np.array(means, np.float32).reshape(len(rows), len(NUMBERS)).T))
    about = {"subject": subject.name, "other": other.name}
    return Distances([key for key, _ in items], **columns, metadata=about)


def apart(first: Tensor, second: Tensor) -> Tensor:
    """(n, 4) total variation, Jensen-Shannon divergence in bits, KL(second || first) in nats and whether the likeliest
    token differs, of logits (n, V)."""
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    variation = (p.exp() - q.exp()).abs().sum(-1) / 2
    kl = (q.exp() * (q - p)).sum(-1)
    differ = first.argmax(-1) != second.argmax(-1)
    return torch.stack([variation, jensen_shannon(first, second), kl, differ.float()], -1)


def jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    """(n,) (KL(p || m) + KL(q || m)) / 2 in bits, m = (p + q) / 2, of logits (n, V): 0 alike, 1 nothing in common."""
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    middle = torch.logaddexp(p, q) - math.log(2)
    return ((p.exp() * (p - middle)).sum(-1) + (q.exp() * (q - middle)).sum(-1)) / (2 * math.log(2))
