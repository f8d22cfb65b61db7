"""Unlearning depth (UDS, arXiv:2605.24614): in which blocks knowledge is gone as it is in gold, by activation patching.

The model before reads a fact with one block's states taken from another model. With s its mean log-probability of the
fact and s_l the same after patching block l, d_l = s - s_l is what the states cost: d1 with gold's, d2 with the
unlearned model's. Blocks with d1 > tau hold knowledge that gold lacks (KE), and

    UDS = sum over KE of d1 clip(d2 / d1, 0, 1) / sum over KE of d1

is 0 where the unlearned model's states still carry the fact, 1 where they carry as little as gold's. What only the
output hides has depth 0. A destroyed model has depth near 1 too: read it with model utility.
"""

from __future__ import annotations

import numpy as np

from ..registry import metric
from ..tables.view import NotApplicable, View
from .golds import golds_of
from .values import Values, averages

STRANGERS = 0.05
"""Share of control rows with a block above tau from which gold does not share the model's space."""


@metric(
    paper="arXiv:2605.24614",
    sentence=(
        "How deeply the knowledge is gone: 0 when it still stands inside the model and only its answers hide it, 1 "
        "when the model's inner states carry as little of it as those of a model that never saw the rows."
    ),
    direction="higher",
    ideal="1; what two models reach that both never saw the rows",
    range=(0.0, 1.0),
    needs=("patched", "before", "gold"),
)
def unlearning_depth(view: View, *, rows: str = "forget", control: str = "retain", tau: float = 0.05) -> Values:
    """Mean over rows of UDS, of several golds their mean; rows that gold knows as well are left out and counted.

    `extra` holds, by block, how many rows it knows (KE), and d1 and d2 in the mean.

    Args:
        rows: the row set.
        control: rows that gold knows too: patching its states must cost nothing there, else the models share no space
            (they must be fine-tuned from one base).
        tau: nats per token that count as knowledge, 0.05 in the authors' code.
    """
    golds = golds_of(view)
    spent = view.table("patched", rows).drop
    depths = []
    costs = [gold.table("patched", rows).drop for gold in golds]
    for gold, cost in zip(golds, costs):
        _same_space(gold, control, tau)
        depths.append(depth(cost, spent, tau))
    known = np.isfinite(np.array(depths)).any(axis=0)
    if not known.any():
        raise NotApplicable(f"in no block gold's states cost more than {tau} nats: {rows} rows are known to gold too")
    ids = [key[0] for key in view.table("patched", rows).keys]
    means = np.nanmean(np.array(depths)[:, known], axis=0)
    each = dict(zip([ids[i] for i in np.flatnonzero(known)], means))
    kept = [row for row in view.of(rows) if row.id in each]
    cost = np.mean(costs, axis=0)
    return averages(
        rows,
        kept,
        np.array([each[row.id] for row in kept]),
        knowing_rows=[int(count) for count in (cost > tau).sum(axis=0)],
        d1=[float(f"{value:.5g}") for value in cost.mean(axis=0)],
        d2=[float(f"{value:.5g}") for value in spent.mean(axis=0)],
        without_knowledge=int((~known).sum()),
        flag="" if any(control in gold.patched for gold in golds) else f"no {control} rows: not controlled for",
    )


def depth(gold: np.ndarray, model: np.ndarray, tau: float) -> np.ndarray:
    """(rows,) UDS from d1 and d2 (rows, blocks); NaN for a row without a block above tau."""
    weight = np.where(gold > tau, gold, 0.0)
    share = np.clip(model / np.where(gold > tau, gold, 1.0), 0, 1)
    total = weight.sum(axis=1)
    return np.where(total > 0, (weight * share).sum(axis=1) / np.where(total > 0, total, 1.0), np.nan)


def _same_space(gold: View, control: str, tau: float) -> None:
    if control not in gold.patched:
        return
    cost = gold.table("patched", control).drop
    share = float((cost > tau).any(axis=1).mean())
    if cost.mean() >= tau or share >= STRANGERS:
        raise NotApplicable(
            f"{gold.name} does not share the space of the model before: its states cost {cost.mean():.3f} nats on "
            f"{control} rows, and {share:.0%} of them have a block above {tau}; both must be trained from one base"
        )
