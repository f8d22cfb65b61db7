"""What a run will need, before anything starts: no weights are loaded, nothing is trained.

Rows are read and tokenised and steps are drawn by the code that a run uses; what they cost follows from the model's
structure (costs.py). Only this machine's speed is measured, by a product of the shape that the run has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from . import registry, routing
from .agents import Task
from .arithmetic import (
    check_flops,
    fed,
    needs_flops,
    product_rate,
    reading_flops,
    rows_of,
    sides_of,
    step_flops,
)
from .attacks.case import Case
from .attacks.written import Written
from .audit import battery
from .costs import Pass, Structure, Traced, kept, shape_of
from .edits import EditRow
from .errors import SubjectError
from .methods.optimise.loop import Drawn, Training, draw
from .methods.optimise.scope import Resolved, resolve
from .methods.optimise.table import fed_tokens
from .methods.optimise.unlearn import recipe_of, set_up
from .metrics.measure import Asked, more_tables
from .registry import Part
from .request import Request, check, named, read_data
from .rows import Row, asked_for
from .subjects.differences import Moved
from .subjects.gradients import could_go_together
from .subjects.image import ImageClassifier
from .subjects.language import LanguageModel, Template
from .subjects.opening import kind_of
from .subjects.soft import SoftPrompt
from .tables.generations import Generations
from .tables.passes import Ask, Continue, Features, Generate, Hidden, Patch, Pull, Score, everything, longest_answer

ATTAINED = 0.6
"""Share of the measured product rate that training reaches on large matrices."""
SECONDS_PER_ROW = 2e-4
"""Launching the operations on one row in one block, forward and backward."""
SECONDS_PER_MOVED = 1e-9
"""Gradient norm, clipping and AdamW per parameter that moves."""
SAMPLED_STEPS = 32
"""So many steps are packed and looked at; the others are taken to be like them."""


@dataclass(frozen=True)
class Plan:
    """What a run needs: counts, FLOPs, bytes, seconds."""

    request: str
    model: str
    method: str
    scope: str
    parameters: dict[str, Any]
    tokens: dict[str, Any]
    flops: dict[str, float]
    memory: dict[str, float]
    time: dict[str, float]
    audit: dict[str, Any]
    remarks: list[str]


def plan(request: Request) -> Plan:
    """What a run of this request will need.

    Raises:
        ExpungeError: whatever would stop the run itself: a request, rows, a model or a scope that cannot be used.
    """
    check(request)
    part = registry.get("methods", request.method_name)
    data = read_data(request)
    subject = without_weights(request)
    training = request.training.made()
    if part.card.kind == "optimise":
        found = estimate(subject, part, request.method_settings, scope=request.scope, data=data, training=training)
    else:
        found = nothing(subject, f"{part.name} is of kind {part.card.kind}: only the audit costs")
    attacks = named(request.audit.attacks) or battery(request.proof, subject.modality)
    return Plan(
        request=request.name,
        model=request.model,
        method=part.name,
        scope=str(request.scope or "the method's own"),
        audit=passes(
            subject,
            {name: asked_for(rows) for name, rows in data.items()},
            attacks,
            models=2 + len(request.gold),
            metrics=None if request.audit.metrics is None else named(request.audit.metrics),
            seed=request.audit.seed,
        ),
        **found,
    )


def without_weights(request: Request) -> Any:
    """The request's model on the meta device: its structure, and its tokenizer or image processor.

    Raises:
        SubjectError: no such model, or one of a kind that only its own weights can build.
    """
    kind = request.subject or kind_of(request.model)
    if kind == "image":
        return ImageClassifier.bare(request.model, dtype=request.dtype)
    if kind != "language":
        raise SubjectError(
            f"{request.model} is opened as {kind}: only models of transformers can be planned without weights"
        )
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    options = {"trust_remote_code": request.trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(request.model, **options)
        config = AutoConfig.from_pretrained(request.model, **options)
        dtype = getattr(torch, request.dtype) if request.dtype else config.dtype or torch.float32
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    except Exception as error:  # transformers raises a dozen kinds here
        raise SubjectError(f"model {request.model} cannot be read: {str(error).splitlines()[0]}") from error
    template = Template(**request.template.model_dump()) if request.template else None
    return LanguageModel(model, tokenizer, request.model, template)


def estimate(
    subject: LanguageModel,
    part: Part,
    settings: dict[str, Any],
    *,
    scope: str | dict[str, Any] | None,
    data: dict[str, list[Row]],
    training: Training,
) -> dict[str, Any]:
    """The cost of one `optimise` method on one subject, which may be without weights.

    Returns:
        The entries parameters, tokens, flops, memory, time and remarks of a `Plan`.
    """
    setup = set_up(subject, part, settings, scope=scope, data=data, training=training, dry=True)
    resolved, drawn, held_out = setup.resolved, setup.drawn, setup.held_out
    shape = shape_of(subject, resolved).reaching(setup.case.taps)
    steps = len(drawn.steps)
    sampled = [rows_of(drawn, step) for step in drawn.steps[:: math.ceil(steps / SAMPLED_STEPS) or 1]]
    passes = [fed(list(step.values())) for step in sampled]

    flops = {
        "prepare": reading_flops(shape.bare, setup.case.looked, headless=True),
        "needs": needs_flops(shape, setup.needs, drawn),
        "steps": steps * _mean([step_flops(shape, setup, training, step) for step in sampled]),
        "guard": _checks(training, steps) * check_flops(shape, held_out),
    }
    flops["total"] = sum(flops.values())
    per_token: float | None = 0.0
    if isinstance(shape, Traced):
        per_token = shape.kept
    elif sampled:
        per_token = kept(subject, resolved, [row for side in sampled[0].values() for row in side])
    copied = sum(subject.model.get_parameter(name).numel() for name, *_ in resolved.slices)
    parameters = [subject.model.get_parameter(name) for name, _ in resolved.parameters]
    still = 0
    if (moving := fed_tokens(subject, parameters, drawn, recipe_of(setup), training)) is not None:
        rows, width = subject.embedding.weight.shape  # type: ignore[union-attr]
        still = (rows - len(moving)) * width
    memory = _memory(shape, resolved, copied, still, passes, per_token or 0.0, training, bool(held_out))
    return {
        "parameters": {
            "total": shape.total,
            "trainable": resolved.trainable,
            "share": resolved.share,
            "tensors": len(resolved.parameters)
            + len(resolved.slices)
            + 2 * len(resolved.lora.targets if resolved.lora else ()),
        },
        "tokens": {
            "steps": steps,
            "steps per epoch": drawn.per_epoch,
            "fed per epoch": round(drawn.per_epoch * _mean([p.tokens for p in passes])),
            "fed": round(steps * _mean([p.tokens for p in passes])),
            "answer tokens": drawn.tokens[1],
        },
        "flops": flops,
        "memory": memory,
        "time": _time(
            subject, shape, flops["total"], steps, passes, _mean([sum(map(len, s.values())) for s in sampled])
        ),
        "remarks": [
            *setup.case.warnings,
            *(
                ["checks of the stopping rule are not counted: what they write depends on what the model gets wrong"]
                * (setup.rule is not None)
            ),
            *(
                ["time is not estimated for pictures: filters run at another rate than products"]
                * isinstance(shape, Traced)
            ),
            *([] if per_token is not None else ["activations are not counted: the model cannot run without weights"]),
        ],
    }


def nothing(subject: LanguageModel, why: str) -> dict[str, Any]:
    """The same entries for a method that does not train."""
    shape = shape_of(subject, resolve("none", subject.model))
    weights = float(shape.total * shape.item)
    return {
        "parameters": {"total": shape.total, "trainable": 0, "share": 0.0, "tensors": 0},
        "tokens": dict.fromkeys(("steps", "steps per epoch", "fed per epoch", "fed", "answer tokens"), 0),
        "flops": {"total": 0.0},
        "memory": {"weights": weights, "total": weights},
        "time": {"FLOP per second": 0.0, "seconds": 0.0},
        "remarks": [why],
    }


def _checks(training: Training, steps: int) -> int:
    """How often the guard looks at its rows."""
    if not training.guard or not steps:
        return 0
    return 1 + steps // training.guard.every + (steps % training.guard.every > 0)


def _memory(
    shape: Structure | Traced,
    resolved: Resolved,
    copied: int,
    still: int,
    passes: list[Pass],
    per_token: float,
    training: Training,
    guarded: bool,
) -> dict[str, float]:
    """Bytes at the peak of a step, as if everything were held at once; the program itself comes on top.

    Args:
        copied: weights in tensors of which slices move; the working copy has its own.
        still: weights of an embedding's rows that the run does not feed.
    """
    whole = sum(math.prod(size) for _, size in resolved.parameters)
    dense = whole + sum(math.prod(size) for *_, size in resolved.slices)
    adapters = resolved.trainable - dense
    dense -= still
    moving = dense + adapters
    masters = 4 * dense if shape.item == 2 else 0
    memory = {
        "weights": shape.total * shape.item + (whole + copied) * shape.item + 4 * adapters,
        "fp32 masters": masters,
        "gradients": dense * shape.item + 4 * adapters,
        "optimiser": 8 * moving,
        "best so far (guard)": 4 * moving if guarded else 0,
        "activations": per_token * max((min(p.tokens, training.micro_tokens) for p in passes), default=0),
        "logits": max((shape.logits(p.answers) for p in passes), default=0),
    }
    return {**memory, "total": sum(memory.values())}


def _time(
    subject: LanguageModel, shape: Structure | Traced, flops: float, steps: int, passes: list[Pass], rows: float
) -> dict[str, float]:
    """Seconds on this machine, from a measured product of the run's own shape."""
    if not steps or isinstance(shape, Traced):
        return {"FLOP per second": 0.0, "seconds": 0.0}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rate = product_rate(round(_mean([p.tokens for p in passes])), *sides_of(shape), subject.dtype, device)
    # Small models wait for the launch of operations, not for arithmetic; the optimiser passes over what moves.
    waiting = steps * (rows * shape.blocks * SECONDS_PER_ROW + shape.moved * SECONDS_PER_MOVED)
    return {"FLOP per second": rate, "seconds": flops / (rate * ATTAINED) + waiting}


