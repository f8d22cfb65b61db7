"""Memories: what a model is given beside its weights, at the output matrix of one MLP. The weights stay as they are.

codebook   keys (n, f) and values (n, d): a token whose activation k lies within the radius of its nearest key gets that
           key's value in place of W k (GRACE, arXiv:2211.11031)
side       a second matrix W': a token with |W' k - W k| above a threshold gets W' k (WISE, arXiv:2405.14768)
offset     vectors (n, d) that every token gets on top (steering, arXiv:2312.06681)

Which tokens are meant follows from their activations alone, so that packed, cached and padded passes agree. The entry
of an edit's delta holds what the edit brought; entries are joined, and radii, masks and thresholds worked out, when
they are put on a model. So any of the edits can be left out again. The published codes look up a prompt's last token
(GRACE) and route whole texts by the mean over their tokens (WISE); here every token is looked up and routed by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SubjectError
from .anatomy import transposed

CODEBOOK = {"keys", "values", "labels", "reach"}
"""keys (n, f); values (n, d); labels (n,) int64, equal where two edits say the same; reach (n,) first radii."""
SIDE = {"index", "value", "edit", "shard", "least", "ratio", "density"}
"""index (m,) places of W and value (m,) what W' has more there; edit (m,) whose they are, the first's where edits of
one shard moved the same place; of each edit (n,): shard; least, the smallest |W' k - W k| among its own tokens; ratio
and density, of the router and of merging."""
OFFSET = {"offset"}
"""offset (n, d): what every edit adds."""
NAME = "memory"


def attach(model: nn.Module, parameter: str, entry: Mapping[str, Tensor]) -> None:
    """Give the module that holds a parameter a memory, in place; what it had already stays before it.

    Raises:
        SubjectError: the memory is of another kind or shape than the matrix or what is there.
    """
    owner = model.get_submodule(parameter.rpartition(".")[0])
    weight = owner.get_parameter("weight")
    present = getattr(owner, NAME, None)
    entry = {name: tensor.to(weight.device) for name, tensor in entry.items()}
    if present is not None:
        if set(present.entry) != set(entry):
            raise SubjectError(f"{parameter} has a memory of another kind already; undo it first")
        entry = joined([present.entry, entry])
    rows, columns = weight.shape[::-1] if transposed(owner) else weight.shape
    if set(entry) == CODEBOOK:
        made: _Memory = Codebook(entry, rows, columns, present)
    else:
        made = (Side if set(entry) == SIDE else Offset)(entry, rows, columns)
    if present is None:
        owner.register_forward_hook(_recall)
    owner.add_module(NAME, made)


def of(model: nn.Module, parameter: str) -> Codebook | Side | Offset | None:
    """The memory at a parameter, if there is one."""
    return getattr(model.get_submodule(parameter.rpartition(".")[0]), NAME, None)


def remembers(model: nn.Module) -> str:
    """The first module with a memory; "" without any."""
    return next((name for name, module in model.named_modules() if isinstance(module, _Memory)), "")


def joined(entries: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One entry for several that were made in this order.

    A side memory's has every place once per shard, so that it does not grow with the edits that moved it.
    """
    whole = {name: torch.cat([entry[name] for entry in entries]) for name in entries[0]}
    if set(whole) != SIDE:
        return whole
    counts = [len(entry["least"]) for entry in entries]
    edit = torch.cat([entry["edit"] + sum(counts[:i]) for i, entry in enumerate(entries)])
    index, value = whole["index"], whole["value"]
    if not len(index):
        return whole
    width = int(index.max()) + 1
    kept, at = (whole["shard"][edit] * width + index).unique(return_inverse=True)
    first = torch.full_like(kept, sum(counts)).scatter_reduce(0, at, edit, "amin")
    sums = value.new_zeros(len(kept)).index_add_(0, at, value)
    return {**whole, "index": kept % width, "value": sums, "edit": first}


