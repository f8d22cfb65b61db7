"""What objectives are made of: the quantities of a step, and the few shapes that forget and retain terms have.

Shapes: T answer tokens of a side, n rows, d hidden size, V vocabulary. All terms are minimised.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...subjects.gather import Gather
from ...subjects.head import linear_logprob

Objective = str | dict[str, dict[str, Any]]
"""An objective inside another method: its name, or {name: {parameter: value}}."""

RetainTerm = Literal["none", "nll", "kl"]
"""none; nll: likelihood of retain answers (GDR); kl: stay with the start model on them (KLR). Objectives that read
layers know `hidden` as well: stay with the start model's activations."""

Alternatives = Literal["refusal", "perturbed"]
"""What preference methods prefer to the forgotten answer: a refusal, or one of the row's perturbed answers."""

LOGIT_ELEMENTS = 1 << 24
"""Logits held at once with gradients (64 MiB in fp32); more are recomputed chunk by chunk in the backward pass."""

Head = Callable[[Tensor], Tensor]


@dataclass
class Side:
    """The rows of one kind in a step. Only answer tokens, never padding; rows in drawing order."""

    hidden: Tensor
    """(T, d) final hidden states at the positions that predict the answer tokens."""
    target: Tensor
    """(T,) the answer tokens."""
    row: Tensor
    """(T,) row of each token, 0 ... n - 1."""
    count: int
    """n"""
    head: Head
    frozen_head: Head
    """The start model's head: the same one unless the scope moves it."""
    vocabulary: int
    linear_head: nn.Linear | None = None
    """The head's weights where it is a plain linear layer."""
    gather: Gather | None = None
    """Adds up the gradient of those weights."""
    joint: Callable[[], Tensor] | None = None
    """(T,) this side's part of log-probabilities that several sides take in one product."""
    constants: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[int, Tensor] = field(default_factory=dict)
    """Residual stream after the blocks that were tapped: (P, d) at the tapped positions, row by row."""
    routers: dict[int, Tensor] = field(default_factory=dict)
    """(P, E) router logits of the blocks that were tapped."""

    @cached_property
    def length(self) -> Tensor:
        """(n,) answer tokens of each row."""
        return torch.bincount(self.row, minlength=self.count)

    @cached_property
    def token_logprob(self) -> Tensor:
        """(T,) log-probability of each answer token, fp32."""
        if self.joint is not None:
            return self.joint()
        if self.linear_head is not None:
            head = self.linear_head
            return linear_logprob(self.hidden, head.weight, head.bias, self.target, self.gather)
        return chunked(lambda h, t: token_logprob(self.head, h, t), self.hidden, self.target, self.vocabulary)

    @cached_property
    def logprob(self) -> Tensor:
        """(n,) log-probability of each row's whole answer."""
        return self.sum_rows(self.token_logprob)

    def sum_rows(self, values: Tensor) -> Tensor:
        """(T,) -> (n,)"""
        return values.new_zeros(self.count).index_add(0, self.row, values)

    @property
    def reference_tokens(self) -> Tensor:
        """(T,) log-probabilities under the start model."""
        return self.constants["reference_tokens"]

    @cached_property
    def reference(self) -> Tensor:
        """(n,) log-probability of each row's whole answer under the start model."""
        return self.sum_rows(self.reference_tokens)

    @property
    def reference_hidden(self) -> Tensor:
        """(T, d) final hidden states of the start model."""
        return self.constants["reference_hidden"]


@dataclass
class Step:
    """One optimiser step as an objective sees it."""

    sides: dict[str, Side]
    index: int
    total: int
    epoch: int = 0
    given: dict[str, Any] = field(default_factory=dict)
    """What the method's `prepare` worked out before training."""
    memory: dict[str, float] = field(default_factory=dict)
    """Numbers an objective keeps from step to step; part of every checkpoint."""
    inner: Callable[[Step], Tensor] | None = None
    """The objective inside, of a method with a parameter `objective`."""

    @property
    def forget(self) -> Side:
        return self.sides["forget"]

    @property
    def retain(self) -> Side:
        return self.sides["retain"]

    @property
    def alternative(self) -> Side:
        """What is to be said instead, row by row beside `forget`."""
        return self.sides["alternative"]

    def retain_term(self, kind: RetainTerm | Literal["hidden"]) -> Tensor | float:
        """The term that keeps what must be kept; 0 for `none`."""
        if kind == "hidden":
            return drift(self.retain)
        if kind == "nll":
            return negative_log_likelihood(self.retain)
        return divergence(self.retain) if kind == "kl" else 0.0


def negative_log_likelihood(side: Side) -> Tensor:
    """Mean over answer tokens of -l."""
    return -side.token_logprob.mean()


