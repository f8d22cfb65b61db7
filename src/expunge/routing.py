"""Whether tokens still take the same experts: before against after, on mixtures of experts (UOE, section 5).

    overlap(l) = mean over tokens of |experts before and after| / K        K experts per token

A method that moves routers, or anything below them, sends tokens to experts that never learnt to treat them. Gold is
left out: models trained apart have experts of their own, in an order of their own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from .evidence import Interval, Routing
from .rows import Row
from .side_effects import interval
from .subjects.anatomy import anatomy
from .tables.passes import Route, Store, run
from .tables.routes import Routes

SETS = ("forget", "retain")
TOKENS = 20_000
"""Tokens looked at in each row set."""


def measure(
    before: Any,
    after: Any,
    data: Mapping[str, list[Row]],
    store: Store | None = None,
    *,
    method: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Routing], str]:
    """Routing on forget and retain rows, from one pass over at most `TOKENS` tokens of each by each model.

    Returns:
        What was measured, nothing on dense models; and a sentence where mixtures could not be compared.
    """
    blocks = [[(bool(block.router), block.experts) for block in model.blocks] for model in (before, after)]
    mixed = [any(router for router, _ in some) for some in blocks]
    if not all(mixed):
        return [], "" if not any(mixed) else "Experts were not compared: one of the two models has none."
    if blocks[0] != blocks[1] or not any(experts for _, experts in blocks[0]):
        return [], "Experts were not compared: the models do not both say, block by block, which ones a token takes."
    chosen = {name: sample(before, data[name], seed) for name in SETS if data.get(name)}
    asks = [Route(tuple(rows)) for rows in chosen.values()]
    tables = [run(model, asks, store, progress) for model in (before, after)]
    places = moved(before, method or {})
    found = []
    for (name, rows), old, new in zip(chosen.items(), *tables):
        if old.metadata["experts"] != new.metadata["experts"] or not np.array_equal(old.offsets, new.offsets):
            return [], "Experts were not compared: the two models cut rows into other tokens or have other experts."
        found.append(_routing(name, rows, old, new, places, len(data[name]), seed))
    return found, ""


def sample(subject: Any, rows: Sequence[Row], seed: int) -> list[Row]:
    """Rows drawn until they have `TOKENS` tokens, in their own order; all of them where they have fewer."""
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    kept: list[int] = []
    fed = 0
    for index in order:
        if fed >= TOKENS:
            break
        kept.append(index)
        fed += len(subject.encode(rows[index]).ids) - 1
    return [rows[index] for index in sorted(kept)]


def moved(subject: Any, method: Mapping[str, Any]) -> dict[int, list[int]]:
    """Block to the experts that the method's scope let move alone."""
    scope = method.get("scope")
    parts = anatomy(subject.model)
    places: dict[int, set[int]] = {}
    for name, _, experts in scope.get("resolved", []) if isinstance(scope, Mapping) else []:
        layer = parts.layer(name)
        if experts and layer is not None:
            places.setdefault(layer, set()).update(experts)
    return {layer: sorted(experts) for layer, experts in places.items()}


def _routing(
    name: str,
    rows: Sequence[Row],
    before: Routes,
    after: Routes,
    places: Mapping[int, list[int]],
    of: int,
    seed: int,
) -> Routing:
    shared = {
        layer: (old[:, :, None] == after.chosen[layer][:, None, :]).any(2).mean(1)
        for layer, old in before.chosen.items()
    }
    token = np.mean(list(shared.values()), axis=0)
    lengths = np.diff(before.offsets)
    means = np.add.reduceat(token, before.offsets[:-1]) / lengths
    low, high = interval(means, rows, seed, lengths)
    return Routing(
        rows=name,
        overlap=Interval(low, float(token.mean()), high),
        blocks={str(layer): float(values.mean()) for layer, values in shared.items()},
        moved={
            str(layer): [float(np.isin(table.chosen[layer], experts).any(1).mean()) for table in (before, after)]
            for layer, experts in places.items()
            if layer in shared
        },
        n=len(rows),
        of=of,
        tokens=before.tokens,
    )
