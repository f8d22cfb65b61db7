"""PrivLeak (MUSE, arXiv:2407.06460): how far membership of the forget rows shows beyond what gold shows.

With a = 1 - AUC (MUSE's convention) 100 (a_model - a_gold) / a_gold. -100: forget rows stand out as members entirely;
0: as little as in gold; up to 100 (1 - a_gold) / a_gold where they look stranger than rows never seen. The scale is not
symmetric, so that the difference of AUC stands beside it.
"""

from __future__ import annotations

import numpy as np

from ..registry import metric
from ..tables.view import View
from .membership import OVER, Share, TableAttack, against_gold, attack, leak
from .values import Values


@metric(
    paper="arXiv:2407.06460",
    sentence=(
        "Whether one can tell that the model was trained on the forget rows: -100 is always, 0 as little as for a "
        "model that never saw them; far above 0 the rows stand out as forgotten, which gives them away too."
    ),
    direction="closest_to_gold",
    ideal="0",
    range=(-100.0, None),
    needs=("scores.answer", "holdout", "gold"),
)
def privleak(
    view: View, *, rows: str = "forget", holdout: str = "holdout", by: TableAttack = "min_k", k: Share = 0.4
) -> Values:
    """PrivLeak in percent of one membership attack; against several golds, of their mean AUC.

    Args:
        rows: the row set.
        holdout: rows of the same kind that no model saw.
        by: the attack; MUSE and OpenUnlearning take min_k.
        k: share of tokens of the min_k attacks.
    """
    units, (both,) = against_gold(view, rows, holdout, [attack(by, view, k)])
    auc, gold = map(float, both(np.ones((1, len(units))))[:, 0])
    value = float(leak(auc, gold))
    flag = f"{value:+.0f}: forget rows look far stranger than rows never seen, over-forgotten" if value > OVER else ""
    extra = {"by": by, "auc": auc, "auc_gold": gold, "auc_difference": auc - gold, "highest": float(leak(0.0, gold))}
    return Values(units, lambda weights: leak(*both(weights)), None, extra, flag)
