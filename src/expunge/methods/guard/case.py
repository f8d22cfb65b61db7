"""What a guard gets, and what guards have in common."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass
from typing import Any

from ...rows import Row
from ...tables.store import content_key


@dataclass(frozen=True)
class GuardCase:
    """What a guard is put around, and the rows it is told about."""

    subject: Any
    """A LanguageModel, or another guard."""
    rows: dict[str, list[Row]]


class Guarded:
    """A subject with a guard around it. What the guard does not change is the inner subject's."""

    def __init__(self, inner: Any, kind: str, words: str, *settings: Any) -> None:
        """
        Args:
            kind: the guard's name.
            words: how it stands in a model's name, e.g. "behind an output filter".
            settings: plain JSON values, everything that decides what it does.
        """
        self.inner = inner
        self.name = f"{inner.name} {words}"
        self._own = (kind, *settings)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    @property
    def fingerprint(self) -> str:
        """sha256 over the guard's settings and the subject inside."""
        return hashlib.sha256(content_key(*self._own, self.inner.fingerprint).encode()).hexdigest()

    def detach(self) -> Any:
        """The subject inside, as it always was."""
        return self.inner

    def copy(self) -> Any:
        """The same guard around an independent deep copy."""
        made = copy.copy(self)
        made.inner = self.inner.copy()
        return made
