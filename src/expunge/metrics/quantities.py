"""Per-row quantities that several metrics share, on flat token arrays (specs: metrics 3.2 and 3.3)."""

from __future__ import annotations

from typing import Literal

import numpy as np

from ..errors import TableError
from ..rows import Row
from ..tables.scores import Scores
from ..tables.view import NotApplicable, View

Form = Literal["geometric", "arithmetic"]
"""How wrong answers are averaged: their mean log-probability, or their mean probability."""


def counted(table: Scores) -> tuple[np.ndarray, np.ndarray]:
    """(which tokens belong to the text of an answer, offsets of the rows among them); end tokens do not count.

    Raises:
        TableError: an answer of end tokens only.
    """
    keep = ~table.end.astype(bool)
    lengths = np.add.reduceat(keep, table.offsets[:-1], dtype=np.int64)
    if not lengths.all():
        row, candidate = table.keys[int(np.flatnonzero(lengths == 0)[0])]
        raise TableError(f"row {row!r} ({candidate}): every scored token is an end token, there is no text to measure")
    return keep, np.concatenate([[0], np.cumsum(lengths)])


def row_means(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """(rows,) means of flat values."""
    return np.add.reduceat(values, offsets[:-1], dtype=np.float64) / np.diff(offsets)


def smallest_means(values: np.ndarray, offsets: np.ndarray, share: float) -> np.ndarray:
    """(rows,) mean of the smallest `share` of each row's values, at least one of them."""
    lengths = np.diff(offsets)
    take = np.maximum(1, np.floor(share * lengths).astype(np.int64))
    order = np.lexsort((values, np.repeat(np.arange(len(lengths)), lengths)))
    rank = np.arange(len(values)) - np.repeat(offsets[:-1], lengths)
    kept = np.where(rank < np.repeat(take, lengths), values[order], 0.0)
    return np.add.reduceat(kept, offsets[:-1], dtype=np.float64) / take


def hit_suffix(hit: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """(rows,) how many tokens at the end of each row are all predicted right."""
    lengths = np.diff(offsets)
    place = np.arange(len(hit)) - np.repeat(offsets[:-1], lengths)
    last_miss = np.maximum.reduceat(np.where(hit, -1, place), offsets[:-1])
    return lengths - 1 - last_miss


def with_wrong_answers(view: View, rows: str) -> list[Row]:
    """The rows of a set that bring perturbed answers.

    Raises:
        NotApplicable: none does.
    """
    kept = [row for row in view.of(rows) if row.perturbed_answers]
    if not kept:
        raise NotApplicable(f"no {rows} row has perturbed_answers (wrong answers in the form of the right one)")
    return kept


def log_wrong(view: View, rows: str, kept: list[Row]) -> np.ndarray:
    """(rows, most wrong answers) mean log-probability of each wrong answer, NaN where a row has fewer."""
    found = np.full((len(kept), max(len(row.perturbed_answers) for row in kept)), np.nan)
    for place in range(found.shape[1]):
        has = [i for i, row in enumerate(kept) if len(row.perturbed_answers) > place]
        found[has, place] = view.mean_logprob(rows, f"perturbed/{place}", [kept[i].id for i in has])
    return found


def log_paraphrase(view: View, rows: str, kept: list[Row]) -> np.ndarray:
    """(rows,) mean log-probability of the paraphrased answer; of the answer itself where there is no paraphrase."""
    found = np.empty(len(kept))
    for name, has in (
        ("paraphrase", [i for i, row in enumerate(kept) if row.paraphrased_answer]),
        ("answer", [i for i, row in enumerate(kept) if not row.paraphrased_answer]),
    ):
        if has:
            found[has] = view.mean_logprob(rows, name, [kept[i].id for i in has])
    return found


def log_truth_ratio(view: View, rows: str, kept: list[Row], form: Form = "geometric") -> np.ndarray:
    """(rows,) log R: how much likelier wrong answers are than the paraphrased right one (metrics 3.3)."""
    wrong = log_wrong(view, rows, kept)
    if form == "geometric":
        numerator = np.nanmean(wrong, axis=1)
    else:
        top = np.nanmax(wrong, axis=1)
        numerator = top + np.log(np.nanmean(np.exp(wrong - top[:, None]), axis=1))
    return numerator - log_paraphrase(view, rows, kept)


def option_probability(view: View, rows: str, kept: list[Row]) -> np.ndarray:
    """(rows,) the right answer's share of the probability of all offered answers."""
    right = view.mean_logprob(rows, "answer", [row.id for row in kept])
    odds = np.nansum(np.exp(np.minimum(log_wrong(view, rows, kept) - right[:, None], 700.0)), axis=1)
    return 1 / (1 + odds)


def left_out(view: View, rows: str, kept: list[Row], why: str) -> dict[str, str]:
    """An entry for `extra` that says how many rows of the set were not measured."""
    missing = len(view.of(rows)) - len(kept)
    return {"left_out": f"{missing} of {len(view.of(rows))} {rows} rows: {why}"} if missing else {}
