"""The loop behind every objective: what is drawn, what is computed once, one step, checkpoints, the utility guard.

1. Everything random is drawn from one seed before training (`draw`).
2. What does not change during training is computed once, for exactly the rows drawn (`references`).
3. A step is one packed pass over all its rows, the head on answer positions only, then backward (`Turn.backward`); a
   method around an objective may take several (`Recipe.around`).
4. A run that leaves the utility band is stopped and stepped back; a killed run goes on from its last checkpoint.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ... import processes
from ...errors import MismatchError, RequestError, TrainingError
from ...files import complete_folder, save_tensors
from ...subjects.entering import Entry, Start, Stored, laid, start_of, stored
from ...subjects.gather import Gather
from ...subjects.head import KEEP_ELEMENTS, linear_logprob
from ...subjects.language import LanguageModel
from ...subjects.packed import TOKEN_BUDGET, Encoded, Pack, Sharing, batches, in_order, pack
from ...subjects.protocol import Progress, Taps
from ...subjects.side_by_side import side_by_side
from .adamw import AdamW
from .halves import Halves, halves
from .shards import cut, is_part, like, local, norm, sharded, whole
from .stop import Stop
from .table import Table, fed_tokens
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
    stop: Stop | None = None
    checkpoint_seconds: float = 60.0
    micro_tokens: int = 16384
    """Tokens with activations at once; a larger step runs its forward pass twice and gives the same gradient."""


@dataclass
class Drawn:
    """All steps of a run: per step and side the places of its rows in `rows[side]`."""

    rows: dict[str, list[Encoded]]
    steps: list[dict[str, list[int]]]
    constants: dict[str, list[dict[str, Tensor]]] = field(default_factory=dict)
    """Per side and row: what does not change during training."""
    per_epoch: int = 1
    """Steps of an epoch."""

    @property
    def fed(self) -> list[Encoded]:
        """The rows of all steps, as often as they come."""
        return [self.rows[side][i] for step in self.steps for side, places in step.items() for i in places]

    @property
    def tokens(self) -> tuple[int, int]:
        """(tokens fed, answer tokens) of the whole run, shared prompts counted once per row."""
        fed = self.fed
        return sum(len(row.ids) - 1 for row in fed), sum(row.scored for row in fed)


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
    return Drawn(rows, steps, per_epoch=max(1, per_epoch))


def _endless(count: int, generator: torch.Generator) -> Iterator[int]:
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


# --- what is computed once -----------------------------------------------------------------------------------------


@torch.no_grad()
def references(
    subject: LanguageModel, rows: Sequence[Encoded], *, hidden: bool, progress: Progress | None = None
) -> list[dict[str, Tensor]]:
    """Per row the start model's `reference_tokens` (answer tokens,) or `reference_hidden` (answer tokens, d)."""
    name = "reference_hidden" if hidden else "reference_tokens"

    def read(model: LanguageModel, group: Sequence[int]) -> list[dict[str, Tensor]]:
        packed = pack([rows[i] for i in group], model.device)
        values = model.hidden_states(packed)
        if not hidden:
            values = chunked(lambda h, t: token_logprob(model.head, h, t), values, packed.target, model.vocabulary)
        return [{name: part.clone()} for part in values.split([rows[i].scored for i in group])]

    return _over(subject, rows, read, progress)


@torch.no_grad()
def activations(
    subject: LanguageModel, rows: Sequence[Encoded], taps: Taps, *, progress: Progress | None = None
) -> list[dict[str, Tensor]]:
    """Per row the start model's residual stream after every tapped block: `layer.7` (tapped positions, d)."""
    taps = replace(taps, final=False, routers=())

    def read(model: LanguageModel, group: Sequence[int]) -> list[dict[str, Tensor]]:
        states = model.states(pack([rows[i] for i in group], model.device), taps)
        found: list[dict[str, Tensor]] = [{} for _ in group]
        for name, values in states.items():
            for row, part in zip(found, values.split([_tapped(rows[i], taps) for i in group])):
                row[name] = part.clone()
        return found

    return _over(subject, rows, read, progress)


