"""The neuron map: the tokens that every MLP neuron of a model stands for (arXiv:2501.02688).

For layer l with rows U (f, d) and the LM head H (V, d) the scores are S = U H^T; a neuron's token is the argmax of its
row of S, its strength z = (max S - mean S) / deviation of S, so that long rows do not win by their length. `up` rows
are the paper's; `gate` rows and value vectors (`down`) are read alike. A folder holds one file a layer, with the hash
of the weights it was made of: a map that was killed goes on, and layers whose weights have changed are read again.

    map.json            model, settings, the tokenizer's tokens, whether every layer asked for is there
    layer-000.safetensors
        tokens int32 (f, k), scores float16 (f, k), mean, deviation, cosine float32 (f,), lse float32 (f,) if asked for
        in experts' layers "3/tokens" ...
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import MismatchError, SubjectError, TableError
from ..files import save_tensors, write_text
from .anatomy import anatomy
from .input_vectors import Holding, Kind, front_norm, neuron_matrices, present
from .language import LanguageModel
from .projection import Projection, Readout, Sign, linear_part, project
from .protocol import Progress
from .value_vectors import Address, ValueMatrix, vectors

Gain = Literal["none", "final", "input"]
FORMAT = 1


@dataclass(frozen=True)
class Settings:
    """How neurons are read."""

    matrix: Kind = "up"
    k: int = 10
    sign: Sign = "+"
    norm: Gain = "none"
    """What a row is multiplied by: nothing (the paper), the final norm's gain, or that of the norm in front of the
    MLP, with which row * gain is the direction that is read."""
    probabilities: bool = False


class Neuron(NamedTuple):
    """One neuron of a map."""

    address: Address
    z: float
    cosine: float
    tokens: tuple[int, ...]
    scores: tuple[float, ...]
    lse: float | None = None


@dataclass(frozen=True)
class Part:
    """One matrix of a map."""

    layer: int
    expert: int | None
    tokens: Tensor
    scores: Tensor
    mean: Tensor
    deviation: Tensor
    cosine: Tensor
    lse: Tensor | None = None

    @cached_property
    def z(self) -> Tensor:
        return (self.scores[:, 0].float() - self.mean) / self.deviation.clamp_min(1e-12)

    def neuron(self, dim: int) -> Neuron:
        return Neuron(
            Address(self.layer, dim, self.expert),
            float(self.z[dim]),
            float(self.cosine[dim]),
            tuple(self.tokens[dim].tolist()),
            tuple(self.scores[dim].float().tolist()),
            None if self.lse is None else float(self.lse[dim]),
        )


@dataclass(frozen=True)
class NeuronMap:
    """Every neuron's best tokens."""

    model: str
    settings: Settings
    words: tuple[str, ...]
    """The tokenizer's tokens as text."""
    special: frozenset[int]
    parts: tuple[Part, ...]
    tied: bool = False
    """The head is the embedding matrix."""
    total: int = 0
    """Layers of the model."""
    complete: bool = True
    """Whether what was to be mapped is; else layers may be missing, or be of the weights before a change."""

    def __len__(self) -> int:
        return sum(len(part.tokens) for part in self.parts)

    def printable(self, token: int) -> bool:
        """Whether a token is text: no special token, no fragment of a character, nothing but spaces."""
        word = self.words[token]
        return token not in self.special and "\ufffd" not in word and any(c.isprintable() and c != " " for c in word)

    def neuron(self, address: Address) -> Neuron:
        """
        Raises:
            SubjectError: the map has no such neuron.
        """
        for part in self.parts:
            if (part.layer, part.expert) == (address.layer, address.expert) and address.dim < len(part.tokens):
                return part.neuron(address.dim)
        layers = sorted({part.layer for part in self.parts})
        widest = max(len(part.tokens) for part in self.parts)
        raise SubjectError(
            f"the map has no neuron {address}; it has layers {layers[0]}-{layers[-1]} with neurons 0-{widest - 1}"
        )

    def strongest(
        self, count: int, *, layers: Sequence[int] | None = None, printable: bool = False
    ) -> Iterator[Neuron]:
        """Neurons whose first token stands out most, in either direction."""
        for place, dim in self._order(layers):
            if count <= 0:
                return
            part = self.parts[place]
            if printable and not self.printable(int(part.tokens[dim, 0])):
                continue
            count -= 1
            yield part.neuron(dim)

    def _order(self, layers: Sequence[int] | None) -> Iterator[tuple[int, int]]:
        chosen = [i for i, part in enumerate(self.parts) if layers is None or part.layer in layers]
        if not chosen:
            return
        strength = torch.cat([self.parts[i].z.abs() for i in chosen])
        where = torch.cat([torch.full((len(self.parts[i].tokens),), i) for i in chosen])
        dims = torch.cat([torch.arange(len(self.parts[i].tokens)) for i in chosen])
        for at in strength.argsort(descending=True, stable=True).tolist():
            yield int(where[at]), int(dims[at])

    def tokens_of(self, text: str) -> list[int]:
        """Tokens that spell a text: itself, with a space before it, and in other cases; "" finds none."""
        wanted = text.strip().casefold()
        return [token for token, word in enumerate(self.words) if wanted and word.strip().casefold() == wanted]

    def naming(self, text: str, *, best: int | None = None) -> list[tuple[int, Neuron]]:
        """Neurons among whose tokens the text is, with its rank (0 the first): by rank, then by strength.

        Args:
            best: only among so many of a neuron's tokens; all by default.
        """
        wanted = torch.tensor(self.tokens_of(text), dtype=torch.int32)
        found: list[tuple[int, Neuron]] = []
        for part in self.parts:
            hits = torch.isin(part.tokens[:, :best], wanted)
            for dim in hits.any(1).nonzero()[:, 0].tolist():
                found.append((int(hits[dim].float().argmax()), part.neuron(dim)))
        return sorted(found, key=lambda pair: (pair[0], -abs(pair[1].z), pair[1].address.layer, pair[1].address.dim))


