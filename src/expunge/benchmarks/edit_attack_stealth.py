"""How far an edit shows: in what the model says elsewhere, in its weights, and to the detector of edits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..edits import EditRow
from ..rows import Row
from ..subjects.differences import Difference, difference
from ..subjects.language import LanguageModel
from ..subjects.localised import localise
from ..subjects.packed import batches, pack
from ..subjects.protocol import innermost
from ..subjects.value_vectors import value_matrices

TOKENS = 4096
"""Tokens in one pass."""
ELEMENTS = 1 << 22
"""Logits of each model held at once."""
CANDIDATES = 3
"""Names whose prompts the detector runs."""
QUIET = ("identical", "requantised")


class Elsewhere:
    """Rows that no edit is about. What the model says of them before any edit is worked out once."""

    def __init__(self, before: LanguageModel, rows: Sequence[Row]) -> None:
        self.before, self.rows = before, list(rows)
        tokens = [before.encode(row) for row in self.rows]
        self.groups = list(batches(tokens, TOKENS))
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
        size = max(1, ELEMENTS // before.vocabulary)
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
        self.weights = dict(before.model.named_parameters())
        self.count = sum(p.numel() for p in self.weights.values())
        self.norm = float(sum(p.detach().double().square().sum() for p in self.weights.values()))

    def see(self, after: Any, edit: EditRow) -> Seen:
        """What one edited model shows."""
        inner = innermost(after)
        own = dict(inner.model.named_parameters())
        pairs = {name: (p, own[name]) for name, p in self.weights.items() if own[name] is not p}
        found = [difference(p.detach(), q.detach(), name) for name, (p, q) in pairs.items()]
        moved = [one for one in found if one.kind != "identical"]
        if not moved:
            return Seen("identical", 0, 0, 0.0, 0.0, 0.0)
        furthest = max(moved, key=lambda one: one.relative)
        label = " and ".join(sorted({one.kind for one in moved}))
        changed = sum(one.changed * self.weights[one.name].numel() for one in moved) / self.count
        size = sum((own[o.name] - self.weights[o.name]).detach().double().square().sum() for o in moved)
        relative = float(size / self.norm) ** 0.5
        ranks = self._named(inner, furthest, edit) if furthest.kind == "low_rank_edit" else (0, 0)
        return Seen(label, len(moved), furthest.rank, furthest.energy, changed, relative, *ranks)

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
