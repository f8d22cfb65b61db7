"""A language model with a memory of edits beside it, and who answers what: what `serac` makes.

Questions are read as the model reads them, by their tokens. One that is within the scope of an edit goes to the
counterfactual model, with the edit told before it; the others go to the model, as if there were no edits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...deltas import Delta
from ...edits import EditRow
from ...errors import RowError
from ...subjects.contexts import can_cut
from ...subjects.language import LanguageModel
from ...subjects.packed import Encoded, Pack, pack
from ...tables.generations import Generations
from ...tables.scores import Scores
from .case import Guarded
from .in_scope import Asked, Scope, Vectors


@dataclass(frozen=True)
class Trained:
    """What demonstrations taught."""

    adapters: Delta
    """Over the model, to the counterfactual one."""
    scope: Scope


def read(subject: LanguageModel, edit: EditRow, question: str) -> str:
    """A question about an edit as the classifier reads it."""
    return plain(subject, subject.prompt_ids(subject.prompt_text(edit.row(question)), (edit.id, "serac")))


def plain(subject: LanguageModel, ids: Sequence[int]) -> str:
    """A prompt as the classifier reads it."""
    return str(subject.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class EditMemory(Guarded):
    """A language model with a memory of edits beside it."""

    def __init__(
        self, inner: LanguageModel, facts: Sequence[EditRow], trained: Trained | None, settings: list[Any]
    ) -> None:
        """
        Args:
            trained: None where there are no facts.
        """
        self.facts, self.trained = list(facts), trained
        self.threshold, self.fact = settings[:2]
        self._base = inner
        learned = trained.adapters.lineage["key"] if trained else ""
        told = [[one.id, one.kind, one.subject, one.prompt, one.target_new] for one in facts]
        super().__init__(inner, "serac", "with a memory of edits", told, settings, learned)

    @cached_property
    def counterfactual(self) -> LanguageModel:
        """The model that answers from what it is told."""
        assert self.trained is not None
        return self.trained.adapters.apply(self._base)

    @cached_property
    def _known(self) -> Vectors:
        assert self.trained is not None
        asked = [Asked(read(self._base, one, one.prompt), one.subject) for one in self.facts]
        return self.trained.scope.likeness.edits(asked)

    # --- which edit ------------------------------------------------------------------------------------------

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """(texts, edits) that texts are within the scopes of the edits."""
        assert self.trained is not None
        return self.trained.scope(texts, self._known)

    def answering(self, prompts: Sequence[Sequence[int]]) -> list[EditRow | None]:
        """For each prompt the edit that answers it; None where none does."""
        found: list[EditRow | None] = [None] * len(prompts)
        texts = [plain(self.inner, prompt) for prompt in prompts]
        some = [i for i, text in enumerate(texts) if text.strip() and self.facts]
        for i, row in zip(some, self.probabilities([texts[i] for i in some]) if some else ()):
            best = int(row.argmax())
            found[i] = self.facts[best] if row[best] >= self.threshold else None
        return found

    def _told(self, prompt: Sequence[int], edit: EditRow, more: int) -> list[int]:
        """The prompt's tokens behind the edit's.

        Raises:
            RowError: they, and `more` tokens, do not fit the model.
        """
        inner = self.inner
        begun = bool(prompt) and prompt[0] == inner.tokenizer.bos_token_id
        text = inner.tokenizer.decode(prompt[1:] if begun else prompt, clean_up_tokenization_spaces=False)
        ids: list[int] = inner.prompt_ids(edit.told(self.fact) + text, (edit.id, "serac"))
        if len(ids) + more > inner.context_length:
            raise RowError(
                f"edit {edit.id}: it and a prompt that it answers have {len(ids)} tokens, and {more} "
                f"are to follow; the model's context holds {inner.context_length}"
            )
        return ids

    # --- the subject's operations ----------------------------------------------------------------------------

    def hidden_states(self, pack_: Pack) -> Tensor:
        """As the model's, of the counterfactual one where an edit answers; both have the same head."""
        edits = self.answering([row.ids[: row.start] for row in pack_.rows])
        if not any(edits):
            return self.inner.hidden_states(pack_)
        parts: list[Tensor] = [torch.empty(0)] * len(edits)
        for model, aside in ((self.inner, False), (self.counterfactual, True)):
            places = [i for i, edit in enumerate(edits) if (edit is not None) is aside]
            rows = [self._row(pack_.rows[i], edits[i]) for i in places]
            if rows:
                states = model.hidden_states(pack(rows, pack_.ids.device))
                for i, part in zip(places, states.split([row.scored for row in rows])):
                    parts[i] = part
        return torch.cat(parts)

    def _row(self, row: Encoded, edit: EditRow | None) -> Encoded:
        if edit is None:
            return row
        before = self._told(row.ids[: row.start], edit, row.scored)
        return Encoded((*before, *row.ids[row.start :]), len(before), row.closing, row.text)

    def start(self, prompts: Sequence[Sequence[int]], limit: int, samples: int = 1) -> Any:
        """Prompts that were read, each `samples` times, by the model that answers them."""
        edits = self.answering(prompts)
        if not any(edits):
            return self.inner.start(prompts, limit, samples)
        lines = [prompt if edit is None else self._told(prompt, edit, limit) for prompt, edit in zip(prompts, edits)]
        cut = can_cut(self.inner, max(map(len, lines)) + limit)
        # Models whose keys and values cannot be cut read prompts of one length together only.
        groups: dict[tuple[bool, int], list[int]] = {}
        for i, (line, edit) in enumerate(zip(lines, edits)):
            groups.setdefault((edit is not None, 0 if cut else len(line)), []).append(i)
        parts = []
        for (aside, _), places in groups.items():
            model = self.counterfactual if aside else self.inner
            rows = torch.tensor([i * samples + j for i in places for j in range(samples)], device=self.inner.device)
            parts.append((model.start([lines[i] for i in places], limit, samples), rows))
        return Parted(parts)

    def score(self, items: Sequence[Any], **options: Any) -> Scores:
        return LanguageModel.score(self, items, **options)  # type: ignore[arg-type]

    def generate(self, *arguments: Any, **options: Any) -> Generations:
        return LanguageModel.generate(self, *arguments, **options)  # type: ignore[arg-type]


class Parted:
    """Prompts that several models go on with, in the order in which they came."""

    def __init__(self, parts: list[tuple[Any, Tensor]]) -> None:
        """
        Args:
            parts: what a model has read, and which rows of all these are.
        """
        self.parts = parts
        self.logits = self._together([one.logits for one, _ in parts])

    def keep(self, rows: Tensor) -> None:
        count = sum(len(own) for _, own in self.parts)
        parts = []
        for one, own in self.parts:
            place = own.new_full((count,), -1)
            place[own] = torch.arange(len(own), device=own.device)
            mine = place[rows]
            if bool((mine >= 0).any()):
                one.keep(mine[mine >= 0])
                parts.append((one, (mine >= 0).nonzero()[:, 0]))
        self.parts = parts

    def join(self, other: Any) -> bool:
        """Prompts that were read later go on by themselves."""
        return False

    def follow(self, tokens: Tensor) -> Tensor:
        return self._together([one.follow(tokens[own]) for one, own in self.parts])

    def _together(self, logits: list[Tensor]) -> Tensor:
        found = logits[0].new_empty(sum(map(len, logits)), logits[0].shape[1])
        for part, (_, own) in zip(logits, self.parts):
            found[own] = part
        return found
