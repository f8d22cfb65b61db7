"""Forget quality (arXiv:2401.06121, section 2.2): can truth ratios tell the model from one that never saw the rows?

Two-sample Kolmogorov-Smirnov test between the truth ratios R on the forget rows of the model and of the gold model. p
depends on the number of rows, so D and n stand beside it. Both samples answer the same questions, which makes the test
generous; a paired test (signs of the differences in log R flipped) stands beside it too, row by row as the KS test
counts rows, and entity by entity, which is right where the questions about one entity are alike but needs at least six
entities to reach p = 0.05.
"""

from __future__ import annotations

import numpy as np

from ..registry import metric
from ..rows import Row
from ..tables.view import View
from .golds import golds_of
from .quantities import Form, left_out, log_truth_ratio, with_wrong_answers
from .two_samples import ks_distance, ks_log10_p
from .values import Units, Values

DESTROYED = 1.0
"""Nats per token above gold's loss on the forget rows from which a pass is suspect."""


def flipped_signs(differences: np.ndarray, groups: tuple[str, ...], flips: int, seed: int) -> float:
    """p-value of the two-sided paired test: how often random signs, one a group, give as large a mean difference."""
    _, index = np.unique(groups, return_inverse=True)
    sums = np.bincount(index, weights=differences)
    generator = np.random.default_rng(seed)
    # Rounding must not make an exact tie a miss.
    limit = np.abs(sums.sum()) - 1e-12 * np.abs(sums).sum()
    as_large = 0
    for first in range(0, flips, 1000):
        signs = generator.integers(0, 2, (min(1000, flips - first), len(sums)), dtype=np.int8)
        as_large += int((np.abs(2 * (signs @ sums) - sums.sum()) >= limit).sum())
    return (1 + as_large) / (1 + flips)


@metric(
    paper="arXiv:2401.06121",
    sentence=(
        "Whether a statistical test can tell the model from one that never saw the rows, as a power of ten: 0 is not "
        "at all, -10 a difference that chance makes once in ten billion times. A ruined model can pass too: read it "
        "with model utility."
    ),
    direction="higher",
    ideal="0; what two models reach that both never saw the rows",
    range=(None, 0.0),
    needs=("scores.answer", "scores.paraphrase", "scores.perturbed", "gold"),
)
def forget_quality(
    view: View, *, rows: str = "forget", form: Form = "geometric", permutations: int = 10_000, seed: int = 0
) -> Values:
    """log10 of the KS p-value between the truth ratios of the model and of gold; the mean over several golds.

    Per-row values are log R of the model minus log R of gold (mean over golds). `extra` holds D, p and n, and the
    paired p-values.

    Args:
        rows: the row set.
        form: how wrong answers are averaged (see truth_ratio); D depends on it.
        permutations: sign flips of the paired test.
        seed: of the sign flips.
    """
    golds = golds_of(view)
    kept = with_wrong_answers(view, rows)
    units = Units.of((rows, kept))
    n = len(kept)
    mine = log_truth_ratio(view, rows, kept, form)
    theirs = [log_truth_ratio(gold, rows, kept, form) for gold in golds]
    distances = [ks_distance(mine, other) for other in theirs]
    differences = mine - np.mean(theirs, axis=0)
    whole = [float(distance(np.ones((1, n)))[0]) for distance in distances]
    log10_p = [float(ks_log10_p(distance, n)) for distance in whole]
    return Values(
        units,
        lambda weights: np.mean([ks_log10_p(distance(weights), n) for distance in distances], axis=0),
        differences,
        {
            "p": float(10 ** np.mean(log10_p)),
            "D": float(np.mean(whole)),
            "n": n,
            "paired_p": flipped_signs(differences, units.ids, permutations, seed),
            "paired_p_entities": flipped_signs(differences, units.entities, permutations, seed),
            "mean_difference": float(differences.mean()),
            "per_gold": [{"log10_p": p, "D": d} for p, d in zip(log10_p, whole)],
            "form": form,
            **left_out(view, rows, kept, "no perturbed answers"),
        },
        _flag(view, golds, rows, kept, whole, float(np.mean(log10_p))),
    )


def _flag(view: View, golds: list[View], rows: str, kept: list[Row], distances: list[float], log10_p: float) -> str:
    if min(distances) == 0:
        return "truth ratios equal those of a gold model exactly: is it the same model?"
    ids = [row.id for row in kept]
    excess = np.mean([gold.mean_logprob(rows, ids=ids) for gold in golds]) - view.mean_logprob(rows, ids=ids).mean()
    if log10_p > np.log10(0.05) and excess > DESTROYED:
        return (
            f"passes, but finds the right answers {excess:.1f} nats per token less likely than gold does: a ruined "
            "model finds all answers alike"
        )
    return ""
