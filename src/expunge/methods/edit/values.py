"""The value of a fact: what an MLP must give at the subject's last token for the model to state the fact.

Facts are looked up where their subject ends (ROME, arXiv:2202.05262). With `delta` added to what the MLP of one layer
gives there, in the prompt as it is and behind other texts,

    L = mean over contexts of NLL(target | context + prompt)
        + kl * KL(edited || original) at the end of "{subject} is a"     what else the subject is stays
        + decay * |delta| / |z|^2                                        z: what is there now, in the prompt as it is

Adam, with |delta| <= clamp * |z|; a fact whose loss is below 0.05 stops. Facts are independent of one another, so those
that fit share every pass; a pass runs from the subject's last token on, through the blocks above (subjects/tails.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ...edits import EditRow
from ...errors import ParameterError, RowError, TrainingError
from ...rows import Row
from ...subjects.language import LanguageModel
from ...subjects.packed import TOKEN_BUDGET, Encoded
from ...subjects.tails import Looked, Tails, look
from ..optimise.importance import flowing
from .case import EditCase
from .told import told

STARTERS = ("The", "Therefore", "Because", "I", "You")
LENGTH = 10
"""Tokens of a text that the model writes to be put before prompts."""
ENOUGH = 0.05
"""Loss at which a value is taken."""


class Lookup(NamedTuple):
    """A prompt with its target as tokens, and where the fact is looked up."""

    tokens: Encoded
    at: int


@dataclass(frozen=True)
class Fact:
    """One edit as its methods see it."""

    edit: EditRow
    lookups: list[Lookup]
    """First as it is, then behind each prefix."""
    prefaces: list[str]
    """What stands before each of them; "" first."""
    essence: tuple[int, ...]
    """Tokens of a text about the subject up to its last token; empty where no subject is named."""


def depth(subject: LanguageModel, layer: float, name: str = "layer") -> int:
    """A layer's number from a number or a fraction of the depth.

    Raises:
        ParameterError: there is no such layer.
    """
    count = len(subject.blocks)
    number = round(layer * count) if 0 < layer < 1 else int(layer)
    if ((layer >= 1 or layer <= 0) and number != layer) or not -count <= number < count + (0 < layer < 1):
        raise ParameterError(f"{name} is {layer}, expected a layer from 0 to {count - 1} or a fraction of the depth")
    return min(number, count - 1) % count


def prefixes(case: EditCase, count: int) -> list[str]:
    """Texts that are put before prompts: the caller's, or sampled once from the base by the seed."""
    if case.prefixes is not None:
        return [text if text[-1:].isspace() else text + " " for text in case.prefixes if text.strip()]
    if count < 0:
        raise ParameterError(f"contexts is {count}, expected at least 0")
    key = f"prefixes {count}"
    if key not in case.memory:
        rounds = -(-count // len(STARTERS))
        asked = [((str(i), "prefix"), text) for i, text in enumerate(STARTERS)]
        texts: list[str] = []
        if count:
            said = case.base.generate(
                asked, max_new_tokens=LENGTH, temperature=1.0, top_p=0.9, samples=rounds, seed=case.seed
            )
            texts = [
                f"{start} {text}".strip() + ". " for start, several in zip(STARTERS, said.texts) for text in several
            ]
        case.memory[key] = texts[:count]
    return list(case.memory[key])


def located(case: EditCase, contexts: int) -> list[Fact]:
    """Every edit with its contexts.

    Raises:
        RowError: the subject does not stand in the text that the model reads.
    """
    subject = case.subject
    before = ["", *prefixes(case, contexts)]
    facts = []
    for edit in case.facts():
        if edit.subject and edit.prompt.count(edit.subject) > 1:
            case.warnings.append(
                f"{edit.source or edit.id}: {edit.subject!r} stands twice in the prompt; the last counts"
            )
        lookups = [lookup(subject, edit.row(preface=text), edit.subject) for text in before]
        essence: tuple[int, ...] = ()
        if edit.subject:
            row = Row(id=edit.id, prompt=f"{edit.subject} is a", answer="thing", kind="completion", source=edit.source)
            about = lookup(subject, row, edit.subject)
            essence = about.tokens.ids[: about.at + 1]
        facts.append(Fact(edit, lookups, before, essence))
    return facts


def lookup(subject: LanguageModel, row: Row, name: str) -> Lookup:
    """Tokens of prompt and answer, without what closes an answer, and the last token of the subject's last mention.

    By character offsets: pieces tokenised apart need not add up. Without a subject, the prompt's last token.
    """
    tokens = subject.encode(row)
    tokens = replace(tokens, ids=tokens.ids[: len(tokens.ids) - tokens.closing], closing=0)
    if not name:
        return Lookup(tokens, tokens.start - 1)
    text, spans = subject.spans(row)
    first = text[: len(subject.prompt_text(row))].rfind(name)
    if first < 0:
        raise RowError(
            f"{row.source or row.id}: the subject {name!r} does not stand in the prompt as the model reads it"
        )
    inside = [i for i, (a, b) in enumerate(spans) if a < first + len(name) and b > first]
    return Lookup(tokens, min(inside[-1], tokens.start - 1))


class Keys(NamedTuple):
    """(n, ...) of one layer, fp32."""

    mean: Tensor
    """Keys, averaged over contexts."""
    bare: Tensor
    """Keys in the prompt as it is."""


def keys(subject: LanguageModel, facts: Sequence[Fact], layers: Sequence[int]) -> tuple[dict[int, Keys], Looked]:
    """Keys of facts at layers, and what the prompts as they are show there. Nothing after the subject is read."""
    found: list[dict[int, Keys]] = []
    bare: list[Looked] = []
    for group in groups(facts):
        texts = [one.tokens.ids[: one.at + 1] for fact in group for one in fact.lookups]
        seen = look(subject, texts, [len(text) - 1 for text in texts], layers)
        found.append({layer: _averaged(seen.keys[layer], group) for layer in layers})
        first = _first(group)
        bare.append(
            Looked(*({layer: t[first] for layer, t in part.items()} for part in (seen.keys, seen.values, seen.streams)))
        )
    joined = {layer: Keys(*(torch.cat(parts) for parts in zip(*(one[layer] for one in found)))) for layer in layers}
    shown = (
        {layer: torch.cat([getattr(one, name)[layer] for one in bare]) for layer in layers}
        for name in ("keys", "values", "streams")
    )
    return joined, Looked(*shown)


def _averaged(each: Tensor, group: Sequence[Fact]) -> Keys:
    counts = [len(fact.lookups) for fact in group]
    return Keys(torch.stack([part.mean(0) for part in each.split(counts)]), each[_first(group)])


def _first(group: Sequence[Fact]) -> list[int]:
    """Where each fact's prompt as it is stands among all its contexts."""
    counts = [len(fact.lookups) for fact in group]
    return [sum(counts[:i]) for i in range(len(counts))]


def groups(facts: Sequence[Fact]) -> Iterator[list[Fact]]:
    """Facts that share passes: as many as a pass takes."""
    group: list[Fact] = []
    used = 0
    for fact in facts:
        cost = sum(len(one.tokens.ids) for one in fact.lookups) + len(fact.essence)
        if group and used + cost > 2 * TOKEN_BUDGET:
            yield group
            group, used = [], 0
        group.append(fact)
        used += cost
    yield group


@dataclass(frozen=True)
class Settings:
    """How values are optimised; the names of the published settings."""

    steps: int = 25
    learning_rate: float = 0.5
    kl: float = 0.0625
    decay: float = 1e-3
    clamp: float = 4.0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("learning_rate", 0), ("kl", 0), ("decay", 0), ("clamp", 0)):
            if getattr(self, name) < least:
                raise ParameterError(f"{name} is {getattr(self, name)}, expected at least {least}")


