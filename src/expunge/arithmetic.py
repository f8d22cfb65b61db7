"""How much arithmetic a run's steps are, and how fast it was done beside this machine's matrix products.

Operations are counted from what a step is made of (costs.py), not while it runs: matrix products and attention, which
are nearly all of them. What a step takes longer than these need at the rate of products is element-wise work, the
optimiser, gathering and Python.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from . import processes
from .costs import STAGES, Pass, Structure, Traced, shape_of
from .methods.optimise.loop import Drawn, Training
from .methods.optimise.unlearn import Preparation, Setup
from .subjects.packed import TOKEN_BUDGET, Encoded, batches, pack

if TYPE_CHECKING:
    from .methods.optimise.unlearn import Outcome

Shape = Structure | Traced


def rows_of(drawn: Drawn, step: Mapping[str, Sequence[int]]) -> dict[str, list[Encoded]]:
    """A step's rows, side by side."""
    return {side: [drawn.rows[side][i] for i in places] for side, places in step.items()}


def fed(sides: Sequence[Sequence[Encoded]], *, gradients: bool = True) -> Pass:
    """What is fed when the rows of all sides go through packed. Without gradients every row looks along its own path
    alone, with them families look as wholes."""
    packed = pack([row for rows in sides for row in rows])
    if gradients:
        common = [0, *[packed.beginning] * (len(packed.runs) - 1)]
        pairs = sum(run.place.numel() * (run.length + shared) for run, shared in zip(packed.runs, common))
    else:
        pairs = sum(bundle.queries.numel() * bundle.keys.shape[1] for bundle in packed.paths[0])
    return Pass(packed.tokens, pairs, tuple(sum(row.scored for row in rows) for rows in sides), len(packed.read))


def reading_flops(shape: Shape, rows: Sequence[Encoded], *, headless: bool = False) -> float:
    """FLOPs of reading rows without gradients, batch by batch, by the model's own code: whether a plain pass
    (subjects/plain_pass.py) may take its place, and spare the last MLP, is seen with weights alone."""
    passes = [fed([[rows[i] for i in group]], gradients=False) for group in batches(rows, TOKEN_BUDGET)]
    return sum(shape.forward(replace(one, answers=()) if headless else one) for one in passes)


def step_flops(shape: Shape, setup: Setup, training: Training, rows: Mapping[str, Sequence[Encoded]]) -> float:
    """FLOPs of one optimiser step."""
    case, flops = setup.case, 0.0
    parts = [(list(rows.values()), 1)]
    if case.repeats is not None:
        forget = [some for side, some in rows.items() if side != "retain"]
        parts = [(forget, case.repeats), ([rows["retain"]] if "retain" in rows else [], 1)]
        flops += _adversary(shape, case, forget)
    for sides, times in parts:
        if not any(sides):
            continue
        one = fed(sides)
        flops += times * (shape.forward(one) + shape.backward(one))
        if one.tokens > training.micro_tokens or processes.count() > 1:
            # A step too large for one pass, or shared out, runs its decoder once without gradients before.
            flops += times * shape.forward(replace(fed(sides, gradients=False), answers=()))
    # Divergences from the start model run that model's head too.
    frozen = [side for side in rows if f"{side}.reference_hidden" in setup.needs]
    return flops + 2.0 * shape.head * sum(row.scored for side in frozen for row in rows[side])


def _adversary(shape: Shape, case: Preparation, forget: Sequence[Sequence[Encoded]]) -> float:
    """FLOPs of the passes that look for a worst shift: gradients down to where it is, and none of weights."""
    if case.adversary is None or isinstance(shape, Traced):
        return 0.0
    block, steps = case.adversary
    still = tuple(replace(m, moves=0.0) for m in shape.matrices)
    attacked = replace(shape.whole, matrices=still, first=(block + 1, 0), head_moves=False, spares=shape.spares)
    one = fed(forget)
    return steps * (attacked.forward(one) + attacked.backward(one))


def needs_flops(shape: Shape, needs: set[str], drawn: Drawn) -> float:
    """FLOPs of what is computed once, for exactly the rows that are drawn."""
    flops = 0.0
    for side, _, quantity in (need.partition(".") for need in sorted(needs)):
        used = sorted({i for step in drawn.steps for i in step.get(side, [])})
        if not quantity or not used:
            continue
        rows = [drawn.rows[side][i] for i in used]
        reach = shape if quantity == "layers" else shape.whole
        flops += reading_flops(reach.bare, rows, headless=quantity in ("layers", "reference_hidden"))
    return flops


def check_flops(shape: Shape, held_out: Sequence[Encoded]) -> float:
    """FLOPs of one look of the utility guard at its rows."""
    return reading_flops(shape.whole, held_out)


# --- how fast it was done --------------------------------------------------------------------------------------------


def achieved(subject: Any, outcome: Outcome, training: Training) -> dict[str, Any]:
    """What the steps of a run reached, on this process's device.

    Of several processes each does its share of a step, and is compared with its own device.

    Returns:
        flops: of all its steps; steps: {step: FLOP per second} of those whose time is known (not the first one of a
        process, which warms up); flop_per_second: their median; machine_flop_per_second: the rate of a matrix product
        of the run's own shape; machine_share: what of it was reached. Rates are absent where no time is known, the last
        two for pictures.
    """
    setup, guard = outcome.setup, training.guard
    shape = shape_of(subject, setup.resolved)
    if isinstance(shape, Structure):
        shape = shape.reaching(setup.case.taps)
        if outcome.entry is not None and not setup.case.adversary:  # whose passes may start at the bottom
            layer, inside = outcome.entry
            shape = replace(shape, entry=(layer, STAGES["mlp_out"] if inside else 0))
    steps = setup.drawn.steps[: outcome.summary["steps"]]
    rows = [rows_of(setup.drawn, step) for step in steps]
    counted = [step_flops(shape, setup, training, some) / processes.count() for some in rows]
    look = check_flops(shape, setup.held_out) / processes.count()
    found: dict[str, Any] = {"flops": sum(counted)}
    rates = {}
    for number, seconds in outcome.step_seconds.items():
        watched = guard is not None and (number % guard.every == 0 or number == len(setup.drawn.steps))
        rates[number] = (counted[number - 1] + (look if watched else 0.0)) / seconds
    if not rates:
        return found
    found |= {"steps": rates, "flop_per_second": median(rates.values())}
    if isinstance(shape, Structure):
        tokens = sum(fed(list(some.values())).tokens for some in rows[:8]) // len(rows[:8])
        product = product_rate(tokens, *sides_of(shape), subject.dtype, subject.device)
        found |= {"machine_flop_per_second": product, "machine_share": found["flop_per_second"] / product}
    return found


def sides_of(shape: Structure) -> tuple[int, int]:
    """(d, n) of the model's largest matrix but the head."""
    hidden = shape.head // shape.vocabulary
    return hidden, max(m.size for m in shape.matrices) // hidden


@cache
def product_rate(tokens: int, hidden: int, inner: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP per second of (tokens, hidden) @ (hidden, inner): the better quartile of 0.2 s; measured once."""
    left, right = (torch.ones(size, dtype=dtype, device=device) for size in ((tokens, hidden), (hidden, inner)))
    seconds: list[float] = []
    began = time.perf_counter()
    while len(seconds) < 3 or time.perf_counter() - began < 0.2:
        started = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2 * tokens * hidden * inner / sorted(seconds)[len(seconds) // 4]
