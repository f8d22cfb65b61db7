"""Concepts of pictures: directions in a classifier's features, and the classifier's decisions read off them.

A concept activation vector is the normal of a linear support vector machine that parts features e(x) of pictures with
a concept from those without; the margin m_j(x) = (w_j . e(x) + b_j) / ||w_j|| is how far x lies on the concept's side.
A post-hoc concept bottleneck (arXiv:2205.15480) is a sparse linear classifier of margins, whose weights W (K, J) say
which concept speaks for which class.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import RequestError, RowError

PENALTIES = (0.001, 0.01, 0.1, 1.0, 10.0)
PICTURES = 100
"""Pictures with a concept, and as many without, that its vector is learnt from, where there are so many."""
HELD_OUT = 0.25
"""Share of them that chooses the penalty."""
FEWEST = 8
"""Pictures with a concept, or without, below which nothing can be learnt and validated."""
L1_SHARE, PENALTY = 0.99, 1e-5
"""Of the bottleneck's elastic net."""


@dataclass(frozen=True)
class Bank:
    """Concept vectors in the features of one classifier."""

    names: tuple[str, ...]
    """(J,)"""
    vectors: np.ndarray
    """(J, d) of unit length."""
    intercepts: np.ndarray
    """(J,), in units of the vectors."""

    @classmethod
    def of(cls, names: Sequence[str], weights: np.ndarray, intercepts: np.ndarray) -> Bank:
        """From hyperplanes w . e + b = 0 of any scale; weights (J, d), intercepts (J,)."""
        norms = np.linalg.norm(weights, axis=1)
        return cls(tuple(names), weights / norms[:, None], intercepts / norms)

    def margins(self, features: np.ndarray) -> np.ndarray:
        """(n, J) of features (n, d)."""
        return features @ self.vectors.T + self.intercepts


def learn(features: np.ndarray, marked: Mapping[str, Sequence[bool | None]], seed: int) -> Bank:
    """A vector for every concept.

    Args:
        features: (n, d)
        marked: per concept and picture whether it shows it; None where that is not known.

    Raises:
        RowError: a concept is shown, or known to be absent, in fewer than 8 pictures.
    """
    from sklearn.svm import LinearSVC

    weights, intercepts = [], []
    for number, (name, shown) in enumerate(marked.items()):
        rng = np.random.default_rng([seed, number])
        sides = [
            rng.permutation([i for i, one in enumerate(shown) if one is side])[:PICTURES] for side in (True, False)
        ]
        count = min(map(len, sides))
        if count < FEWEST:
            raise RowError(
                f"concept {name!r}: {len(sides[0])} pictures show it and {len(sides[1])} are known not to; expected at "
                f"least {FEWEST} of each"
            )
        held = max(1, int(HELD_OUT * count))
        places = [np.concatenate([side[a:b] for side in sides]).astype(int) for a, b in ((held, count), (0, held))]
        (x, y), (x_held, y_held) = ((features[p], np.array([shown[i] is True for i in p])) for p in places)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of few iterations: what counts is accuracy on the pictures held out
            found = [LinearSVC(C=c, random_state=0).fit(x, y) for c in PENALTIES]
        best = max(found, key=lambda machine: float(machine.score(x_held, y_held)))
        weights.append(best.coef_[0])
        intercepts.append(float(best.intercept_[0]))
    return Bank.of(list(marked), np.array(weights), np.array(intercepts))


@dataclass(frozen=True)
class Bottleneck:
    """A linear classifier of standardised margins."""

    bank: Bank
    mean: np.ndarray
    """(J,) of the margins it was fitted to."""
    scale: np.ndarray
    """(J,) their standard deviations."""
    weights: np.ndarray
    """W (K, J)"""
    accuracy: float
    """On the pictures it was fitted to."""

    def inputs(self, features: np.ndarray) -> np.ndarray:
        """(n, J) standardised margins."""
        return (self.bank.margins(features) - self.mean) / self.scale

    def attributions(self, features: np.ndarray, kind: int) -> np.ndarray:
        """(J,) integrated gradients of class `kind`'s score from the mean margins to those of the pictures, averaged
        over pictures: of a linear score exactly W[kind] times the difference."""
        return self.weights[kind] * self.inputs(features).mean(0)  # type: ignore[no-any-return]


def fit(bank: Bank, features: np.ndarray, classes: np.ndarray, count: int, reached: float, short: float) -> Bottleneck:
    """The bottleneck of a classifier's training rows.

    Args:
        features, classes: (n, d) and (n,).
        count: K.
        reached: the classifier's own accuracy on these rows.
        short: how much lower the bottleneck's may be.

    Raises:
        RequestError: the concepts do not explain the classes.
    """
    from sklearn.linear_model import SGDClassifier

    margins = bank.margins(features)
    mean, scale = margins.mean(0), np.maximum(margins.std(0), 1e-12)
    model = SGDClassifier(
        loss="log_loss", penalty="elasticnet", alpha=PENALTY, l1_ratio=L1_SHARE, random_state=0, average=True
    ).fit((margins - mean) / scale, classes)
    accuracy = float(model.score((margins - mean) / scale, classes))
    if accuracy < reached - short:
        raise RequestError(
            f"concept_poisoning: the concepts {', '.join(bank.names)} explain only {accuracy:.0%} of the rows, the "
            f"classifier gets {reached:.0%} right; expected at most {short:.0%} less. Give more concepts, or none"
        )
    weights = np.zeros((count, len(bank.names)))
    rows = model.coef_ if len(model.classes_) > 2 else np.concatenate([-model.coef_, model.coef_])
    weights[model.classes_] = rows
    return Bottleneck(bank, mean, scale, weights, accuracy)