@dataclass(frozen=True)
class Values:
    """What optimising found, per fact."""

    delta: Tensor
    """(n, d) fp32, to be added to what the MLP gives."""
    keys: Keys
    log: dict[str, Any]
    """Losses before and after, and steps, for the report."""


@dataclass(frozen=True)
class Together:
    """Facts that share a pass, and how the model moves with a change of each."""

    subject: LanguageModel
    facts: list[Fact]
    tails: Tails
    """Texts: every fact's contexts in their order, then the essences. Read: what predicts the target tokens, then what
    stands at the ends of the essences."""
    settings: Settings
    owner: list[int]
    """Per text its fact."""
    target: Tensor
    """(T,) target tokens, context by context."""
    text: Tensor
    """(T,) the text that each stands in."""

    @property
    def device(self) -> torch.device:
        return self.subject.device

    @cached_property
    def fact(self) -> Tensor:
        """(texts,) the fact of each."""
        return torch.tensor(self.owner, device=self.device)

    @cached_property
    def length(self) -> Tensor:
        """(contexts,) target tokens of each."""
        return torch.bincount(self.text)

    @cached_property
    def weight(self) -> Tensor:
        """(T,) what a target token counts in the mean over its fact's contexts of their means over tokens."""
        contexts = torch.tensor([len(fact.lookups) for fact in self.facts], device=self.device)
        return 1 / (self.length * contexts[self.fact[: len(self.length)]])[self.text]

    def of_facts(self, texts: Tensor) -> Tensor:
        """(texts,) to (n,): sums over the texts of each fact."""
        return texts.new_zeros(len(self.facts)).index_add(0, self.fact[: len(texts)], texts)

    def of_texts(self, tokens: Tensor) -> Tensor:
        """(T,) to (contexts,): the mean over the target tokens of each context."""
        return tokens.new_zeros(len(self.length)).index_add(0, self.text, tokens) / self.length

    @cached_property
    def mean(self) -> tuple[Tensor, Tensor]:
        """(T,) the fact of each target token, and what its log-probability adds to the fact's loss."""
        return self.fact[self.text], -self.weight

    def said(self, logprobs: Tensor) -> Tensor:
        """(T,) of the target from (T or more, V)."""
        return logprobs[: len(self.target)].gather(1, self.target[:, None])[:, 0]

    def nll(self, said: Tensor) -> Tensor:
        """(n,) negative log-likelihood from (T,) log-probabilities of target tokens: mean over contexts of means over
        tokens."""
        facts, factor = self.mean
        return said.new_zeros(len(self.facts)).index_add(0, facts, factor * said)


