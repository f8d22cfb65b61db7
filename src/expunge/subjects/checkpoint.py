"""A checkpoint whose tensors are read when they are needed: what looks at weights one by one need not load a model.

The model is made without weights (meta device), which is enough to take it apart; within `holding` the tensors asked
for are there. Only a folder whose files name tensors as the model does can be read so. Others (quantised weights,
experts that are put together while loading) are loaded whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from ..errors import SubjectError
from .anatomy import anatomy
from .input_vectors import Holding, present
from .language import LanguageModel


def opened(
    path: str | Path, *, device: str | None = None, dtype: str | None = None, trust_remote_code: bool = False
) -> tuple[LanguageModel, Holding]:
    """A model folder without its weights, or a model with them, and what makes weights be there.

    Args:
        device, dtype: of the tensors that are held; by default the best device there is, and the stored type.

    Raises:
        SubjectError: as `LanguageModel.load`.
    """
    folder = Path(path)
    options = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    if not (folder / "config.json").is_file() or trust_remote_code:
        return LanguageModel.load(path, **options), present  # type: ignore[arg-type]
    bare = _without_weights(folder)
    files = _files(folder)
    if bare is None or _missing(bare.model, files):
        return LanguageModel.load(path, **options), present  # type: ignore[arg-type]
    wanted = None if dtype is None else getattr(torch, dtype, None)
    if dtype is not None and not isinstance(wanted, torch.dtype):
        raise SubjectError(f"dtype {dtype!r} is not a torch type; expected float32, bfloat16 or float16")
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return bare, _reader(bare.model, files, chosen, wanted)


def _without_weights(folder: Path) -> LanguageModel | None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()
    try:
        config = AutoConfig.from_pretrained(folder)
        if getattr(config, "quantization_config", None) is not None:
            return None
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        return LanguageModel(model, AutoTokenizer.from_pretrained(folder), str(folder))
    except Exception:  # whatever it is, loading the model says it better
        return None


def _files(folder: Path) -> dict[str, Path]:
    """Tensor name to the file it is in."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in named.items()}
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened_:
            found |= dict.fromkeys(opened_.keys(), file)
    return found


def _missing(model: nn.Module, files: dict[str, Path]) -> list[str]:
    """Parameters that no file names; a head that is the embedding's own matrix stands there under its name."""
    return [name for name, _ in model.named_parameters() if _stored(model, name, files) is None]


def _stored(model: nn.Module, name: str, files: dict[str, Path]) -> str | None:
    if name in files:
        return name
    parts = anatomy(model)
    other = f"{parts.embedding[0]}.weight"
    tied = bool(getattr(model.config, "tie_word_embeddings", False))  # type: ignore[union-attr]
    return other if tied and name == f"{parts.lm_head[0]}.weight" and other in files else None


def _reader(model: nn.Module, files: dict[str, Path], device: torch.device, dtype: torch.dtype | None) -> Holding:
    from safetensors import safe_open

    @contextmanager
    def holding(names: Sequence[str]) -> Iterator[None]:
        before: list[tuple[nn.Module, str, nn.Parameter]] = []
        try:
            for name in dict.fromkeys(names):
                stored = str(_stored(model, name, files))
                with safe_open(files[stored], framework="pt", device=str(device)) as file:
                    tensor = file.get_tensor(stored)
                owner, _, leaf = name.rpartition(".")
                module: nn.Module = model.get_submodule(owner)
                shape = tuple(getattr(module, leaf).shape)
                if tuple(tensor.shape) != shape:
                    raise SubjectError(f"{files[stored]}: tensor {stored} has shape {tuple(tensor.shape)}, not {shape}")
                if not bool(torch.isfinite(tensor).all()):
                    raise SubjectError(f"{files[stored]}: tensor {stored} holds values that are not finite")
                before.append((module, leaf, getattr(module, leaf)))
                module._parameters[leaf] = nn.Parameter(tensor if dtype is None else tensor.to(dtype), False)
            yield
        finally:
            for module, leaf, parameter in reversed(before):
                module._parameters[leaf] = parameter

    return holding
