"""Strings that must not come out, found word by word in one look per word, however many they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...rows import Row
from ...wording import words

Run = tuple[str, ...]


def runs(text: Sequence[str], length: int) -> set[Run]:
    """All runs of `length` consecutive words."""
    return set(zip(*(text[i:] for i in range(length))))


class Forbidden:
    """A set of runs of words.

    A text of up to `run` words is forbidden as it stands. Of a longer one, as whole answers are, each run of `run`
    words is, so that a copy that is cut short or has a word changed is found too. Runs that an allowed text has as
    well give nothing away and are not forbidden.
    """

    def __init__(self, texts: Iterable[str], *, allowed: Iterable[str] = (), run: int = 5) -> None:
        wanted = {tuple(words(text)) for text in texts} - {()}
        harmless: set[Run] = set()
        if any(len(text) > run for text in wanted):
            for other in allowed:
                harmless |= runs(words(other), run)
        self.runs: set[Run] = set(wanted)
        for text in wanted:
            if len(text) > run:
                self.runs |= runs(text, run) - harmless
        self.lengths = sorted({len(found) for found in self.runs})

    def within(self, text: str) -> bool:
        """Whether something forbidden stands in `text`."""
        said = words(text)
        return any(tuple(said[i : i + n]) in self.runs for n in self.lengths for i in range(len(said) - n + 1))


def answers(rows: Iterable[Row]) -> list[str]:
    """What the rows give away: value and aliases, the answer where a row has no value."""
    return [text for row in rows for text in (row.value or row.answer, *row.aliases)]