Goal = Callable[[Together], Callable[[Tensor], Tensor]]
"""What values are optimised for, the bound on their size aside: facts to the losses (n,) of changes (n, d)."""


def published(group: Together) -> Callable[[Tensor], Tensor]:
    """NLL of the target, and what the subject is: the loss of ROME and MEMIT."""
    subject, tails = group.subject, group.tails
    count = len(group.target)
    described = group.owner[int(group.text.max()) + 1 :]
    head = subject.linear_head
    with torch.no_grad():
        before = subject.head(tails.clean[count:]).float().log_softmax(-1)
    at = torch.tensor(described, device=group.device, dtype=torch.long)

    def losses(delta: Tensor) -> Tensor:
        states = tails.states(delta.index_select(0, group.fact))
        if head is None:
            logprobs = subject.head(states).float().log_softmax(-1)
            now = logprobs[count:]
            said, apart = group.said(logprobs), (now.exp() * (now - before)).sum(-1)
        else:
            said, apart = told(head, states, group.target, before)
        return group.nll(said).index_add(0, at, group.settings.kl * apart)

    return losses


def optimised(
    subject: LanguageModel,
    facts: Sequence[Fact],
    layer: int,
    settings: Settings,
    *,
    at: Literal["value", "stream"] = "value",
    goal: Goal | None = None,
) -> Values:
    """Values of all facts at one layer.

    Args:
        at: whose norm bounds delta: the MLP's output (ROME) or the residual stream after the block (MEMIT).
        goal: what they are optimised for in place of the published loss.

    Raises:
        TrainingError: a value is not finite.
    """
    parts = [_together(subject, group, layer, settings, at, goal or published) for group in groups(facts)]
    log = {key: [value for part in parts for value in part.log[key]] for key in parts[0].log}
    found = Keys(*(torch.cat([part.keys[i] for part in parts]) for i in range(2)))
    return Values(torch.cat([part.delta for part in parts]), found, log)


