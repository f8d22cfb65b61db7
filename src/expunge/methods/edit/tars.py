"""TARS: rows that read a concept are turned round (arXiv:2412.10257).

1. v0: the residual stream after the last block, at the end of prompts that the concept follows (mean over prompts).
2. Of v0 + s |v0| / sqrt(d) N(0, I), a thousand draws, the mean of the 2 % after which the head finds the concept most
   probable is the targeting vector v; again from there until p(concept) >= 0.99, five rounds at most.
3. Of all rows w of gate and up matrices those with the largest cosine to v are taken.
4. w <- -|w| v / |v|

Several concepts are removed one after another, each from what the one before left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...deltas import Delta, compose
from ...errors import ParameterError, RequestError, RowError
from ...registry import edit
from ...rows import Row
from ...subjects.input_vectors import neuron_matrices, reading_matrices
from ...subjects.language import LanguageModel
from ...subjects.value_vectors import ValueMatrix, vectors
from ...subjects.watch import watch
from ...tables.store import content_key
from ..optimise.columns import sparse
from .case import Edit, EditCase

Rows = Literal["both", "gate", "up"]
KEPT = 0.02
"""Share of the draws that a targeting vector is the mean of."""
COMMON = 0.9
"""Cosine to the mean state of other prompts from which on a vector stands for everything."""
OTHERS = 64
"""Other prompts whose mean state is taken."""
CHUNK = 4096
"""Rows whose cosines are worked out at once."""


@dataclass(frozen=True)
class Concept:
    """A token, and texts that it follows."""

    name: str
    token: int
    prompts: tuple[str, ...]


@edit(
    paper="arXiv:2412.10257",
    intention="removal",
    requires=("weights", "forget_data"),
    cost="2N per prompt token, some thousand products with the head, one product with every gate and up matrix",
    known_weaknesses=("not studied",),
)
def tars(
    case: EditCase,
    *,
    concept: str = "",
    prompts: tuple[str, ...] = (),
    share: float = 0.005,
    count: int | None = None,
    threshold: float | None = None,
    rows: Rows = "both",
    draws: int = 1000,
    noise: float = 0.3,
    enough: float = 0.99,
    rounds: int = 5,
    centre: bool = False,
) -> Edit:
    """Turn the gate and up rows that look most like a concept's vector away from it (Davies et al. 2024).

    Without `concept` the answers of the edits (else of the forget rows) are the concepts: one for every first token of
    an answer, with the prompts it follows. `concept` names one, in one or several spellings ("dog; Dog"), and `prompts`
    1 to 5 texts that it follows. `share` of all rows is turned, or `count` of them (the paper: as few as 1), or all
    whose cosine is above `threshold`. `centre` takes the mean state after retain rows' prompts off first: without it a
    vector close to that mean is refused, because the rows it finds serve everything.
    """
    if count is not None and count < 1:
        raise ParameterError(f"tars: count is {count}, expected at least 1")
    if not 0 < share <= 1 or draws < 1 or rounds < 1 or noise <= 0:
        raise ParameterError("tars: expected 0 < share <= 1, draws and rounds of at least 1 and noise above 0")
    found = named(case.subject, concept, prompts) if concept or prompts else answers(case)
    others = [case.subject.prompt_text(row) for row in case.data.get("retain", [])[:OTHERS] if row.prompt]
    if not others:
        if centre:
            raise RequestError("tars: centre needs retain rows with prompts, and the request names none")
        case.warnings.append(
            "there are no retain prompts to compare with: whether the vector is common was not checked"
        )
    subject, deltas, log = case.subject, list[Delta](), dict[str, object]()
    for one in found:
        mean = state(subject, others) if others else None
        v, p = targeted(subject, one, mean if centre else None, draws, noise, enough, rounds, case.seed)
        common = math.nan if mean is None else float(torch.cosine_similarity(v, mean, dim=0))
        if common > COMMON:
            raise RequestError(
                f"tars: the vector of {one.name!r} has cosine {common:.2f} to the mean state after other prompts (at "
                f"most {COMMON} is expected): the rows it finds serve everything. Give prompts that say more about the "
                "concept, or centre=true"
            )
        chosen = nearest(subject, v, rows, share, count, threshold)
        deltas.append(turned(subject, v, [(matrix, dim) for matrix, dim, _ in chosen]))
        log[one.name] = {
            "token": one.token,
            "probability": round(p, 4),
            "cosine_to_mean": round(common, 4),
            "rows": [[matrix.name, str(matrix.address(dim))] for matrix, dim, _ in chosen],
            "cosines": [round(cosine, 4) for *_, cosine in chosen],
        }
        if one is not found[-1]:
            subject = compose(deltas).apply(case.subject, check=False)
    case.summary["tars"] = log
    settings = {"method": "tars", "concepts": [one.name for one in found]}
    return Delta(case.base.fingerprint, compose(deltas).entries, settings)


# --- concepts --------------------------------------------------------------------------------------------------------


def named(subject: LanguageModel, concept: str, prompts: Sequence[str]) -> list[Concept]:
    """A concept by its spellings: one for every first token.

    Raises:
        ParameterError: there is no spelling, or no prompt.
    """
    spellings = [text.strip() for text in concept.split(";") if text.strip()]
    if not spellings or not prompts:
        raise ParameterError(
            f"tars: expected a concept and 1 to 5 prompts, found {concept!r} and {len(prompts)} prompts"
        )
    found: dict[int, Concept] = {}
    for text in spellings:
        encoded = subject.encode(Row(id="concept", prompt=prompts[0], answer=text, kind="completion"))
        token = encoded.ids[encoded.start]
        found.setdefault(token, Concept(text, token, tuple(text.rstrip(" ") for text in prompts)))
    return list(found.values())


def answers(case: EditCase) -> list[Concept]:
    """What the facts answer now: one concept for every first token.

    Raises:
        RowError: a fact does not say what it answers now.
    """
    prompts: dict[int, list[str]] = {}
    names: dict[int, str] = {}
    for fact in case.facts():
        if not fact.ground_truth:
            raise RowError(f"{fact.source or fact.id}: field 'ground_truth' is missing: tars removes what is said now")
        encoded = case.subject.encode(fact.row(answer=fact.ground_truth[0]))
        token = encoded.ids[encoded.start]
        names.setdefault(token, case.subject.tokenizer.decode([token]))
        prompts.setdefault(token, []).append(case.subject.prompt_text(fact.row()))
    return [Concept(names[token], token, tuple(dict.fromkeys(several))) for token, several in prompts.items()]


# --- the targeting vector --------------------------------------------------------------------------------------------


def state(subject: LanguageModel, prompts: Sequence[str]) -> Tensor:
    """(d,) mean residual stream after the last block, at the prompts' ends."""
    (states,) = watch(subject, prompts, [(subject.blocks[-1].name, "out")])
    return states.mean(0)


