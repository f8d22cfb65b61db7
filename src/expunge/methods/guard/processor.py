"""A guard as a logits processor of transformers, for `model.generate` with its own greedy, sampled or beam search."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from .restriction import Restricted, Restriction


class GuardLogits(LogitsProcessor):
    """What `guard` does to logits, while transformers decodes and keeps its keys and values.

        model.generate(**inputs, logits_processor=[GuardLogits(guarded, inputs["input_ids"])])

    Beams change places between steps: what was written is looked up by its tokens, never by its row.
    """

    def __init__(self, guarded: Restriction, prompts: Tensor, mask: Tensor | None = None) -> None:
        """
        Args:
            prompts: (n, length) tokens as `generate` gets them, padded on the left.
            mask: (n, length) 0 where they are padding.
        """
        self.guarded = guarded
        self.length = prompts.shape[1]
        keep = torch.ones_like(prompts) if mask is None else mask
        rows = [tuple(row[kept.bool()].tolist()) for row, kept in zip(prompts, keep)]
        bans = guarded.ban(rows, guarded.features(rows))
        self._bans = {tuple(row): ban for row, ban in zip(prompts.tolist(), bans)}
        self._lines: dict[tuple[int, ...], Restricted | None] = {}

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        found = scores.float().clone()
        lines: dict[tuple[int, ...], Restricted | None] = {}
        for place, row in enumerate(input_ids.tolist()):
            key = tuple(row)
            line = lines[key] if key in lines else self._line(key)
            lines[key] = line
            if line:
                found[place] = line.process(scores[place].float())
        self._lines = lines
        return found

    def _line(self, tokens: tuple[int, ...]) -> Restricted | None:
        prompt, written = tokens[: self.length], tokens[self.length :]
        if not written:
            return self.guarded.line(self._bans[prompt])
        before = self._lines.get(tokens[:-1]) if tokens[:-1] in self._lines else self._line(tokens[:-1])
        if before is None:
            return None
        made = before.copy()
        made.take(written[-1])
        return made
