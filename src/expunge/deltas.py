"""Deltas: what a method changed, over a base that is never modified.

The delta is the truth: the changed model of a run *is* base + delta, so the same file always gives the same weights.
An entry of a delta is dense (the difference), a slice (differences of some places on the first axis: experts), sparse
(indices and differences), low-rank (B @ A times a scale) or a memory beside the matrix (subjects/memory.py); a guard's
delta is its configuration. Differences are fp32 whatever the base's type.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import DeltaError, MismatchError
from .files import complete_folder, save_tensors
from .subjects.language import LanguageModel
from .subjects.memory import CODEBOOK, OFFSET, SIDE, attach, joined
from .subjects.quantised import dense_weight, is_quantised

FORMAT = 1
FORMS = {
    "dense": {"difference"},
    "slice": {"difference", "slice"},
    "low_rank": {"A", "B", "scale"},
    "sparse": {"index", "value"},
    "codebook": CODEBOOK,
    "side": SIDE,
    "offset": OFFSET,
}
MEMORIES = ("codebook", "side", "offset")
NO_WEIGHTS = ("scale", "index", "slice", "labels", "reach", "edit", "shard", "least", "ratio", "density")
"""Tensors of an entry that say where or how much, and are not counted as parameters."""


@dataclass(frozen=True)
class Delta:
    """A change of some tensors of one base."""

    base: str
    """Fingerprint of the subject it was made on."""
    entries: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Parameter name to tensors: {difference}, {difference (k, ...), slice (k,)}, {A (r, columns), B (rows, r),
    scale ()}, {index (n,), value (n,)} or a memory."""
    lineage: dict[str, Any] = field(default_factory=dict)
    result: str = ""
    """Fingerprint of base + delta, where known."""
    config: dict[str, Any] | None = None
    """A guard's name and settings, and the facts that it tells; then there are no entries."""

    @property
    def kind(self) -> str:
        """dense, slice, low_rank, sparse, codebook, side, offset, mixed, guard or empty."""
        if self.config is not None:
            return "guard"
        forms = {_form(name, entry) for name, entry in self.entries.items()}
        return forms.pop() if len(forms) == 1 else "mixed" if forms else "empty"

    @property
    def memories(self) -> list[str]:
        """Where memories stand: entries that change no weights."""
        return [name for name, entry in self.entries.items() if _form(name, entry) in MEMORIES]

    @staticmethod
    def from_models(base: LanguageModel, changed: LanguageModel, names: Iterable[str] | None = None) -> Delta:
        """The dense delta between two subjects of one shape; tensors that are equal have no entry.

        Args:
            names: tensors to look at; by default all parameters, and running statistics.
        """
        before, after = (moving(subject.model) for subject in (base, changed))
        if before.keys() != after.keys():
            odd = sorted(before.keys() ^ after.keys())[0]
            raise MismatchError(f"the changed model has other tensors than its base, first {odd}")
        entries = {
            name: {"difference": (after[name].detach().float() - before[name].detach().float()).cpu()}
            for name in (before if names is None else names)
            if not torch.equal(before[name], after[name])
        }
        return Delta(base.fingerprint, entries)

    def difference(self, name: str) -> Tensor:
        """fp32 change of one tensor.

        Raises:
            DeltaError: the entry does not say what shape the tensor has.
        """
        entry = self.entries[name]
        if set(entry) == {"difference"}:
            return entry["difference"]
        if "A" in entry:
            return float(entry["scale"]) * (entry["B"].float() @ entry["A"].float())
        form = _form(name, entry)
        raise DeltaError(f"tensor {name}: a {form} entry has no shape of its own; apply it to a base")

    def apply(self, subject: LanguageModel, scale: float = 1.0, *, check: bool = True) -> LanguageModel:
        """base + scale x delta as a new subject; every untouched tensor is shared with the base, which stays as it is.

        Quantised weights that change are dense afterwards: rounding them again would lose the change.

        Args:
            scale: share of the change; -1 moves the other way.
            check: refuse a base with another fingerprint than the delta's.

        Raises:
            MismatchError: another base, or tensors of other names or shapes.
        """
        if check and self.base != subject.fingerprint:
            raise MismatchError(
                f"the delta was made on a base with fingerprint {self.base[:12]}, {subject.name} has "
                f"{subject.fingerprint[:12]}; give the model it was made on"
            )
        if self.config is not None:
            raise DeltaError(f"a guard's delta ({self.config.get('name')}) changes no weights; run it with its method")
        own = moving(subject.model)
        for name in self.entries:
            if name not in own:
                raise MismatchError(f"{subject.name} has no tensor {name}, which the delta changes")
        beside = self.memories
        if beside and scale != 1:
            raise DeltaError(f"tensor {beside[0]}: a memory is there or it is not, it cannot be put on {scale} times")
        changed = self.entries.keys() - set(beside)
        memo: dict[int, Any] = {id(p): p for name, p in own.items() if name not in changed}
        memo |= {id(buffer): buffer for name, buffer in subject.model.named_buffers() if name not in changed}
        model = copy.deepcopy(subject.model, memo)
        own |= _dense_again(model, [name for name in changed if is_quantised(own[name])])
        moved = moving(model)
        with torch.no_grad():
            for name in beside:
                attach(model, name, self.entries[name])
            for name in changed:
                target = moved[name]
                if "slice" in self.entries[name]:
                    self._move_slice(name, target, own[name], scale)
                    continue
                change = self.change(name, target.shape).to(target.device)
                target.copy_((own[name].float() + scale * change).to(target.dtype))
        made = subject.with_model(model)
        made.base = subject
        return made

    def change(self, name: str, shape: torch.Size) -> Tensor:
        """fp32 change of one tensor of this shape, whatever its entry's form.

        Raises:
            MismatchError: the entry is of a tensor of another shape.
        """
        entry = self.entries[name]
        if "index" in entry:
            flat = torch.zeros(shape.numel())
            flat[entry["index"]] = entry["value"].float()
            return flat.view(shape)
        if "slice" in entry:
            whole = torch.zeros(shape)
            self._move_slice(name, whole, whole, 1.0)
            return whole
        change = self.difference(name)
        if change.shape != shape:
            raise MismatchError(f"tensor {name} has shape {tuple(shape)}, the delta {tuple(change.shape)}")
        return change

    def _move_slice(self, name: str, target: Tensor, own: Tensor, scale: float) -> None:
        entry = self.entries[name]
        places, change = entry["slice"].to(target.device), entry["difference"].to(target.device)
        if change.shape[1:] != target.shape[1:] or (len(places) and int(places.max()) >= len(target)):
            raise MismatchError(
                f"tensor {name} has shape {tuple(target.shape)}, the delta's slice {tuple(change.shape)} at "
                f"{places.tolist()}"
            )
        target[places] = (own[places].float() + scale * change).to(target.dtype)

    def negate(self) -> Delta:
        """The delta that leads from the changed model back to the base.

        Raises:
            DeltaError: it is a memory, which can only be left out.
        """
        return replace(self._map(lambda t: -t), base=self.result or self.base, result=self.base)

    def scaled(self, factor: float) -> Delta:
        """The delta times a factor."""
        return replace(self._map(lambda t: factor * t), result="")

    def _map(self, function: Callable[[Tensor], Tensor]) -> Delta:
        for name, entry in self.entries.items():
            if _form(name, entry) in MEMORIES:
                raise DeltaError(
                    f"tensor {name}: a memory has no opposite and no share; use the base without the delta"
                )
        moving = ("difference", "scale", "value")
        entries = {
            name: {key: function(t) if key in moving else t for key, t in entry.items()}
            for name, entry in self.entries.items()
        }
        return replace(self, entries=entries)

    def sparsified(self) -> Delta:
        """The same change, with dense entries of which less than a third moves stored as indices and values."""
        entries = {}
        for name, entry in self.entries.items():
            difference = entry.get("difference", torch.empty(0))
            if set(entry) == {"difference"} and int((difference != 0).sum()) * 3 < difference.numel():
                flat = difference.reshape(-1)
                index = flat.nonzero()[:, 0]
                entry = {"index": index, "value": flat[index]}
            entries[name] = entry
        return replace(self, entries=entries)

    def cost(self) -> dict[str, int]:
        """`parameters`: numbers stored for the change; `bytes`: its size on disk."""
        tensors = [t for entry in self.entries.values() for key, t in entry.items() if key not in NO_WEIGHTS]
        size = sum(t.numel() * t.element_size() for entry in self.entries.values() for t in entry.values())
        return {"parameters": sum(t.numel() for t in tensors), "bytes": size}

    def save(self, folder: str | Path) -> None:
        """Write delta.safetensors and delta.json; the folder appears when complete."""
        tensors = {f"{name}::{key}": t.contiguous() for name, entry in self.entries.items() for key, t in entry.items()}
        with complete_folder(Path(folder)) as partial:
            save_tensors(tensors, partial / "delta.safetensors")
            about = {
                "format": FORMAT,
                "kind": self.kind,
                "base": self.base,
                "result": self.result,
                "lineage": self.lineage,
                "config": self.config,
                "sha256": _sha256(partial / "delta.safetensors"),
            }
            (partial / "delta.json").write_text(json.dumps(about, indent=1, ensure_ascii=False), encoding="utf-8")

    @staticmethod
    def load(folder: str | Path) -> Delta:
        """Read a delta folder.

        Raises:
            DeltaError: it is no delta, of another format, or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(folder)
        try:
            about = json.loads((folder / "delta.json").read_text(encoding="utf-8"))
            if about["format"] != FORMAT:
                raise DeltaError(f"{folder} has delta format {about['format']}, this version reads {FORMAT}")
            if _sha256(folder / "delta.safetensors") != about["sha256"]:
                raise DeltaError(f"{folder}/delta.safetensors is damaged: its sha256 is not the one in delta.json")
            tensors = load_file(folder / "delta.safetensors")
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise DeltaError(f"{folder} is not a readable delta folder: {error}") from None
        entries: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, part = key.rpartition("::")
            entries.setdefault(name, {})[part] = tensor
        for name, entry in entries.items():
            _form(name, entry)
        missing = [field for field in ("base", "lineage", "result", "config") if field not in about]
        if missing:
            raise DeltaError(f"{folder}/delta.json has no field {missing[0]}")
        return Delta(about["base"], entries, about["lineage"], about["result"], about["config"])


def moving(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor that training can change: parameters, and buffers that are stored and not integers (the running
    statistics of batch norms)."""
    stored = model.state_dict().keys()
    buffers = {n: b for n, b in model.named_buffers() if n in stored and b.is_floating_point()}
    return {**dict(model.named_parameters()), **buffers}


