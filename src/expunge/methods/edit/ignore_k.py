"""Ignore-k: of what any method changed, the largest k % is left out (arXiv:2504.09522).

    theta <- theta + mask * (theta' - theta)      mask: 0 at the k % largest |theta' - theta|

The inverse of what merging keeps (TIES, arXiv:2306.01708): the largest changes are what a text primes elsewhere with,
the rest is enough to remember it. Whether the paper takes the largest of each tensor or of all is not known.
"""

from __future__ import annotations

from ... import registry
from ...deltas import Delta
from ...errors import ParameterError
from ...registry import edit
from ..optimise.magnitude import Granularity, ignored
from ..optimise.terms import Objective
from .case import Edit, EditCase


@edit(
    paper="arXiv:2504.09522",
    intention="removal",
    requires=("weights", "forget_data"),
    cost="the method's, and two passes over its change",
    known_weaknesses=("relearn",),
)
def ignore_k(
    case: EditCase,
    *,
    method: Objective = "npo",
    k: float = 8.0,
    granularity: Granularity = "tensor",
    band: tuple[float, float] | None = None,
    complement: bool = False,
    count_zeros: bool = False,
    exclude: str = "",
) -> Edit:
    """Run a gradient method or an editor and leave out the largest k % of its change (Sun et al. 2025).

    `k` 8 is recalled, not checked: sweep it. `granularity`: the largest of each tensor, each row or all tensors
    together. `band` leaves out percentages from the largest on, in place of (0, k); `complement` keeps what it would
    leave out. Entries that did not change count with `count_zeros` only. `exclude`: pattern of tensors that stay whole.
    """
    name, settings = (method, {}) if isinstance(method, str) else next(iter(method.items()))
    part = registry.get("methods", name)
    if part.card.kind == "optimise":
        delta: Delta = case.unlearn(method, phase="change").delta
    elif part.card.kind == "edit":
        delta = part.function(case, **part.resolve(settings))
    else:
        raise ParameterError(f"ignore_k: {name} is of kind {part.card.kind}, expected optimise or edit")
    found, share = ignored(
        delta,
        k,
        granularity=granularity,
        band=band,
        complement=complement,
        count_zeros=count_zeros,
        exclude=exclude,
    )
    case.summary["ignore_k"] = {"method": name, "left_out": round(share, 6)}
    return found