@torch.no_grad()
def targeted(
    subject: LanguageModel,
    concept: Concept,
    mean: Tensor | None,
    draws: int,
    noise: float,
    enough: float,
    rounds: int,
    seed: int,
) -> tuple[Tensor, float]:
    """((d,) targeting vector, p(concept) that the head reads in it); `mean` is taken off the vector at the end."""
    v = state(subject, concept.prompts)
    generator = torch.Generator().manual_seed(int(content_key("tars", seed, concept.token)[:15], 16))
    p = _probability(subject, v[None], concept.token)
    for _ in range(rounds):
        if float(p) >= enough:
            break
        drawn = v + noise * v.norm() / math.sqrt(len(v)) * torch.randn(draws, len(v), generator=generator)
        scores = _probability(subject, drawn, concept.token)
        v = drawn[scores.topk(max(1, round(KEPT * draws))).indices].mean(0)
        p = _probability(subject, v[None], concept.token)
    return v if mean is None else v - mean, float(p)


def _probability(subject: LanguageModel, states: Tensor, token: int) -> Tensor:
    """(n,) p(token) after states (n, d), a few at a time: logits are never held whole."""
    size = max(1, (1 << 22) // subject.vocabulary)
    return torch.cat([subject.lens(part).softmax(-1)[:, token].cpu() for part in states.split(size)])


# --- rows ------------------------------------------------------------------------------------------------------------


def nearest(
    subject: LanguageModel, v: Tensor, rows: Rows, share: float, count: int | None, threshold: float | None
) -> list[tuple[ValueMatrix, int, float]]:
    """(matrix, row, cosine) of the rows that look most like a vector, the nearest first.

    Raises:
        RequestError: no row's cosine is above the threshold.
    """
    model = subject.model
    matrices = reading_matrices(model) if rows == "both" else neuron_matrices(model, rows)
    cosines = [_cosines(vectors(model, matrix), v) for matrix in matrices]
    every = torch.cat(cosines)
    best = every.sort(descending=True, stable=True)
    wanted = max(1, round(share * len(every))) if count is None else min(count, len(every))
    if threshold is not None:
        wanted = int((best.values > threshold).sum())
        if not wanted:
            raise RequestError(
                f"tars: no row has a cosine above {threshold}; the largest is {float(best.values[0]):.3f}"
            )
    ends = torch.tensor([len(c) for c in cosines]).cumsum(0)
    places = best.indices[:wanted]
    of = torch.searchsorted(ends, places, right=True)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), ends[:-1]])
    found = zip(of.tolist(), (places - starts[of]).tolist(), best.values[:wanted].tolist())
    return [(matrices[i], dim, cosine) for i, dim, cosine in found]


def _cosines(rows: Tensor, v: Tensor) -> Tensor:
    parts = [torch.cosine_similarity(part.float().cpu(), v[None], dim=1) for part in rows.split(CHUNK)]
    return torch.cat(parts)


def turned(subject: LanguageModel, v: Tensor, chosen: Sequence[tuple[ValueMatrix, int]]) -> Delta:
    """The change that turns rows away from a vector: each keeps its length and gets cosine -1."""
    moved: dict[str, list[tuple[ValueMatrix, int, Tensor]]] = {}
    direction = v.double() / v.double().norm()
    for matrix, dim in chosen:
        old = vectors(subject.model, matrix)[dim].double().cpu()
        moved.setdefault(matrix.name, []).append((matrix, dim, -direction * old.norm() - old))
    return Delta("", sparse(moved))
