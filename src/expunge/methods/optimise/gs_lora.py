"""GS-LoRA and GS-LoRA++: adapters in the feed-forward layers, of which few blocks' are to move.

    L = CE(retain) + beta max(0, bound - CE(forget)) + alpha sum over groups of |its adapter matrices|
        + push max(0, prototype_bound - d(forget)) + pull d(retain)                                  (++)

A group is all adapter matrices of one block and its norm that of all of them together (group lasso), so that whole
blocks are switched off. d is the mean distance of a row's state to its class's prototype: the mean state of the class's
rows under the start model. The class of an answer token is the token, which for a picture is its class.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ...errors import ParameterError, ScopeError, TrainingError
from ...registry import optimise
from ...subjects.anatomy import structure
from ...subjects.language import LanguageModel
from ...subjects.packed import Encoded
from .loop import Turn, references
from .scope import PRINCIPAL, resolve
from .shards import like, norm
from .terms import Side, Step, chunked, negative_log_likelihood
from .unlearn import Preparation

Grouping = Literal["block", "module", "matrix"]
Positive = Annotated[float, Field(ge=0)]
ACTIVE = 1e-3
"""A group counts as active above this share of the largest one's norm: descent alone makes norms small, never zero."""


def _prepare(case: Preparation) -> None:
    settings, subject = case.settings, case.subject
    if case.scope is None:
        case.scope = "lora(r=8, alpha=1, modules=mlp)"
    lora = resolve(case.scope, subject.model).lora
    if settings["alpha"] and (lora is None or lora.init in PRINCIPAL):
        raise ScopeError(
            f"gs_lora: scope {case.scope!r} has no adapters that start at nothing; expected e.g. lora(r=8, alpha=1, "
            "modules=mlp), or the method's alpha = 0"
        )
    bound = 2 + 2 * math.log(subject.vocabulary) if settings["bound"] is None else settings["bound"]
    case.given["bound"] = bound
    case.summary["bound"] = bound
    case.after = partial(_after, settings=settings)
    if lora is not None:
        case.around = partial(_around, settings=settings)
        case.trained = partial(activity, grouping=settings["grouping"])
    if not settings["prototypes"]:
        return
    measured = settings["prototype_bound"] is None
    sides = ("forget", "retain") if settings["pull"] or measured else ("forget",)
    case.looked += [row for side in sides for row in case.rows[side]]
    if case.dry:
        return
    case.given["prototypes"] = {side: prototypes(subject, case.rows[side]) for side in sides if case.rows[side]}
    if measured and case.rows["forget"]:
        tables = torch.cat([table for _, table in case.given["prototypes"].values()])
        tables = tables if settings["prototype_of"] == "embedding" else _logits(subject.head, tables, subject.dtype)
        settings["prototype_bound"] = _mean_distance(tables, settings["distance"])
        case.summary["prototype_bound"] = settings["prototype_bound"]


