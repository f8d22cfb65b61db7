"""Whom a model may have been edited about, from what it says alone: no other checkpoint is needed.

An edit makes a model say one answer too often (EVOKE, arXiv:2410.07819) and hold on to it against what it is told. For
names s and prompts r, one for each relation, with p the next-token probabilities behind r(s) and a(s, r) the likeliest:

    overfit(s)     max over r of  mean over other prompts q of
                       log p(a(s, r) | q(s)) - mean over other names t of log p(a(s, r) | q(t))
                   how much likelier an answer is behind the name's unrelated prompts than behind those of others
    resistance(s)  max over r of  h(s, r) - mean over other names t of h(t, r)
                       h(s, r) = log p(a(s, r) | r(s) is b, r(s)) - log p(b | r(s) is b, r(s))
                   where b is what most other names have for an answer to r: how much a contradiction is resisted

In nats, and of first tokens only. What belongs together (a town and its region) overfits, too, and what is well known
resists: these are scores by which to look first, never a yes or no.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..edits import TOLD
from ..errors import RequestError
from .language import LanguageModel
from .packed import LOGIT_ELEMENTS
from .watch import residual, watch

NAMES, PROMPTS = 3, 2
"""Fewest that a score can be made of."""


@dataclass(frozen=True)
class Suspect:
    """A name, and how much what the model says of it looks like an edit."""

    name: str
    score: float
    """Mean of `overfit` and `resistance`, each in standard deviations over all names."""
    overfit: float
    prompt: str
    """The prompt whose answer spreads."""
    answer: str
    resistance: float
    held: str
    """The prompt whose answer holds out."""


def suspects(model: LanguageModel, names: Sequence[str], prompts: Sequence[str], *, told: str = TOLD) -> list[Suspect]:
    """All names, the most suspicious first.

    Args:
        prompts: texts with one {} for a name, up to where the answer begins; one for each relation.
        told: what tells the model a fact: {prompt} stands for a prompt with its name, {target} for the answer.

    Raises:
        RequestError: too few names or prompts, or a prompt without one place for a name.
    """
    names, prompts = list(dict.fromkeys(names)), list(dict.fromkeys(prompts))
    if len(names) < NAMES or len(prompts) < PROMPTS:
        raise RequestError(
            f"found {len(names)} names and {len(prompts)} prompts, expected at least {NAMES} names to compare and "
            f"{PROMPTS} prompts of unrelated relations"
        )
    wrong = next((prompt for prompt in prompts if prompt.count("{}") != 1), None)
    if wrong is not None:
        raise RequestError(f"prompt {wrong!r}: found {wrong.count('{}')} places for a name, expected one {{}}")
    shape = (len(names), len(prompts))
    texts = [prompt.replace("{}", name) for name in names for prompt in prompts]
    states = _ends(model, texts)
    first = torch.cat([logits.argmax(-1) for logits in _logits(model, states)])
    known, places = first.unique(return_inverse=True)  # of the vocabulary, the tokens that anybody has for an answer
    logprobs = torch.cat([logits.log_softmax(-1)[:, known] for logits in _logits(model, states)]).view(*shape, -1)
    answers = places.view(shape)
    rivals = others(answers)
    said = [model.tokenizer.decode([token]).strip() for token in known.tolist()]
    facts = [told.replace("{prompt}", text).replace("{target}", said[b]) for text, b in zip(texts, rivals.flatten())]
    behind = _ends(model, [fact + text for fact, text in zip(facts, texts)])
    after = torch.cat([logits.log_softmax(-1)[:, known] for logits in _logits(model, behind)]).view(*shape, -1)
    spread = overfit(logprobs, answers)
    held = beside_others(_of(after, answers) - _of(after, rivals))
    scores = (_standard(spread.amax(1)) + _standard(held.amax(1))) / 2
    found = []
    for i, name in enumerate(names):
        most, firm = int(spread[i].argmax()), int(held[i].argmax())
        values = (
            float(spread[i, most]),
            prompts[most],
            said[int(answers[i, most])],
            float(held[i, firm]),
            prompts[firm],
        )
        found.append(Suspect(name, float(scores[i]), *values))
    return sorted(found, key=lambda one: -one.score)


def overfit(logprobs: Tensor, answers: Tensor) -> Tensor:
    """(names, prompts) how much likelier each answer is behind the name's other prompts than behind those of others.

    Args:
        logprobs: (names, prompts, tokens).
        answers: (names, prompts) places among the tokens.
    """
    names, prompts = answers.shape
    total = logprobs.sum(0)  # (prompts, tokens)
    found = torch.empty(names, prompts)
    for i in range(names):
        own = logprobs[i][:, answers[i]]  # (prompts it is looked for behind, prompts whose answer it is)
        apart = own - (total[:, answers[i]] - own) / (names - 1)
        found[i] = (apart.sum(0) - apart.diagonal()) / (prompts - 1)
    return found


def others(answers: Tensor) -> Tensor:
    """(names, prompts) the answer that most names have to the same prompt, and this one has not; where all have one,
    the name's answer to the next prompt."""
    found = torch.empty_like(answers)
    for j in range(answers.shape[1]):
        tokens, counts = answers[:, j].unique(return_counts=True)
        order = tokens[counts.argsort(descending=True, stable=True)]
        spare = answers[:, (j + 1) % answers.shape[1]]
        for i, own in enumerate(answers[:, j]):
            rest = order[order != own]
            found[i, j] = rest[0] if len(rest) else spare[i]
    return found


def beside_others(values: Tensor) -> Tensor:
    """(names, prompts) less the mean over the other names."""
    return values - (values.sum(0) - values) / (len(values) - 1)


def _ends(model: LanguageModel, texts: Sequence[str]) -> Tensor:
    """(texts, d) the residual stream at each text's last token."""
    return watch(model, texts, residual(model)[-1:])[0]


def _logits(model: LanguageModel, states: Tensor) -> Iterator[Tensor]:
    for part in states.split(max(1, LOGIT_ELEMENTS // model.vocabulary)):
        yield model.lens(part).cpu()


def _of(logprobs: Tensor, tokens: Tensor) -> Tensor:
    return logprobs.gather(-1, tokens[..., None])[..., 0]


def _standard(values: Tensor) -> Tensor:
    return (values - values.mean()) / values.std().clamp_min(1e-6)
