"""What was done to a checkpoint's matrices: nothing, rounding, a localised edit, or training.

Each pair of matrices is read once from disk and looked at in blocks of rows: D = W' - W is never whole. Its leading
singular values come from a randomised range finder (Halko et al., arXiv:0909.4061), which is exact for what matters
here: a change of few ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import MismatchError, SubjectError

Kind = Literal["identical", "requantised", "low_rank_edit", "sparse_edit", "dense_change"]
RANKS = 32
"""Changes of at most so many ranks count as edits, in matrices that are wide enough."""
FEW = 8
"""In narrow ones an eighth of the narrower side, but so many at least: a merged adapter has 8 ranks."""
ENERGY = 0.99
"""Share of |D|^2 that those ranks must hold."""
SPARSE = 0.01
"""At most this share of a matrix's entries moves in a sparse edit."""
ROWS = 1 << 22
"""Entries of a block of rows."""
NARROW = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
LEVELS = 256
"""Distinct values of a row in 8 bits or fewer."""


@dataclass(frozen=True)
class Difference:
    """What was done to one tensor."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    changed: float
    """Share of the entries that are another number."""
    relative: float
    """|D|_F / |W|_F"""
    stable_rank: float
    """|D|_F^2 / |D|_2^2; 0 where nothing changed."""
    rank: int
    """Ranks that hold `ENERGY` of the change; 0 where there are more than `most_ranks`, or it is no matrix."""
    energy: float
    """Share of |D|^2 in its leading singular value."""
    right: Tensor | None = field(default=None, repr=False, compare=False)
    """(in,) leading right singular vector of a low-rank edit: what the matrix must read to say something else."""


Tensors = Mapping[str, Callable[[], Tensor]]


@contextmanager
def tensors(folder: str | Path) -> Iterator[Tensors]:
    """The tensors of a model folder by name, each read when it is asked for.

    Raises:
        SubjectError: no safetensors files there.
    """
    from safetensors import safe_open

    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise SubjectError(f"{folder} holds no *.safetensors files; expected a model folder")
    with ExitStack() as stack:
        found: dict[str, Callable[[], Tensor]] = {}
        for file in files:
            opened = stack.enter_context(safe_open(file, framework="pt"))
            found |= {name: _reader(opened, name) for name in opened.keys()}  # noqa: SIM118 - no mapping
        yield found


def _reader(opened: object, name: str) -> Callable[[], Tensor]:
    return lambda: opened.get_tensor(name)  # type: ignore[attr-defined,no-any-return]


def differences(
    reference: Tensors, suspect: Tensors, *, progress: Callable[[int, int], None] | None = None
) -> list[Difference]:
    """What was done to every tensor of the suspect, in the reference's order.

    Where all of a suspect's numbers fit a narrower type, the reference is rounded to it first, so that an edit is found
    beneath the rounding.

    Raises:
        MismatchError: the checkpoints do not have the same tensors in the same shapes; names the first that differs.
    """
    for name in [*reference, *suspect]:
        if name not in reference or name not in suspect:
            where = "reference" if name in reference else "suspect"
            raise MismatchError(f"checkpoints cannot be compared: tensor {name} is only in the {where}")
    found = []
    for number, name in enumerate(reference):
        before, after = reference[name](), suspect[name]()
        if before.shape != after.shape:
            raise MismatchError(
                f"checkpoints cannot be compared: {name} is {tuple(before.shape)} in the reference and "
                f"{tuple(after.shape)} in the suspect"
            )
        found.append(difference(before, after, name))
        if progress:
            progress(number + 1, len(reference))
    return found


def most_ranks(shape: Sequence[int]) -> int:
    """Ranks that a change of a matrix may have and still count as an edit.

    Of a narrow matrix 32 ranks are half of all that there are, and a short training moves hardly more; any change of a
    tiny one has few.
    """
    narrower = min(shape)
    return max(0, min(RANKS, max(narrower // 8, FEW), narrower // 2 - 1))


@torch.no_grad()
def difference(before: Tensor, after: Tensor, name: str = "") -> Difference:
    """What turned `before` into `after`; both (out, in), or of any other one shape. Stacks of experts (E, a, b) are
    looked at as (E a, b)."""
    shape = tuple(before.shape)
    before, after = (t.reshape(-1, t.shape[-1]) if t.dim() > 1 else t.reshape(1, -1) for t in (before, after))
    if _same(before, after):  # be it in another type
        return Difference(name, shape, "identical", 0.0, 0.0, 0.0, 0, 0.0)
    rounded = _rounded(before, after)
    if rounded is not None:
        before = rounded
        if _same(before, after):
            return Difference(name, shape, "requantised", 0.0, 0.0, 0.0, 0, 0.0)
    size, changed, norm = _sums(before, after)
    share, relative = changed / before.numel(), (norm / size) ** 0.5 if size else float("inf")
    if min(before.shape) < 2:
        return Difference(name, shape, "sparse_edit" if share <= SPARSE else "dense_change", share, relative, 1.0, 0, 1)
    values, right = _leading(before, after)
    energies = (values.square().cumsum(0) / norm).tolist()
    rank = next((r for r, energy in enumerate(energies[: most_ranks(before.shape)], 1) if energy >= ENERGY), 0)
    kind: Kind
    if rank:
        kind = "low_rank_edit"
    elif _levels(after) < _levels(before):
        kind = "requantised"
    else:
        kind = "sparse_edit" if share <= SPARSE else "dense_change"
    stable = norm / float(values[0]) ** 2
    return Difference(name, shape, kind, share, relative, stable, rank, energies[0], right if rank else None)


def _same(before: Tensor, after: Tensor) -> bool:
    return all(torch.equal(a.float(), b.float()) for a, b in zip(_blocks(before), _blocks(after)))


def _rounded(before: Tensor, after: Tensor) -> Tensor | None:
    """The reference in the widest narrower type that all of the suspect's numbers fit; None where there is none."""
    for dtype in NARROW:
        narrower = before.element_size() > dtype.itemsize or (before.dtype != dtype and before.dtype in NARROW)
        if narrower and all(torch.equal(a.to(dtype).float(), a.float()) for a in _blocks(after)):
            return before.to(dtype)
    return None