@optimise(
    paper="arXiv:2403.11530",
    modality=("image", "language"),
    intention="removal",
    needs=("forget", "retain"),
    requires=("weights", "gradients", "forget_data", "retain_data"),
    cost="4N per token of forget and retain rows; with prototypes 2N once for each row",
    known_weaknesses=("relearn",),
    prepare=_prepare,
    aliases={"gs_lora_plus_plus": {"prototypes": True}},
)
def gs_lora(
    step: Step,
    *,
    beta: Positive = 0.15,
    bound: float | None = None,
    alpha: Positive = 1e-4,
    warmup: float = 0.0,
    grouping: Grouping = "block",
    proximal: bool = False,
    prototypes: bool = False,
    push: Positive = 0.1,
    pull: Positive = 0.1,
    prototype_bound: float | None = None,
    prototype_of: Literal["embedding", "logits"] = "embedding",
    distance: Literal["kl", "squared"] = "kl",
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    ema_epoch: int = 0,
) -> Tensor:
    """Bounded ascent on forget rows and descent on retain rows, in adapters of which whole blocks are switched off
    (Zhao et al. 2024, eq. 8-12).

    `bound` None is 2 + 2 ln(classes); published: 105 to 110, for logits of a cosine loss scaled by 64. `alpha` is 0 in
    the first `warmup` epochs. `proximal` (ours) scales groups by max(0, 1 - learning rate x alpha / norm) after each
    step in place of the term's gradient, so that groups become exactly 0 and stay so. `prototypes` makes it GS-LoRA++
    (arXiv:2501.09705): states are pushed from their class's prototype on forget rows and held on retain rows, in KL of
    softmaxes over their entries or in squared distance; `prototype_bound` None is the mean distance between
    prototypes (published: 18, for 512 entries). With alpha 0 any scope will do. `ema_decay` averages weights from epoch
    `ema_epoch` on.

    Published: AdamW, learning rate 0.01 falling by a cosine, weight decay 0.05, a batch of 48; beta 0.2 to 0.4 by task,
    push 0.005 to 0.5, pull 0 to 0.001. Decay shrinks groups too: compare sparsity at equal decay. An epoch here passes
    over the forget rows, there over the retain rows.
    """
    ceiling = step.given["bound"]
    loss = negative_log_likelihood(step.retain) + beta * (ceiling - negative_log_likelihood(step.forget)).relu()
    if not prototypes:
        return loss
    known = step.given["prototypes"]
    away = {
        name: from_prototype(step.sides[name], classes, table, prototype_of, distance)
        for name, (classes, table) in known.items()
    }
    assert prototype_bound is not None
    loss = loss + push * (prototype_bound - away["forget"].mean()).relu()
    return loss + pull * away["retain"].mean() if pull else loss


# --- groups ----------------------------------------------------------------------------------------------------------


def groups(model: nn.Module, grouping: Grouping) -> dict[str, list[nn.Parameter]]:
    """Adapter matrices by group: a block's number, the name of an adapted layer, or of a matrix."""
    parts = structure(model)
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        owner, inside, _ = name.partition(".lora_")
        if inside:
            layer = parts.layer(name)
            block = owner if layer is None else str(layer)
            found.setdefault({"block": block, "module": owner, "matrix": name}[grouping], []).append(parameter)
    return found


def _around(turn: Turn, settings: dict[str, Any]) -> Tensor:
    """The objective's gradient, and the group term's: each matrix over its group's norm."""
    members = groups(turn.subject.model, settings["grouping"])
    lengths = {name: norm([p.detach() for p in some]) for name, some in members.items()}
    if settings["proximal"] and turn.index:  # before the first step B is 0, and not because it was switched off
        off = [name for name, length in lengths.items() if not length]
        if len(off) == len(members):
            raise TrainingError(
                f"gs_lora: alpha {settings['alpha']:g} had switched off every {settings['grouping']} after step "
                f"{turn.index}; lower it, or raise warmup"
            )
        for name in off:  # momentum would bring them back
            for p in members[name]:
                p.requires_grad_(False)
    loss = turn.backward()
    alpha = _alpha(turn, settings)
    for name, some in members.items():
        if alpha and not settings["proximal"] and lengths[name]:
            for p in some:
                pull = alpha / lengths[name].to(p.dtype) * p.detach()
                p.grad = pull if p.grad is None else p.grad.add_(pull)
    return loss + alpha * torch.stack([length.to(loss.device) for length in lengths.values()]).sum()


def _after(turn: Turn, moved: Sequence[Tensor], settings: dict[str, Any]) -> None:
    """The proximal step, and the running average of the weights, which takes their place in the end."""
    alpha = _alpha(turn, settings)
    if settings["proximal"] and alpha:
        beside = {id(p): (p, m) for p, m in zip(turn.parameters, moved)}
        for some in groups(turn.subject.model, settings["grouping"]).values():
            pairs = [beside[id(p)] for p in some]
            shrink(pairs, turn.learning_rate * alpha)
    decay = settings["ema_decay"]
    if decay and _epoch(turn) >= settings["ema_epoch"]:
        average = turn.kept.setdefault("average", [m.clone() for m in moved])
        for mean, m in zip(average, moved):
            mean.lerp_(m, 1 - decay)
            if turn.index == turn.total - 1:
                m.copy_(mean)


