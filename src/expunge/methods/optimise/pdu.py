"""Primal-dual unlearning: flat predictions on forget rows, the retain loss held under a bound."""

import math

import torch
from torch import Tensor

from ...errors import ParameterError
from ...registry import optimise
from .loop import mean_loss
from .terms import Step, dual, margin, negative_log_likelihood
from .unlearn import Preparation

MEASURED = 256
"""Retain rows that the bound is measured on."""


def _prepare(case: Preparation) -> None:
    """Measure the bound where none is given."""
    settings, training, rows = case.settings, case.training, case.rows["retain"]
    if settings["multiplier"] < 0 or settings["rate"] < 0:
        raise ParameterError(
            f"pdu: multiplier is {settings['multiplier']} and rate {settings['rate']}, expected 0 or more for both"
        )
    epochs = training.epochs
    if training.steps is not None:
        epochs = training.steps / max(1, math.ceil(len(case.data.get("forget", [])) / training.batch_size))
    if settings["rate"] and epochs <= settings["warmup"]:
        case.warnings.append(
            f"pdu: the multiplier stays at {settings['multiplier']:g}: the run ends after {epochs:g} epochs, and it is "
            f"first updated after {settings['warmup']:g} (warmup)"
        )
    if settings["bound"] is not None or case.dry or not rows:
        return
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(case.seed)).tolist()
    start = mean_loss(case.subject, [rows[i] for i in order[:MEASURED]])
    settings["bound"] = (1 + settings["tolerance"]) * start
    case.summary |= {"start_retain_nll": start, "bound": settings["bound"]}


@optimise(
    paper="arXiv:2506.05314",
    intention="removal",
    needs=("forget", "retain"),
    requires=("weights", "gradients", "forget_data", "retain_data"),
    cost="6N per token of forget and retain rows",
    known_weaknesses=("direct", "relearn", "decoding"),
    prepare=_prepare,
)
def pdu(
    step: Step,
    *,
    bound: float | None = None,
    tolerance: float = 0.1,
    multiplier: float = 100.0,
    rate: float = 5.0,
    warmup: float = 5.0,
    forget_weight: float = 1.0,
) -> Tensor:
    """Flatten forget predictions, (max z - mean z)^2, subject to retain loss <= bound (Entesari et al. 2025).

    The retain loss is weighted by a multiplier that starts at `multiplier` and moves by rate x (loss - bound) after
    each step once `warmup` epochs are over. `bound` None is (1 + tolerance) times the start model's loss on retain
    rows; the paper uses 0.3 on TOFU. Published for MUSE: multiplier 50, rate 1, warmup 3. The forget term is quadratic
    in logits, so multipliers depend on the model.
    """
    assert bound is not None
    kept = dual(step, negative_log_likelihood(step.retain), bound=bound, start=multiplier, rate=rate, warmup=warmup)
    return forget_weight * margin(step.forget).square().mean() + kept