def _recall(owner: Any, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
    return owner.memory(arguments[0], output)  # type: ignore[no-any-return]


class _Memory(nn.Module):
    """Keeps its entry, which copies and fingerprints of the model then hold too."""

    def __init__(self, entry: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in entry.items():
            self.register_buffer(f"entry_{name}", tensor)

    @property
    def entry(self) -> dict[str, Tensor]:
        return {n.removeprefix("entry_"): b for n, b in self.named_buffers() if n.startswith("entry_")}


class Codebook(_Memory):
    """What is looked up by nearness."""

    def __init__(self, entry: Mapping[str, Tensor], rows: int, columns: int, before: Codebook | None = None) -> None:
        """`before`: the codebook of the first of these edits, whose radii then are not worked out again."""
        super().__init__(entry)
        keys, values, reach = entry["keys"], entry["values"], entry["reach"]
        if keys.shape[1:] != (columns,) or values.shape != (len(keys), rows):
            raise SubjectError(f"a codebook of keys {tuple(keys.shape)} does not fit a matrix ({rows}, {columns})")
        known = None if before is None else before.found
        self.kept, radii = radii_of(keys, entry["labels"], reach, known)
        self.register_buffer("keys", keys[self.kept], persistent=False)
        self.register_buffer("values", values[self.kept], persistent=False)
        self.register_buffer("radii", radii[self.kept], persistent=False)

    @property
    def found(self) -> tuple[list[int], Tensor]:
        """What `radii_of` gave."""
        radii = self.get_buffer("entry_reach").clone()
        radii[self.kept] = self.get_buffer("radii")
        return self.kept, radii

    def forward(self, inputs: Tensor, output: Tensor) -> Tensor:
        keys, values, radii = (self.get_buffer(name) for name in ("keys", "values", "radii"))
        if not len(keys):
            return output
        distance, nearest = torch.cdist(inputs.reshape(-1, inputs.shape[-1]).float(), keys, compute_mode=EXACT).min(1)
        near = (distance <= radii[nearest]).view(output.shape[:-1])
        found = values[nearest].to(output.dtype).view(output.shape)
        return torch.where(near[..., None], found, output)


EXACT = "donot_use_mm_for_euclid_dist"  # a key's distance from itself is 0, not a rounding error


def radii_of(
    keys: Tensor, labels: Tensor, reach: Tensor, found: tuple[list[int], Tensor] | None = None
) -> tuple[list[int], Tensor]:
    """Which keys stand by themselves, and (n,) radii, by GRACE's rule for one edit after another (its algorithm 1).

    Far from the nearest key: a new one with its own reach. Near a key of the same label: that key's radius grows to
    take the new one in. Near one of another label: a new key, and both reach half the way to each other.

    Args:
        found: what this gave for the first of them.
    """
    start, known = ([], reach[:0]) if found is None else found
    kept = list(start)
    radii = torch.cat([known, reach[len(known) :]])
    for i in range(len(known), len(keys)):
        if kept:
            distances = (keys[kept] - keys[i]).norm(dim=1)
            at = int(distances.argmin())
            nearest, distance = kept[at], distances[at]
            if bool(distance <= radii[nearest] + reach[i]):
                if bool(labels[nearest] == labels[i]):
                    radii[nearest] = torch.maximum(radii[nearest], distance)
                    continue
                radii[nearest] = radii[i] = distance / 2
        kept.append(i)
    return kept, radii


class Side(_Memory):
    """A second matrix and its router."""

    def __init__(self, entry: Mapping[str, Tensor], rows: int, columns: int) -> None:
        super().__init__(entry)
        index, value, edit = entry["index"], entry["value"], entry["edit"]
        if len(index) and int(index.max()) >= rows * columns:
            raise SubjectError(f"a side memory with place {int(index.max())} does not fit a matrix ({rows}, {columns})")
        shards = [int(shard) for shard in entry["shard"].unique()]
        owners = entry["shard"][edit]
        parts = [
            value.new_zeros(rows * columns).index_add_(0, index[owners == shard], value[owners == shard])
            for shard in shards
        ]
        merged = sum(parts, value.new_zeros(1))
        if len(parts) > 1:
            merged = ties(torch.stack(parts), float(entry["density"][-1]))
        threshold = (entry["ratio"] * entry["least"]).min() if len(parts) else value.new_tensor(float("inf"))
        self.register_buffer("difference", merged.expand(rows * columns).view(rows, columns), persistent=False)
        self.register_buffer("threshold", threshold, persistent=False)

    def forward(self, inputs: Tensor, output: Tensor) -> Tensor:
        difference, threshold = self.get_buffer("difference"), self.get_buffer("threshold")
        more = torch.nn.functional.linear(inputs, difference.to(inputs.dtype)).view(output.shape)
        aside = more.float().norm(dim=-1, keepdim=True) > threshold
        return torch.where(aside, output + more, output)


def ties(parts: Tensor, density: float) -> Tensor:
    """(n,) merge of differences (k, n) (TIES, arXiv:2306.01708): of each its largest share, of every place the sign
    with more mass, of those that have it the mean."""
    moved = parts.abs()
    trimmed = []
    for part, size in zip(parts, moved):
        count = max(1, round(density * int((size > 0).sum())))
        trimmed.append(torch.where(size >= size.topk(count).values[-1], part, 0.0))
    stacked = torch.stack(trimmed)
    agrees = (stacked.sign() == stacked.sum(0).sign()) & (stacked != 0)
    return (stacked * agrees).sum(0) / agrees.sum(0).clamp_min(1)


class Offset(_Memory):
    """What every token gets more."""

    def __init__(self, entry: Mapping[str, Tensor], rows: int, columns: int) -> None:
        super().__init__(entry)
        if entry["offset"].shape[1:] != (rows,):
            raise SubjectError(f"offsets {tuple(entry['offset'].shape)} do not fit a matrix ({rows}, {columns})")
        self.register_buffer("shift", entry["offset"].sum(0), persistent=False)

    def forward(self, _: Tensor, output: Tensor) -> Tensor:
        return output + self.get_buffer("shift").to(output.dtype)