# --- the audit -------------------------------------------------------------------------------------------------------


class _Offline(Written):
    """Plans ask no agent: what is written offline stands for it."""

    def lists(self, name: str, tasks: Sequence[Task], parse: Callable[[str], list[Any]]) -> list[list[Any]]:
        return super().lists("offline", tasks, parse)


@dataclass(frozen=True)
class _Watched(Case):
    """A case whose asks are written down and answered with nothing."""

    written: Written = field(default_factory=_Offline)
    asked: list[Ask] = field(default_factory=list)
    copies: list[Ask] = field(default_factory=list)
    """What changed copies of the subject were asked."""
    taught: list[Drawn] = field(default_factory=list)
    """The training of copies."""
    facts: list[int] = field(default_factory=list)
    """Facts that are edited into copies, by change."""

    def teach(
        self,
        subject: Any,
        rows: Sequence[Row],
        *,
        steps: int,
        batch_size: int,
        learning_rate: float,
        evaluate_at: Sequence[int] = (),
        evaluate: Callable[[int], None] | None = None,
    ) -> None:
        training = Training(steps=steps, batch_size=batch_size)
        generator = torch.Generator().manual_seed(self.seed)
        encoded = {"rows": [self.subject.encode(row) for row in rows]}
        self.taught.append(draw(encoded, ["rows"], training=training, generator=generator))
        if evaluate is not None:
            for step in evaluate_at:
                evaluate(step)

    def edit(
        self,
        edits: Sequence[EditRow],
        editor: Part,
        settings: dict[str, Any],
        mode: str,
        *,
        done: Sequence[Any] = (),
        memory: dict[str, Any] | None = None,
    ) -> tuple[Any, tuple[Any, ...], Moved]:
        self.facts.append(len(edits) - len(done))
        return self.subject, tuple(edits) if mode == "sequence" else (), Moved()

    def teach_prompt(self, subject: Any, rows: Sequence[Row], prompt: SoftPrompt, **training: Any) -> None:
        for step in training["evaluate_at"]:
            training["evaluate"](step)

    def ask(self, subject: Any, *asks: Ask) -> list[Any]:
        return [self.note(ask, self.copies) for ask in asks]

    def note(self, ask: Ask, where: list[Ask] | None = None) -> Any:
        (self.asked if where is None else where).append(ask)
        if not isinstance(ask, Generate):
            return None
        keys = [key for key, _, _ in ask.prompts]
        return Generations(keys, [""] * len(keys), [[""] * ask.samples for _ in keys], [[True] for _ in keys])


