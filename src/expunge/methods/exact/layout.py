"""Which rows go into which shard and slice, and which blocks are learnt at which stage.

Nothing here looks at what a row says: where it goes depends on its place in the file and the seed alone. A layout that
knew the rows would change when one of them is deleted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...errors import ParameterError, RowError

Cell = tuple[int, int]
"""(shard, slice)"""


def cells(count: int, shards: int, slices: int, *, seed: int, shuffle: bool = True) -> list[Cell]:
    """(count,) where each row goes: permuted by the seed, cut into shards, each of them into slices, as even as can be.

    Args:
        shuffle: off, rows keep their order: the first L-th of them is slice 0 of all shards, so that a file sorted by
            the chance of deletion has slices of different chances (`matching` orders use that).

    Raises:
        RowError: fewer rows than cells.
    """
    if count < shards * slices:
        raise RowError(
            f"{count} rows cannot fill {shards} shards of {slices} slices; expected at least {shards * slices} rows, "
            "or fewer shards or slices"
        )
    # A stream of its own: whoever draws rows to delete with the same seed must not draw them in this sequence.
    rng = np.random.default_rng([seed, 0x5A])
    order = rng.permutation(count) if shuffle else np.arange(count)
    found: list[Cell] = [(0, 0)] * count
    for first, outer in enumerate(np.array_split(order, shards if shuffle else slices)):
        for second, inner in enumerate(np.array_split(outer, slices if shuffle else shards)):
            for place in inner.tolist():
                found[place] = (first, second) if shuffle else (second, first)
    return found


def groups(blocks: int, slices: int) -> list[list[int]]:
    """Blocks that each stage learns, from the top down: blocks // L each; the lowest ones that are left over, none.

    Below the blocks being learnt everything is as it was, so a pass forward may begin there and a pass back ends there.

    Raises:
        ParameterError: more slices than blocks.
    """
    if slices > blocks:
        raise ParameterError(f"slices is {slices}, but the model has {blocks} blocks; every slice needs one of its own")
    size = blocks // slices
    return [list(range(blocks - (i + 1) * size, blocks - i * size)) for i in range(slices)]


def row_passes(sizes: Sequence[int], order: Sequence[int]) -> int:
    """Rows read in an epoch of each stage of an order: stage i reads the first i slices.

    Args:
        sizes: (L,) rows of each slice.
    """
    return int(np.cumsum([sizes[s] for s in order]).sum())
