"""MUSE's published data: seven configurations of texts and questions, from the hub or a folder laid out like it.

| configuration | splits | fields |
|---|---|---|
| raw, train | forget, retain1, retain2 (raw: holdout) | text |
| verbmem | forget | prompt, gt |
| knowmem | forget_qa, forget_qa_icl, retain_qa, retain_qa_icl | question, answer |
| privleak | forget, retain, holdout | text |
| scal, sust (News only) | forget_1 ... forget_4 | text |

A folder has its files at CONFIG/SPLIT.jsonl (json, csv, parquet, parts as the hub names them).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, Literal

from ..errors import RowError
from ..rows import Row, Source, read_rows
from .muse_mini import FOLDS

FIELDS = {
    "verbmem": {"prompt": "prompt", "completion": "gt"},
    "knowmem": {"question": "question", "answer": "answer"},
}
TEXT = {"text": "text"}
HEADLINE = ("verbmem_f", "knowmem_f", "privleak", "knowmem_r")
"""The scores of the first four criteria."""
ELSEWHERE = (
    "Scalability (C5) and sustainability (C6) compare models that forgot several requests: `expunge bench "
    "muse_requests MODEL --set method=...` makes them of the model before."
)


def read(place: str, config: str, split: str) -> list[Row]:
    """The rows of one split, called `config/split/1` ...

    Args:
        place: a hub id, or a folder with the same layout.

    Raises:
        RowError: there is no such split, or a row lacks a field.
    """
    return read_rows(Source(place, FIELDS.get(config, TEXT), config, split), f"{config}/{split}")


def folds(place: str, kind: Literal["scal", "sust"]) -> list[list[Row]]:
    """What is asked to be forgotten: ever more at once (scal, nested), or one after the other (sust, disjoint).

    Raises:
        RowError: there are no folds (Books has none), or they are not nested or not disjoint.
    """
    if Path(place).is_dir() and not (Path(place) / kind).is_dir():
        raise RowError(f"{place} has no folder {kind!r}: folds were published for News only, not for Books")
    found = [read(place, kind, f"forget_{k + 1}") for k in range(FOLDS)]
    texts = [{row.answer for row in fold} for fold in found]
    if kind == "scal":
        for k, (smaller, larger) in enumerate(pairwise(texts), start=1):
            if not smaller <= larger:
                raise RowError(
                    f"{place}: {len(smaller - larger)} texts of scal/forget_{k} are not in scal/forget_{k + 1}; every "
                    "fold of scal holds the one before it"
                )
    else:
        for (i, first), (j, second) in combinations(enumerate(texts, start=1), 2):
            if first & second:
                raise RowError(
                    f"{place}: sust/forget_{i} and sust/forget_{j} have {len(first & second)} texts in common; folds "
                    "of sust are disjoint"
                )
    return found


def windows(tokenizer: Any, rows: Sequence[Row], size: int) -> list[Row]:
    """Texts joined by blank lines and cut into windows of `size` tokens, as the published training does; the last one
    is filled up from the beginning.

    Windows are texts again, cut where tokens end: tokenised by itself one may have a token or two fewer.
    """
    text = "\n\n".join(row.answer for row in rows)
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    found = []
    for number, first in enumerate(range(0, len(spans), size), start=1):
        part = spans[first : first + size]
        cut_ = text[part[0][0] : part[-1][1]]
        if (lacking := size - len(part)) and len(spans) > size:
            cut_ += "\n\n" + text[: spans[lacking - 1][1]]
        found.append(Row(id=f"window/{number}", answer=cut_, kind="text", source=rows[0].source))
    return found


def few_shot(rows: Sequence[Row], examples: Sequence[Row]) -> list[Row]:
    """Questions behind solved examples, as plain text whatever template the model has.

    The space that the published prompt ends in is left to the answer, whose first token it belongs to.
    """
    before = "".join(f"Question: {one.prompt}\nAnswer: {one.answer}\n\n" for one in examples)
    return [replace(row, kind="completion", prompt=f"{before}Question: {row.prompt}\nAnswer:") for row in rows]


STOPS = ("\n\n", "\nQuestion", "Question:")


def cut(text: str) -> str:
    """An output up to where the model began another question."""
    return text[: min((at for stop in STOPS if (at := text.find(stop)) >= 0), default=len(text))].strip()


def head(tokenizer: Any, text: str, count: int) -> str:
    """The first `count` tokens of a text."""
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return text[: spans[count - 1][1]] if len(spans) > count else text


def length(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])
