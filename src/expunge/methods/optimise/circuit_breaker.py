"""Circuit breakers: forget rows' activations turn away from what they were, retain rows' stay."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ...errors import ParameterError
from ...registry import optimise
from ...subjects.anatomy import anatomy
from ...subjects.protocol import Taps
from .terms import Side, Step
from .unlearn import Preparation


def _prepare(case: Preparation) -> None:
    """Read at the target blocks; adapters on every linear layer up to the highest of them."""
    depth = len(anatomy(case.subject.model).blocks)
    asked = case.settings["layers"]
    if asked is None:
        # hidden_states[10] and [20] of 32: the outputs of blocks 9 and 19.
        asked = [max(0, round(share * depth) - 1) for share in (10 / 32, 20 / 32)]
    for layer in asked:
        if not -depth <= layer < depth:
            raise ParameterError(f"circuit_breaker: layer {layer} is not within 0-{depth - 1}")
    layers = tuple(sorted({layer % depth for layer in asked}))
    if not layers:
        raise ParameterError("circuit_breaker: layers is empty, expected at least 1 block")
    case.taps = Taps(final=False, layers=layers, positions=case.settings["positions"])
    case.summary["layers"] = list(layers)
    if case.scope is None:
        case.scope = f"lora(r=16, alpha=16, layers=0-{layers[-1]})"


@optimise(
    paper="arXiv:2406.04313",
    intention="suppression",
    needs=("forget.layers", "retain.layers"),
    requires=("weights", "gradients", "forget_data", "retain_data"),
    cost="forward and backward of the blocks up to the highest layer, forget and retain rows; one forward pass per row",
    known_weaknesses=("relearn", "logit_lens"),
    prepare=_prepare,
    aliases={"rr": {}},
)
def circuit_breaker(
    step: Step,
    *,
    layers: list[int] | None = None,
    alpha: float = 10.0,
    positions: Literal["all", "answer"] = "all",
) -> Tensor:
    """Representation rerouting: c_s relu(cos(h, h_start)) on forget rows, c_r |h - h_start| on retain rows (Zou et al.
    2024, alg. 1), with c_s = alpha (1 - t/2T) and c_r = alpha t/2T.

    `layers` None are the blocks at 0.31 and 0.63 of the depth, moved through adapters of rank 16. The retain weight
    rises with the step, so this objective cannot stand inside another method.
    """
    done = (step.index + 1) / (2 * step.total)
    return alpha * (1 - done) * rerouted(step.forget) + alpha * done * moved(step.retain)


def rerouted(side: Side) -> Tensor:
    """Mean over layers and positions of relu(cos) between activations and the start model's."""
    pairs = [(values.float(), side.constants[f"layer.{at}"].float()) for at, values in side.layers.items()]
    return torch.stack([cosine_similarity(values, start, dim=-1).relu().mean() for values, start in pairs]).mean()


def moved(side: Side) -> Tensor:
    """Mean over layers and positions of |h - h_start|, as good as squared where the difference is rounding.

    The gradient of a norm has length 1 however small the norm is: what differently packed passes round differently
    would be pushed like a true difference.
    """
    found = []
    for at, values in side.layers.items():
        start = side.constants[f"layer.{at}"]
        rounding = 8 * torch.finfo(values.dtype).eps * start.float().norm(dim=-1)
        size = (values.float() - start.float()).square().sum(-1)
        found.append(((size + rounding.square()).sqrt() - rounding).mean())
    return torch.stack(found).mean()
