"""Second moments of keys: C = E[k k^T] over the tokens of a corpus, k what goes into an MLP's output matrix.

One pass feeds all layers asked for and ends after the highest. Products are made in tiles of rows in fp32 and added in
float64, so that beside C itself (8 f^2 bytes a layer) only a tile is held; where C of all layers is more than
`MOMENT_BYTES`, the corpus runs once for every group of layers. It ends after `max_tokens`, or where doubling the tokens
moved C by less than `tolerance`. What was found is kept on disk under the hash of model, corpus and settings: another
model never meets it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from .. import processes
from ..errors import RowError, SubjectError
from ..files import cache_folder, complete_folder, save_tensors
from ..rows import Row
from ..tables.store import content_key
from .language import LanguageModel
from .packed import TOKEN_BUDGET
from .protocol import Progress
from .tails import Text, edited_matrix, look

MOMENT_BYTES = 8 << 30
"""Held at once for sums."""
TILE = 2048
"""Rows of C that are made in one product."""


@dataclass(frozen=True)
class Moment:
    """C of one layer."""

    matrix: Tensor
    """(f, f), float64."""
    tokens: int
    change: float
    """Relative Frobenius change over the last doubling of the tokens: how far C may be off."""

    def regularised(self, ridge: float) -> Tensor:
        """C + ridge * tr(C) / f * I"""
        size = len(self.matrix)
        return self.matrix + ridge * float(self.matrix.trace()) / size * torch.eye(size, dtype=torch.float64)

    @cached_property
    def factors(self) -> dict[float, Tensor]:
        return {}

    def solve(self, keys: Tensor, ridge: float) -> Tensor:
        """(C + ridge)^-1 keys (f, n); one Cholesky factor serves all edits.

        Raises:
            SubjectError: C is singular, because the corpus has fewer tokens than there are neurons.
        """
        if ridge not in self.factors:
            factor, failed = torch.linalg.cholesky_ex(self.regularised(ridge))
            if int(failed):
                raise SubjectError(
                    f"the keys' second moment ({len(self.matrix)} neurons, {self.tokens} tokens) cannot be inverted; "
                    "give a larger corpus or a ridge above 0"
                )
            self.factors[ridge] = factor
        return torch.cholesky_solve(keys, self.factors[ridge])

    @cached_property
    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues in rising order, and eigenvectors in columns."""
        found = torch.linalg.eigh(self.matrix)
        return found.eigenvalues, found.eigenvectors


def encoded(subject: LanguageModel, rows: Sequence[Row]) -> list[Text]:
    """Corpus rows as token ids, prompt and answer; errors as `encode`."""
    return [subject.encode(row).ids for row in rows]


def moments(
    subject: LanguageModel,
    texts: Sequence[Text],
    layers: Sequence[int],
    *,
    max_tokens: int = 3_200_000,
    tolerance: float = 0.01,
    keep: Path | None = None,
    progress: Progress | None = None,
) -> dict[int, Moment]:
    """C of every layer asked for, from the disk where it is there.

    Args:
        texts: token ids; every token of each counts.
        keep: folder in which what was found is kept; the user's cache by default.

    Raises:
        RowError: there are no texts.
        SubjectError: a layer is no dense one, or its C does not fit into memory.
    """
    if not texts:
        raise RowError("the key statistics need texts, found 0")
    sizes = {layer: edited_matrix(subject, layer).count for layer in layers}
    corpus = hashlib.sha256(repr([tuple(text) for text in texts]).encode()).hexdigest()
    home = keep if keep is not None else cache_folder() / "moments"
    folders = {layer: home / content_key(subject.fingerprint, corpus, layer, max_tokens, tolerance) for layer in sizes}
    found = {layer: _load(folder) for layer, folder in folders.items() if processes.once(folder.is_dir)}
    for group in _groups({layer: size for layer, size in sizes.items() if layer not in found}):
        for layer, moment in _stream(subject, texts, group, max_tokens, tolerance, progress).items():
            found[layer] = moment
            if processes.first():
                with complete_folder(folders[layer]) as partial:
                    about = torch.tensor([moment.tokens, moment.change], dtype=torch.float64)
                    save_tensors({"moment": moment.matrix, "about": about}, partial / "moment.safetensors")
    return found


def _load(folder: Path) -> Moment:
    from safetensors.torch import load_file

    read = load_file(folder / "moment.safetensors")
    return Moment(read["moment"], int(read["about"][0]), float(read["about"][1]))


def _groups(sizes: dict[int, int]) -> list[dict[int, int]]:
    """Layers whose sums, and the copies they are compared with, fit into memory together."""
    groups: list[dict[int, int]] = []
    used = 0
    for layer, size in sorted(sizes.items()):
        need = 12 * size * size
        if need > MOMENT_BYTES:
            raise SubjectError(
                f"the keys' second moment of layer {layer} ({size} x {size}) takes {need / 2**30:.1f} GiB, more than "
                f"{MOMENT_BYTES / 2**30:.0f} GiB; edit without it (covariance=false)"
            )
        if not groups or used + need > MOMENT_BYTES:
            groups.append({})
            used = 0
        groups[-1][layer] = size
        used += need
    return groups


def _stream(
    subject: LanguageModel,
    texts: Sequence[Text],
    sizes: dict[int, int],
    max_tokens: int,
    tolerance: float,
    progress: Progress | None,
) -> dict[int, Moment]:
    sums = {layer: torch.zeros(size, size, dtype=torch.float64) for layer, size in sizes.items()}
    earlier = {layer: torch.zeros(size, size) for layer, size in sizes.items()}
    change = dict.fromkeys(sizes, 1.0)
    tokens, compared = 0, 0
    total = min(max_tokens, sum(map(len, texts)))
    for batch in _batches(texts, max_tokens):
        rows = [row for row, text in enumerate(batch) for _ in text]
        at = [place for text in batch for place in range(len(text))]
        keys = look(subject, batch, at, list(sizes), rows=rows).keys
        for layer, size in sizes.items():
            k = keys[layer].cpu()
            for first in range(0, size, TILE):
                tile = slice(first, first + TILE)
                sums[layer][tile] += (k[:, tile].T @ k).double()
        tokens += len(at)
        if progress:
            progress(tokens, total)
        if tokens >= 2 * compared:
            for layer in sizes:
                now = (sums[layer] / tokens).float()
                change[layer] = float((now - earlier[layer]).norm() / now.norm().clamp_min(1e-30))
                earlier[layer] = now
            compared = tokens
            if max(change.values()) < tolerance:
                break
    return {layer: Moment(sums[layer] / tokens, tokens, change[layer]) for layer in sizes}


def _batches(texts: Sequence[Text], max_tokens: int) -> list[list[Text]]:
    """Texts in their order, in batches within the token budget, alike lengths together in each; up to `max_tokens`."""
    found: list[list[Text]] = []
    window: list[Text] = []
    used = taken = 0
    for text in texts:
        text = text[: max_tokens - taken]
        if not len(text):
            break
        taken += len(text)
        if window and used + len(text) > TOKEN_BUDGET:
            found += _alike(window)
            window, used = [], 0
        window.append(text)
        used += len(text)
    return found + _alike(window)


def _alike(texts: Sequence[Text]) -> list[list[Text]]:
    """Lengths within a quarter of one another: padding is computed too."""
    groups: list[list[Text]] = []
    for text in sorted(texts, key=len):
        if groups and len(text) * 3 <= len(groups[-1][0]) * 4:
            groups[-1].append(text)
        else:
            groups.append([text])
    return groups
