"""What every token of a vocabulary adds to a text, so that tokens that would complete a forbidden run are looked up."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ...wording import letters
from .forbidden import Forbidden, Reader

BROKEN = "\ufffd"
"""Stands in a text where the bytes of a character are not complete."""


class Pieces:
    """The texts that tokens add, taken apart into words.

    What a token adds is its text behind another one: tokenizers that drop a space at the beginning of a text keep it
    there.
    """

    def __init__(self, tokenizer: Any, size: int) -> None:
        """
        Args:
            size: tokens of the model's vocabulary; those that the tokenizer does not know add nothing.
        """
        self.tokenizer = tokenizer
        self._anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1]
        self._before = self._decode([[self._anchor]])[0]
        known = min(size, len(tokenizer))
        self.texts = [text[len(self._before) :] for text in self._decode([[self._anchor, t] for t in range(known)])]
        self.texts += [""] * (size - known)
        self.broken = {token for token, text in enumerate(self.texts) if BROKEN in text}
        self.going: dict[str, list[int]] = {}
        """Tokens that only go on with a word, by what they add to it."""
        self.going_on: dict[int, str] = {}
        """The same the other way round."""
        self.fresh: dict[str, list[int]] = {}
        """Tokens that begin one new word and nothing else, by the word."""
        self.several: list[tuple[int, str, tuple[str, ...]]] = []
        """The others: token, what goes on with a word, new words."""
        for token, text in enumerate(self.texts):
            if token in self.broken:
                continue
            goes_on, new = _parts(text)
            if goes_on and not new:
                self.going.setdefault(goes_on, []).append(token)
                self.going_on[token] = goes_on
            elif len(new) == 1 and not goes_on:
                self.fresh.setdefault(new[0], []).append(token)
            elif new:
                self.several.append((token, goes_on, new))

    def _decode(self, ids: list[list[int]]) -> list[str]:
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return list(self.tokenizer.batch_decode(ids, **options))

    def text(self, tokens: list[int]) -> str:
        """What several tokens in a row add."""
        return self._decode([[self._anchor, *tokens]])[0][len(self._before) :]

    def several_of(self, forbidden: Forbidden) -> list[int]:
        """Tokens of several words that may complete one of the runs."""
        used = {word for run in forbidden.runs for word in run}
        endings = {word[i:] for word in used for i in range(1, len(word))}
        return [t for t, goes_on, new in self.several if goes_on in endings or not used.isdisjoint((goes_on, *new))]


def _parts(text: str) -> tuple[str, tuple[str, ...]]:
    """What goes on with the word before, and the new words."""
    found = [""]
    for letter in (letter for character in text for letter in letters(character)):
        if letter:
            found[-1] += letter
        else:
            found.append("")
    return found[0], tuple(word for word in found[1:] if word)


class Line:
    """The text of one output as its tokens come."""

    def __init__(self, pieces: Pieces, forbidden: Forbidden) -> None:
        self.pieces = pieces
        self.reader = Reader(forbidden)
        self._waiting: list[int] = []  # tokens whose bytes make no whole character yet

    def copy(self) -> Line:
        made = Line(self.pieces, self.reader.forbidden)
        made.reader, made._waiting = self.reader.copy(), list(self._waiting)
        return made

    def take(self, token: int) -> None:
        """Go on by a token."""
        if not self._waiting and token not in self.pieces.broken:
            self.reader.feed(self.pieces.texts[token])
            return
        self._waiting.append(token)
        text = self.pieces.text(self._waiting)
        # No character has more than four bytes: what is broken after that stays so.
        if not text.endswith(BROKEN) or len(self._waiting) >= 4:
            self.reader.feed(text)
            self._waiting = []

    def would_complete(self, tokens: Iterable[int]) -> list[int]:
        """Those of the tokens after which a run stands in the text, if it ended there."""
        found = []
        for token in tokens:
            line = self.copy()
            line.take(token)
            if line._waiting:
                line.reader.feed(line.pieces.text(line._waiting).rstrip(BROKEN))
            line.reader.end()
            if line.reader.found:
                found.append(token)
        return found

    def banned(self, several: Iterable[int]) -> list[int]:
        """Every token with whole characters that completes a run; those of several words among `several` only."""
        if self._waiting:
            # A character is being spelt byte by byte: tokens that are not its bytes end it.
            line = self.copy()
            line.reader.feed(line.pieces.text(line._waiting))
            line._waiting = []
            return line.banned(several)
        word, going = self.reader.word, self.pieces.going
        closing = self.reader.closing()
        found = [token for wanted in closing if wanted.startswith(word) for token in going.get(wanted[len(word) :], ())]
        # A model that may not say a word says it behind a letter: "Xweaver".
        found += [token for wanted in closing if word for token in going.get(wanted, ())]
        after = self.reader.copy()
        after.feed(" ")
        found += [token for wanted in after.closing() for token in self.pieces.fresh.get(wanted, ())]
        return found + self.would_complete(several)