def _together(
    subject: LanguageModel, group: list[Fact], layer: int, settings: Settings, where: str, goal: Goal
) -> Values:
    asked = [one for fact in group for one in fact.lookups]
    about = [fact.essence for fact in group if fact.essence]
    texts = [one.tokens.ids[:-1] for one in asked] + about
    read = [[place - 1 for place in range(one.tokens.start, len(one.tokens.ids))] for one in asked]
    last = [len(text) - 1 for text in about]
    tails = Tails(subject, texts, [one.at for one in asked] + last, layer, read + [[place] for place in last])
    device = subject.device
    owner = [i for i, fact in enumerate(group) for _ in fact.lookups]
    owner += [i for i, fact in enumerate(group) if fact.essence]
    target = torch.tensor([t for one in asked for t in one.tokens.ids[one.tokens.start :]], device=device)
    text = torch.tensor([i for i, one in enumerate(asked) for _ in one.tokens.ids[one.tokens.start :]], device=device)
    looked = tails.looked
    size = (looked.values if where == "value" else looked.streams)[layer][_first(group)].norm(dim=-1)
    aim = goal(Together(subject, group, tails, settings, owner, target, text))

    decay = settings.decay / size.square()

    def losses(delta: Tensor) -> Tensor:
        # By the gradient that torch gives the norm of a zero vector, 0: it is at its least there.
        return aim(delta) + decay * torch.linalg.vector_norm(delta, dim=-1)

    with flowing(subject.model, []):  # a graph of what delta moves, and of nothing else
        delta, log = _descend(losses, torch.zeros(len(group), tails.matrix.width, device=device), size, settings)
    wrong = [fact.edit for fact, row in zip(group, delta) if not bool(row.isfinite().all())]
    if wrong:
        raise TrainingError(
            f"{wrong[0].source or wrong[0].id}: the value of the fact is not finite; lower learning_rate"
        )
    return Values(delta, _averaged(looked.keys[layer][: len(asked)], group), log)


def _descend(losses: Any, delta: Tensor, size: Tensor, settings: Settings) -> tuple[Tensor, dict[str, Any]]:
    """Adam on every row by itself; a row that has reached `ENOUGH` stays as it is."""
    mean, square = torch.zeros_like(delta), torch.zeros_like(delta)
    going = torch.ones(len(delta), dtype=torch.bool, device=delta.device)
    start = end = torch.zeros(len(delta))
    steps, most = torch.zeros_like(going, dtype=torch.long), settings.clamp * size
    for step in range(1, settings.steps + 1):
        delta.requires_grad_(True)
        with torch.set_grad_enabled(step < settings.steps):  # nothing moves after the last one
            each = losses(delta)
        end = each.detach()
        start = end if step == 1 else start
        going &= ~(end < ENOUGH)
        if step == settings.steps or not bool(going.any()):
            break
        (gradient,) = torch.autograd.grad(each.sum(), [delta])
        delta = delta.detach()
        mean.lerp_(gradient, 0.1)
        square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        root = (square / (1 - 0.999**step)).sqrt_().add_(1e-8)
        new = torch.addcdiv(delta, mean, root, value=-settings.learning_rate / (1 - 0.9**step))
        new *= (most / new.norm(dim=-1).clamp_min(1e-12)).clamp_max(1)[:, None]
        delta = torch.where(going[:, None], new, delta)
        steps += going
    log = {"steps": steps.tolist(), "loss_before": start.tolist(), "loss_after": end.tolist()}
    return delta.detach(), log