def _dense_again(model: Any, names: Sequence[str]) -> dict[str, nn.Parameter]:
    """Put ordinary linear layers in the place of quantised ones, in place; their weights by name."""
    if not names:
        return {}
    from transformers.quantizers.base import get_keys_to_not_convert

    dtype = next(p.dtype for p in model.parameters() if not is_quantised(p))
    found = {}
    for name in names:
        path = name.rpartition(".")[0]
        owner: Any = model.get_submodule(path)
        weight = dense_weight(owner, dtype)
        layer = nn.Linear(owner.in_features, owner.out_features, owner.bias is not None, device="meta", dtype=dtype)
        layer.weight, layer.bias = nn.Parameter(weight.clone(), requires_grad=False), owner.bias
        model.set_submodule(path, layer)
        found[name] = nn.Parameter(weight, requires_grad=False)
    # So that a model once saved model is loaded as it is: these are not to be quantised.
    config = model.config.quantization_config
    for key in ("llm_int8_skip_modules", "modules_to_not_convert"):
        if hasattr(config, key):
            kept = getattr(config, key) or get_keys_to_not_convert(model)
            setattr(config, key, [*kept, *(name.rpartition(".")[0] for name in names)])
    return found


def _form(name: str, entry: Mapping[str, Tensor]) -> str:
    for form, keys in FORMS.items():
        if set(entry) == keys:
            return form
    raise DeltaError(f"tensor {name}: the delta holds {', '.join(sorted(entry))}, which is no known form")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def compose(deltas: Sequence[Delta]) -> Delta:
    """One delta for several made one on top of the other, in this order.

    Raises:
        MismatchError: one was made on something else than the result of those before it.
    """
    if not deltas:
        raise DeltaError("0 deltas to stack, expected at least 1")
    if any(delta.config is not None for delta in deltas):
        return _told(deltas)
    for number, (first, second) in enumerate(itertools.pairwise(deltas), start=2):
        if first.result and second.base != first.result:
            raise MismatchError(
                f"delta {number} was made on {second.base[:12]}, the one before it ends at {first.result[:12]}"
            )
    entries: dict[str, dict[str, Tensor]] = {}
    for name in dict.fromkeys(name for delta in deltas for name in delta.entries):
        parts = [delta.entries[name] for delta in deltas if name in delta.entries]
        entries[name] = parts[0] if len(parts) == 1 else summed(name, parts)
    lineage = {"stack": [delta.lineage for delta in deltas]}
    return Delta(deltas[0].base, entries, lineage, deltas[-1].result)