def weighted_likelihood(side: Side, weight: Tensor) -> Tensor:
    """Mean over answer tokens of w l, with w held constant: pushes each token down by its own weight."""
    return (weight.detach() * side.token_logprob).mean()


def drift(side: Side) -> Tensor:
    """Mean squared distance to the start model's activations at the tapped layers, over positions and dimensions."""
    layers = [(side.layers[at].float() - side.constants[f"layer.{at}"].float()).square().mean() for at in side.layers]
    return torch.stack(layers).mean()


def divergence(side: Side) -> Tensor:
    """Mean over answer tokens of KL(start model || model), the start model from its stored hidden states."""

    def tokens(hidden: Tensor, reference: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = side.frozen_head(reference).float().log_softmax(-1)
        return (wanted.exp() * (wanted - side.head(hidden).float().log_softmax(-1))).sum(-1)

    return chunked(tokens, side.hidden, side.reference_hidden, side.vocabulary).mean()


class _Known(torch.autograd.Function):
    """Values of logits whose gradient is worked out beside them: autograd keeps nothing else and takes no softmax."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, term: LogitTerm, at: Tensor) -> Tensor:
        values, gradient = term(logits, at)
        ctx.save_for_backward(gradient)
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0][:, None], None, None


LogitTerm = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(logits (k, V) fp32, their tokens' places in the side (k,)) -> (values (k,), gradient of each in its logits (k, V)).
The logits must be left as they are."""


def of_logits(side: Side, term: LogitTerm, at: Tensor | None = None) -> Tensor:
    """(k,) values of a term that knows its own gradient, at the tokens `at` (k,), by default all of them."""
    hidden = side.hidden if at is None else side.hidden[at]
    at = torch.arange(len(hidden), device=hidden.device) if at is None else at
    return chunked(lambda h, a: _Known.apply(side.head(h).float(), term, a), hidden, at, side.vocabulary)


def towards(side: Side, wanted: Callable[[Tensor, Tensor], Tensor], at: Tensor | None = None) -> Tensor:
    """(k,) cross-entropies -sum_v q_v log p_v to target distributions q that are held constant; gradient p - q.

    wanted: (probabilities p (k, V) of the model itself, the tokens' places (k,)) -> q (k, V), leaving p as it is.
    """

    def term(z: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        p = z.softmax(-1)
        q = wanted(p, at)
        top, index = p.max(-1)
        # The normaliser log sum exp z, from the softmax that is there already.
        normaliser = z.gather(1, index[:, None])[:, 0] - top.log()
        return normaliser - torch.linalg.vecdot(q, z), p.sub_(q)

    return of_logits(side, term, at)


def preference(step: Step, beta: float) -> Tensor:
    """-2/beta mean over rows of log sigmoid(beta (preferred - rejected)): the alternative before the forgotten answer,
    both relative to the start model (arXiv:2305.18290, eq. 7; scaled as NPO is)."""
    preferred = step.alternative.logprob - step.alternative.reference
    rejected = step.forget.logprob - step.forget.reference
    return -2 / beta * torch.nn.functional.logsigmoid(beta * (preferred - rejected)).mean()


def margin(side: Side) -> Tensor:
    """(T,) how far the highest logit stands above the mean of all: 0 where every token is as likely as every other."""

    def tokens(hidden: Tensor, _: Tensor) -> Tensor:
        z = side.head(hidden).float()
        return z.max(-1).values - z.mean(-1)

    return chunked(tokens, side.hidden, side.target, side.vocabulary)


def dual(step: Step, loss: Tensor, *, bound: float, start: float, rate: float, warmup: float = 0.0) -> Tensor:
    """multiplier x loss, the multiplier rising by rate x (loss - bound) after each step, never below 0.

    To be called once per step, on the step's mean. `warmup`: epochs in which the multiplier stays at `start`.
    """
    multiplier = step.memory.setdefault("multiplier", start)
    if step.epoch >= warmup:
        step.memory["multiplier"] = max(0.0, multiplier + rate * (float(loss.detach()) - bound))
    return multiplier * loss


def chunked(function: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, other: Tensor, vocabulary: int) -> Tensor:
    """`function` over chunks of tokens, so that (T, V) is never held whole: (T, d), (T, ...) -> (T,)."""
    size = max(1, LOGIT_ELEMENTS // vocabulary)
    if len(hidden) <= size:
        return function(hidden, other)
    parts = zip(hidden.split(size), other.split(size))
    if not torch.is_grad_enabled():
        return torch.cat([function(h, o) for h, o in parts])
    return torch.cat([checkpoint(function, h, o, use_reentrant=False) for h, o in parts])  # type: ignore[misc]


def token_logprob(head: Head, hidden: Tensor, target: Tensor) -> Tensor:
    """(T,) fp32 log-probabilities of the targets."""
    return -torch.nn.functional.cross_entropy(head(hidden).float(), target, reduction="none")
