"""The loop behind every objective: what is drawn, what is computed once, one step, checkpoints, the utility guard.

1. Everything random is drawn from one seed before training (`draw`).
2. What does not change during training is computed once, for exactly the rows drawn (`references`).
3. A step is one packed pass over all its rows, the head on answer positions only, then backward (`gradients`).
4. A run that leaves the utility band is stopped and stepped back; a killed run goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...errors import RequestError, TrainingError
from ...files import complete_folder, save_tensors
from ...subjects.language import LanguageModel, Progress
from ...subjects.packed import Encoded, batches, pack
from .terms import Head, Side, Step, chunked, negative_log_likelihood, token_logprob

Schedule = Literal["constant", "linear", "cosine"]
Loss = Callable[[Step], Tensor]


@dataclass(frozen=True)
class Guard:
    """Stops a run whose loss on retain rows that it never trains on leaves the band for `patience` checks."""

    band: float = 1.0
    """Nats per answer token above the start model's loss."""
    patience: int = 6
    every: int = 10
    """Optimiser steps between checks."""
    rows: int = 32
    """At most so many retain rows, and at most a fifth of them, are held out for this."""


@dataclass(frozen=True)
class Training:
    """How an objective is optimised."""

    epochs: float = 5.0
    """Passes over the forget rows."""
    steps: int | None = None
    """Optimiser steps; takes the place of epochs."""
    batch_size: int = 16
    """Forget rows in a step, with as many retain rows beside them."""
    learning_rate: float = 1e-5
    schedule: Schedule = "constant"
    warmup: int = 0
    """Steps of linear warm-up."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """0 turns clipping off."""
    seed: int = 0
    guard: Guard | None = Guard()
    checkpoint_seconds: float = 60.0
    micro_tokens: int = 16384
    """Tokens with activations at once; a larger step runs its forward pass twice and gives the same gradient."""


@dataclass
class Drawn:
    """All steps of a run: per step and side the places of its rows in `rows[side]`."""

    rows: dict[str, list[Encoded]]
    steps: list[dict[str, list[int]]]
    constants: dict[str, list[dict[str, Tensor]]] = field(default_factory=dict)

    @property
    def tokens(self) -> tuple[int, int]:
        """(tokens fed, answer tokens) of the whole run, shared prompts counted once per row."""
        chosen = [self.rows[side][i] for step in self.steps for side, places in step.items() for i in places]
        return sum(len(row.ids) - 1 for row in chosen), sum(row.scored for row in chosen)


def draw(
    rows: dict[str, list[Encoded]],
    leading: Sequence[str],
    *,
    training: Training,
    generator: torch.Generator,
    count: int | None = None,
) -> Drawn:
    """Which rows every step sees.

    An epoch runs over the leading sides, which are aligned row by row (forget and its alternatives); a side with k
    times as many rows has another k-th of them for each epoch. One row of every other side (retain) is drawn beside
    each, all of them once before any comes again.

    Args:
        count: rows of an epoch; by default those of the smallest leading side.
    """
    count = min(len(rows[side]) for side in leading) if count is None else count
    per_epoch = math.ceil(count / training.batch_size) if count else 0
    total = training.steps if training.steps is not None else math.ceil(training.epochs * per_epoch)
    total = total if count else 0
    streams = {side: _endless(len(items), generator) for side, items in rows.items() if side not in leading}
    steps: list[dict[str, list[int]]] = []
    epoch = -1
    while len(steps) < total:
        epoch += 1
        order = torch.randperm(count, generator=generator)
        for places in order.split(training.batch_size):
            step = {side: (places + epoch % (len(rows[side]) // count) * count).tolist() for side in leading}
            for side, stream in streams.items():
                step[side] = [next(stream) for _ in range(len(places))]
            steps.append(step)
            if len(steps) == total:
                break
    return Drawn(rows, steps)


def _endless(count: int, generator: torch.Generator) -> Iterator[int]:
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


# --- what is computed once -----------------------------------------------------------------------------------------


@torch.no_grad()
def references(
    subject: LanguageModel, rows: Sequence[Encoded], *, hidden: bool, progress: Progress | None = None
) -> list[dict[str, Tensor]]:
    """Per row the start model's `reference_tokens` (answer tokens,) or `reference_hidden` (answer tokens, d)."""
    found: list[dict[str, Tensor]] = [{} for _ in rows]
    done = 0
    for group in batches(rows, 4096):
        packed = pack([rows[i] for i in group], subject.device)
        states = subject.hidden_states(packed)
        lengths = [rows[i].scored for i in group]
        if hidden:
            values, name = states, "reference_hidden"
        else:
            values = chunked(lambda h, t: token_logprob(subject.head, h, t), states, packed.target, subject.vocabulary)
            name = "reference_tokens"
        for index, part in zip(group, values.split(lengths)):
            found[index] = {name: part.clone()}
        done += len(group)
        if progress:
            progress(done, len(rows))
    return found