def _told(deltas: Sequence[Delta]) -> Delta:
    """The facts of several guards of one kind together."""
    configs = [delta.config or {} for delta in deltas]
    frames = [{key: value for key, value in config.items() if key != "edits"} for config in configs]
    if any("edits" not in config or frame != frames[0] for config, frame in zip(configs, frames)):
        raise DeltaError(
            "a guard's delta changes no weights; only facts told by one guard with the same settings stack"
        )
    config = {**frames[0], "edits": [edit for config in configs for edit in config["edits"]]}
    return Delta(deltas[0].base, {}, {"stack": [delta.lineage for delta in deltas]}, config=config)


def summed(name: str, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """One entry for several of one tensor: of places, low rank or memories where all are, else dense.

    Parts of one form are taken one after another: with the first of them summed before, the bits are the same.
    """
    forms = {_form(name, part) for part in parts}
    if forms & set(MEMORIES):
        if len(forms) > 1:
            raise DeltaError(
                f"tensor {name}: {' and '.join(sorted(forms))} entries cannot be stacked; apply one by one"
            )
        return joined(parts)
    if forms == {"low_rank"}:
        return dict(functools.reduce(functools.partial(_stacked, name), parts))
    values, put = aligned(name, parts)
    return put(functools.reduce(torch.add, values))


def _stacked(name: str, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Factors side by side as long as they are smaller than the tensor itself, from then on the tensor."""
    if "A" in first and _narrow((first, second)):
        scaled = [float(part["scale"]) * part["B"].float() for part in (first, second)]
        return {
            "A": torch.cat([first["A"].float(), second["A"].float()]),
            "B": torch.cat(scaled, 1),
            "scale": torch.ones(()),
        }
    (one, other), put = aligned(name, (first, second))
    return put(one + other)


Put = Callable[[Tensor], dict[str, Tensor]]
"""Makes an entry of changes at the places that were aligned."""


def aligned(name: str, parts: Sequence[Mapping[str, Tensor]]) -> tuple[list[Tensor], Put]:
    """Changes of one tensor by several entries, of one shape: at all the places that any of them moves where all have
    places, else of the whole tensor; and how an entry is made of such changes.

    Raises:
        DeltaError: entries of places stand beside one another whose kinds of place differ.
    """
    for where, what in (("index", "value"), ("slice", "difference")):
        if all(where in part for part in parts):
            return _at_places(parts, where, what)
    shaped = {i: Delta("", {name: dict(p)}).difference(name) for i, p in enumerate(parts) if not _places(p)}
    if not shaped:
        raise DeltaError(f"tensor {name}: slices and sparse entries cannot be stacked without a base; apply one by one")
    shape = next(iter(shaped.values())).shape
    dense = [shaped.get(i) for i in range(len(parts))]
    whole = [Delta("", {name: dict(p)}).change(name, shape) if d is None else d for d, p in zip(dense, parts)]
    for one in whole:
        if one.shape != shape:
            raise MismatchError(
                f"tensor {name} has shape {tuple(shape)} in one delta and {tuple(one.shape)} in another"
            )
    return [one.float() for one in whole], lambda values: {"difference": values}


def _at_places(parts: Sequence[Mapping[str, Tensor]], where: str, what: str) -> tuple[list[Tensor], Put]:
    kept = torch.cat([part[where] for part in parts]).unique()
    found = []
    for part in parts:
        change = part[what].float()
        empty = change.new_zeros(len(kept), *change.shape[1:])
        found.append(empty.index_add_(0, torch.searchsorted(kept, part[where]), change))
    return found, lambda values: {what: values, where: kept}


def _places(entry: Mapping[str, Tensor]) -> bool:
    return "index" in entry or "slice" in entry


def _narrow(parts: Sequence[Mapping[str, Tensor]]) -> bool:
    """Whether factors side by side are smaller than the tensor itself."""
    rows, columns = len(parts[0]["B"]), parts[0]["A"].shape[1]
    return sum(len(part["A"]) for part in parts) * (rows + columns) < rows * columns


def undo(subject: LanguageModel) -> LanguageModel:
    """The subject before the last delta was applied: the base itself, bit for bit.

    Raises:
        DeltaError: no delta was applied to it.
    """
    if subject.base is None:
        raise DeltaError(f"{subject.name} carries no delta to undo; negate the delta and apply it instead")
    return subject.base


@dataclass
class Recorded:
    """A working copy, and after the block what was changed in it."""

    subject: LanguageModel
    delta: Delta | None = None


@contextmanager
def editing(subject: LanguageModel) -> Iterator[Recorded]:
    """Change weights of `recorded.subject` in place; afterwards `recorded.delta` is exactly what changed."""
    recorded = Recorded(subject.copy())
    yield recorded
    recorded.delta = Delta.from_models(subject, recorded.subject)
