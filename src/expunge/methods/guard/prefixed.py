"""What guards that put texts before prompts have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from ...rows import Row
from ...subjects.packed import Encoded
from .case import Guarded

Role = Literal["user", "system"]


class Prefixed(Guarded):
    """A subject that reads a text of ours before every prompt: `prefix(question)`, which may be empty.

    With a chat template it stands at the beginning of the user's turn, or is the system's; without one, before
    everything. Answers and running text are scored after it, and none of its tokens is.
    """

    def __init__(self, inner: Any, prefix: Callable[[str], str], role: Role, form: str, *settings: Any) -> None:
        """
        Args:
            form: how what is put before is called in the model's name.
            settings: plain JSON values, everything that decides what is put before.
        """
        self.prefix = prefix
        self.role = role
        super().__init__(inner, "in_context", f"with {form} before every prompt", role, form, *settings)

    def prompt_text(self, row: Row, prompt: str | None = None) -> str:
        return str(self.inner.prompt_text(self._row(row, prompt)))

    def encode(self, row: Row, *, answer: str | None = None, prompt: str | None = None) -> Encoded:
        return self.inner.encode(self._row(row, prompt), answer=answer)

    def spans(self, row: Row) -> tuple[str, list[tuple[int, int]]]:
        return self.inner.spans(self._row(row))

    def _row(self, row: Row, prompt: str | None = None) -> Row:
        """The row as the subject inside is to read it."""
        question = row.prompt if prompt is None else prompt
        before = self.prefix(question)
        if before and self.role == "system" and self.inner.chats(row):
            turns = row.messages or (("user", question),)
            return replace(row, prompt=question, messages=(("system", before.rstrip("\n")), *turns))
        return replace(row, prompt=question, preface=before + row.preface)