def _over(
    subject: LanguageModel,
    rows: Sequence[Encoded],
    read: Callable[[LanguageModel, Sequence[int]], list[dict[str, Tensor]]],
    progress: Progress | None,
) -> list[dict[str, Tensor]]:
    groups = list(batches(rows, TOKEN_BUDGET))
    parts = side_by_side(subject, groups, read, of=[row.ids for row in rows], fewest=1, progress=progress)
    return in_order(groups, parts)


# --- one step --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """What is optimised: an objective, whole and in its two parts, and what its passes must hand out."""

    loss: Loss
    """Forget and retain terms together."""
    sides: tuple[str, ...]
    """Row sets of a step, in the order of the packed pass."""
    forget: Loss | None = None
    """The forget term alone, over all sides but `retain`."""
    retain: Loss | None = None
    """The weighted retain term alone, over the side `retain`."""
    taps: Taps = field(default_factory=Taps)
    around: Callable[[Turn], Tensor] | None = None
    """Takes the step's gradients in another way than one backward pass of `loss`."""
    after: Callable[[Turn, Sequence[Tensor]], None] | None = None
    """Called when the optimiser has made its step, with what it moves; may move it further, in place."""
    inner: Loss | None = None
    given: dict[str, Any] = field(default_factory=dict)


@dataclass
class Turn:
    """One optimiser step as a method around an objective sees it: backward passes that add to `parameters`' grads."""

    subject: LanguageModel
    """The model in training."""
    parameters: Sequence[nn.Parameter]
    drawn: Drawn
    recipe: Recipe
    index: int
    memory: dict[str, float]
    frozen_head: Head
    entries: Entries | None = None
    micro_tokens: int = 16384
    processes: int = 1
    rank: int = 0
    learning_rate: float = 0.0
    """Of this step."""
    kept: dict[str, list[Tensor]] = field(default_factory=dict)
    """Tensors, one beside each that the optimiser moves, that go on from step to step; part of every checkpoint."""
    seen: dict[str, Side] = field(default_factory=dict)
    """The sides of the last passes, for the log."""
    shift: tuple[int, Tensor] | None = None
    gather: Gather = field(default_factory=Gather)
    table: Table | None = None
    """The rows of the embedding that are in training in its place."""
    halves: Halves | None = None
    """Runs a step's pass in two halves side by side."""
    asked: frozenset[str] = frozenset()
    """Sides that earlier steps took log-probabilities of: from now on in one product."""

    @property
    def total(self) -> int:
        return len(self.drawn.steps)

    def rows(self, sides: Sequence[str]) -> list[Encoded]:
        """The step's rows of these sides, in the order of the pass."""
        step = self.drawn.steps[self.index]
        return [self.drawn.rows[name][i] for name in sides for i in step[name]]

    def backward(self, part: Literal["forget", "retain"] | None = None) -> Tensor:
        """Add the gradient of the objective, or of one part of it; returns the loss."""
        sides, loss = self._part(part)
        if loss is None or not sides:
            return torch.zeros((), device=self.subject.device)
        with self.gather.adding(), _aside(self.parameters if self.processes > 1 else ()):
            return _backward(self, sides, loss)

    def _part(self, part: str | None) -> tuple[tuple[str, ...], Loss | None]:
        if part is None:
            return self.recipe.sides, self.recipe.loss
        if part == "retain":
            return ("retain",) if "retain" in self.recipe.sides else (), self.recipe.retain
        return tuple(side for side in self.recipe.sides if side != "retain"), self.recipe.forget

    @contextmanager
    def perturbed(self, layer: int, delta: Tensor) -> Iterator[None]:
        """Within the block `delta` is added to what block `layer` gives out in forget passes.

        delta (P, d): every fed token of the forget part's rows, row by row.
        """
        self.shift = (layer, delta)
        try:
            yield
        finally:
            self.shift = None

    @cached_property
    def _owners(self) -> Tensor:
        """(P,) whose shift a fed token of the forget part takes: its own, or that of the row whose token stands for it
        where rows share a beginning. A pass over some of the rows must not choose another one."""
        rows = self.rows(self._part("forget")[0])
        starts, packed = _starts(rows), pack(rows)
        return torch.tensor([starts[row] + at for row, at in packed.owner])[packed.every]

    def positions(self) -> int:
        """P: fed tokens of the forget part's rows."""
        return sum(len(row.ids) - 1 for row in self.rows(self._part("forget")[0]))

    def delta_gradient(self, loss: Loss) -> tuple[Tensor, Tensor]:
        """(loss, its gradient with respect to the perturbation in force); parameters' gradients stay as they are.

        Every process computes it for the whole step, so that all of them take the same perturbation.

        Raises:
            TrainingError: the forget rows of a step do not fit one pass.
        """
        assert self.shift is not None
        sides = self._part("forget")[0]
        rows = self.rows(sides)
        if sum(len(row.ids) for row in rows) > self.micro_tokens:
            raise TrainingError(
                f"perturbations need a step's forget rows in one pass: {sum(len(r.ids) for r in rows)} tokens, but "
                f"training.micro_tokens is {self.micro_tokens}. Raise it or lower training.batch_size."
            )
        value = loss(self._step(sides, self._states(rows, range(len(rows)))))
        (gradient,) = torch.autograd.grad(value, self.shift[1])
        return value.detach(), gradient

    def _step(self, sides: Sequence[str], states: Mapping[str, Tensor]) -> Step:
        made = _sides(self, sides, states)
        self.seen.update(made)
        epoch = self.index // self.drawn.per_epoch
        return Step(made, self.index, self.total, epoch, self.recipe.given, self.memory, self.recipe.inner)

    def _states(
        self, rows: Sequence[Encoded], members: Sequence[int], subject: LanguageModel | None = None, half: int = 0
    ) -> dict[str, Tensor]:
        """What the taps read in one pass over `members` of the part's rows, by a twin of the model if one is given."""
        subject = subject or self.subject
        # Rows that share a beginning share its shift. Some of them alone may begin alike for longer than all do.
        sharing: Sharing = "tokens" if self.shift is None or len(members) == len(rows) else "nothing"
        pack_ = pack([rows[i] for i in members], subject.device, sharing=sharing)
        own = None if self.table is None else (self.table.weight, self.table.place)
        with self.gather.embedding(subject.embedding, own, half):
            if self.shift is None:
                entry = self.entries.lay(pack_) if self.entries is not None else None
                return subject.states(pack_, self.recipe.taps, entry)
            layer, delta = self.shift
            # A pass that starts above the block would see no shift.
            entry = self.entries.lay(pack_) if self.entries is not None and self.entries.runs(layer) else None
            starts = _starts(rows)
            owner = self._owners[[starts[members[row]] + at for row, at in pack_.owner]].to(delta.device)
            with subject.perturbed(layer, delta[owner]):
                return subject.states(pack_, self.recipe.taps, entry)