def passes(
    subject: LanguageModel,
    data: dict[str, list[Row]],
    attacks: Sequence[tuple[str, dict[str, Any]]],
    models: int,
    metrics: Sequence[Asked] | None = None,
    seed: int = 0,
) -> dict[str, int]:
    """What the audit asks of every model.

    An attack is a generator: it is started, and what it asks and teaches is counted instead of answered and trained.
    """
    limit = longest_answer(subject, data)
    case = _Watched(subject, data, seed, limit)
    more = more_tables(metrics, subject.modality)
    for ask in everything(subject, data, limit, more=more - {"divergences"}, host=subject, seed=seed).values():
        case.note(ask)
    for name, settings in attacks:
        part = registry.get("attacks", name)
        chosen = part.resolve(settings)
        with suppress(Exception):  # whatever cannot go on without weights
            attack = part.function(case, **chosen)
            answer = case.note(next(attack))
            while True:
                answer = case.note(attack.send(answer))
    greedy = {
        (row.id, question)
        for ask in case.asked
        if isinstance(ask, Generate) and ask.temperature == 0
        for _, row, question in ask.prompts
    }
    sampled = {
        (row.id, question, ask.samples, ask.temperature, ask.seed): ask.samples
        for ask in case.asked
        if isinstance(ask, Generate) and ask.temperature > 0
        for _, row, question in ask.prompts
    }
    continued = {
        row.id
        for ask in case.asked
        if isinstance(ask, Continue)
        for row, read in ((row, subject.encode(row)) for row in ask.rows)
        if read.scored - read.closing > ask.shortest
    }
    compared = data.get("forget", []) if "divergences" in more else []
    rows = {
        kind: {row.id: row.answer for a in case.asked if isinstance(a, kind) for row in a.rows}
        for kind in (Pull, Patch)
    }
    scored = {(row.id, *texts) for ask in case.asked if isinstance(ask, Score) for _, row, *texts in ask.items}
    if isinstance(subject, LanguageModel) and could_go_together(subject):
        # Own answers of rows with gradients are scored on the way.
        scored -= {(row, answer, None) for row, answer in rows[Pull].items()}
    return {
        "models": models,
        "answers scored per model": len(scored),
        "questions asked per model": len(greedy),
        "answers sampled per model": sum(sampled.values()),
        "rows with gradients per model": len(rows[Pull]),
        "rows whose states are patched per model": len(rows[Patch]),
        "answers continued from every beginning per model": len(continued),
        "rows compared with an untrained network per model": len(compared),
        "rows compared with each gold model per model": len(data.get("forget", [])) if "distances" in more else 0,
        "hidden states per model": sum(_looked(ask) for ask in case.asked),
        "questions to changed copies per model": sum(len(a.prompts) for a in case.copies if isinstance(a, Generate)),
        "relearning steps per model": sum(len(drawn.steps) for drawn in case.taught),
        "relearning tokens per model": sum(drawn.tokens[0] for drawn in case.taught),
        "facts edited into copies per model": sum(case.facts),
        "tokens in an answer at most": limit,
        **_compared(subject, data, seed),
    }


def _looked(ask: Ask) -> int:
    """Hidden states that an ask wants."""
    return len(ask.prompts) if isinstance(ask, Hidden) else len(ask.rows) if isinstance(ask, Features) else 0


def _compared(subject: LanguageModel, data: dict[str, list[Row]], seed: int) -> dict[str, int]:
    """Rows on which the experts before and after are compared; nothing for dense models."""
    if not any(block.experts for block in subject.blocks):
        return {}
    rows = (routing.sample(subject, data[name], seed) for name in routing.SETS if data.get(name))
    return {"rows whose experts are compared": sum(map(len, rows))}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