# --- making a map ----------------------------------------------------------------------------------------------------


def build(
    subject: LanguageModel,
    folder: Path,
    settings: Settings | None = None,
    *,
    layers: Sequence[int] | None = None,
    holding: Holding = present,
    progress: Progress | None = None,
) -> NeuronMap:
    """Read every neuron, layer by layer; layers that the folder has of the same weights are not read again.

    At most the head, one matrix and two tiles of scores are held.

    Args:
        layers: only these.
        holding: of a model that is read from disk (`checkpoint.opened`).
        progress: (layers done, layers).

    Raises:
        SubjectError: there is no such matrix or layer.
        ParameterError: k is more than there are tokens.
        MismatchError: the folder holds a map of other settings, or of another model.
        OutputError: the folder cannot be written.
    """
    settings = settings or Settings()
    matrices = neuron_matrices(subject.model, settings.matrix, holding)
    depth = len(subject.blocks)
    wanted = sorted({matrix.layer for matrix in matrices} if layers is None else set(layers))
    unknown = [layer for layer in wanted if layer not in {matrix.layer for matrix in matrices}]
    if unknown:
        raise SubjectError(f"{subject.name} has layers 0-{depth - 1}; none called {unknown[0]} has an MLP")
    parts = anatomy(subject.model)
    ends = [f"{parts.lm_head[0]}.weight"]
    if settings.norm == "final" and parts.final_norm is not None:
        ends += [f"{parts.final_norm[0]}.{name}" for name, _ in parts.final_norm[1].named_parameters()]
    if parts.narrowing is not None:
        ends.append(f"{parts.narrowing[0]}.weight")
    norm = front_norm(subject.model) if settings.norm == "input" else None
    found: list[Part] = []
    with holding(ends):
        readout = Readout.of(subject, "final" if settings.norm == "final" else "none")
        head = _digest([subject.model.get_parameter(name) for name in ends])
        about = _about(subject, settings, depth)
        _begin(folder, about)
        for done, layer in enumerate(wanted, start=1):
            mine = [matrix for matrix in matrices if matrix.layer == layer]
            found += _layer(subject, folder, mine, readout, settings, norm, holding, head)
            if progress:
                progress(done, len(wanted))
    about["complete"] = True
    _keep(folder, about)
    return _made(about, found)


def _layer(
    subject: LanguageModel,
    folder: Path,
    matrices: Sequence[ValueMatrix],
    readout: Readout,
    settings: Settings,
    norm: str | None,
    holding: Holding,
    head: str,
) -> list[Part]:
    block = anatomy(subject.model).blocks[matrices[0].layer]
    path = folder / f"layer-{block.index:03}.safetensors"
    names = list(dict.fromkeys(matrix.name for matrix in matrices))
    front: list[str] = []
    if norm is not None:
        module: Any = subject.model.get_submodule(f"{block.name}.{norm}")
        front = [f"{block.name}.{norm}.{name}" for name, _ in module.named_parameters()]
    with holding([*names, *front]):
        key = _digest([subject.model.get_parameter(name) for name in (*names, *front)]) + head
        if path.is_file() and (kept := _read(path, block.index)) is not None and kept[0] == key:
            return kept[1]
        gain: Callable[[Tensor], Tensor] = lambda rows: rows  # noqa: E731
        if norm is not None:
            gain = linear_part(module, block.width)
        tensors: dict[str, Tensor] = {}
        for matrix in matrices:
            rows = vectors(subject.model, matrix)
            one = project(
                readout,
                rows if norm is None else gain(rows.float()),
                settings.k,
                sign=settings.sign,
                probabilities=settings.probabilities,
            )
            before = "" if matrix.expert is None else f"{matrix.expert}/"
            tensors |= {before + name: tensor for name, tensor in _columns(one).items()}
    _write(path, tensors, key)
    read = _read(path, block.index)
    assert read is not None
    return read[1]


def _columns(one: Projection) -> dict[str, Tensor]:
    limit = torch.finfo(torch.float16).max
    columns = {
        "tokens": one.tokens.contiguous(),
        "scores": one.scores.clamp(-limit, limit).to(torch.float16),
        "mean": one.mean.float(),
        "deviation": one.deviation.float(),
        "cosine": one.cosine.float(),
    }
    return columns if one.log_sum is None else {**columns, "lse": one.log_sum.float()}


