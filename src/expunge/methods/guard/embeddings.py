"""Embeddings of words and questions, for what is alike in meaning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import ParameterError


class Embedder(Protocol):
    def embed(self, texts: Sequence[str]) -> Tensor:
        """(n, d) of length 1, fp32 on the CPU."""
        ...


def embedder(name: str, subject: Any) -> Embedder:
    """`subject`: the model's own input embeddings; else a sentence-transformers model, by folder or hub id.

    Raises:
        ParameterError: the extra is not installed, or there is no such model.
    """
    if name == "subject":
        return Own(subject)
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ParameterError(
            f"embedder {name!r} needs the extra: pip install 'expunge[embeddings]'; `subject` needs none"
        ) from None
    try:
        return Sentences(SentenceTransformer(name, device="cpu"))
    except Exception as error:  # the library raises many kinds for unknown names and no connection
        raise ParameterError(f"embedder {name!r} cannot be loaded: {str(error).splitlines()[0]}") from None


class Own:
    """Means of a model's own input embeddings, which lie around a common mean that says nothing."""

    def __init__(self, subject: Any) -> None:
        self.tokenizer = subject.tokenizer
        weight = subject.model.get_input_embeddings().weight.detach().float().cpu()
        self.rows = weight - weight.mean(0)

    def embed(self, texts: Sequence[str]) -> Tensor:
        # With the space that stands before a word in a text.
        ids = self.tokenizer([f" {text}" for text in texts], add_special_tokens=False)["input_ids"]
        means = [self.rows[one].mean(0) if one else self.rows.new_zeros(self.rows.shape[1]) for one in ids]
        return F.normalize(torch.stack(means), dim=1) if means else self.rows.new_zeros(0, self.rows.shape[1])


class Sentences:
    """A sentence-transformers model."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def embed(self, texts: Sequence[str]) -> Tensor:
        found = self.model.encode(
            list(texts), convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False
        )
        return torch.as_tensor(found).float().cpu()
