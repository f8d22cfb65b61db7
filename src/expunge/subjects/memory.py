"""Memories: what a model is given beside its weights, at the output matrix of one MLP. The weights stay as they are.

codebook   keys (n, f) and values (n, d): a token whose activation k lies within the radius of its nearest key gets that
           key's value in place of W k (GRACE, arXiv:2211.11031)
side       a second matrix W': a token with |W' k - W k| above a threshold gets W' k (WISE, arXiv:2405.14768)

Which tokens are meant follows from their activations alone, so that packed, cached and padded passes agree. An entry of
a delta holds what every edit brought, in order; radii, masks and thresholds are worked out when it is put on a model.
So any of the edits can be left out again. The published codes look up a prompt's last token (GRACE) and route whole
texts by the mean over their tokens (WISE); here every token is looked up and routed by itself.
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
"""index (m,) places of W and value (m,) what W' has more there; edit (m,) whose they are; of each edit (n,): shard;
least, the smallest |W' k - W k| among its own tokens; ratio and density, of the router and of merging."""
NAME = "memory"


def attach(model: nn.Module, parameter: str, entry: Mapping[str, Tensor]) -> None:
    """Give the module that holds a parameter a memory, in place; what it had already stays before it.

    Raises:
        SubjectError: the memory is of another kind or shape than the matrix or what is there.
    """
    owner = model.get_submodule(parameter.rpartition(".")[0])
    weight = owner.get_parameter("weight")
    present = getattr(owner, NAME, None)
    if present is not None:
        if set(present.entry) != set(entry):
            raise SubjectError(f"{parameter} has a memory of another kind already; undo it first")
        entry = joined([present.entry, entry])
    kind = Codebook if set(entry) == CODEBOOK else Side
    rows, columns = weight.shape[::-1] if transposed(owner) else weight.shape
    made = kind({name: tensor.to(weight.device) for name, tensor in entry.items()}, rows, columns)
    if present is None:
        owner.register_forward_hook(_recall)
    owner.add_module(NAME, made)


def of(model: nn.Module, parameter: str) -> Codebook | Side | None:
    """The memory at a parameter, if there is one."""
    return getattr(model.get_submodule(parameter.rpartition(".")[0]), NAME, None)


def remembers(model: nn.Module) -> str:
    """The first module with a memory; "" without any."""
    return next((name for name, module in model.named_modules() if isinstance(module, Codebook | Side)), "")


def joined(entries: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One entry for several that were made in this order."""
    first = entries[0]
    if set(first) == CODEBOOK:
        return {name: torch.cat([entry[name] for entry in entries]) for name in first}
    counts = [len(entry["least"]) for entry in entries]
    edit = torch.cat([entry["edit"] + sum(counts[:i]) for i, entry in enumerate(entries)])
    return {**{name: torch.cat([entry[name] for entry in entries]) for name in first}, "edit": edit}


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

    def __init__(self, entry: Mapping[str, Tensor], rows: int, columns: int) -> None:
        super().__init__(entry)
        keys, values = entry["keys"], entry["values"]
        if keys.shape[1:] != (columns,) or values.shape != (len(keys), rows):
            raise SubjectError(f"a codebook of keys {tuple(keys.shape)} does not fit a matrix ({rows}, {columns})")
        kept, radii = radii_of(keys, entry["labels"], entry["reach"])
        self.register_buffer("keys", keys[kept], persistent=False)
        self.register_buffer("values", values[kept], persistent=False)
        self.register_buffer("radii", radii[kept], persistent=False)

    def forward(self, inputs: Tensor, output: Tensor) -> Tensor:
        keys, values, radii = (self.get_buffer(name) for name in ("keys", "values", "radii"))
        if not len(keys):
            return output
        distance, nearest = torch.cdist(inputs.reshape(-1, inputs.shape[-1]).float(), keys, compute_mode=EXACT).min(1)
        near = (distance <= radii[nearest]).view(output.shape[:-1])
        found = values[nearest].to(output.dtype).view(output.shape)
        return torch.where(near[..., None], found, output)


EXACT = "donot_use_mm_for_euclid_dist"  # a key's distance from itself is 0, not a rounding error


def radii_of(keys: Tensor, labels: Tensor, reach: Tensor) -> tuple[list[int], Tensor]:
    """Which keys stand by themselves, and (n,) radii, by GRACE's rule for one edit after another (its algorithm 1).

    Far from the nearest key: a new one with its own reach. Near a key of the same label: that key's radius grows to
    take the new one in. Near one of another label: a new key, and both reach half the way to each other.
    """
    kept: list[int] = []
    radii = reach.clone()
    for i in range(len(keys)):
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
