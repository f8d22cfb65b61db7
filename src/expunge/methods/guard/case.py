"""What a guard gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...rows import Row


@dataclass(frozen=True)
class GuardCase:
    """What a guard is put around, and the rows it is told about."""

    subject: Any
    """A LanguageModel, or another guard."""
    rows: dict[str, list[Row]]
