"""Words of a text, so that two texts can be compared whatever their case, accents and punctuation."""

from __future__ import annotations

import re
import unicodedata

# Ideographs and kana are written without spaces: each counts as a word.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|(?:(?![\u3040-\u30ff\u3400-\u9fff])\w)+")


def words(text: str) -> list[str]:
    """Lower case, without accents and punctuation."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    return _WORD.findall("".join(c for c in plain if not unicodedata.combining(c)))


def normalise(text: str) -> str:
    """The words, parted by single spaces."""
    return " ".join(words(text))
