"""Representation misdirection: forget rows lose their inner representation, retain rows keep theirs."""

from __future__ import annotations

import random
from typing import Literal

import torch
from torch import Tensor

from ...errors import ParameterError, RowError, TrainingError
from ...registry import optimise
from ...subjects.anatomy import anatomy
from ...subjects.packed import Encoded
from ...subjects.protocol import Taps
from .loop import activations
from .terms import Step
from .unlearn import Preparation

PAIR = ("You are a novice in {} who often makes mistakes.", "You are a world-class expert in {}.")
"""What a contrast direction leads to, and from (CUT)."""


def _prepare(case: Preparation) -> None:
    """Draw the direction, measure the activations' size, read at one layer, move three matrices below it."""
    settings = case.settings
    depth = len(anatomy(case.subject.model).blocks)
    layer = round(0.22 * depth) if settings["layer"] is None else settings["layer"]
    if not -depth <= layer < depth:
        raise ParameterError(f"rmu: layer {layer} is not within 0-{depth - 1}")
    layer %= depth
    case.taps = Taps(final=False, layers=(layer,), positions=settings["positions"])
    if case.scope is None:
        span = f"{max(0, layer - 2)}-{layer}"
        roles = anatomy(case.subject.model).roles
        # Blocks that are mixtures have their MLP in experts, all of which move.
        present = {role: {at for at, _ in roles[role]} for role in ("mlp_out", "experts")}
        wanted = [role for role in present if present[role] & set(range(max(0, layer - 2), layer + 1))]
        case.scope = "+".join(f"role:{role}@{span}" for role in wanted)
    if contrast := settings["direction"] == "contrast":
        case.needs.add("forget.layers")
        if not settings["keywords"]:
            raise ParameterError("rmu: direction = contrast needs keywords, the subjects to be a novice in")
    about = _topics(case)
    topics = sorted(set(about))
    if settings["coefficient"] == "adaptive":
        case.looked = [*case.rows["forget"]]
    if case.dry:
        return
    generator = torch.Generator().manual_seed(case.seed)
    width = case.subject.model.config.get_text_config().hidden_size
    draw = torch.randn if settings["direction"] == "normal" else torch.rand
    direction = _contrasts(case, layer) if contrast else draw(max(1, len(topics)), width, generator=generator)
    coefficients = torch.full((len(direction), 1), 0.0)
    if settings["coefficient"] == "adaptive":
        start = activations(case.subject, case.rows["forget"], case.taps)
        norms = [row[f"layer.{layer}"].float().norm(dim=-1).cpu() for row in start]
        for at, topic in enumerate(topics):
            norm = torch.cat([norm for norm, name in zip(norms, about) if name == topic]).mean()
            if not norm:
                raise TrainingError(
                    f"rmu: activations after block {layer} are zero on forget rows; choose another layer"
                )
            coefficients[slice(None) if contrast else at] = settings["scale"] * norm
    else:
        coefficients[:] = settings["coefficient"]
    steered = (coefficients * torch.nn.functional.normalize(direction.cpu(), dim=-1)).to(case.subject.device)
    case.given |= {"layer": layer, "targets": steered, "order": case.seed}
    if len(topics) > 1:
        case.constants["forget"] = [
            {"topic": torch.full((_positions(row, settings["positions"]),), topics.index(name), device=steered.device)}
            for row, name in zip(case.rows["forget"], about)
        ]
    named = dict(zip(topics, coefficients[:, 0].tolist()))
    case.summary |= {"layer": layer, "coefficient": named if len(topics) > 1 else float(coefficients[0])}


def _topics(case: Preparation) -> list[str]:
    """What each forget row is about, as far as directions go.

    Raises:
        ParameterError: contrast directions come from keywords and not from topics.
        RowError: a row does not say it.
    """
    kind, rows = case.settings["topics"], case.data.get("forget", [])
    if kind == "one":
        return [""] * len(rows)
    if case.settings["direction"] == "contrast":
        raise ParameterError("rmu: directions of contrast come from keywords; leave topics out, or take uniform ones")
    found = [row.source.rpartition(":")[0] if kind == "file" else getattr(row, kind) for row in rows]
    for row, topic in zip(rows, found):
        if not topic:
            raise RowError(f"{row.source or f'row {row.id}'}: no {kind}, which rmu(topics={kind!r}) needs")
    return found


def _positions(row: Encoded, which: str) -> int:
    """Positions of a row that are read."""
    return row.scored if which == "answer" else len(row.ids) - 1


def _contrasts(case: Preparation, layer: int) -> Tensor:
    """(keywords, d) from the activations of an expert to those of a novice, after the layer at the last token."""
    words = case.settings["keywords"]
    novice, expert = (case.subject.hidden([text.format(word) for word in words])[:, layer + 1] for text in PAIR)
    return novice - expert


@optimise(
    paper="arXiv:2403.03218",
    intention="suppression",
    needs=("forget", "retain.layers"),
    requires=("weights", "gradients", "forget_data", "retain_data"),
    cost="forward and backward of the blocks up to the layer, from the lowest trained one; once more for retain rows",
    known_weaknesses=("relearn", "logit_lens", "decoding"),
    prepare=_prepare,
    aliases={"adaptive_rmu": {"coefficient": "adaptive", "scale": 5.0, "retain_weight": 1200.0}},
)
def rmu(
    step: Step,
    *,
    layer: int | None = None,
    coefficient: float | Literal["adaptive"] = "adaptive",
    scale: float = 5.0,
    retain: Literal["hidden", "none"] = "hidden",
    retain_weight: float = 100.0,
    direction: Literal["uniform", "normal", "contrast"] = "uniform",
    keywords: tuple[str, ...] = (),
    topics: Literal["one", "file", "entity", "relation"] = "one",
    positions: Literal["all", "answer"] = "all",
) -> Tensor:
    """Pull forget rows' activations at one layer to a random direction, hold retain rows' (Li et al. 2024, eq. 1-3).

    Moves the MLP output matrices of the layer and of the two below it. `layer` None is 0.22 of the depth, as in the
    paper. `coefficient` "adaptive" is `scale` times the mean norm of the start model's activations on forget rows (Dang
    et al., arXiv:2408.06223); the published pairs of (coefficient, retain_weight) are (6.5, 1200) for Zephyr-7B and
    (20, 100) by default.

    `direction` "contrast" is CUT, of the paper's first version: each step moves forget rows' own start activations from
    an expert's towards a novice's in one of the `keywords`.

    `topics`: forget rows of different files, entities or relations have a direction and a coefficient each, as the
    paper's two corpora have.
    """
    at, targets = step.given["layer"], step.given["targets"]
    if direction == "contrast":
        word = random.Random(f"{step.given['order']}/{step.index}").randrange(len(targets))
        target = targets[word] + step.forget.constants[f"layer.{at}"].float()
    else:
        target = targets[step.forget.constants["topic"]] if len(targets) > 1 else targets[0]
    forget = (step.forget.layers[at].float() - target).square().mean()
    return forget + retain_weight * step.retain_term(retain)