def _levels(matrix: Tensor) -> int:
    """Distinct values of a row, at most, over a few rows; more than `LEVELS` count as one more."""
    rows = matrix[:: max(1, len(matrix) // 8)].float()
    return min(LEVELS + 1, max(len(row.unique()) for row in rows))


def _blocks(*matrices: Tensor) -> Iterator[Tensor]:
    for matrix in matrices:
        yield from matrix.split(max(1, ROWS // matrix.shape[1]))


def _changes(before: Tensor, after: Tensor) -> Iterator[Tensor]:
    """D = after - before in fp32, block by block of rows."""
    for old, new in zip(_blocks(before), _blocks(after)):
        yield new.float() - old.float()


def _sums(before: Tensor, after: Tensor) -> tuple[float, int, float]:
    """(|W|^2, entries that changed, |D|^2)"""
    size = sum(float(block.float().double().square().sum()) for block in _blocks(before))
    changed, norm = 0, 0.0
    for d in _changes(before, after):
        changed += int(d.count_nonzero())
        norm += float(d.double().square().sum())
    return size, changed, norm


def _leading(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """(leading singular values of D, descending; (in,) its leading right singular vector)"""
    wide = min(RANKS + 8, *before.shape)
    draw = torch.Generator().manual_seed(0)
    test = torch.randn(before.shape[1], wide, generator=draw)
    for _ in range(2):  # one power iteration sharpens the range where the spectrum falls slowly
        image = torch.cat([d @ test for d in _changes(before, after)])
        basis = torch.linalg.qr(image).Q
        parts = basis.split([len(d) for d in _blocks(before)])
        test = sum((d.T @ q for d, q in zip(_changes(before, after), parts)), torch.zeros_like(test))
    _, values, right = torch.linalg.svd(test.T, full_matrices=False)
    return values, right[0]


def overall(found: Sequence[Difference]) -> str:
    """One sentence about a checkpoint."""
    kinds = {d.kind for d in found}
    if kinds <= {"identical"}:
        return "weights identical; check prompts"
    if kinds <= {"identical", "requantised"}:
        return "weights rounded to a narrower type, nothing else"
    edited = [d for d in found if d.kind in ("low_rank_edit", "sparse_edit")]
    if "dense_change" in kinds:
        return "changed everywhere" + (" in some matrices and locally in others" if edited else ": trained or replaced")
    return f"localised edit in {len(edited)} of {len(found)} tensors: {', '.join(d.name for d in edited[:6])}"


# --- models in memory -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moved:
    """What the weights of a model show of a change."""

    label: str = "identical"
    """What was done to the tensors that changed; `identical` where none did."""
    tensors: int = 0
    changed: float = 0.0
    """Share of all weights that are another number."""
    relative: float = 0.0
    """|D|_F / |W|_F of all weights."""
    furthest: Difference | None = None
    """The tensor that moved furthest for its size."""


class Weights:
    """A model that others, changed over it, are compared with. Tensors that are shared with it are not read."""

    def __init__(self, model: nn.Module) -> None:
        self.own = dict(model.named_parameters())
        self.count = sum(p.numel() for p in self.own.values())
        self.norm = float(sum(p.detach().double().square().sum() for p in self.own.values()))

    def moved(self, model: nn.Module) -> Moved:
        """What was done to a model of the same tensors."""
        pairs = {name: (self.own[name], p) for name, p in model.named_parameters() if self.own[name] is not p}
        found = [difference(before.detach(), after.detach(), name) for name, (before, after) in pairs.items()]
        moved = [one for one in found if one.kind != "identical"]
        if not moved:
            return Moved()
        changed = sum(one.changed * self.own[one.name].numel() for one in moved) / self.count
        size = sum((pairs[o.name][1] - pairs[o.name][0]).detach().double().square().sum() for o in moved)
        label = " and ".join(sorted({one.kind for one in moved}))
        relative = float(size / self.norm) ** 0.5
        return Moved(label, len(moved), changed, relative, max(moved, key=lambda one: one.relative))