def _starts(rows: Sequence[Encoded]) -> list[int]:
    """Place of each row's first fed token among the fed tokens of all."""
    return list(itertools.accumulate((len(row.ids) - 1 for row in rows), initial=0))


@dataclass
class Entries:
    """What passes that start above the frozen prefix need of every row."""

    start: Start
    rows: dict[Encoded, Stored]

    def runs(self, block: int) -> bool:
        """Whether passes run the whole of a block."""
        return self.start.layer + self.start.inside <= block

    def lay(self, pack_: Pack) -> Entry:
        return laid(self.start.layer, [self.rows[row] for row in pack_.rows], pack_)


ENTRY_BYTES = 2 << 30
"""What passes start from is stored up to this size."""


def entries(subject: LanguageModel, drawn: Drawn, layer: int | None, *, inside: bool = False) -> Entries | None:
    """What the start model hands to the lowest thing that moves, for every row drawn, where storing it pays.

    It pays where rows come more than once and fit `ENTRY_BYTES`.

    Args:
        layer: the lowest block that anything moves in; None where something below the blocks does.
        inside: of that block only the matrix moves that its MLP gives out through.
    """
    fed = drawn.fed
    rows = list(dict.fromkeys(fed))
    if layer is None or len(fed) < 1.5 * len(rows):
        return None
    start = start_of(subject, layer, inside=inside)
    if start is None:
        return None
    width = subject.model.config.get_text_config().hidden_size
    if start.inside:
        width += subject.model.get_parameter(f"{subject.blocks[layer].out}.weight").numel() // width
    size = sum(len(row.ids) - 1 for row in rows) * width * torch.finfo(subject.dtype).bits // 8
    if size > ENTRY_BYTES:
        return entries(subject, drawn, layer) if start.inside else None
    return Entries(start, dict(zip(rows, stored(subject, rows, start))))


