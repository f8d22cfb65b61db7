"""Model utility (arXiv:2401.06121, section 2.2): the harmonic mean of nine numbers about rows that should be kept.

{probability, ROUGE-L recall, truth ratio (truth better)} on each of three row sets. One set (TOFU's retain authors)
counts plain probability; the others (real authors, world facts) the right answer's share among the offered answers.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from ..registry import metric
from ..tables.view import View
from .means import harmonic_mean
from .quantities import Form, log_truth_ratio, option_probability, with_wrong_answers
from .texts import overlaps
from .values import Aggregate, Units, Values


@metric(
    paper="arXiv:2401.06121",
    sentence="What is left of the model's usefulness outside the forgotten rows, from 0 to 1; a part at 0 makes it 0.",
    direction="higher",
    ideal="the value of a model that never saw the forget rows",
    range=(0.0, 1.0),
    needs=("scores.answer", "scores.paraphrase", "scores.perturbed", "generations"),
)
def model_utility(
    view: View,
    *,
    plain: tuple[str, ...] = ("retain",),
    options: tuple[str, ...] = ("neighbour", "general"),
    form: Form = "geometric",
) -> Values:
    """Harmonic mean of three numbers per row set; all of them in `extra["parts"]`.

    Args:
        plain: row sets whose probability is the right answer's own.
        options: row sets whose probability is the right answer's share among right and wrong ones (TOFU: real_authors,
            world_facts).
        form: how wrong answers are averaged in the truth ratio.
    """
    names: list[str] = []
    columns: list[np.ndarray] = []
    groups = []
    for rows in (*plain, *options):
        kept = with_wrong_answers(view, rows)
        ids = [row.id for row in kept]
        own = rows in plain
        probability = np.exp(view.mean_logprob(rows, ids=ids)) if own else option_probability(view, rows, kept)
        truth = 1 - np.exp(np.minimum(log_truth_ratio(view, rows, kept, form), 0.0))
        columns.append(np.stack([probability, overlaps(view, rows, kept, "rougeL", "recall"), truth], axis=1))
        names += [f"{rows} {part}" for part in ("probability", "rouge", "truth_ratio")]
        groups.append((rows, kept))
    parts = _parts(columns)
    found = parts(np.ones((1, sum(len(column) for column in columns))))[0]
    zero = [name for name, part in zip(names, found) if part <= 0]
    return Values(
        Units.of(*groups),
        lambda weights: harmonic_mean(parts(weights)),
        None,
        {"parts": {name: float(part) for name, part in zip(names, found)}, "form": form},
        f"{' and '.join(zero)} exactly 0, which hides the other parts" if zero else "",
    )


def _parts(columns: list[np.ndarray]) -> Aggregate:
    """Weights over all rows to (draws, parts)."""
    bounds = np.cumsum([0, *map(len, columns)])

    def parts(weights: np.ndarray) -> np.ndarray:
        spans = [weights[:, first:last] for first, last in pairwise(bounds)]
        return np.concatenate([w @ c / w.sum(axis=1, keepdims=True) for w, c in zip(spans, columns)], axis=1)

    return parts
