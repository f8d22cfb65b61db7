"""Strings that must not come out, found word by word in one look per word, however many they are.

One matcher for whole texts (`Forbidden.within`), for texts that arrive in pieces (`Reader`, `Withholding`) and for what
may be written next (`Reader.closing`).
"""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from functools import cached_property

from ...rows import Row
from ...wording import letters, words

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

    @cached_property
    def begins(self) -> frozenset[Run]:
        """Every beginning of a run that is not the whole run."""
        return frozenset(run[:n] for run in self.runs for n in range(1, len(run)))

    @cached_property
    def last(self) -> dict[Run, frozenset[str]]:
        """Beginning to the words with which it is whole; () to the runs of one word."""
        found: dict[Run, set[str]] = {}
        for run in self.runs:
            found.setdefault(run[:-1], set()).add(run[-1])
        return {run: frozenset(several) for run, several in found.items()}

    @cached_property
    def first(self) -> list[str]:
        """The words that runs begin with, sorted."""
        return sorted({run[0] for run in self.runs})

    def opens(self, beginning: str) -> bool:
        """Whether a word that begins so may be a run's first."""
        at = bisect_left(self.first, beginning)
        return at < len(self.first) and self.first[at].startswith(beginning)


class Reader:
    """What was read so far of a text that arrives in pieces, cut anywhere."""

    def __init__(self, forbidden: Forbidden) -> None:
        self.forbidden = forbidden
        self.found: Run | None = None
        """The first forbidden run that stands in the text."""
        self.word = ""
        """The word that is not complete."""
        self.read = 0
        """Characters read."""
        self._begun: list[tuple[Run, int]] = []  # runs begun by whole words, and where
        self._start = 0

    def copy(self) -> Reader:
        made = copy.copy(self)
        made._begun = list(self._begun)
        return made

    def feed(self, piece: str) -> None:
        """Read on, up to the first run that is found."""
        for character in piece:
            for letter in letters(character):
                if letter:
                    if not self.word:
                        self._start = self.read
                    self.word += letter
                elif self.word:
                    self._end()
            if self.found:
                return
            self.read += 1

    def end(self) -> None:
        """The text is complete, and so is its last word."""
        if self.word and not self.found:
            self._end()

    def _end(self) -> None:
        last, begins = self.forbidden.last, self.forbidden.begins
        begun = []
        for run, start in (*self._begun, ((), self._start)):
            if self.word in last.get(run, ()):
                self.found = self.found or (*run, self.word)
            if (*run, self.word) in begins:
                begun.append(((*run, self.word), start))
        self._begun = begun
        self.word = ""

    @property
    def safe(self) -> int:
        """Characters that no run can begin in any more, whatever follows."""
        if self._begun:
            return self._begun[0][1]
        return self._start if self.word and self.forbidden.opens(self.word) else self.read

    def closing(self) -> set[str]:
        """The words that would make a run whole if they came next, in place of the one that is not complete."""
        last = self.forbidden.last
        return {word for run in ((), *(run for run, _ in self._begun)) for word in last.get(run, ())}


class Withholding:
    """Lets a text through as it arrives, except what is forbidden or may still become so; then says something else."""

    def __init__(self, forbidden: Forbidden, refusal: str) -> None:
        self.refusal = refusal
        self.withheld = False
        """Whether something forbidden was found; nothing comes through any more."""
        self._reader = Reader(forbidden)
        self._waiting = ""
        self._said = False

    def feed(self, piece: str) -> str:
        """What may be shown now."""
        if self.withheld:
            return ""
        self._reader.feed(piece)
        self._waiting += piece
        return self._let()

    def close(self) -> str:
        """The text is complete: what is left of it, or the refusal."""
        if self.withheld:
            return ""
        self._reader.end()
        return self._let() if self._reader.found else self._say(self._waiting)

    def _let(self) -> str:
        if self._reader.found:
            self.withheld = True
            self._waiting = ""
            return ("\n" if self._said else "") + self.refusal
        kept = self._reader.read - self._reader.safe
        cut = len(self._waiting) - kept
        text, self._waiting = self._waiting[:cut], self._waiting[cut:]
        return self._say(text)

    def _say(self, text: str) -> str:
        self._said = self._said or bool(text.strip())
        return text


def answers(rows: Iterable[Row]) -> list[str]:
    """What the rows give away: value and aliases, the answer where a row has no value."""
    return [text for row in rows for text in (row.value or row.answer, *row.aliases)]
