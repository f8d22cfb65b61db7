"""Which value vectors hold a concept (ConceptVectors, arXiv:2406.11614, section 3; here without a rating model).

The concept is known by its tokens T: those its texts are full of and others are not. For a value vector v with scores
S_t = v . E_t over the vocabulary (mean m, standard deviation s)

    purity       share of the k best tokens that are in T
    z            mean over T of (S_t - m) / s
    attribution  (mean k | concept's prompts - mean k | other prompts) x (mean over T of S_t - m)

k is the neuron's activation at the end of a prompt. Purity and z say what a vector would write, attribution whether it
is what writes it: vectors that only spell a concept out need not be the ones a model answers from.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import ParameterError, SubjectError
from .language import LanguageModel
from .projection import Norm, Readout, project
from .value_vectors import Address, ValueMatrix, value_matrices, vectors
from .watch import activations

Criterion = Literal["attribution", "z", "purity"]
RATIO = 4.0
"""So many times as often as in other texts a token stands in the concept's, or it is no token of the concept."""
Rater = Callable[[list[str]], float]
"""Best tokens of a vector, as text, to a number from 0 to 1: how clearly they express one concept."""


@dataclass(frozen=True)
class Candidate:
    """One value vector, and how much it has to do with the concept."""

    address: Address
    z: float
    attribution: float
    """NaN where no prompts were given."""
    purity: float
    """NaN where k was not given."""


@dataclass(frozen=True)
class Search:
    """What was found, best first."""

    candidates: list[Candidate]
    searched: int
    """Value vectors looked at."""
    unsearched: int
    """Value vectors left out: those of fused experts show no activations."""


def distinctive(
    subject: LanguageModel, texts: Sequence[str], others: Sequence[str], *, most: int = 40, ratio: float = RATIO
) -> tuple[int, ...]:
    """Tokens of a concept: by n log(n / expected), where others say how often a token is to be expected.

    Args:
        most: at most so many.
        ratio: how many times as often as expected a token must stand in the texts.

    Raises:
        ParameterError: no token is.
    """
    own, rest = _counts(subject, texts), _counts(subject, others)
    total = sum(own.values())
    smoothed = sum(rest.values()) + len(own | rest)
    expected = {token: total * (rest[token] + 1) / smoothed for token in own}
    special = set(subject.tokenizer.all_special_ids)
    kept = [token for token, n in own.items() if n >= ratio * expected[token] and token not in special]
    kept = [token for token in kept if any(c.isalnum() for c in subject.tokenizer.decode([token]))]
    if not kept:
        raise ParameterError(
            f"no token stands {ratio:g} times as often in the {len(texts)} texts of the concept as in the "
            f"{len(others)} other ones; give longer texts of it, or other ones that are not about it"
        )
    kept.sort(key=lambda token: (-own[token] * math.log(own[token] / expected[token]), token))
    return tuple(kept[:most])


def _counts(subject: LanguageModel, texts: Sequence[str]) -> Counter[int]:
    found: Counter[int] = Counter()
    for text in texts:
        found.update(subject.tokenizer(text, add_special_tokens=False)["input_ids"])
    return found


def search(
    subject: LanguageModel,
    tokens: Sequence[int],
    *,
    by: Criterion = "attribution",
    prompts: Sequence[str] = (),
    others: Sequence[str] = (),
    k: int | None = None,
    norm: Norm = "none",
    matrices: Sequence[ValueMatrix] | None = None,
) -> Search:
    """All value vectors, ranked.

    Args:
        tokens: of the concept, as `distinctive` finds them.
        by: what to rank by.
        prompts, others: texts at whose end the concept is asked for, and others; attribution needs a pass over them.
        k: best tokens of which purity is a share; it needs products with the whole vocabulary.
        matrices: look only there.

    Raises:
        ParameterError: what is ranked by was not asked for.
        SubjectError: attribution was asked for, and every MLP of the model is a stack of fused experts.
    """
    if (by == "attribution" and not (prompts and others)) or (by == "purity" and k is None):
        raise ParameterError(f"value vectors are to be ranked by {by}, which needs prompts and others, or k")
    matrices = value_matrices(subject.model) if matrices is None else list(matrices)
    every = sum(matrix.count for matrix in matrices)
    difference: list[Tensor] = []
    if prompts:
        matrices = [matrix for matrix in matrices if matrix.owner is not None]
        if not matrices:
            raise SubjectError(
                f"{subject.name} keeps its experts in fused stacks, which show no activations; rank by z or purity"
            )
        mine, theirs = (activations(subject, texts, matrices) for texts in (prompts, others))
        difference = [a.mean(0) - b.mean(0) for a, b in zip(mine, theirs)]
    readout, wanted = Readout.of(subject, norm), torch.tensor(tokens)
    found: list[Candidate] = []
    for number, matrix in enumerate(matrices):
        gap, deviation = _gap(readout, vectors(subject.model, matrix), wanted)
        effect = difference[number] * gap if difference else torch.full_like(gap, math.nan)
        pure = torch.full_like(gap, math.nan)
        if k is not None:
            pure = purity(project(readout, vectors(subject.model, matrix), k).tokens, wanted)
        columns = zip((gap / deviation).tolist(), effect.tolist(), pure.tolist())
        found += [Candidate(matrix.address(dim), *values) for dim, values in enumerate(columns)]
    # Small vocabularies give many equal purities: then the clearer one is first.
    found.sort(key=lambda one: (-getattr(one, by), -one.z, one.address))
    return Search(found, len(found), every - len(found))


def _gap(readout: Readout, block: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(f,) mean score of the tokens above that of the vocabulary, and the deviation of all scores."""
    read = readout.read(block)
    mean = read @ readout.centre
    own = read @ readout.head[tokens.to(readout.head.device)].float().mean(0)
    return (own - mean).cpu(), readout.deviation(read).cpu().clamp_min(1e-12)


def purity(best: Tensor, tokens: Tensor) -> Tensor:
    """(n,) share of each vector's best tokens (n, k) that are the concept's."""
    return torch.isin(best.long(), tokens.long()).float().mean(1)


def rate(
    subject: LanguageModel, matrix: ValueMatrix, rater: Rater, *, k: int = 200, keep: float = 0.7, norm: Norm = "none"
) -> list[tuple[Address, float]]:
    """Value vectors of one MLP rated by any judge of word lists, as the paper has a language model do it.

    Args:
        keep: share of the vectors that is rated: those of highest mean score over the vocabulary.

    Returns:
        Addresses and ratings, best first.
    """
    found = project(Readout.of(subject, norm), vectors(subject.model, matrix), k)
    count = max(1, round(keep * matrix.count))
    chosen = found.mean.argsort(descending=True, stable=True)[:count].tolist()
    rated = [
        (matrix.address(dim), rater(subject.tokenizer.convert_ids_to_tokens(found.tokens[dim].tolist())))
        for dim in chosen
    ]
    return sorted(rated, key=lambda pair: (-pair[1], pair[0]))
