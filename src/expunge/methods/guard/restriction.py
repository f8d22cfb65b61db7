"""A language model that is restricted where a prompt is about what is forgotten: what `guard` makes.

Prompts are read once: the classifier looks at the hidden states that decoding starts from, and keys and values are
kept. Outputs are read as text while their tokens come (guard/pieces.py), so that tokens that would say something
forbidden get no probability, however it is spelt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...subjects import decoding
from ...subjects.contexts import Read
from ...subjects.language import LanguageModel
from ...subjects.packed import pack
from ...subjects.token_statistics import token_statistics
from ...tables.generations import Generations
from ...tables.scores import COLUMNS, Scores
from .case import Guarded
from .embeddings import Embedder
from .forbidden import Forbidden
from .gate import Classifier, Item, Names, shortened
from .pieces import Line, Pieces

CANDIDATES = 16
"""Likeliest tokens whose unfinished words are compared by meaning, and whose bytes are spelt out, at every step."""
FLOOR = -87.0
"""Log-probability in tables of what cannot be said (-inf would make every mean infinite)."""


@dataclass(frozen=True)
class Ban:
    """What is forbidden in the answer to one prompt."""

    forbidden: Forbidden
    several: list[int]
    """Tokens of several words that may complete a phrase."""
    soft: Tensor | None
    """(V,) what `meaning` takes from the logits of tokens that are whole words."""
    like: Callable[[tuple[str, ...]], Tensor] | None
    """Words to their c."""


class Restricted:
    """One output under a ban, as its tokens come."""

    def __init__(self, guard: Restriction, ban: Ban) -> None:
        self.guard = guard
        self.ban = ban
        self.line = Line(guard.pieces, ban.forbidden)
        self.refusing: list[int] | None = None
        """How much of the refusal is still to be said, where it is being said."""
        self.written = 0

    def copy(self) -> Restricted:
        made = Restricted(self.guard, self.ban)
        made.line, made.written = self.line.copy(), self.written
        made.refusing = None if self.refusing is None else list(self.refusing)
        return made

    def take(self, token: int) -> None:
        """Go on by a token."""
        self.written += 1
        if self.refusing:
            self.refusing = self.refusing[1:] or list(self.guard.refusal_ids(False))
        else:
            self.line.take(token)

    def process(self, logits: Tensor) -> Tensor:
        """(V,) logits, with what must not be said at -inf."""
        if not self.refusing:
            found = logits.float().clone()
            if self.ban.soft is not None:
                found -= self.ban.soft.to(found.device)
            banned = self.line.banned(self.ban.several)
            found[banned] = -torch.inf
            self._look_closer(found)
            blocked = self.guard.on_block == "refuse" and found[int(logits.argmax())] == -torch.inf
            if found.max() > -torch.inf and not blocked:
                return found
            self.refusing = list(self.guard.refusal_ids(self.written == 0))
        found = torch.full_like(logits, -torch.inf, dtype=torch.float32)
        found[self.refusing[0]] = 0.0
        return found

    def _look_closer(self, logits: Tensor) -> None:
        """The likeliest tokens that no table decides: parts of characters, and unfinished words."""
        pieces = self.guard.pieces
        best = logits.topk(min(CANDIDATES, len(logits))).indices.tolist()
        logits[self.line.would_complete([t for t in best if t in pieces.broken])] = -torch.inf
        if self.ban.like is None:
            return
        word = self.line.reader.word
        going = {t: word + made for t in best if (made := pieces.going_on.get(t))}
        if going:
            alike = self.ban.like(tuple(going.values()))
            logits[list(going)] -= penalty(alike, self.guard.soft, self.guard.delta).to(logits.device)


def penalty(alike: Tensor, soft: float, delta: float) -> Tensor:
    """What is taken from logits for cosines to forbidden words."""
    return (soft * alike.clamp(min=0)).masked_fill(alike >= delta, torch.inf)


class Guarding:
    """Prompts that were read and go on, some of them under a ban."""

    def __init__(self, started: Any, lines: list[Restricted | None]) -> None:
        self.started = started
        self.lines = lines
        self.logits = self._process(started.logits)

    def keep(self, rows: Tensor) -> None:
        self.started.keep(rows)
        self.lines = [line.copy() if (line := self.lines[row]) else None for row in rows.tolist()]

    def join(self, other: Any) -> bool:
        """As `Started.join`; every line keeps the guard that it began under."""
        joined = isinstance(other, Guarding) and self.started.join(other.started)
        self.lines += other.lines if joined else []
        return bool(joined)

    def follow(self, tokens: Tensor) -> Tensor:
        for line, token in zip(self.lines, tokens.tolist()):
            if line:
                line.take(token)
        return self._process(self.started.follow(tokens))

    def _process(self, logits: Tensor) -> Tensor:
        if not any(self.lines):
            return logits
        found = logits.float().clone()
        for row, line in enumerate(self.lines):
            if line:
                found[row] = line.process(logits[row])
        return found


class Restriction(Guarded):
    """A language model that is restricted where a prompt is about what is forgotten."""

    def __init__(
        self,
        inner: LanguageModel,
        items: Sequence[Item],
        places: Tensor | None,
        classifier: Classifier | None,
        words: Embedder | None,
        allowed: Sequence[str],
        **settings: Any,
    ) -> None:
        """
        Args:
            places: (items, d) mean final hidden states of the items' questions; None, and no classifier, where there
                is no item.
            words: for matching by meaning; None without it.
            allowed: answers whose runs of words are never forbidden.
        """
        self.items = items
        self.classifier = classifier
        self.words = words
        self.allowed = allowed
        self._places = places
        self._names = Names(items)
        self.threshold, self.nearest = settings["threshold"], settings["nearest"]
        self.beams, self.beta, self.run = settings["beams"], settings["beta"], settings["run"]
        self.soft, self.delta = settings["soft"], settings["delta"]
        self.on_flag, self.on_block, self.refusal = settings["on_flag"], settings["on_block"], settings["refusal"]
        told = [[list(item.name), list(item.texts)] for item in items]
        super().__init__(inner, "guard", "under GUARD", told, dict(sorted(settings.items())))

    @cached_property
    def pieces(self) -> Pieces:
        return Pieces(self.inner.tokenizer, self.inner.vocabulary)

    @lru_cache(maxsize=8)  # noqa: B019 (guards live as long as the process)
    def refusal_ids(self, first: bool) -> tuple[int, ...]:
        """Tokens of the refusal, at the beginning of an answer or in the midst of it, and of its end."""
        # What stands before an answer belongs to the chat template; without one, a space does.
        text = ("" if first and getattr(self.inner.tokenizer, "chat_template", None) else " ") + self.refusal
        ids = self.inner.tokenizer(text, add_special_tokens=False)["input_ids"]
        return (*ids, *sorted(self.inner.stop_ids)[:1])

    # --- what is forbidden -----------------------------------------------------------------------------------

    def ban(self, prompts: Sequence[Sequence[int]], features: Tensor) -> list[Ban | None]:
        """For each prompt what is forbidden in its answer; None where the classifier lets it through.

        Args:
            features: (prompts, d) their mean final hidden states.
        """
        if self.classifier is None or self._places is None:
            return [None] * len(prompts)
        flagged = self.classifier(features) >= self.threshold
        # What all questions have in common says nothing of how alike two are.
        alike = F.normalize(features - self.classifier.mean, dim=1) @ self._near.T
        found: list[Ban | None] = []
        for prompt, flag, near in zip(prompts, flagged.tolist(), alike):
            if not flag:
                found.append(None)
                continue
            text = self.inner.tokenizer.decode(prompt, skip_special_tokens=True)
            chosen = {*near.topk(min(self.nearest, len(near))).indices.tolist(), *self._names.of(text)}
            found.append(self._ban(tuple(sorted(chosen))))
        return found

    @cached_property
    def _near(self) -> Tensor:
        assert self.classifier is not None
        assert self._places is not None
        return F.normalize(self._places - self.classifier.mean, dim=1)

    @lru_cache(maxsize=1024)  # noqa: B019
    def _ban(self, chosen: tuple[int, ...]) -> Ban:
        items = [self.items[place] for place in chosen]
        texts = [text for item in items for text in item.texts]
        forbidden = shortened(Forbidden(texts, allowed=self.allowed, run=self.run), self.beta)
        several = self.pieces.several_of(forbidden)
        telling = sorted({word for item in items for word in item.telling})
        if self.words is None or not telling:
            return Ban(forbidden, several, None, None)
        words, targets = self.words, self.words.embed(telling)

        @lru_cache(maxsize=4096)
        def one(word: str) -> float:
            return float((words.embed([word]) @ targets.T).max())

        tokens, vectors = self._vocabulary
        soft = torch.zeros(self.inner.vocabulary)
        soft[tokens] = penalty((vectors @ targets.T).amax(1), self.soft, self.delta)
        return Ban(forbidden, several, soft, lambda several: torch.tensor([one(word) for word in several]))

    @cached_property
    def _vocabulary(self) -> tuple[Tensor, Tensor]:
        """Tokens that are whole words, and their embeddings."""
        assert self.words is not None
        pairs = [(token, word) for word, tokens in self.pieces.fresh.items() for token in tokens]
        vectors = self.words.embed([word for _, word in pairs])
        return torch.tensor([token for token, _ in pairs], dtype=torch.long), vectors

    def line(self, ban: Ban | None) -> Restricted | None:
        """A new output under a ban."""
        if ban is None:
            return None
        made = Restricted(self, ban)
        if self.on_flag == "refuse":
            made.refusing = list(self.refusal_ids(True))
        return made

    # --- the subject's operations ----------------------------------------------------------------------------

    def start(self, prompts: Sequence[Sequence[int]], limit: int, samples: int = 1) -> Guarding:
        """Prompts that were read, each `samples` times; the classifier looks at what was read."""
        seen: list[Tensor] = []

        def look(found: Read) -> None:
            seen.extend(found.states[at].float().mean(0).cpu() for at in found.places)

        started = decoding.start(self.inner, prompts, limit, samples, look)
        bans = self.ban(prompts, torch.stack(seen))
        return Guarding(started, [self.line(ban) for ban in bans for _ in range(samples)])

    def generate(self, *arguments: Any, **options: Any) -> Generations:
        return LanguageModel.generate(self, *arguments, **options)  # type: ignore[arg-type]

    def score(self, items: Sequence[Any], **options: Any) -> Scores:
        """Answers as they are likely under the guard: probabilities of the processed logits, renormalised."""
        prompts = [row.ids[: row.start] for _, row in items]
        distinct = list(dict.fromkeys(prompts))
        bans = dict(zip(distinct, self.ban(distinct, self.features(distinct)))) if distinct else {}
        plain = [i for i, prompt in enumerate(prompts) if bans[prompt] is None]
        under = [i for i, prompt in enumerate(prompts) if bans[prompt] is not None]
        tables = [self.inner.score([items[i] for i in plain], **options)]
        tables += [self._under(items[i][0], items[i][1], self.line(bans[prompts[i]])) for i in under]
        order = np.argsort([*plain, *under]).tolist() if items else []
        return replace(Scores.concatenate(tables), metadata=tables[0].metadata).take(order)

    @torch.no_grad()
    def features(self, prompts: Sequence[tuple[int, ...]]) -> Tensor:
        """(n, d) mean final hidden states of prompts."""
        found = decoding.read(self.inner, prompts, keep=False)
        return torch.stack([found.states[at].float().mean(0).cpu() for at in found.places])

    @torch.no_grad()
    def _under(self, key: Any, row: Any, line: Restricted | None) -> Scores:
        assert line is not None
        pack_ = pack([row], self.inner.device)
        logits = self.inner.head(self.inner.hidden_states(pack_)).float()
        target = pack_.target.tolist()
        for place, token in enumerate(target):
            logits[place] = line.process(logits[place])
            line.take(token)
        at = torch.arange(len(target), device=logits.device)
        statistics = token_statistics(lambda rows: rows, logits, pack_.target, at, logits.shape[1])
        columns = {name: v.cpu().numpy() for name, v in zip(("logprob", "hit", "mean", "variance"), statistics)}
        columns["logprob"] = np.maximum(columns["logprob"], FLOOR).astype(np.float32)
        columns["token"] = pack_.target.to(torch.int32).cpu().numpy()
        columns["end"] = np.arange(row.scored) >= row.scored - row.closing
        return Scores.of([key], [row.scored], {name: columns[name] for name in COLUMNS}, [row.text])
