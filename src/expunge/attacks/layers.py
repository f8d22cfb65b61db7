"""Guesses at an answer's first token, read from what a model would say after each of its layers (arXiv:2309.17410)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from ..evidence import Item
from ..rows import Row
from ..tables.passes import Hidden
from .case import Attack, Case, Found

VALIDATION = 48
"""Retained rows on which layers are chosen."""

Budget = Annotated[int, Field(ge=2)]
Guess = Callable[[Tensor], list[list[int]]]
"""Log-probabilities (layers, V) after the chosen layers -> for each k the tokens that are issued, more for larger k."""


def guesses(
    case: Case, layers: Sequence[int], count: int, k: int, guess: Guess, spent: Callable[[int, int], int]
) -> Attack:
    """Success of the tokens that `guess` issues, from layers chosen on retained rows of the same model.

    The same is done on rows the model never learned (holdout): what is right there is chance, and the note says it.
    Curve: budget against success.

    Args:
        layers: which are read, 0 the first block; none: `count` layers chosen by `cover`.
        k: tokens that a layer may issue, for the choice of layers.
        spent: (layers, k) -> tokens that may be issued, B.
    """
    known, never = case.rows.get("retain", [])[:VALIDATION], case.rows.get("holdout", [])
    rows = [*case.forget, *never, *known]
    states = yield Hidden(tuple((row, None) for row in rows))
    tokens = [first_token(case.subject, row) for row in rows]
    depth = states.shape[1] - 1
    wrong = [at for at in layers if not 0 <= at < depth]
    if wrong:
        return Found(status=f"skipped: there is no layer {wrong[0]}; the model has 0-{depth - 1}")
    chosen = list(layers) or list(range(depth))[-count:]
    if known and not layers:
        validation = zip(states[len(rows) - len(known) :], tokens[len(rows) - len(known) :])
        chosen = cover(
            torch.stack([_ranks(after_blocks(case.subject, state), token) for state, token in validation]), k, count
        )
    told = [guess(after_blocks(case.subject, state)[chosen]) for state in states[: len(rows) - len(known)]]
    hits = [[token in guessed for guessed in several] for several, token in zip(told, tokens)]
    forget = len(case.forget)
    items = [Item(row.entity or row.id, row.id, float(hit[-1])) for row, hit in zip(case.forget, hits)]
    curve = [(float(spent(len(chosen), j)), _mean(found)) for j, found in enumerate(zip(*hits[:forget]), start=1)]
    issued = [len(several[-1]) for several in told[:forget]]
    budget = {"queries": forget, "candidates": _mean(issued), "at most": max(issued), "layers": len(chosen)}
    note = f"first answer token only; layers {', '.join(map(str, chosen))}"
    if never:
        note += f"; {_mean([hit[-1] for hit in hits[forget:]]):.2f} on {len(never)} rows the model never learned"
    return Found(items, budget, curve, "candidates at most", note)


def first_token(subject: Any, row: Row) -> int:
    encoded = subject.encode(row)
    return int(encoded.ids[encoded.start])


def after_blocks(subject: Any, state: Tensor) -> Tensor:
    """(blocks, V) log-probabilities after every block, of one residual stream (blocks + 1, d)."""
    return torch.as_tensor(subject.lens(state[1:])).log_softmax(-1).cpu()


def best(scores: Tensor, k: int) -> Tensor:
    """(..., k) tokens with the highest scores; of equal ones those with the smallest number."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k]


def cover(ranks: Tensor, k: int, count: int) -> list[int]:
    """The layers in which most answers are among the k best: one after the other the one that adds most, of equal ones
    the later.

    Args:
        ranks: (n, layers) how many tokens stand above the answer.
    """
    found: list[int] = []
    hit = ranks < k
    covered = torch.zeros(len(ranks), dtype=torch.bool)
    while len(found) < min(count, ranks.shape[1]):
        left = [at for at in range(ranks.shape[1]) if at not in found]
        found.append(max(left, key=lambda at: (int((hit[:, at] & ~covered).sum()), at)))
        covered |= hit[:, found[-1]]
    return sorted(found)


def _ranks(scores: Tensor, token: int) -> Tensor:
    return (scores > scores[:, token : token + 1]).sum(-1)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