def _sides(turn: Turn, sides: Sequence[str], states: Mapping[str, Tensor]) -> dict[str, Side]:
    """Cut what one pass (or several, put together) handed out into the sides it came from."""
    subject, taps = turn.subject, turn.recipe.taps
    step = turn.drawn.steps[turn.index]
    device = next(iter(states.values())).device
    made: dict[str, Side] = {}
    answers = positions = 0
    for name in sides:
        rows = [turn.drawn.rows[name][i] for i in step[name]]
        lengths = torch.tensor([row.scored for row in rows], device=device)
        fed = torch.tensor([_tapped(row, taps) for row in rows], device=device)
        answer = slice(answers, answers + int(lengths.sum()))
        tapped = slice(positions, positions + int(fed.sum()))
        constants = turn.drawn.constants.get(name, [])
        stored = [constants[i] for i in step[name]] if constants else []
        made[name] = Side(
            hidden=states["final"][answer] if "final" in states else states[next(iter(states))][:0],
            target=torch.tensor([t for row in rows for t in row.ids[row.start :]], device=device),
            row=torch.repeat_interleave(torch.arange(len(rows), device=device), lengths),
            count=len(rows),
            head=subject.head,
            frozen_head=turn.frozen_head,
            vocabulary=subject.vocabulary,
            linear_head=subject.linear_head,
            gather=turn.gather,
            constants={key: torch.cat([row[key] for row in stored]) for key in (stored[0] if stored else {})},
            layers={layer: states[f"layer.{layer}"][tapped] for layer in taps.layers},
            routers={layer: states[f"router.{layer}"][tapped] for layer in taps.routers},
        )
        answers, positions = answer.stop, tapped.stop
    _join(turn, {name: side for name, side in made.items() if name in turn.asked})
    return made


def _join(turn: Turn, sides: Mapping[str, Side]) -> None:
    """Let sides take their log-probabilities in one product, if its logits can be kept for the backward pass."""
    head = turn.subject.linear_head
    counts = [len(side.target) for side in sides.values()]
    if head is None or len(sides) < 2 or sum(counts) * turn.subject.vocabulary > KEEP_ELEMENTS:
        return

    @cache
    def parts() -> dict[str, Tensor]:
        hidden, target = (torch.cat([getattr(side, n) for side in sides.values()]) for n in ("hidden", "target"))
        values = linear_logprob(hidden, head.weight, head.bias, target, turn.gather)
        return dict(zip(sides, values.split(counts)))

    for name, side in sides.items():
        side.joint = lambda name=name: parts()[name]


def _tapped(row: Encoded, taps: Taps) -> int:
    """Positions of a row that taps read."""
    return row.scored if taps.positions == "answer" else len(row.ids) - 1


