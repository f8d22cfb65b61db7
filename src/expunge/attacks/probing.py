"""Linear probes on hidden states: how well a line parts classes, layer by layer, on entities the probe never saw.

Whatever is chosen (layer, strength of regularisation) is chosen within the training folds, and folds are of entities:
questions about one person never stand on both sides. A probe on shuffled labels is the measure of how much that helps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..errors import ParameterError

Classifier = Literal["logistic", "svm"]
"""logistic: regression with probabilities. svm: the linear support vector machine of WACK, at C = 1."""

STRENGTHS = (1.0, 10.0, 100.0, 1000.0)
"""C, tried at the layer that is best at 100; states have length 1, so that little regularisation is much."""
FIRST = 100.0
FOLDS = 3


def unit(states: Any) -> np.ndarray:
    """(n, layers, d) float64 with every vector's L2 norm 1; zeros stay zeros."""
    array = np.asarray(states, dtype=np.float64)
    norms = np.linalg.norm(array, axis=-1, keepdims=True)
    return np.divide(array, norms, out=np.zeros_like(array), where=norms > 0)


def spaced(layers: int, count: int) -> list[int]:
    """At most `count` layers, evenly spaced, the last one among them; 0 takes all."""
    if count <= 0 or count >= layers:
        return list(range(layers))
    return sorted({round((i + 1) * (layers - 1) / count) for i in range(count)})


@dataclass(frozen=True)
class Probe:
    """A fitted probe and what it was worth on entities it never saw."""

    layer: int
    strength: float
    model: Any
    """The fitted scikit-learn classifier."""
    accuracy: float
    """Mean over classes of the share recognised, of test folds; 1 / classes is chance."""
    held_out: np.ndarray
    """(n, classes) probabilities of every row from the fold that left its entity out; decisions of an svm."""
    folds: int

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """(n, classes) probabilities of rows from their features (n, layers, d)."""
        return _scores(self.model, features[:, self.layer])


def fit(
    features: np.ndarray,
    labels: Sequence[int] | np.ndarray,
    entities: Sequence[str] | np.ndarray,
    *,
    layers: Sequence[int] | None = None,
    classifier: Classifier = "logistic",
    seed: int = 0,
) -> Probe:
    """The best probe of several layers, with its accuracy on folds of entities that took no part in any choice.

    Args:
        features: (n, layers, d), as `unit` gives them.
        labels: (n,) 0, 1 ...
        entities: (n,) who each row is about.
        layers: those that are tried; all by default.

    Raises:
        ParameterError: a class has rows of fewer than four entities.
    """
    y, groups = np.asarray(labels), np.asarray(entities)
    tried = list(range(features.shape[1])) if layers is None else list(layers)
    fewest = min(len(np.unique(groups[y == label])) for label in np.unique(y))
    if fewest <= FOLDS:
        raise ParameterError(f"a class has rows of {fewest} entities; a probe needs at least {FOLDS + 1}")
    make = _maker(classifier, seed)
    held_out = np.zeros((len(y), len(np.unique(y))))
    for train, test in _folds(y, groups, seed):
        layer, strength = _choose(features[train], y[train], groups[train], tried, make, classifier, seed)
        held_out[test] = _scores(make(strength).fit(features[train, layer], y[train]), features[test, layer])
    layer, strength = _choose(features, y, groups, tried, make, classifier, seed)
    model = make(strength).fit(features[:, layer], y)
    return Probe(layer, strength, model, balanced(y, held_out.argmax(1)), held_out, FOLDS)


def transfer(
    features: np.ndarray,
    labels: Sequence[int] | np.ndarray,
    entities: Sequence[str] | np.ndarray,
    other: np.ndarray,
    about: Sequence[str] | np.ndarray,
    *,
    layers: Sequence[int] | None = None,
    classifier: Classifier = "logistic",
    seed: int = 0,
) -> np.ndarray:
    """(m, classes) what probes trained on these rows say of rows of another kind, whose entities they never saw.

    Args:
        features: (n, layers, d), `labels` (n,) and `entities` (n,), as for `fit`.
        other: (m, layers, d) features of the rows that are judged.
        about: (m,) who each of them is about; whoever is in no row of training is judged by the last fold.
    """
    y, groups, names = np.asarray(labels), np.asarray(entities), np.asarray(about)
    tried = list(range(features.shape[1])) if layers is None else list(layers)
    make = _maker(classifier, seed)
    found = np.zeros((len(other), len(np.unique(y))))
    for train, _ in _folds(y, groups, seed):
        layer, strength = _choose(features[train], y[train], groups[train], tried, make, classifier, seed)
        model = make(strength).fit(features[train, layer], y[train])
        away = ~np.isin(names, groups[train])
        if away.any():
            found[away] = _scores(model, other[away, layer])
    return found


def by_layer(
    features: np.ndarray,
    labels: Sequence[int] | np.ndarray,
    entities: Sequence[str] | np.ndarray,
    *,
    layers: Sequence[int] | None = None,
    classifier: Classifier = "logistic",
    seed: int = 0,
) -> dict[int, float]:
    """Layer to the balanced accuracy of its probe on folds of unseen entities; nothing is chosen (C = 100, or 1)."""
    y, groups = np.asarray(labels), np.asarray(entities)
    make = _maker(classifier, seed)
    tried = range(features.shape[1]) if layers is None else layers
    return {layer: _accuracy(features[:, layer], y, groups, make(FIRST), seed) for layer in tried}


def balanced(labels: np.ndarray, said: np.ndarray) -> float:
    """Mean over classes of the share of their rows that is recognised."""
    return float(np.mean([(said[labels == label] == label).mean() for label in np.unique(labels)]))


def _maker(classifier: Classifier, seed: int) -> Callable[[float], Any]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import LinearSVC

    if classifier == "svm":
        return lambda _: LinearSVC(
            C=1.0, tol=1e-5, dual=True, max_iter=1_000_000, class_weight="balanced", random_state=seed
        )
    return lambda strength: LogisticRegression(C=strength, max_iter=2000, class_weight="balanced")


def _folds(y: np.ndarray, groups: np.ndarray, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    from sklearn.model_selection import StratifiedGroupKFold

    count = min(FOLDS, *(len(np.unique(groups[y == label])) for label in np.unique(y)))
    return list(StratifiedGroupKFold(count, shuffle=True, random_state=seed).split(y, y, groups))


def _choose(
    features: np.ndarray,
    y: np.ndarray,
    groups: np.ndarray,
    layers: Sequence[int],
    make: Callable[[float], Any],
    classifier: Classifier,
    seed: int,
) -> tuple[int, float]:
    """(layer, C) by folds within these rows; the earlier of equals."""
    at = {layer: _accuracy(features[:, layer], y, groups, make(FIRST), seed) for layer in layers}
    layer = max(at, key=at.__getitem__)
    if classifier == "svm":
        return layer, 1.0
    of = {c: at[layer] if c == FIRST else _accuracy(features[:, layer], y, groups, make(c), seed) for c in STRENGTHS}
    return layer, max(of, key=of.__getitem__)


def _accuracy(features: np.ndarray, y: np.ndarray, groups: np.ndarray, model: Any, seed: int) -> float:
    said = np.zeros_like(y)
    for train, test in _folds(y, groups, seed):
        said[test] = model.fit(features[train], y[train]).predict(features[test])
    return balanced(y, said)


def _scores(model: Any, features: np.ndarray) -> np.ndarray:
    if hasattr(model, "predict_proba"):
        return np.asarray(model.predict_proba(features))
    found = np.asarray(model.decision_function(features))
    return np.stack([-found, found], axis=1) if found.ndim == 1 else found
