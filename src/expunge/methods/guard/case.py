"""What a guard gets, and what guards have in common."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ...edits import EditRow
from ...rows import Row
from ...tables.store import content_key


@dataclass(frozen=True)
class GuardCase:
    """What a guard is put around, and the rows it is told about."""

    subject: Any
    """A LanguageModel, or another guard."""
    rows: dict[str, list[Row]]
    edits: Sequence[EditRow] = ()
    """Facts that it is to tell, for guards that edit."""
    demonstrations: Sequence[EditRow] = ()
    """Other facts, with their rephrasings and what must stay, that show how new facts are to be taken."""


class Outlet(Protocol):
    """What one answer passes through on its way out, piece by piece (`expunge serve`)."""

    @property
    def refusal(self) -> str:
        """What is said in place of what is withheld."""
        ...

    @property
    def withheld(self) -> bool:
        """Whether the rest is not shown; where the answer is shown as a whole, the refusal stands for all of it."""
        ...

    def feed(self, piece: str) -> str:
        """What may be shown now."""
        ...

    def close(self) -> str:
        """The answer is complete: what is still to be shown."""
        ...


class Chain:
    """Two outlets, one behind the other."""

    def __init__(self, first: Outlet, second: Outlet) -> None:
        self.first, self.second = first, second

    @property
    def withheld(self) -> bool:
        return self.first.withheld or self.second.withheld

    @property
    def refusal(self) -> str:
        return self.second.refusal if self.second.withheld else self.first.refusal

    def feed(self, piece: str) -> str:
        return self.second.feed(self.first.feed(piece))

    def close(self) -> str:
        return self.second.feed(self.first.close()) + self.second.close()


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

    def outlet(self, question: str) -> Outlet | None:
        """What an answer to this question passes through; None where texts leave as they are written."""
        inner = getattr(self.inner, "outlet", None)
        return inner(question) if inner else None

    def detach(self) -> Any:
        """The subject inside, as it always was."""
        return self.inner

    def copy(self) -> Any:
        """The same guard around an independent deep copy."""
        made = copy.copy(self)
        made.inner = self.inner.copy()
        return made