def _backward(turn: Turn, sides: Sequence[str], loss: Loss) -> Tensor:
    """Backward of one part of a step; returns its loss.

    On a CPU two threads take half of the rows each. A part that is too large for one pass, or shared by several
    processes, runs the decoder without gradients first, takes the objective's gradient at what the taps read, and then
    runs each piece with gradients. The objective always sees the whole step, so the trajectory does not depend on how
    it was split.
    """
    subject, taps, count = turn.subject, turn.recipe.taps, turn.processes
    rows = turn.rows(sides)
    at_once = count == 1 and sum(len(row.ids) for row in rows) <= turn.micro_tokens
    groups = turn.halves.of(rows) if at_once and turn.halves is not None and turn.shift is None else []
    if at_once and not groups:
        value = loss(turn._step(sides, turn._states(rows, range(len(rows)))))
        value.backward()  # type: ignore[no-untyped-call]
        return value.detach()

    idle = 0
    if not at_once:
        shares = [[i for i in range(len(rows)) if i % count == rank] for rank in range(count)]
        plans = [
            [[mine[i] for i in group] for group in batches([rows[i] for i in mine], turn.micro_tokens)]
            for mine in shares
        ]
        groups = plans[turn.rank]
        # Where weights lie in parts no process can run a pass alone: one that is done repeats one for naught.
        idle = max(len(plan) for plan in plans) - len(groups) if subject.sharded else 0
    answers = list(itertools.accumulate((row.scored for row in rows), initial=0))
    fed = list(itertools.accumulate((_tapped(row, taps) for row in rows), initial=0))

    def places(key: str, group: Iterable[int]) -> Tensor:
        starts = answers if key == "final" else fed
        return torch.cat([torch.arange(starts[i], starts[i + 1], device=subject.device) for i in group])

    keys = ["final"] if taps.final else []
    keys += [*(f"layer.{layer}" for layer in taps.layers), *(f"router.{layer}" for layer in taps.routers)]
    parts: list[tuple[Sequence[int], dict[str, Tensor]]]
    if at_once:
        assert turn.halves is not None
        found = turn.halves.run(lambda twin, half: turn._states(rows, groups[half], twin, half))
        parts = list(zip(groups, found))
    else:
        with torch.no_grad():
            parts = [(group, turn._states(rows, group)) for group in groups]
            for _ in range(idle):
                turn._states(rows, [0])
    together: dict[str, Tensor] = {}
    for key in keys:
        width = parts[0][1][key].shape[1] if parts else 0
        if count > 1:
            sizes = torch.tensor([width], device=subject.device)
            torch.distributed.all_reduce(sizes, torch.distributed.ReduceOp.MAX)
            width = int(sizes)
        length = (answers if key == "final" else fed)[-1]
        dtype = torch.float32 if key.startswith("router") else subject.dtype
        together[key] = torch.zeros(length, width, dtype=dtype, device=subject.device)
        for group, states in parts:
            together[key][places(key, group)] = states[key].detach()
        if count > 1:
            torch.distributed.all_reduce(together[key])
        together[key].requires_grad_(not at_once or any(states[key].requires_grad for _, states in parts))
    if not at_once:
        parts = []
    value = loss(turn._step(sides, together))
    value.backward()  # type: ignore[no-untyped-call]
    if count > 1:
        # Every process took the same gradient of the head; the sum over processes below must count it once.
        for parameter in turn.parameters:
            if parameter.grad is not None:
                parameter.grad /= count

    def back(group: Sequence[int], states: Mapping[str, Tensor]) -> None:
        pairs = [
            (states[key], gradient[places(key, group)] if group else torch.zeros_like(states[key]))
            for key in keys
            if states[key].requires_grad and (gradient := together[key].grad) is not None
        ]
        if pairs:
            torch.autograd.backward([state for state, _ in pairs], [gradient for _, gradient in pairs])

    if at_once:
        assert turn.halves is not None
        # Two halves add up to the same whichever is first; with what was there before them they would not.
        others = [p for p in turn.parameters if not turn.gather.owns(p)]
        with _aside(others), turn.gather.in_parts():
            turn.halves.run(lambda _, half: back(*parts[half]))
        return value.detach()
    for group in [*groups, *[[]] * idle]:
        back(group, turn._states(rows, group or [0]))
    if count > 1:
        _sum_gradients([p for p in turn.parameters if not is_part(p)])
    return value.detach()


