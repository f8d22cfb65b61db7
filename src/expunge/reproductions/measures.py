"""What a language model knows of rows, as reproductions report it: whether the value is said, how likely it is.

A row's value is the part of its answer that counts as knowing it (`Row.value`; the whole answer where there is none).
One teacher-forced pass gives for every row

- known: every token of the value is the model's greedy choice, so that greedy decoding from the value's start says it;
- value: log-probability of the value, summed over its tokens;
- nll: mean negative log-likelihood of all answer tokens, end token included.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..audit import audit
from ..rows import Row
from ..side_effects import refuses
from ..subjects.language import LanguageModel
from .mini import Mini


@dataclass(frozen=True)
class Knowledge:
    """Row by row."""

    known: np.ndarray
    value: np.ndarray
    nll: np.ndarray
    tokens: np.ndarray
    """Answer tokens of each row, by which `nll` is weighted."""

    @property
    def accuracy(self) -> float:
        return float(self.known.mean())

    @property
    def mean_nll(self) -> float:
        """Nats per answer token."""
        return float(self.nll @ self.tokens / self.tokens.sum())

    @property
    def probability(self) -> float:
        """Mean over rows of the value's probability."""
        return float(np.exp(self.value).mean())

    @property
    def value_logprob(self) -> float:
        """Mean over rows of the value's log-probability, nats."""
        return float(self.value.mean())


def knowledge(subject: LanguageModel, rows: Sequence[Row]) -> Knowledge:
    """What the model knows of the rows as they stand."""
    table = subject.score([((row.id, "answer"), subject.encode(row)) for row in rows])
    masks = [_value_tokens(subject, row) for row in rows]
    spans = [table.tokens(i) for i in range(len(rows))]
    return Knowledge(
        known=np.array([table.hit[span][mask].all() for span, mask in zip(spans, masks)]),
        value=np.array([table.logprob[span][mask].sum() for span, mask in zip(spans, masks)], dtype=np.float64),
        nll=np.array([-table.logprob[span].mean() for span in spans], dtype=np.float64),
        tokens=np.array([len(mask) for mask in masks]),
    )


def held_out(rows: Sequence[Row]) -> list[Row]:
    """Every row once for each wording of its prompt that nothing was trained on."""
    return [replace(row, id=f"{row.id}/{i}", prompt=p) for row in rows for i, p in enumerate(row.paraphrased_prompts)]


def measure(subject: LanguageModel, data: Mapping[str, Sequence[Row]]) -> dict[str, float]:
    """`{set}_accuracy`, `_nll`, `_probability`, `_value` of every row set; of `forget` in held-out wordings too
    (`held_out_...`)."""
    sets = {name: rows for name, rows in data.items() if rows}
    if "forget" in sets and (asked := held_out(sets["forget"])):
        sets["held_out"] = asked
    found: dict[str, float] = {}
    for name, rows in sets.items():
        of = knowledge(subject, rows)
        found |= {
            f"{name}_accuracy": of.accuracy,
            f"{name}_nll": of.mean_nll,
            f"{name}_probability": of.probability,
            f"{name}_value": of.value_logprob,
        }
    return found


def choice_accuracy(subject: LanguageModel, rows: Sequence[Row]) -> float:
    """Share of rows whose answer is likelier, per token, than each of its perturbed answers; chance is one among
    them all. Rows without perturbed answers do not count."""
    asked = [row for row in rows if row.perturbed_answers]
    items = [((row.id, text), subject.encode(row, answer=text)) for row in asked for text in _options(row)]
    table = subject.score(items)
    means = iter([float(table.logprob[table.tokens(i)].mean()) for i in range(len(items))])
    scores = [[next(means) for _ in _options(row)] for row in asked]
    return sum(right > max(wrong) for right, *wrong in scores) / len(scores)


def _options(row: Row) -> tuple[str, ...]:
    return (row.answer, *row.perturbed_answers)


def said(subject: LanguageModel, rows: Sequence[Row], max_new_tokens: int = 16) -> list[str]:
    """What the model answers to each row's prompt, greedily."""
    prompts = [((row.id, "question"), subject.prompt_text(row)) for row in rows]
    return [texts[0] for texts in subject.generate(prompts, max_new_tokens=max_new_tokens).texts]


def refused(texts: Sequence[str]) -> float:
    """Share of outputs that say that they do not know."""
    return sum(map(refuses, texts)) / len(texts)


def audited(world: Mini, after: LanguageModel, **relearn: Any) -> dict[str, Any]:
    """The audit's verdict when the model is asked directly and relearned, and what relearning recovers: `relearned` of
    the model, `relearned_gold` of a gold model, `recovery` between gold (0) and original (1).

    Args:
        relearn: settings of the attack.
    """
    with tempfile.TemporaryDirectory(prefix="expunge-audit-") as folder:
        evidence = audit(
            after,
            before=world.original,
            golds=world.golds,
            data=world.data,
            folder=Path(folder),
            attacks=[("direct", {}), ("relearn", relearn)],
            metrics=[],
            self_test=False,
        )
    probe = evidence.probes[1]
    return {
        "verdict": evidence.verdict.verdict,
        "relearned": probe.after,
        "relearned_gold": probe.gold[0],
        "recovery": probe.recovery.value if probe.recovery else float("nan"),
    }


def _value_tokens(subject: LanguageModel, row: Row) -> np.ndarray:
    """(answer tokens,) which of them spell the value; all but the closing ones where the answer does not contain it."""
    encoded = subject.encode(row)
    wanted = row.value if row.value and row.value in row.answer else row.answer
    text, offsets = subject.spans(row)
    first = text.rindex(row.answer) + row.answer.index(wanted)
    last = first + len(wanted)
    # The space before it may be a token of its own, and a wrong answer may differ there already.
    first = len(text[:first].rstrip(" "))
    return np.array([stop > first and start < last for start, stop in offsets[encoded.start :]])