def shrink(pairs: Sequence[tuple[Tensor, Tensor]], by: float) -> None:
    """Shorten a group by `by`, in place, to 0 where it is shorter; its direction stays.

    pairs: each parameter with the fp32 values that stand for it.
    """
    length = float(norm([like(p, m) for p, m in pairs]))
    for _, m in pairs:
        m.mul_(max(0.0, 1 - by / length) if length else 0.0)


def _epoch(turn: Turn) -> int:
    return turn.index // turn.drawn.per_epoch


def _alpha(turn: Turn, settings: dict[str, Any]) -> float:
    return float(settings["alpha"]) if _epoch(turn) >= settings["warmup"] else 0.0


@torch.no_grad()
def activity(subject: LanguageModel, grouping: Grouping) -> dict[str, Any]:
    """For the report: each group's norm, and how many are active.

    `moved`: Frobenius norm of the change of each block's weights, 0 where B is, however large A.
    """
    lengths = {name: float(norm(some)) for name, some in groups(subject.model, grouping).items()}
    largest = max(lengths.values(), default=0.0)
    active = [name for name, length in lengths.items() if length > ACTIVE * largest]
    squares: dict[str, float] = {}
    parts = structure(subject.model)
    for name, module in subject.model.named_modules():
        if hasattr(module, "lora_A"):
            layer = parts.layer(name + ".")
            block = name if layer is None else str(layer)
            change: Any = module
            squares[block] = squares.get(block, 0.0) + float(change.get_delta_weight("default").float().square().sum())
    moved = {block: square**0.5 for block, square in squares.items()}
    return {"groups": {"norms": lengths, "active": active, "of": len(lengths), "moved": moved}}


# --- prototypes ------------------------------------------------------------------------------------------------------


def prototypes(subject: LanguageModel, rows: Sequence[Encoded]) -> tuple[Tensor, Tensor]:
    """(the answer tokens that occur (C,) in order, the mean state that predicts each (C, d) fp32)"""
    states = torch.cat([row["reference_hidden"] for row in references(subject, rows, hidden=True)]).float()
    target = torch.tensor([token for row in rows for token in row.ids[row.start :]], device=states.device)
    classes, place, count = target.unique(return_inverse=True, return_counts=True)
    return classes, states.new_zeros(len(classes), states.shape[1]).index_add_(0, place, states) / count[:, None]


def from_prototype(
    side: Side, classes: Tensor, table: Tensor, of: Literal["embedding", "logits"], distance: Literal["kl", "squared"]
) -> Tensor:
    """(T,) distance of each answer token's state to its class's prototype: KL(softmax(prototype) || softmax(state)), or
    the sum of squares. Of logits: what the heads make of both."""
    wanted = table[torch.searchsorted(classes, side.target)]

    def tokens(hidden: Tensor, prototype: Tensor) -> Tensor:
        z, p = hidden.float(), prototype
        if of == "logits":
            z, p = side.head(hidden).float(), _logits(side.frozen_head, prototype, hidden.dtype)
        if distance == "squared":
            return (z - p).square().sum(-1)
        p = p.log_softmax(-1)
        return (p.exp() * (p - z.log_softmax(-1))).sum(-1)

    return chunked(tokens, side.hidden, wanted, side.vocabulary if of == "logits" else table.shape[1])


@torch.no_grad()
def _logits(head: Any, states: Tensor, dtype: torch.dtype) -> Tensor:
    return head(states.to(dtype)).float()  # type: ignore[no-any-return]


def _mean_distance(table: Tensor, distance: str) -> float:
    """Mean over pairs of different prototypes."""
    count = len(table)
    if count < 2:
        raise ParameterError("gs_lora: there is one prototype only, so no distance to measure; give prototype_bound")
    if distance == "squared":
        between = torch.cdist(table, table).square()
    else:
        logs = table.log_softmax(-1)
        between = (logs.exp() * logs).sum(-1)[:, None] - logs.exp() @ logs.T
    return float((between.sum() - between.diagonal().sum()) / (count * (count - 1)))
