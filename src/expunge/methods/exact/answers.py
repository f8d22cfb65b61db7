"""What a subject answers to rows, one line each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ...subjects.packed import batches, pack


def answers(subject: Any, rows: Sequence[Any]) -> list[dict[str, Any]]:
    """Per row: `row_id`, `answer`, what is `predicted` (a class, or a greedy continuation), `right` (every token of the
    answer is the first choice) and `probability` (the geometric mean of its tokens')."""
    items = [((row.id, "answer"), subject.encode(row)) for row in rows]
    table = subject.score(items)
    means = [float(np.exp(table.logprob[table.tokens(i)].mean(dtype=np.float64))) for i in range(len(rows))]
    right = [bool(table.hit[table.tokens(i)].all()) for i in range(len(rows))]
    if subject.modality == "image":
        said = _classes(subject, [row for _, row in items])
    else:
        longest = max(row.scored for _, row in items)
        prompts = [((row.id, "question"), subject.prompt_text(row)) for row in rows]
        said = [texts[0] for texts in subject.generate(prompts, max_new_tokens=longest).texts]
    return [
        {"row_id": row.id, "answer": row.answer, "predicted": text, "right": hit, "probability": mean}
        for row, text, hit, mean in zip(rows, said, right, means)
    ]


@torch.no_grad()
def _classes(subject: Any, rows: Sequence[Any]) -> list[str]:
    found: dict[int, str] = {}
    for group in batches(rows, 512):
        packed = pack([rows[i] for i in group], subject.device)
        best = subject.head(subject.hidden_states(packed)).argmax(-1).tolist()
        found |= {i: subject.classes[number] for i, number in zip(group, best)}
    return [found[i] for i in range(len(rows))]
