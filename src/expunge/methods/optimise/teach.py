"""Training from the beginning, in training mode: batch norms learn their statistics, dropout is on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ...subjects.packed import Encoded
from .loop import fit


def teach(
    subject: Any,
    rows: Sequence[Encoded],
    *,
    epochs: float,
    batch_size: int,
    learning_rate: float,
    seed: int,
    weight_decay: float = 0.0,
    progress: Any = None,
) -> dict[str, Any]:
    """Train all parameters of a subject in place on rows, with AdamW and a cosine schedule after a short warm-up.

    Returns:
        seconds, tokens, answers, losses: as `loop.fit`.
    """
    import torch

    if len(rows) % batch_size == 1:
        batch_size += 1  # batch norms learn nothing from a single row
    steps = math.ceil(epochs * len(rows) / batch_size)
    subject.model.train()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # dropout's
            return fit(
                subject,
                rows,
                steps=steps,
                batch_size=batch_size,
                learning_rate=learning_rate,
                seed=seed,
                schedule="cosine",
                warmup=min(20, steps // 10),
                weight_decay=weight_decay,
                progress=progress,
            )
    finally:
        subject.model.eval()