def _digest(tensors: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        data = tensor.detach().cpu().contiguous()
        digest.update(f"{tuple(data.shape)} {data.dtype}".encode())
        digest.update(data.view(torch.uint8).numpy().data if data.dim() else b"")
    return digest.hexdigest()


# --- on disk ---------------------------------------------------------------------------------------------------------


def _about(subject: LanguageModel, settings: Settings, depth: int) -> dict[str, Any]:
    tokenizer = subject.tokenizer
    return {
        "format": FORMAT,
        "model": subject.name,
        "layers": depth,
        "tied": bool(getattr(subject.model.config.get_text_config(), "tie_word_embeddings", False)),
        "settings": asdict(settings),
        "special": sorted(tokenizer.all_special_ids),
        "complete": False,
        "words": [tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in range(len(tokenizer))],
    }


def _begin(folder: Path, about: dict[str, Any]) -> None:
    path = folder / "map.json"
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        for name in ("format", "settings", "model", "layers"):
            if before.get(name) != about[name]:
                raise MismatchError(
                    f"{folder} holds a map with {name} {before.get(name)}, asked for {about[name]}; choose another "
                    "--out"
                )
    _keep(folder, about)


def _keep(folder: Path, about: dict[str, Any]) -> None:
    write_text(folder / "map.json", json.dumps(about, ensure_ascii=False) + "\n")


def _write(path: Path, tensors: dict[str, Tensor], key: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        key_bytes = torch.tensor(list(key.encode()), dtype=torch.uint8)
        save_tensors({**tensors, "key": key_bytes}, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _read(path: Path, layer: int) -> tuple[str, list[Part]] | None:
    """The key of a layer's file and its parts; None where it cannot be read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        key = bytes(tensors.pop("key").tolist()).decode()
    except (OSError, KeyError, SafetensorError):
        return None
    groups: dict[int | None, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        expert, slash, column = name.rpartition("/")
        groups.setdefault(int(expert) if slash else None, {})[column] = tensor
    order = sorted(groups, key=lambda expert: -1 if expert is None else expert)
    return key, [Part(layer, expert, **groups[expert]) for expert in order]


def _made(about: dict[str, Any], parts: Sequence[Part]) -> NeuronMap:
    return NeuronMap(
        about["model"],
        Settings(**about["settings"]),
        tuple(about["words"]),
        frozenset(about["special"]),
        tuple(parts),
        about["tied"],
        about["layers"],
        about["complete"],
    )


def load(folder: str | Path) -> NeuronMap:
    """Read a map.

    Raises:
        TableError: it is none, or a file of it is damaged.
    """
    folder = Path(folder)
    try:
        about = json.loads((folder / "map.json").read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise TableError(f"{folder}: map format {about['format']}, this version reads {FORMAT}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TableError(
            f"{folder} holds no neuron map ({error}); `expunge neurons find MODEL --out {folder}` makes one"
        ) from None
    parts: list[Part] = []
    for path in sorted(folder.glob("layer-*.safetensors")):
        read = _read(path, int(path.stem.rpartition("-")[2]))
        if read is None:
            raise TableError(f"{path} is damaged; the same `expunge neurons find` writes it again")
        parts += read[1]
    if not parts:
        raise TableError(f"{folder}: the map has no layer yet; the same `expunge neurons find` goes on")
    return _made(about, parts)


# --- two maps --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overlap:
    """How much of what neurons name is the same in two models."""

    first: float
    """Share of neurons with the same first token."""
    jaccard: float
    """Of their k tokens, mean over neurons."""
    layers: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Layer to both."""


def overlap(one: NeuronMap, other: NeuronMap) -> Overlap:
    """Compare two maps neuron by neuron.

    Raises:
        MismatchError: of other tokens, settings or shapes.
    """
    if one.words != other.words:
        raise MismatchError(f"{one.model} and {other.model} have other tokens; an overlap needs one tokenizer")
    if one.settings != other.settings:
        raise MismatchError(f"the maps were made with other settings: {one.settings} and {other.settings}")
    shapes = [[(part.layer, part.expert, tuple(part.tokens.shape)) for part in m.parts] for m in (one, other)]
    if shapes[0] != shapes[1]:
        raise MismatchError(f"{one.model} and {other.model} have other neurons, or other layers are mapped")
    same: dict[int, list[Tensor]] = {}
    shared: dict[int, list[Tensor]] = {}
    for a, b in zip(one.parts, other.parts):
        same.setdefault(a.layer, []).append((a.tokens[:, 0] == b.tokens[:, 0]).float())
        common = (a.tokens[:, :, None] == b.tokens[:, None]).any(2).sum(1).float()
        shared.setdefault(a.layer, []).append(common / (2 * a.tokens.shape[1] - common))
    layers = {n: (float(torch.cat(same[n]).mean()), float(torch.cat(shared[n]).mean())) for n in same}
    every = [torch.cat([t for ts in found.values() for t in ts]).mean() for found in (same, shared)]
    return Overlap(float(every[0]), float(every[1]), layers)
