"""A model folder or hub id opened as the kind of subject that its configuration names, or that a request asks for."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from .. import registry
from ..errors import SubjectError


def open_subject(
    source: str | Path, *, kind: str | None = None, device: str | None = None, dtype: str | None = None, **more: Any
) -> Any:
    """An `ImageClassifier` where the configuration names an image classifier, else a `LanguageModel`.

    Args:
        kind: name of a registered subject, a plug-in's for example, in place of what the configuration says.
        more: options of `LanguageModel.load`; no other kind takes any.

    Raises:
        SubjectError: no such model, or one that cannot be loaded as this kind.
        UnknownNameError: there is no such kind.
    """
    kind = kind or kind_of(source)
    if kind == "language":
        from .language import LanguageModel

        return LanguageModel.load(source, device=device, dtype=dtype, **more)
    for name, value in more.items():
        if value:
            raise SubjectError(f"{name}: {source} is opened as {kind}, and only language models take one")
    return registry.get("subjects", kind).function(str(source), device=device or "", dtype=dtype or "")


def kind_of(source: str | Path) -> str:
    """`image` where the configuration names an image classifier of transformers, else `language`, whose loader has a
    sentence for whatever else is wrong."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as NAMES

    known = {name for names in NAMES.values() for name in ([names] if isinstance(names, str) else names)}
    found = _architectures(source) if Path(source).exists() else _on_the_hub(str(source))
    return "image" if set(found) & known else "language"


def _architectures(source: str | Path) -> tuple[str, ...]:
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(source)
    except Exception:
        return ()
    return tuple(config.get("architectures") or ())


_on_the_hub = cache(_architectures)
"""Asked once: where nothing answers, the hub's library waits and tries again, several times."""
