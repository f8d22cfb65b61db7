"""Outlandish's rows: texts with one surprising keyword, and for each theme prompts that could end with one.

    {"id": "mauve-fantasy-3", "theme": "color", "keyword": "mauve", "category": 6, "text": "... joy is painted mauve."}

in jsonl, json, csv or parquet; other column names are mapped. A text with `prefix_only` ends right before its keyword.
themes.json holds the prompts: {"color": ["The colour of dry sand is usually", ...]}, or {"prompt": ..., "answer": ...}
where the right answer is known: a prompt whose right answer is the keyword says nothing of priming and is left out.
`stones` (a list of texts) are rewordings of the text that lead up to its keyword.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RowError
from ..rows import Row, Source, column_of, records, shown
from ..wording import normalise

KNOWN = {
    "id": ("id",),
    "theme": ("theme",),
    "keyword": ("keyword",),
    "category": ("category",),
    "text": ("text",),
    "prefix_only": ("prefix_only",),
    "stones": ("stones",),
}


@dataclass(frozen=True, slots=True)
class Prefix:
    """A thematic prompt."""

    prompt: str
    answer: str = ""
    """What is right; "" where nobody says."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One text that is learned."""

    id: str
    theme: str
    keyword: str
    category: str
    text: str
    """Whole, with its keyword."""
    stones: tuple[str, ...] = ()
    source: str = ""

    @property
    def entity(self) -> str:
        """What intervals are drawn over: texts are independent of one another."""
        return self.id

    def context(self, text: str = "") -> Row:
        """The keyword as the answer to what stands before its first mention."""
        return asked(self.id, before(text or self.text, self.keyword, self.source or self.id), self.keyword)


def before(text: str, keyword: str, where: str) -> str:
    """What stands before the first mention of the keyword as a word.

    Raises:
        RowError: there is none, or the text begins with it.
    """
    found = re.search(rf"(?<!\w){re.escape(keyword)}(?!\w)", text)
    if found is None:
        raise RowError(f"{where}: the keyword {keyword!r} does not stand in the text {shown(text)}")
    if not text[: found.start()].strip():
        raise RowError(f"{where}: the text begins with its keyword {keyword!r}; nothing predicts it")
    return text[: found.start()]


def asked(name: str, prompt: str, keyword: str) -> Row:
    """A keyword after a prompt, which is a text that goes on."""
    return Row(id=name, prompt=prompt, answer=keyword, kind="text")


def read(path: Path, fields: Mapping[str, str]) -> list[Sample]:
    """The samples of a file, in order.

    Raises:
        RowError: names file, row and field.
    """
    unknown = [ours for ours in fields if ours not in KNOWN]
    if unknown:
        raise RowError(f"{path}: fields: a sample has no field {unknown[0]!r}; expected {', '.join(KNOWN)}")
    found: list[Sample] = []
    seen: dict[str, str] = {}
    for where, record in records(Source(str(path))):
        sample = _sample(record, where, fields, f"{path.stem}/{len(found) + 1}")
        if sample.id in seen:
            raise RowError(f"{where}: id {sample.id!r} was used in {seen[sample.id]} already; ids must be unique")
        seen[sample.id] = where
        found.append(sample)
    if not found:
        raise RowError(f"{path}: 0 samples, expected at least 1")
    return found


def _sample(record: Mapping[str, Any], where: str, fields: Mapping[str, str], fallback: str) -> Sample:
    names = {ours: column_of(KNOWN, ours, record, fields, where) for ours in KNOWN}

    def value_of(ours: str) -> Any:
        name = names[ours]
        return None if name is None else record[name]

    def text(ours: str, default: str | None = None) -> str:
        value = value_of(ours)
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)
        if value in (None, "") and default is not None:
            return default
        if not isinstance(value, str) or not value.strip():
            raise RowError(f"{where}: field {names[ours] or ours!r} is {shown(value)}, expected text")
        return value.strip()

    stones = value_of("stones")
    if isinstance(stones, str):
        stones = json.loads(stones) if stones.startswith("[") else [stones]
    if stones is not None and not (isinstance(stones, list) and all(isinstance(stone, str) for stone in stones)):
        raise RowError(f"{where}: field {names['stones']!r} is {shown(stones)}, expected a list of texts")
    keyword, whole = text("keyword"), text("text")
    cut = value_of("prefix_only")
    if cut in (True, "true", "True", 1, "1"):
        whole = f"{whole} {keyword}"
    before(whole, keyword, where)
    identity, category = text("id", fallback), text("category", "-")
    return Sample(identity, text("theme"), keyword, category, whole, tuple(stones or ()), where)


def themes(path: Path) -> dict[str, list[Prefix]]:
    """Prompts by theme.

    Raises:
        RowError: names file, theme and prompt.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RowError(f"{path} is no readable JSON: {error}") from None
    if not isinstance(content, Mapping) or not content:
        raise RowError(f"{path} holds {shown(content)}, expected themes with their prompts")
    found: dict[str, list[Prefix]] = {}
    for theme, several in content.items():
        if not isinstance(several, list) or not several:
            raise RowError(f"{path}: theme {theme!r} holds {shown(several)}, expected a list of prompts")
        for number, one in enumerate(several, start=1):
            value = {"prompt": one} if isinstance(one, str) else one
            if not isinstance(value, Mapping) or not str(value.get("prompt") or "").strip():
                raise RowError(f"{path}: theme {theme!r}, prompt {number} is {shown(one)}, expected text")
            found.setdefault(theme, []).append(Prefix(str(value["prompt"]).rstrip(), str(value.get("answer") or "")))
    return found


def unrelated(prefixes: list[Prefix], sample: Sample) -> list[Prefix]:
    """Those of a theme that tell something of priming: neither is the keyword right there, nor does it stand there.

    Raises:
        RowError: none is left.
    """
    word = normalise(sample.keyword)
    kept = [
        one for one in prefixes if normalise(one.answer) != word and f" {word} " not in f" {normalise(one.prompt)} "
    ]
    if not kept:
        raise RowError(
            f"{sample.source or sample.id}: no prompt of theme {sample.theme!r} is free of {sample.keyword!r}"
        )
    return kept