@contextmanager
def _aside(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients that are there are taken away within the block, and added afterwards."""
    before = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    yield
    for p, grad in zip(parameters, before):
        if grad is not None:
            p.grad = grad if p.grad is None else p.grad + grad


def _sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Add the gradients of all processes. A tensor that got none in any of them has none, as in one process."""
    if not parameters:
        return
    reached = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
    torch.distributed.all_reduce(reached, torch.distributed.ReduceOp.MAX)
    sums = []
    for parameter, anywhere in zip(parameters, reached.tolist()):
        if anywhere:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            sums.append(torch.distributed.all_reduce(parameter.grad, async_op=True))
    for sum_ in sums:
        sum_.wait()


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

    memory: dict[str, float] = field(default_factory=dict)
    """What the objective kept from step to step, as it was at the end."""
    loss: list[float] = field(default_factory=list)
    gradient_norm: list[float] = field(default_factory=list)
    nll: dict[str, list[float]] = field(default_factory=dict)
    """Mean negative log-likelihood per answer token of each side the objective looked at."""
    guard: list[tuple[int, float]] = field(default_factory=list)
    """(step, loss on held-out retain rows)"""
    stopped_by_guard: bool = False
    stepped_back_to: int | None = None
    stopped: str | None = None
    """Why `evaluate` ended the run."""
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0


def train(
    subject: LanguageModel,
    parameters: Sequence[nn.Parameter],
    drawn: Drawn,
    recipe: Recipe,
    training: Training,
    *,
    held_out: Sequence[Encoded] = (),
    frozen_head: Head | None = None,
    entries: Entries | None = None,
    checkpoint: Path | None = None,
    key: str = "",
    evaluate_at: Sequence[int] = (),
    evaluate: Callable[[int], str | None] | None = None,
    progress: Progress | None = None,
) -> Log:
    """Optimise `parameters` of the subject in place with AdamW.

    Parameters held in 16 bits are moved through fp32 masters, so that small steps are not lost.

    Args:
        held_out: rows the guard watches; none turns it off.
        frozen_head: the start model's head, where the scope moves it.
        entries: stored inputs of the lowest block that moves.
        checkpoint: folder for the state of a run that may be killed; `key` says which run it belongs to.
        evaluate: called before the first step (0) and after steps named in `evaluate_at`; a sentence from it says why
            the run ends there.

    Raises:
        TrainingError: the loss is not finite, or no parameter receives a gradient.
        MismatchError: the checkpoint is of this run, but holds it as another version of expunge laid it out.
    """
    if not parameters:
        return Log()
    if processes.count() > 1:
        with torch.no_grad():
            for parameter in parameters:  # whatever each of them prepared, they begin alike
                values = parameter.detach().contiguous()
                torch.distributed.broadcast(values, 0)
                parameter.copy_(values)
    with sharded(subject, parameters) as stand_ins:
        rows = None
        if fed := fed_tokens(subject, stand_ins, drawn, recipe, training):
            assert subject.embedding is not None
            rows = Table(subject.embedding.weight, fed)
            stand_ins = [rows.weight if p is rows.whole else p for p in stand_ins]
        with halves(subject) as parts:
            return _train(
                subject,
                stand_ins,
                rows,
                parts,
                drawn,
                recipe,
                training,
                held_out,
                frozen_head,
                entries,
                checkpoint,
                key,
                evaluate_at,
                evaluate,
                progress,
            )


def _train(
    subject: LanguageModel,
    parameters: Sequence[nn.Parameter],
    rows: Table | None,
    parts: Halves | None,
    drawn: Drawn,
    recipe: Recipe,
    training: Training,
    held_out: Sequence[Encoded],
    frozen_head: Head | None,
    entries: Entries | None,
    checkpoint: Path | None,
    key: str,
    evaluate_at: Sequence[int],
    evaluate: Callable[[int], str | None] | None,
    progress: Progress | None,
) -> Log:
    optimiser = AdamW(parameters, training.weight_decay)
    masters, gather = optimiser.masters, Gather()
    log, first = Log(), 0
    best: list[Tensor] | None = None
    kept: dict[str, list[Tensor]] = {}
    outside = 0
    began = time.monotonic()

    def settle() -> None:
        """Give the model what the masters hold."""
        optimiser.write_back()
        if rows is not None:
            rows.write()

    if checkpoint is not None:
        resumed = _resume(checkpoint, key, optimiser)
        if resumed is not None:
            first, log, best, kept, outside = resumed
            settle()
    if first == 0 and processes.sharding() and not subject.sharded:
        log.warnings.append("FSDP had nothing to cut: no whole tensor or adapter of a block moves in this scope")
    guard = training.guard if held_out else None
    if guard and not log.guard:
        log.guard.append((0, mean_loss(subject, held_out)))
        best, log.stepped_back_to = [master.detach().clone() for master in masters], 0
    saved = time.monotonic()
    total = len(drawn.steps)
    before = log.seconds
    index = first
    try:
        while True:
            # Ahead of the next step: a run that is killed in a check makes it again when it goes on.
            if evaluate and index in evaluate_at:
                log.stopped = evaluate(index)
            last = index == total or log.stopped is not None
            if guard and log.guard[-1][0] < index and (index % guard.every == 0 or last):
                now = mean_loss(subject, held_out)
                log.guard.append((index, now))
                if now <= log.guard[0][1] + guard.band:
                    outside = 0
                    best = [master.detach().clone() for master in masters]
                    log.stepped_back_to = index
                else:
                    outside += 1
                    log.stopped_by_guard = outside >= guard.patience or last
            if last or log.stopped_by_guard:
                break
            rate = training.learning_rate * _factor(training, index, total)
            turn = Turn(
                subject,
                parameters,
                drawn,
                recipe,
                index,
                log.memory,
                frozen_head or subject.head,
                entries,
                training.micro_tokens,
                processes.count(),
                processes.rank(),
                learning_rate=rate,
                kept=kept,
                gather=gather,
                table=rows,
                halves=parts,
                asked=frozenset(log.nll),
            )
            value = turn.backward() if recipe.around is None else recipe.around(turn)
            if not torch.isfinite(value):
                raise TrainingError(
                    f"the loss is {float(value)} at step {index + 1} of {total}; nothing was written. "
                    "Lower training.learning_rate or the method's weights."
                )
            if index == 0 and float(value):  # at a distance of exactly nothing there is no gradient either
                log.warnings += _without_gradient(parameters)
            total_norm = norm([p.grad for p in parameters if p.grad is not None])
            optimiser.step(rate, total_norm, training.max_grad_norm)
            if rows is not None:
                rows.write()
            if recipe.after is not None:
                with torch.no_grad():
                    recipe.after(turn, masters)
                optimiser.write_back()
            for parameter in parameters:
                gather.clear(parameter)
            log.loss.append(float(value))
            log.gradient_norm.append(float(total_norm))
            for name, side in turn.seen.items():
                if "token_logprob" in side.__dict__:
                    log.nll.setdefault(name, []).append(float(-side.token_logprob.detach().mean()))
            index += 1
            if progress:
                progress(index, total)
            log.seconds = before + time.monotonic() - began
            if checkpoint is not None and _due(saved, training, subject):
                _save(checkpoint, key, index, log, optimiser, best, kept, outside)
                saved = time.monotonic()
    except KeyboardInterrupt:
        # Parts of weights cannot be put together any more: other processes are elsewhere.
        if checkpoint is not None and first < index and not subject.sharded:
            _save(checkpoint, key, index, log, optimiser, best, kept, outside)
        raise
    if log.stopped_by_guard and best is not None:
        with torch.no_grad():
            for master, values in zip(masters, best):
                master.copy_(values)
        settle()
    if progress and index < total:
        progress(total, total)
    log.seconds = before + time.monotonic() - began
    return log


def mean_loss(subject: LanguageModel, rows: Sequence[Encoded]) -> float:
    """Mean negative log-likelihood per answer token."""
    values = references(subject, rows, hidden=False)
    return float(-torch.cat([row["reference_tokens"] for row in values]).mean())


def _without_gradient(parameters: Sequence[nn.Parameter]) -> list[str]:
    reached = sum(1 for p in parameters if p.grad is not None and bool(p.grad.any()))
    if parameters and reached == 0:
        raise TrainingError("no parameter of the scope receives a gradient from this objective; choose another scope")
    # LoRA's A matrices get none in the first step: B starts at zero.
    silent = sum(1 for p in parameters if p.grad is None)
    return [f"{silent} of {len(parameters)} tensors of the scope are out of the objective's reach"] if silent else []


# --- checkpoints: safetensors and JSON, never pickle ---------------------------------------------------------------


def _due(saved: float, training: Training, subject: LanguageModel) -> bool:
    """Whether it is time for a checkpoint; where all processes must give their parts the first one's clock says so."""
    due = time.monotonic() - saved >= training.checkpoint_seconds
    return processes.once(lambda: due) if subject.sharded else due


def _save(
    folder: Path,
    key: str,
    step: int,
    log: Log,
    optimiser: AdamW,
    best: list[Tensor] | None,
    kept: dict[str, list[Tensor]],
    outside: int,
) -> None:
    """Written by the first process. Tensors are whole, so that a run may go on with another number of processes."""
    tensors: dict[str, Tensor] = {}

    def put(name: str, parameter: Tensor, part: Tensor) -> None:
        tensor = whole(like(parameter, part.detach()))
        if processes.first():
            tensors[name] = (tensor.cpu() if is_part(parameter) else tensor).contiguous()

    for i, (parameter, master) in enumerate(zip(optimiser.parameters, optimiser.masters)):
        put(f"value.{i}", parameter, master)
        for name, value in optimiser.state.get(master, {}).items():
            if value.dim():
                put(f"{name}.{i}", parameter, value)
            elif processes.first():
                tensors[f"{name}.{i}"] = value.detach()
        if best is not None:
            put(f"best.{i}", parameter, best[i])
        for name, beside in kept.items():
            put(f"kept.{name}.{i}", parameter, beside[i])
    if not processes.first():
        return
    with complete_folder(folder) as partial:
        save_tensors(tensors, partial / "tensors.safetensors")
        state = {"key": key, "step": step, "outside": outside, "log": asdict(log)}
        (partial / "state.json").write_text(json.dumps(state), encoding="utf-8")


def _same_layout(folder: Path, step: int, held: Sequence[tuple[int, ...]], moves: Sequence[tuple[int, ...]]) -> None:
    """One run moves the same tensors whenever it goes on: only another version of this code can have cut them in
    another way."""
    for number, (there, here) in enumerate(itertools.zip_longest(held, moves), start=1):
        if there != here:
            raise MismatchError(
                f"{folder} holds step {step} of this very run, written by another version of expunge: tensor {number} "
                f"is {_shape(there)} there, and {_shape(here)} moves now. Delete the folder to begin the run again, or "
                "let the version that wrote it go on."
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else " x ".join(map(str, shape)) or "a number"


def _resume(
    folder: Path,
    key: str,
    optimiser: AdamW,
) -> tuple[int, Log, list[Tensor] | None, dict[str, list[Tensor]], int] | None:
    from safetensors import safe_open

    def read() -> Any:
        found = folder / "state.json"
        return json.loads(found.read_text(encoding="utf-8")) if found.is_file() else None

    state = processes.once(read)
    if state is None or state["key"] != key:
        return None
    best: list[Tensor] | None = None
    kept: dict[str, list[Tensor]] = {}
    with torch.no_grad(), safe_open(folder / "tensors.safetensors", "pt") as file:
        names = set(file.keys())
        held = [tuple(file.get_slice(f"value.{i}").get_shape()) for i in range(len(names)) if f"value.{i}" in names]
        _same_layout(folder, int(state["step"]), held, [tuple(p.shape) for p in optimiser.parameters])

        def part(name: str, parameter: Tensor) -> Tensor:
            tensor = file.get_tensor(name).to(parameter.device)
            return local(cut(parameter, tensor))

        for i, (parameter, master) in enumerate(zip(optimiser.parameters, optimiser.masters)):
            master.copy_(part(f"value.{i}", parameter))
            if f"step.{i}" in names:
                optimiser.state[master] = {
                    "step": file.get_tensor(f"step.{i}").to(master.device, copy=True),
                    **{name: part(f"{name}.{i}", parameter).clone() for name in ("exp_avg", "exp_avg_sq")},
                }
        if "best.0" in names:
            best = [part(f"best.{i}", parameter).clone() for i, parameter in enumerate(optimiser.parameters)]
        for beside in sorted({name.split(".")[1] for name in names if name.startswith("kept.")}):
            kept[beside] = [
                part(f"kept.{beside}.{i}", parameter).clone() for i, parameter in enumerate(optimiser.parameters)
            ]
    log = Log(**state["log"])
    log.guard = [(int(step), float(value)) for step, value in log.guard]
    return int(state["step"]), log, best, kept, int(state["outside"])


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
            Recipe(lambda step: negative_log_likelihood(step.sides["rows"]), ("rows",)),
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
