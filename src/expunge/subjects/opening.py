"""A model folder or hub id opened as the kind of subject that its configuration names."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def open_subject(source: str | Path, *, device: str | None = None, dtype: str | None = None) -> Any:
    """An `ImageClassifier` where the configuration names an image classifier, else a `LanguageModel`.

    Raises:
        SubjectError: no such model, or one that neither can load.
    """
    if classifies_pictures(source):
        from .image import ImageClassifier

        return ImageClassifier.load(source, device=device, dtype=dtype)
    from .language import LanguageModel

    return LanguageModel.load(source, device=device, dtype=dtype)


def classifies_pictures(source: str | Path) -> bool:
    """Whether the configuration names an image classifier of transformers; False where it cannot be read."""
    from transformers import PretrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as NAMES

    known = {name for names in NAMES.values() for name in ([names] if isinstance(names, str) else names)}
    try:
        config, _ = PretrainedConfig.get_config_dict(source)
    except Exception:  # whatever it is, the loader of language models has a sentence for it
        return False
    return bool(set(config.get("architectures") or ()) & known)
