"""Whether a question is within the scope of an edit: the classifier of SERAC (arXiv:2206.06520).

A logistic regression on how alike the question x and the edit's own prompt z are:

letters   cosine of TF-IDF vectors, of letters three at a time
words     cosine of TF-IDF vectors, of words
subject   share of the words of whom the edit is about that x has; of z's words where nobody is named
meaning   cosine of a frozen encoder's vectors: a causal model's at the end of a question, where it is about to answer

It is trained on other edits. In the scope of each are its prompt and rephrasings; out of it are its locality prompts,
and of the other edits' questions those most like it. No feature is about particular words, so that it serves edits
that it has not seen. The paper trains the encoder, by distance or by cross-attention; here it stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import RequestError
from ...wording import words

NEAR = 8
"""Other edits' questions that every training edit is told from."""
LETTERS: dict[str, Any] = {"analyzer": "char_wb", "ngram_range": (3, 3)}
WORDS: dict[str, Any] = {"analyzer": words}
Embed = Callable[[Sequence[str]], np.ndarray]
"""Texts to vectors (n, d) of length 1."""
Vectors = list[Any]
"""For every feature a matrix with a row for each text; a question's times an edit's is the feature."""


@dataclass(frozen=True)
class Asked:
    """One edit as the classifier reads it."""

    prompt: str
    subject: str = ""
    inside: tuple[str, ...] = ()
    """Questions in its scope beside the prompt."""
    outside: tuple[str, ...] = ()


class Likeness:
    """How alike questions are to edits, feature by feature."""

    def __init__(self, texts: Sequence[str], embed: Embed) -> None:
        """
        Args:
            texts: what document frequencies are counted on.
        """
        from sklearn.feature_extraction.text import TfidfTransformer

        self.embed = embed
        self.forms = [(_counts(**form), TfidfTransformer()) for form in (LETTERS, WORDS)]
        self.present = _counts(binary=True, **WORDS)
        for counts, weights in self.forms:
            weights.fit(counts.transform(texts))

    def questions(self, texts: Sequence[str]) -> Vectors:
        return [*self._weighed(texts), self.present.transform(texts), self.embed(texts)]

    def edits(self, edits: Sequence[Asked]) -> Vectors:
        prompts = [one.prompt for one in edits]
        named = self.present.transform([one.subject or one.prompt for one in edits])
        shares = named.multiply(1 / np.maximum(np.asarray(named.sum(1)), 1)).tocsr()
        return [*self._weighed(prompts), shares, self.embed(prompts)]

    def _weighed(self, texts: Sequence[str]) -> Vectors:
        return [weights.transform(counts.transform(texts)) for counts, weights in self.forms]


def _counts(**options: Any) -> Any:
    from sklearn.feature_extraction.text import HashingVectorizer

    # Words that training never saw count too, and as the rarest: the names in edits to come.
    return HashingVectorizer(n_features=1 << 18, norm=None, alternate_sign=False, **options)


def alike(questions: Vectors, edits: Vectors) -> np.ndarray:
    """(questions, edits, features)"""
    products = [x @ z.T for x, z in zip(questions, edits)]
    return np.stack([p if isinstance(p, np.ndarray) else p.toarray() for p in products], -1)


@dataclass(frozen=True)
class Scope:
    """Probabilities that questions are within the scopes of edits."""

    likeness: Likeness
    weights: np.ndarray
    """(features,)"""
    bias: float

    def __call__(self, questions: Sequence[str], edits: Vectors) -> np.ndarray:
        """(questions, edits)

        Args:
            edits: as `likeness.edits` gives them.
        """
        return 1 / (1 + np.exp(-(alike(self.likeness.questions(questions), edits) @ self.weights + self.bias)))


def questions(edits: Sequence[Asked]) -> list[str]:
    """All that is in the scope of any of the edits."""
    return [text for one in edits for text in (one.prompt, *one.inside)]


def fitted(likeness: Likeness, edits: Sequence[Asked]) -> Scope:
    """A classifier trained on edits.

    Raises:
        RequestError: they have no rephrasings, or nothing is out of their scopes.
    """
    from sklearn.linear_model import LogisticRegression

    if not any(one.inside for one in edits):
        raise RequestError(
            f"serac: none of {len(edits)} demonstrations has rephrasings, so that nothing shows what is within the "
            "scope of an edit beside its own words"
        )
    texts = questions(edits)
    owners = np.array([i for i, one in enumerate(edits) for _ in (one.prompt, *one.inside)])
    read, known = likeness.questions(texts), likeness.edits(edits)
    features, labels = [], []
    for i, one in enumerate(edits):
        found = alike(read, [z[i : i + 1] for z in known])[:, 0]
        own = {one.prompt, *one.inside}
        others = np.array([j for j, text in enumerate(texts) if text not in own], dtype=int)
        near = others[np.argsort(-found[others].mean(-1), kind="stable")[:NEAR]]
        features += [found[owners == i], found[near]]
        labels += [1] * (1 + len(one.inside)) + [0] * len(near)
        if one.outside:
            features.append(alike(likeness.questions(one.outside), [z[i : i + 1] for z in known])[:, 0])
            labels += [0] * len(one.outside)
    if all(labels):
        raise RequestError(
            f"serac: nothing is out of the scope of {len(edits)} demonstrations; give others about other facts, or "
            "locality"
        )
    made = LogisticRegression(C=100.0, class_weight="balanced", max_iter=1000).fit(np.concatenate(features), labels)
    return Scope(likeness, made.coef_[0], float(made.intercept_[0]))
