"""UOE/SEUF: only the expert that forget rows use most is unlearned, while an anchor keeps their routing on it.

    affinity(l, i) = mean over rows of the mean over tokens of g_i        g = score s of a chosen expert, else 0
    loss = objective + anchor_weight x mean over forget tokens of |s - a|^2        a = 1 at the experts taken, else 0

s sums to 1 over all E experts of a block, so that an expert nobody chooses still has a gradient in the anchor. g is
neither divided by the sum over chosen experts nor scaled. Shared experts are no candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ...errors import ParameterError, ScopeError, SubjectError
from ...registry import optimise
from ...subjects.language import LanguageModel
from ...subjects.packed import TOKEN_BUDGET, Encoded, batches, pack
from ...subjects.protocol import Taps
from ...subjects.routing import Scoring, scores, scoring
from .terms import Objective, Side, Step
from .unlearn import Preparation

Expert = tuple[int, int]
"""(block, expert)"""


@dataclass(frozen=True)
class Anchor:
    """Where the router of one block is held."""

    scoring: Scoring
    target: Tensor
    """(E,) 1 at the experts taken."""


def _prepare(case: Preparation) -> None:
    """Measure which experts the forget rows use, take the foremost, move them and their routers."""
    settings, subject = case.settings, case.subject
    if case.asked is not None:
        raise ScopeError(
            f"uoe moves the experts that it chooses, and the request asks for the scope {case.asked!r}; leave scope "
            "out, or run the objective by itself in that scope"
        )
    layers = candidates(case)
    case.looked = sample(case.rows["forget"], settings["attribution_tokens"], case.seed)
    if case.looked and not case.dry:
        places = _attributed(case, layers)
    else:
        count = len(subject.model.get_parameter(str(subject.blocks[layers[0]].router)))
        everywhere = layers if settings["per"] == "every_layer" else layers[:1]
        places = {layer: list(range(min(settings["experts"], count))) for layer in everywhere}
    if case.dry and settings["per"] != "every_layer":
        case.warnings.append(
            f"uoe: counted as if the experts were in block {layers[0]}; which they are shows once forget rows have "
            "run, and higher blocks cost less"
        )
    router = str(settings["train_router"]).lower()
    case.scope = "+".join(
        f"expert(layer={layer}, index={'|'.join(map(str, chosen))}, router={router})"
        for layer, chosen in places.items()
    )
    if settings["anchor_weight"]:
        case.taps = replace(case.taps, routers=tuple(places))


def _attributed(case: Preparation, layers: Sequence[int]) -> dict[int, list[int]]:
    """Block to the experts taken there; notes what objective and report need of them."""
    subject, settings, rows = case.subject, case.settings, case.looked
    table, kinds = affinity(subject, rows, [i for i, block in enumerate(subject.blocks) if block.experts])
    taken = select({layer: table[layer] for layer in layers}, settings)
    places: dict[int, list[int]] = {}
    for layer, expert in sorted(taken):
        places.setdefault(layer, []).append(expert)
    case.given["anchors"] = {
        layer: Anchor(
            kinds[layer],
            torch.zeros_like(table[layer]).index_fill(0, torch.tensor(chosen), 1.0).to(subject.device),
        )
        for layer, chosen in places.items()
    }
    case.summary |= _summary(table, layers, taken, rows, kinds)
    best = max(table, key=lambda layer: float(table[layer].max()))
    if best not in layers:
        case.warnings.append(
            f"uoe: the highest affinity, {float(table[best].max()):.3f}, is in block {best}, of which an objective "
            f"that reads block {max(layers)} sees nothing; set its layer to {best} to unlearn there"
        )
    return places


@optimise(
    paper="arXiv:2411.18797",
    intention="removal",
    needs=("forget",),
    requires=("weights", "gradients", "forget_data", "retain_data", "routed_experts"),
    cost="the objective's, from the block of the expert upwards; one forward pass of `attribution_tokens` before",
    known_weaknesses=("not studied",),
    prepare=_prepare,
    aliases={"seuf": {}},
)
def uoe(
    step: Step,
    *,
    objective: Objective = "grad_diff",
    experts: int = 1,
    per: Literal["model", "layer", "every_layer"] = "model",
    rank: int = 1,
    anchor_weight: float = 1.0,
    train_router: bool = True,
    contrast: float = 1.2,
    attribution_tokens: int = 100_000,
) -> Tensor:
    """Unlearn the one expert that forget rows use most, and hold their routing on it (Zhuang et al. 2025).

    `experts` are taken from the whole model, from the layer of the foremost one (`layer`), or from every layer. `rank`
    1 starts at the highest affinity, -1 at the lowest. It stops where no affinity is `contrast` times the mean: then
    forget rows use all experts alike. The paper trains at a rate of 1e-4 with 16 rows in a step.
    """
    assert step.inner is not None
    loss = step.inner(step)
    return loss + anchor_weight * anchored(step.forget, step.given["anchors"]) if anchor_weight else loss


def anchored(side: Side, anchors: Mapping[int, Anchor]) -> Tensor:
    """Mean over blocks and tapped tokens of |s - a|^2: 0 where all of a router's score is on one target, at most 2."""
    found = [
        (scores(side.routers[layer], anchor.scoring) - anchor.target).square().sum(-1).mean()
        for layer, anchor in anchors.items()
    ]
    return torch.stack(found).mean()


# --- attribution -----------------------------------------------------------------------------------------------------


