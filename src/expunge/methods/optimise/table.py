"""An embedding in training: only the rows of tokens that the run feeds can move.

Of a vocabulary of 128k a run over a few hundred questions feeds some thousand tokens. The rows of all others have a
gradient of nought in every step, so that Adam's moments stay nought and nothing moves them. Here the rows that are fed
are a parameter of their own: gradient, moments and masters are as large as they are, and the table is written back to
after every step. What moves is what would have moved, but for the rounding of the gradient's norm.

It holds where nothing else reaches the table: no weight decay, which pulls at all rows, no head that is the same
tensor and is trained, no method around the objective that takes whole gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...subjects.protocol import Subject

if TYPE_CHECKING:
    from .loop import Drawn, Recipe, Training

SHARE = 0.5
"""Of the table at most; where a run feeds more there is little to gain."""


class Table:
    """The rows of an embedding that a run feeds, in training in the table's place."""

    def __init__(self, whole: Tensor, tokens: Sequence[int]) -> None:
        self.whole = whole
        self.rows = rows = torch.tensor(tokens, device=whole.device)
        """(k,) tokens, in order."""
        self.weight = nn.Parameter(whole.detach()[rows])
        """(k, d)"""
        self.place = rows.new_full((len(whole),), -1)
        """(V,) where a token's row stands in `weight`."""
        self.place[rows] = torch.arange(len(rows), device=rows.device)

    @torch.no_grad()
    def write(self) -> None:
        """Give the table what was learnt."""
        self.whole.index_copy_(0, self.rows, self.weight)


def fed_tokens(
    subject: Subject, parameters: Sequence[nn.Parameter], drawn: Drawn, recipe: Recipe, training: Training
) -> list[int] | None:
    """The only tokens, in order, whose rows of the embedding can move; None where the table moves as a whole."""
    if training.weight_decay or recipe.around is not None or recipe.after is not None:
        return None
    embedding = subject.embedding
    if embedding is None or not any(p is embedding.weight for p in parameters):
        return None
    uses = [name for name, p in subject.model.named_parameters(remove_duplicate=False) if p is embedding.weight]
    if recipe.taps.final and len(uses) > 1:  # passes go through a head whose gradient reaches every row
        return None
    found = sorted({token for row in set(drawn.fed) for token in row.ids[:-1]})
    return found if found and len(found) <= SHARE * len(embedding.weight) else None
