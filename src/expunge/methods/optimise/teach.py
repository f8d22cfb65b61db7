"""Training from the beginning, in training mode: batch norms learn their statistics, dropout is on."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

from ...errors import RequestError
from ...subjects.packed import Encoded
from .importance import flowing
from .loop import Recipe, Training, draw, train
from .restriction import restricted
from .terms import negative_log_likelihood


def teach(
    subject: Any,
    rows: Sequence[Encoded],
    *,
    epochs: float,
    batch_size: int,
    learning_rate: float,
    seed: int,
    weight_decay: float = 0.0,
    modules: Collection[str] = ("",),
    restriction: float = 0.0,
    progress: Any = None,
) -> dict[str, Any]:
    """Train a subject in place on rows, with AdamW and a cosine schedule after a short warm-up.

    Args:
        modules: names of those that learn; all others are held in evaluation mode, running statistics too.
        restriction: weight of the penalty on the size of gradients (restriction.py).

    Returns:
        seconds, tokens, answers, losses: as `loop.fit`.

    Raises:
        RequestError: there is nothing to train on.
    """
    import torch

    if not rows:
        raise RequestError("0 rows to train on, expected at least 1")
    if len(rows) % batch_size == 1:
        batch_size += 1  # batch norms learn nothing from a single row
    steps = math.ceil(epochs * len(rows) / batch_size)
    training = Training(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        schedule="cosine",
        warmup=min(20, steps // 10),
        weight_decay=weight_decay,
        seed=seed,
        guard=None,
    )
    drawn = draw({"rows": list(rows)}, ["rows"], training=training, generator=torch.Generator().manual_seed(seed))
    recipe = Recipe(
        lambda step: negative_log_likelihood(step.sides["rows"]),
        ("rows",),
        around=(lambda turn: restricted(turn, restriction)) if restriction else None,
    )
    subject.settle()  # what is tried out in a pass puts modules back into one mode
    chosen = [subject.model.get_submodule(name) for name in modules]
    parameters = list(dict.fromkeys(p for module in chosen for p in module.parameters()))
    for module in chosen:
        module.train()
    try:
        with torch.random.fork_rng(devices=[]), flowing(subject.model, parameters):
            torch.manual_seed(seed)  # dropout's
            log = train(subject, parameters, drawn, recipe, training, progress=progress)
    finally:
        subject.model.eval()
        subject.__dict__.pop("fingerprint", None)
    tokens, answers = drawn.tokens
    return {"seconds": log.seconds, "tokens": tokens, "answers": answers, "losses": log.loss}