# --- one step --------------------------------------------------------------------------------------------------------


def _sides(
    subject: LanguageModel, drawn: Drawn, step: dict[str, list[int]], hidden: Tensor, frozen_head: Head
) -> dict[str, Side]:
    sides: dict[str, Side] = {}
    start = 0
    for name, places in step.items():
        rows = [drawn.rows[name][i] for i in places]
        lengths = torch.tensor([row.scored for row in rows], device=hidden.device)
        stop = start + int(lengths.sum())
        stored = [drawn.constants[name][i] for i in places] if name in drawn.constants else []
        sides[name] = Side(
            hidden=hidden[start:stop],
            target=torch.tensor([t for row in rows for t in row.ids[row.start :]], device=hidden.device),
            row=torch.repeat_interleave(torch.arange(len(rows), device=hidden.device), lengths),
            count=len(rows),
            head=subject.head,
            frozen_head=frozen_head,
            vocabulary=subject.vocabulary,
            linear_head=subject.linear_head,
            constants={key: torch.cat([row[key] for row in stored]) for key in (stored[0] if stored else {})},
        )
        start = stop
    return sides


def gradients(
    subject: LanguageModel,
    drawn: Drawn,
    index: int,
    loss: Loss,
    *,
    frozen_head: Head,
    micro_tokens: int,
    processes: int = 1,
    rank: int = 0,
) -> tuple[Tensor, dict[str, Side]]:
    """Backward of one step; returns its loss.

    A step that is too large for one pass, or shared by several processes, runs the decoder without gradients first,
    takes the objective's gradient at the final hidden states, and then runs each part with gradients: the objective
    always sees the whole step, so the trajectory does not depend on how it was split.
    """
    step = drawn.steps[index]
    rows = [drawn.rows[name][i] for name, places in step.items() for i in places]
    total = len(drawn.steps)
    if processes == 1 and sum(len(row.ids) for row in rows) <= micro_tokens:
        sides = _sides(subject, drawn, step, subject.hidden_states(pack(rows, subject.device)), frozen_head)
        value = loss(Step(sides, index, total))
        value.backward()  # type: ignore[no-untyped-call]
        return value.detach(), sides

    mine = [i for i in range(len(rows)) if i % processes == rank]
    groups = [[mine[i] for i in group] for group in batches([rows[i] for i in mine], micro_tokens)]
    lengths = [row.scored for row in rows]
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)

    def places(group: Iterable[int]) -> Tensor:
        return torch.cat([torch.arange(starts[i], starts[i + 1], device=subject.device) for i in group])

    width = 0
    parts = []
    with torch.no_grad():
        for group in groups:
            parts.append((places(group), subject.hidden_states(pack([rows[i] for i in group], subject.device))))
            width = parts[-1][1].shape[1]
    if processes > 1:
        sizes = torch.tensor([width], device=subject.device)
        torch.distributed.all_reduce(sizes, torch.distributed.ReduceOp.MAX)
        width = int(sizes)
    hidden = torch.zeros(starts[-1], width, dtype=subject.dtype, device=subject.device)
    for at, states in parts:
        hidden[at] = states
    if processes > 1:
        torch.distributed.all_reduce(hidden)
    hidden.requires_grad_()
    sides = _sides(subject, drawn, step, hidden, frozen_head)
    value = loss(Step(sides, index, total))
    value.backward()  # type: ignore[no-untyped-call]
    trained = [p for p in subject.model.parameters() if p.requires_grad]
    if processes > 1:
        # Every process took the same gradient of the head; the sum over processes below must count it once.
        for parameter in trained:
            if parameter.grad is not None:
                parameter.grad /= processes
    assert hidden.grad is not None
    for group in groups:
        states = subject.hidden_states(pack([rows[i] for i in group], subject.device))
        if states.requires_grad:
            states.backward(hidden.grad[places(group)])  # type: ignore[no-untyped-call]
    if processes > 1:
        for parameter in trained:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)
    return value.detach(), sides


def _factor(training: Training, index: int, total: int) -> float:
    """Learning rate of step `index` as a share of the full one."""
    if index < training.warmup:
        return (index + 1) / training.warmup
    if training.schedule == "constant":
        return 1.0
    done = (index - training.warmup) / max(1, total - training.warmup)
    return 1.0 - done if training.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


# --- the loop --------------------------------------------------------------------------------------------------------


