"""Small tables for the metric tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from expunge.rows import Row
from expunge.tables.generations import Generations
from expunge.tables.scores import Scores
from expunge.tables.view import View, candidates


def scores(
    items: Sequence[tuple[str, str, Sequence[float]]],
    *,
    hits: Sequence[Sequence[bool]] | None = None,
    closing: int = 0,
    mean: float = 0.0,
    variance: float = 1.0,
    texts: Sequence[str] | None = None,
) -> Scores:
    """A table of (row, candidate, log-probabilities); the last `closing` tokens of each item are end tokens."""
    lengths = [len(logprobs) for _, _, logprobs in items]
    flat = np.concatenate([np.asarray(logprobs, np.float32) for _, _, logprobs in items])
    end = np.concatenate([np.arange(n) >= n - closing for n in lengths])
    return Scores(
        [(row, candidate) for row, candidate, _ in items],
        np.concatenate([[0], np.cumsum(lengths)]),
        np.zeros(len(flat), np.int32),
        flat,
        np.concatenate([np.asarray(h, bool) for h in hits]) if hits is not None else np.zeros(len(flat), bool),
        np.full(len(flat), mean, np.float32),
        np.full(len(flat), variance, np.float32),
        end,
        list(texts) if texts is not None else ["text"] * len(items),
    )


def view(probabilities: Mapping[str, Sequence[Sequence[float]]], **more: object) -> View:
    """Rows that have, per set, one list each: probability of the paraphrase, then of the wrong answers.

    Every candidate has one token; the answer's probability is the paraphrase's.
    """
    rows, tables = {}, {}
    for name, lists in probabilities.items():
        rows[name] = [
            Row(
                id=f"{name}-{i}",
                answer=f"the answer is word{i}",
                prompt=f"question {i}",
                entity=f"{name} entity {i // 2}",
                paraphrased_answer="p",
                perturbed_answers=("w",) * (len(values) - 1),
            )
            for i, values in enumerate(lists)
        ]
        items = []
        for row, values in zip(rows[name], lists):
            by_name = dict(zip(candidates(row), [values[0], *values]))
            items += [(row.id, candidate, [np.log(p)]) for candidate, p in by_name.items()]
        tables[name] = scores(items)
    return View(rows, tables, **more)  # type: ignore[arg-type]


def generations(rows: Sequence[Row], texts: Sequence[str]) -> Generations:
    return Generations(
        [(row.id, "question") for row in rows],
        [row.prompt for row in rows],
        [[text] for text in texts],
        [[True]] * len(rows),
    )


def answers(logprobs: Mapping[str, Sequence[float]], name: str = "forget", **options: object) -> View:
    """One set of rows whose answers have these token log-probabilities."""
    rows = [Row(id=i, answer="text", entity=i) for i in logprobs]
    items = [(i, "answer", values) for i, values in logprobs.items()]
    return View({name: rows}, {name: scores(items, **options)})  # type: ignore[arg-type]
