"""How far an edit shows: in what the model says elsewhere, in its weights, to the detector of edits, and to one who has
the edited model alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..edits import EditRow
from ..rows import Row
from ..subjects.differences import Difference, Weights
from ..subjects.language import LanguageModel
from ..subjects.localised import localise
from ..subjects.packed import LOGIT_ELEMENTS, TOKEN_BUDGET, batches, pack
from ..subjects.protocol import innermost
from ..subjects.suspects import NAMES, PROMPTS, suspects
from ..subjects.value_vectors import value_matrices

CANDIDATES = 3
"""Names whose prompts the detector runs."""
QUIET = ("identical", "requantised")
HEARD = 8
"""Relations that the listener asks for."""


class Elsewhere:
    """Rows that no edit is about. What the model says of them before any edit is worked out once."""

    def __init__(self, before: LanguageModel, rows: Sequence[Row]) -> None:
        self.before, self.rows = before, list(rows)
        tokens = [before.encode(row) for row in self.rows]
        self.groups = list(batches(tokens, TOKEN_BUDGET))
        self.states, self.targets = list[Tensor](), list[Tensor]()
        with torch.no_grad():
            for group in self.groups:
                packed = pack([tokens[i] for i in group], before.device)
                self.states.append(before.hidden_states(packed))
                self.targets.append(packed.target)

    @torch.no_grad()
    def drift(self, after: Any) -> dict[str, float]:
        """Per answer token: the loss before and after in nats, and KL(before || after)."""
        inner, before = innermost(after), self.before
        size = max(1, LOGIT_ELEMENTS // before.vocabulary)
        totals, count = torch.zeros(3, dtype=torch.float64), 0
        for group, states, targets in zip(self.groups, self.states, self.targets):
            packed = pack([after.encode(self.rows[i]) for i in group], inner.device)
            for old, new, target in zip(
                states.split(size), inner.hidden_states(packed).split(size), targets.split(size), strict=True
            ):
                p, q = before.head(old).float().log_softmax(-1), inner.head(new).float().log_softmax(-1)
                right = [-each.gather(1, target[:, None]).sum() for each in (p, q)]
                totals += torch.stack([*right, (p.exp() * (p - q)).sum()]).double().cpu()
                count += len(target)
        loss_before, loss_after, divergence = (totals / count).tolist()
        return {"loss_before": loss_before, "loss_after": loss_after, "kl": divergence}


@dataclass(frozen=True)
class Seen:
    """What the weights show of an edit."""

    label: str
    """What was done to the tensors that changed; `identical` where none did."""
    tensors: int
    rank: int
    """Of the tensor that moved furthest; 0 where it is no edit of few ranks."""
    energy: float
    """Share of that tensor's change in its leading singular value."""
    changed: float
    """Share of all weights that are another number."""
    relative: float
    """|D|_F / |W|_F of all weights."""
    subject_rank: int = 0
    """Of the subject among the candidates by the edit's direction; 0 where none can be told."""
    object_rank: int = 0
    """Of the target's first token among those whose prompts of the best candidates made likelier; 0 where it is not."""


class Detector:
    """The detector of edits (edit_audit.py), with every subject as a candidate and every relation as a prompt."""

    def __init__(self, before: LanguageModel, names: Sequence[str], prompts: Sequence[str]) -> None:
        self.before, self.names, self.prompts = before, list(names), list(prompts)
        self.weights = Weights(before.model)

    def see(self, after: Any, edit: EditRow) -> Seen:
        """What one edited model shows."""
        inner = innermost(after)
        found = self.weights.moved(inner.model)
        where = found.furthest
        if where is None:
            return Seen("identical", 0, 0, 0.0, 0.0, 0.0)
        ranks = self._named(inner, where, edit) if where.kind == "low_rank_edit" else (0, 0)
        return Seen(found.label, found.tensors, where.rank, where.energy, found.changed, found.relative, *ranks)

    def _named(self, after: LanguageModel, where: Difference, edit: EditRow) -> tuple[int, int]:
        matrix = next((m for m in value_matrices(self.before.model) if m.name == where.name), None)
        if matrix is None or matrix.owner is None or not self.names:
            return 0, 0
        found = localise(self.before, after, matrix, self.names, self.prompts, CANDIDATES)
        names = [name for name, _ in found.names]
        tokens = list(dict.fromkeys(gain.token for gain in found.gains))
        encoded = self.before.encode(edit.row())
        target = self.before.tokenizer.decode([encoded.ids[encoded.start]])
        return (
            names.index(edit.subject) + 1 if edit.subject in names else 0,
            tokens.index(target) + 1 if target in tokens else 0,
        )


class Listener:
    """Scores of names by what a model says alone (subjects/suspects.py), the base's worked out once."""

    def __init__(self, before: LanguageModel, names: Sequence[str], prompts: Sequence[str]) -> None:
        self.names, self.prompts = list(dict.fromkeys(names)), list(dict.fromkeys(prompts))[:HEARD]
        self.before = self._areas(before)

    @staticmethod
    def fits(names: Sequence[str], prompts: Sequence[str]) -> bool:
        """Whether there is enough to compare."""
        return len(set(names)) >= NAMES and len(set(prompts)) >= PROMPTS

    def hear(self, after: Any, name: str) -> dict[str, list[float]] | None:
        """Score to the share of other names that this one stands above, before and after, ties by half; None where it
        is none of the names, or the fact stands in a guard's prompt and in no model."""
        if name not in self.names or innermost(after) is not after:
            return None
        return {score: [self.before[score][name], areas[name]] for score, areas in self._areas(after).items()}

    def _areas(self, model: LanguageModel) -> Mapping[str, dict[str, float]]:
        found = suspects(model, self.names, self.prompts)
        return {
            score: dict(zip((one.name for one in found), above([getattr(one, score) for one in found])))
            for score in SCORES
        }


SCORES = ("score", "overfit", "resistance")


def above(values: Sequence[float]) -> list[float]:
    """Share of the other values that each is larger than, ties by half."""
    each = torch.tensor(values)
    larger = (each[:, None] > each).float() + 0.5 * (each[:, None] == each).float()
    return ((larger.sum(1) - 0.5) / (len(values) - 1)).tolist()