@dataclass
class Log:
    """What happened, step by step."""

    loss: list[float] = field(default_factory=list)
    gradient_norm: list[float] = field(default_factory=list)
    nll: dict[str, list[float]] = field(default_factory=dict)
    """Mean negative log-likelihood per answer token of each side the objective looked at."""
    guard: list[tuple[int, float]] = field(default_factory=list)
    """(step, loss on held-out retain rows)"""
    stopped_by_guard: bool = False
    stepped_back_to: int | None = None
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0


def train(
    subject: LanguageModel,
    parameters: Sequence[nn.Parameter],
    drawn: Drawn,
    loss: Loss,
    training: Training,
    *,
    held_out: Sequence[Encoded] = (),
    frozen_head: Head | None = None,
    checkpoint: Path | None = None,
    key: str = "",
    evaluate_at: Sequence[int] = (),
    evaluate: Callable[[int], None] | None = None,
    progress: Progress | None = None,
) -> Log:
    """Optimise `parameters` of the subject in place with AdamW.

    Parameters held in 16 bits are moved through fp32 masters, so that small steps are not lost.

    Args:
        held_out: rows the guard watches; none turns it off.
        checkpoint: folder for the state of a run that may be killed; `key` says which run it belongs to.
        evaluate: called before the first step (0) and after steps named in `evaluate_at`.

    Raises:
        TrainingError: the loss is not finite, or no parameter receives a gradient.
    """
    from accelerate import PartialState

    if not parameters:
        return Log()
    processes = PartialState()
    masters = [
        p if p.dtype == torch.float32 else nn.Parameter(p.detach().float().clone(), requires_grad=True)
        for p in parameters
    ]
    optimiser = torch.optim.AdamW(masters, lr=training.learning_rate, weight_decay=training.weight_decay, fused=True)
    log, first = Log(), 0
    best: list[Tensor] | None = None
    outside = 0
    began = time.monotonic()
    if checkpoint is not None:
        resumed = _resume(checkpoint, key, masters, optimiser)
        if resumed is not None:
            first, log, best, outside = resumed
            _write_back(parameters, masters)
    guard = training.guard if held_out else None
    if guard and not log.guard:
        log.guard.append((0, mean_loss(subject, held_out)))
        best, log.stepped_back_to = [master.detach().clone() for master in masters], 0
    if evaluate and first == 0 and 0 in evaluate_at:
        evaluate(0)
    saved = time.monotonic()
    total = len(drawn.steps)
    before = log.seconds
    index = first
    try:
        while index < total and not log.stopped_by_guard:
            for group in optimiser.param_groups:
                group["lr"] = training.learning_rate * _factor(training, index, total)
            value, sides = gradients(
                subject,
                drawn,
                index,
                loss,
                frozen_head=frozen_head or subject.head,
                micro_tokens=training.micro_tokens,
                processes=processes.num_processes,
                rank=processes.process_index,
            )
            if not torch.isfinite(value):
                raise TrainingError(
                    f"the loss is {float(value)} at step {index + 1} of {total}; nothing was written. "
                    "Lower training.learning_rate or the method's weights."
                )
            if index == 0:
                log.warnings += _without_gradient(parameters)
            for parameter, master in zip(parameters, masters):
                if master is not parameter:
                    master.grad = None if parameter.grad is None else parameter.grad.float()
            limit = training.max_grad_norm or math.inf
            norm = torch.nn.utils.clip_grad_norm_(masters, limit)
            optimiser.step()
            for parameter, master in zip(parameters, masters):
                parameter.grad = master.grad = None
            _write_back(parameters, masters)
            log.loss.append(float(value))
            log.gradient_norm.append(float(norm))
            for name, side in sides.items():
                if "token_logprob" in side.__dict__:
                    log.nll.setdefault(name, []).append(float(-side.token_logprob.detach().mean()))
            index += 1
            if guard and (index % guard.every == 0 or index == total):
                now = mean_loss(subject, held_out)
                log.guard.append((index, now))
                if now <= log.guard[0][1] + guard.band:
                    outside = 0
                    best = [master.detach().clone() for master in masters]
                    log.stepped_back_to = index
                else:
                    outside += 1
                    log.stopped_by_guard = outside >= guard.patience or index == total
            if evaluate and index in evaluate_at:
                evaluate(index)
            if progress:
                progress(index, total)
            log.seconds = before + time.monotonic() - began
            if checkpoint is not None and time.monotonic() - saved >= training.checkpoint_seconds:
                _save(checkpoint, key, index, log, masters, optimiser, best, outside)
                saved = time.monotonic()
    except KeyboardInterrupt:
        if checkpoint is not None and first < index:
            _save(checkpoint, key, index, log, masters, optimiser, best, outside)
        raise
    if log.stopped_by_guard and best is not None:
        with torch.no_grad():
            for master, values in zip(masters, best):
                master.copy_(values)
        _write_back(parameters, masters)
    if progress and log.stopped_by_guard:
        progress(total, total)
    log.seconds = before + time.monotonic() - began
    return log


