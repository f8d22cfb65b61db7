"""Words of a text, so that two texts can be compared whatever their case, accents and punctuation."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

# Ideographs and kana are written without spaces: each counts as a word.
_ALONE = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_ALONE}]|(?:(?![{_ALONE}])\w)+")
_ALONE_ONLY = re.compile(rf"[{_ALONE}]")


def words(text: str) -> list[str]:
    """Lower case, without accents and punctuation."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    return _WORD.findall("".join(c for c in plain if not unicodedata.combining(c)))


def normalise(text: str) -> str:
    """The words, parted by single spaces."""
    return " ".join(words(text))


@lru_cache(maxsize=1 << 16)
def letters(character: str) -> tuple[str, ...]:
    """What one character gives to the words of the text that it stands in: "" ends a word, others go on with it.

    An ideograph is a word: ("", "北", ""). An accent gives nothing: ().
    """
    found: list[str] = []
    for plain in unicodedata.normalize("NFKD", character.casefold()):
        if _ALONE_ONLY.match(plain):
            found += ["", plain, ""]
        elif not unicodedata.combining(plain):
            found.append(plain if _WORD.match(plain) else "")
    return tuple(found)
