"""Solved questions that stand before another one."""

from __future__ import annotations

from typing import Any

from ..rows import Row


def solved(subject: Any, row: Row, answer: str | None = None) -> str:
    """The row with its answer (or another one) as a line of its own: in the subject's template, or plain inside of a
    chat."""
    asked = row.prompt if subject.chats(row) else subject.prompt_text(row)
    return f"{asked.rstrip(' ')}{subject.template.separator}{row.answer if answer is None else answer}\n"