def mean_loss(subject: LanguageModel, rows: Sequence[Encoded]) -> float:
    """Mean negative log-likelihood per answer token."""
    values = references(subject, rows, hidden=False)
    return float(-torch.cat([row["reference_tokens"] for row in values]).mean())


@torch.no_grad()
def _write_back(parameters: Sequence[nn.Parameter], masters: Sequence[nn.Parameter]) -> None:
    for parameter, master in zip(parameters, masters):
        if master is not parameter:
            parameter.copy_(master)


def _without_gradient(parameters: Sequence[nn.Parameter]) -> list[str]:
    reached = sum(1 for p in parameters if p.grad is not None and bool(p.grad.any()))
    if parameters and reached == 0:
        raise TrainingError("no parameter of the scope receives a gradient from this objective; choose another scope")
    # LoRA's A matrices get none in the first step: B starts at zero.
    silent = sum(1 for p in parameters if p.grad is None)
    return [f"{silent} of {len(parameters)} tensors of the scope are out of the objective's reach"] if silent else []


# --- checkpoints: safetensors and JSON, never pickle ---------------------------------------------------------------


def _save(
    folder: Path,
    key: str,
    step: int,
    log: Log,
    masters: Sequence[nn.Parameter],
    optimiser: torch.optim.Optimizer,
    best: list[Tensor] | None,
    outside: int,
) -> None:
    tensors: dict[str, Tensor] = {}
    for i, master in enumerate(masters):
        tensors[f"value.{i}"] = master.detach().contiguous()
        for name, state in optimiser.state.get(master, {}).items():
            tensors[f"{name}.{i}"] = state.detach().contiguous()
        if best is not None:
            tensors[f"best.{i}"] = best[i].contiguous()
    with complete_folder(folder) as partial:
        save_tensors(tensors, partial / "tensors.safetensors")
        state = {"key": key, "step": step, "outside": outside, "log": asdict(log)}
        (partial / "state.json").write_text(json.dumps(state), encoding="utf-8")


def _resume(
    folder: Path, key: str, masters: Sequence[nn.Parameter], optimiser: torch.optim.Optimizer
) -> tuple[int, Log, list[Tensor] | None, int] | None:
    from safetensors.torch import load_file

    if not (folder / "state.json").is_file():
        return None
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    if state["key"] != key:
        return None
    tensors = load_file(folder / "tensors.safetensors")
    with torch.no_grad():
        for i, master in enumerate(masters):
            master.copy_(tensors[f"value.{i}"])
            optimiser.state[master] = {
                name: tensors[f"{name}.{i}"].to(
                    "cpu" if name == "step" and master.device.type == "cpu" else master.device
                )
                for name in ("step", "exp_avg", "exp_avg_sq")
                if f"{name}.{i}" in tensors
            }
    best = [tensors[f"best.{i}"].to(m.device) for i, m in enumerate(masters)] if "best.0" in tensors else None
    log = Log(**state["log"])
    log.guard = [(int(step), float(value)) for step, value in log.guard]
    return int(state["step"]), log, best, int(state["outside"])


# --- plain training ------------------------------------------------------------------------------------------------


def fit(
    subject: LanguageModel,
    items: Sequence[Encoded],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    schedule: Schedule = "constant",
    warmup: int = 0,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    evaluate_at: Sequence[int] = (),
    evaluate: Callable[[int], None] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train all parameters of the subject in place on the answers of `items`.

    Returns:
        seconds, tokens, answers (scored tokens), losses (per step).

    Raises:
        RequestError: there is nothing to train on.
        TrainingError: the loss is not finite.
    """
    if not items:
        raise RequestError("0 rows to train on, expected at least 1")
    training = Training(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        schedule=schedule,
        warmup=warmup,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        seed=seed,
        guard=None,
    )
    generator = torch.Generator().manual_seed(seed)
    drawn = draw({"rows": list(items)}, ["rows"], training=training, generator=generator)
    parameters = list(subject.model.parameters())
    flags = [p.requires_grad for p in parameters]
    subject.model.requires_grad_(True)
    try:
        log = train(
            subject,
            parameters,
            drawn,
            lambda step: negative_log_likelihood(step.sides["rows"]),
            training,
            evaluate_at=evaluate_at,
            evaluate=evaluate,
            progress=progress,
        )
    finally:
        for parameter, flag in zip(parameters, flags):
            parameter.requires_grad_(flag)
        subject.__dict__.pop("fingerprint", None)
    tokens, answers = drawn.tokens
    return {"seconds": log.seconds, "tokens": tokens, "answers": answers, "losses": log.loss}