def candidates(case: Preparation) -> list[int]:
    """Blocks whose experts may be taken: those the objective sees.

    Raises:
        SubjectError: there are no routed experts, or none whose choices can be read.
        ParameterError: the objective reads below all of them.
    """
    subject = case.subject
    layers = [index for index, block in enumerate(subject.blocks) if block.experts]
    if not layers:
        if any(block.router for block in subject.blocks):
            raise SubjectError(
                f"uoe: the experts of {subject.name} are not called with the experts chosen, so nobody can tell which "
                "its tokens take"
            )
        raise SubjectError(f"uoe needs routed experts; {subject.name} has none, it is dense")
    if case.taps.final:
        return layers
    read = max((*case.taps.layers, *case.taps.routers))
    seen = [layer for layer in layers if layer <= read]
    if not seen:
        raise ParameterError(
            f"uoe: the objective reads block {read}, below the first block with experts, {layers[0]}; set its layer to "
            f"{layers[0]} or higher"
        )
    return seen


def sample(rows: Sequence[Encoded], tokens: int, seed: int) -> list[Encoded]:
    """Rows in random order, until they have so many tokens; all of them where they have fewer."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    found: list[Encoded] = []
    fed = 0
    for index in order:
        if fed >= tokens:
            break
        found.append(rows[index])
        fed += len(rows[index].ids) - 1
    return found


@torch.no_grad()
def affinity(
    subject: LanguageModel, rows: Sequence[Encoded], layers: Sequence[int]
) -> tuple[dict[int, Tensor], dict[int, Scoring]]:
    """(block to (E,) affinities, block to how its router scores), from one pass without gradients or head.

    Raises:
        SubjectError: routers that score in an unknown way.
    """
    taps = Taps(final=False, routers=tuple(layers), chosen=tuple(layers))
    table: dict[int, Tensor] = {}
    kinds: dict[int, Scoring] = {}
    for group in batches(rows, TOKEN_BUDGET):
        states = subject.states(pack([rows[i] for i in group], subject.device), taps)
        lengths = torch.tensor([len(rows[i].ids) - 1 for i in group], device=subject.device)
        # The mean over rows of means over tokens.
        weight = torch.repeat_interleave(1 / (lengths * len(rows)), lengths)[:, None]
        for layer in layers:
            logits, chosen = states[f"router.{layer}"], states[f"chosen.{layer}"]
            if layer not in kinds:
                kinds[layer] = scoring(logits, chosen, states[f"weight.{layer}"])
                table[layer] = torch.zeros(logits.shape[1])
            kept = torch.zeros_like(logits).scatter(1, chosen, scores(logits, kinds[layer]).gather(1, chosen))
            table[layer] += (weight * kept).sum(0).cpu()
    return table, kinds


def select(table: Mapping[int, Tensor], settings: Mapping[str, Any]) -> list[Expert]:
    """The experts to take.

    Raises:
        ParameterError: there are not so many.
        SubjectError: all affinities are alike.
    """
    count, per, rank = settings["experts"], settings["per"], settings["rank"]
    if count < 1 or rank == 0:
        raise ParameterError(
            f"uoe: experts is {count} and rank {rank}; expected at least 1 expert, and a rank from 1 down or -1 up"
        )
    values = {(layer, i): float(v) for layer, row in table.items() for i, v in enumerate(row)}
    ranking = sorted(values, key=lambda expert: (-values[expert], expert))
    mean = sum(values.values()) / len(values)
    if values[ranking[0]] < settings["contrast"] * mean:
        raise SubjectError(
            f"uoe: forget rows use all experts alike: the highest affinity, {values[ranking[0]]:.3f}, is "
            f"{values[ranking[0]] / max(mean, 1e-30):.2f} times the mean {mean:.3f}, expected {settings['contrast']:g} "
            f"times. Highest of each block: {_foremost(table)}. An expert would be chosen by chance; set contrast = 0 "
            "to go on all the same"
        )
    if per == "model":
        rankings = [ranking]
    else:
        wanted = [ranking[0][0]] if per == "layer" else list(table)
        rankings = [[expert for expert in ranking if expert[0] == layer] for layer in wanted]
    first = abs(rank) - 1
    taken = [(one if rank > 0 else one[::-1])[first : first + count] for one in rankings]
    short = next((one for one, some in zip(rankings, taken) if len(some) < count), None)
    if short is not None:
        raise ParameterError(
            f"uoe: {count} experts from rank {rank} on were asked for, and there are {len(short)} to choose from "
            f"(per = {per})"
        )
    return [expert for some in taken for expert in some]


def _foremost(table: Mapping[int, Tensor]) -> str:
    return ", ".join(f"{layer}: expert {int(row.argmax())} {float(row.max()):.3f}" for layer, row in table.items())


def _summary(
    table: Mapping[int, Tensor],
    layers: Sequence[int],
    taken: Sequence[Expert],
    rows: Sequence[Encoded],
    kinds: Mapping[int, Scoring],
) -> dict[str, Any]:
    """For the report: what was taken, and the whole table."""
    every = torch.cat([table[layer] for layer in layers])
    return {
        "experts": [{"block": layer, "expert": i, "affinity": round(float(table[layer][i]), 6)} for layer, i in taken],
        "affinity_highest": round(float(every.max()), 6),
        "affinity_mean": round(float(every.mean()), 6),
        "attribution": {"rows": len(rows), "tokens": sum(len(row.ids) - 1 for row in rows)},
        "scoring": "/".join(sorted(set(kinds.values()))),
        "affinity": {str(layer): [round(float(v), 6) for v in row] for layer, row in table.items()},
    }
