"""Selective synaptic dampening: weights that matter more for forget rows than for all rows are made smaller.

For every weight with importances I_f on forget rows and I_D on all rows:

    if I_f > alpha I_D:   theta <- theta min(1, lambda I_D / I_f)

No gradient step is taken and nothing is trained. Its relatives are values of its parameters: LFSSD
(`importance: loss_free`, arXiv:2402.19308), ASSD (`alpha: adaptive`, arXiv:2402.10098), XLF with its search
(`importance: loss_free_l1, alpha: search`, arXiv:2406.09173).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from ...deltas import Delta
from ...errors import ParameterError, RequestError
from ...registry import edit
from ...subjects.packed import Encoded
from ..optimise.importance import importance as weigh
from .case import Edit, EditCase


@edit(
    paper="arXiv:2308.07707",
    modality=("image", "language"),
    intention="removal",
    requires=("weights", "gradients", "forget_data", "retain_data"),
    cost="6N per token of forget and retain rows, once; one pass over the weights",
    known_weaknesses=("relearn",),
)
def ssd(
    case: EditCase,
    *,
    alpha: Annotated[float, Field(gt=0)] | Literal["adaptive", "search"] = "adaptive",
    dampening: Annotated[float, Field(ge=0)] = 1.0,
    importance: Literal["fisher", "loss_free", "loss_free_l1"] = "fisher",
    per: Literal["batch", "row"] = "batch",
    batch_size: Annotated[int, Field(ge=1)] = 64,
    retained_only: bool = False,
    rho: Annotated[float, Field(gt=0, lt=1)] = 0.2,
    growth: Annotated[float, Field(gt=1)] = 1.1,
    max_rounds: Annotated[int, Field(ge=1)] = 500,
) -> Edit:
    """Dampen the weights that matter more for forget rows than for all training rows (Foster et al. 2024, eq. 5-6).

    An `alpha` belongs to its batches: in shuffled batches gradients of different rows cancel, I_D shrinks and the
    ratio grows 6-8 fold, so the published 10 for class-sorted batches destroys a small model here. "adaptive" takes
    the percentile 100 - ln(1 + 100 share) of the ratio over all weights, share = forget rows of all rows. "search"
    begins at a 25th of the share and raises it by `growth` until accuracy on forget rows is at most `rho` of what it
    was. `per: row` is the exact Fisher diagonal, `retained_only` takes retain rows alone for I_D.
    """
    forgotten = case.encoded("forget", "ssd")
    kept = case.encoded("retain", "ssd", "the rows the model was trained on and keeps")
    share = len(forgotten) / (len(forgotten) + len(kept))
    if per == "row" and not retained_only and isinstance(alpha, float) and alpha >= 1 / share:
        raise ParameterError(
            f"ssd: alpha is {alpha:g}, but with per = row no ratio exceeds all rows / forget rows = {1 / share:.3g}, "
            "so nothing would change; choose a smaller alpha"
        )
    scope = case.tensors("ssd")
    names = [name for name, _ in scope.parameters]
    # Shuffled: what a batch's mean gradient is depends on who stands beside whom.
    order = torch.Generator().manual_seed(case.seed)

    def weighed(rows: list[Encoded]) -> dict[str, Tensor]:
        mixed = [rows[i] for i in torch.randperm(len(rows), generator=order).tolist()]
        return weigh(case.subject, mixed, names, kind=importance, batch_size=1 if per == "row" else batch_size)

    pair = Importances(case.subject, weighed(forgotten), weighed(kept if retained_only else [*forgotten, *kept]))
    about: dict[str, Any] = {"per": per, "batch_size": 1 if per == "row" else batch_size, "order": "shuffled"}
    if alpha == "search":
        found, about["rounds"], delta = _search(
            case.subject, pair, forgotten, share, dampening, rho, growth, max_rounds
        )
    else:
        found = pair.threshold(share) if alpha == "adaptive" else float(alpha)
        delta = pair.dampened(found, dampening)
    changed, zeroed = pair.counts(found, dampening)
    case.summary["ssd"] = {"alpha": found, "dampened": changed, "zeroed": zeroed, "of": scope.trainable, **about}
    if not changed:
        case.warnings.append(f"no weight's ratio exceeds alpha = {found:g}; nothing was changed")
    return delta


@dataclass
class Importances:
    """What forget rows and all rows make of the weights of one subject."""

    subject: Any
    forget: dict[str, Tensor]
    every: dict[str, Tensor]

    def __post_init__(self) -> None:
        ratios = torch.cat([(self.forget[name] / self.every[name]).flatten().cpu() for name in self.forget])
        self.ratios = ratios[torch.isfinite(ratios)].sort().values.numpy()
        """All finite I_f / I_D, sorted."""

    def threshold(self, share: float) -> float:
        """The ratio that ln(1 + 100 share) per cent of the weights exceed (arXiv:2402.10098)."""
        return _percentile(self.ratios, 100 - math.log(1 + 100 * share))

    def selected(self, name: str, alpha: float) -> Tensor:
        return self.forget[name] > alpha * self.every[name]

    def factor(self, name: str, alpha: float, dampening: float) -> Tensor:
        """What each weight is multiplied by."""
        smaller = (dampening * self.every[name] / self.forget[name]).clamp(max=1)
        return torch.where(self.selected(name, alpha), smaller, 1.0)

    def dampened(self, alpha: float, dampening: float) -> Delta:
        entries = {}
        for name in self.forget:
            weight = self.subject.model.get_parameter(name).detach().float()
            change = (weight * (self.factor(name, alpha, dampening) - 1)).cpu()
            if bool(change.any()):
                entries[name] = {"difference": change}
        return Delta(self.subject.fingerprint, entries, {"method": "ssd", "alpha": alpha, "dampening": dampening})

    def counts(self, alpha: float, dampening: float) -> tuple[int, int]:
        """(weights that are dampened, those of them that become 0)."""
        hit = sum(int(self.selected(name, alpha).sum()) for name in self.forget)
        return hit, sum(int((self.factor(name, alpha, dampening) == 0).sum()) for name in self.forget)


def _percentile(ordered: np.ndarray, p: float) -> float:
    """By linear interpolation, of sorted values: numpy would sort them again for every round of a search."""
    if not len(ordered):
        return math.inf
    place = max(0.0, p) / 100 * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (place - low) * (float(ordered[high]) - float(ordered[low])))


def _search(
    subject: Any,
    pair: Importances,
    rows: list[Encoded],
    share: float,
    dampening: float,
    rho: float,
    growth: float,
    max_rounds: int,
) -> tuple[float, int, Delta]:
    """(alpha, rounds, delta) of the mildest dampening that is enough (arXiv:2406.09173)."""

    def accuracy(model: Any) -> float:
        return float(model.score([((str(i), "answer"), row) for i, row in enumerate(rows)]).hit.mean())

    wanted, now, share = rho * accuracy(subject), math.nan, share / 25
    for number in range(1, max_rounds + 1):
        alpha = pair.threshold(share)
        delta = pair.dampened(alpha, dampening)
        now = accuracy(delta.apply(subject))
        if now <= wanted:
            return alpha, number, delta
        share *= growth
    raise RequestError(
        f"ssd(alpha='search'): after {max_rounds} rounds accuracy on forget rows is {now:.3f}, expected at most "
        f"{wanted:.3f}; the rows are not held by weights of their own"
    )
