"""From a request's rows to a delta: what one objective changes in one subject."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import processes, registry
from ...cards import MethodCard
from ...deltas import Delta
from ...errors import ParameterError, RequestError, RowError, ScopeError
from ...registry import Part
from ...rows import Row
from ...subjects.anatomy import structure
from ...subjects.entering import Start
from ...subjects.language import LanguageModel
from ...subjects.packed import Encoded
from ...subjects.protocol import Progress, Taps
from ...tables.store import content_key
from . import columns, fila, slices
from .loop import Drawn, Recipe, Training, Turn, activations, draw, entries, references, train
from .reinforce import REINFORCE
from .scope import PRINCIPAL, LoraSpec, Resolved, resolve
from .stop import Rule
from .terms import Step


@dataclass(frozen=True)
class Outcome:
    """What a method leaves behind."""

    delta: Delta
    summary: dict[str, Any]
    """Resolved settings, scope, training log, counts: everything the report says about the method."""
    subject: LanguageModel
    """The trained working copy; with adapters it still carries them."""
    setup: Setup
    """What the run had decided before it began."""
    step_seconds: dict[int, float]
    """Time of each step (1, 2 ...) but the first one that this process made: it warms up."""
    entry: Start | None
    """Where passes started, if what is below was stored."""


@dataclass
class Preparation:
    """What a method's `prepare` sees, and fills, once before training."""

    subject: LanguageModel
    """The start model."""
    settings: dict[str, Any]
    """The method's own parameters; those of the outer method where it is around another one, in its own turn."""
    scope: str | Mapping[str, Any] | None
    """What is to move: what the user asked for, or what a method chose where that is None."""
    data: Mapping[str, list[Row]]
    rows: dict[str, list[Encoded]]
    """Tokens of every side."""
    training: Training
    folder: Path | None = None
    progress: Progress | None = None
    taps: Taps = field(default_factory=Taps)
    constants: dict[str, list[dict[str, Tensor]]] = field(default_factory=dict)
    """Per side and row."""
    given: dict[str, Any] = field(default_factory=dict)
    """What objectives find in `step.given`."""
    needs: set[str] = field(default_factory=set)
    """What else of the start model the objective reads with these settings, in the words of a card's `needs`."""
    looked: list[Encoded] = field(default_factory=list)
    """Rows that ran, or would run, through the blocks of the start model for this; plans count them."""
    repeats: int | None = None
    """How often a step runs its forget part, which then is a pass of its own beside the retain part; plans count it.
    None: one pass of both."""
    adversary: tuple[int, int] | None = None
    """(block, times): passes of a step over its forget part for gradients of a shift after this block."""
    around: Callable[[Turn], Tensor] | None = None
    """Takes each step's gradients in the objective's place (`Recipe.around`), of a method that is around no other."""
    after: Callable[[Turn, Sequence[Tensor]], None] | None = None
    """Called after each step of the optimiser (`Recipe.after`)."""
    trained: Callable[[LanguageModel], Mapping[str, Any]] | None = None
    """What the trained copy shows, for the summary."""
    summary: dict[str, Any] = field(default_factory=dict)
    """Plain values for the report."""
    warnings: list[str] = field(default_factory=list)
    asked: str | Mapping[str, Any] | None = None
    """The user's scope, whatever a method inside has chosen since."""
    dry: bool = False
    """Only `scope` and `taps` are wanted: the subject may be without weights, nothing is trained."""

    @property
    def seed(self) -> int:
        return self.training.seed


def unlearn(
    subject: LanguageModel,
    part: Part,
    settings: Mapping[str, Any],
    *,
    scope: str | Mapping[str, Any] | None,
    data: Mapping[str, list[Row]],
    training: Training,
    folder: Path | None = None,
    evaluate_at: Sequence[int] = (),
    evaluate: Callable[[LanguageModel, int], str | None] | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Run an `optimise` method. The subject is not changed; the delta leads from it to the changed model.

    Args:
        scope: which weights may move; None takes the method's own (`all` unless it says otherwise).
        data: row sets by name; `forget` and `retain` are trained on.
        folder: where a killed run finds its checkpoint again; None runs without.
        evaluate: called with the model in training after the steps in `evaluate_at` (0 is before the first); a sentence
            from it says why the run ends there.

    Raises:
        RequestError: rows the objective needs are missing.
        RowError: a row does not fit the model.
        ScopeError: the scope matches nothing that can move.
        TrainingError: the loss is not finite.
        MismatchError: another version of expunge left the checkpoint, in another layout.
    """
    setup = set_up(subject, part, settings, scope=scope, data=data, training=training, folder=folder, progress=progress)
    case, resolved, drawn = setup.case, setup.resolved, setup.drawn
    chosen, rows = setup.chain[0][1], drawn.rows
    _needs(case, setup.needs, drawn)

    working, parameters, finish = _working_copy(case, resolved)
    key = content_key(
        subject.fingerprint,
        part.name,
        chosen,
        resolved.json(),
        asdict(replace(training, checkpoint_seconds=0.0)),
        {name: [row.ids for row in items] for name, items in rows.items()},
    )
    processes.same("scope, rows or settings", key)
    stored = entries(subject, drawn, resolved.first_layer, inside=resolved.first_is_out)
    watch = _Stopwatch(progress)
    rule, checks = setup.rule, range(0)
    if rule is not None:
        rule.measure(subject)
        checks = range(0, len(drawn.steps), rule.stop.every or drawn.per_epoch)

    def look(step: int) -> str | None:
        if evaluate is not None and step in evaluate_at and (said := evaluate(working, step)) is not None:
            return said
        return f"after step {step}: {rule}" if rule is not None and step in checks and rule.check(working) else None

    log = train(
        working,
        parameters,
        drawn,
        recipe_of(setup),
        training,
        held_out=setup.held_out,
        frozen_head=subject.head,
        entries=stored,
        checkpoint=folder / "checkpoint" if folder is not None and parameters else None,
        key=key,
        evaluate_at=sorted({*evaluate_at, *checks}),
        evaluate=look,
        progress=watch,
    )
    if case.trained is not None:
        case.summary |= case.trained(working)
    if rule is not None and (not rule.met or log.stopped_by_guard) and not rule.check(working):
        log.warnings.append(f"the stopping rule is not met: {rule}")
    tokens, answers = drawn.tokens
    share = len(log.loss) / max(1, len(drawn.steps))
    summary = {
        "name": part.name,
        "settings": chosen,
        "training": asdict(training),
        "scope": resolved.json(),
        "steps": len(log.loss),
        "steps_planned": len(drawn.steps),
        "tokens": int(tokens * share),
        "answer_tokens": int(answers * share),
        "rows": {name: len(items) for name, items in rows.items()},
        "log": asdict(log),
        "seconds": log.seconds,
        "stopped_by_guard": log.stopped_by_guard,
        "stepped_back_to": log.stepped_back_to if log.stopped_by_guard else None,
        "stopped": log.stopped,
        "stop": None if rule is None else rule.summary(),
        "warnings": [*case.warnings, *log.warnings],
        **({"prepared": case.summary} if case.summary else {}),
    }
    lineage = {"method": part.name, "settings": chosen, "scope": resolved.json()["form"], "key": key}
    finish()
    return Outcome(
        _delta(subject, working, resolved, lineage),
        summary,
        working,
        setup,
        watch.seconds(len(log.loss)),
        None if stored is None else stored.start,
    )


class _Stopwatch:
    """Progress of training that notes when every step ended."""

    def __init__(self, tell: Progress | None) -> None:
        self.tell = tell
        self.ended: dict[int, float] = {}

    def __call__(self, done: int, total: int) -> None:
        self.ended.setdefault(done, time.perf_counter())
        if self.tell is not None:
            self.tell(done, total)

    def seconds(self, steps: int) -> dict[int, float]:
        """Of those of the first `steps` steps that began in this process after another one."""
        ends = self.ended
        return {n: ends[n] - ends[n - 1] for n in sorted(ends) if n <= steps and n - 1 in ends}


Chain = list[tuple[Part, dict[str, Any]]]
"""A method with its settings, and behind it the objective inside, if it is around one."""


@dataclass
class Setup:
    """Everything a run decides before it computes anything on the model."""

    chain: Chain
    needs: set[str]
    case: Preparation
    resolved: Resolved
    drawn: Drawn
    held_out: list[Encoded]
    """Retain rows that the guard watches and nobody trains on."""
    rule: Rule | None = None
    """What may end the run early."""


def set_up(
    subject: LanguageModel,
    part: Part,
    settings: Mapping[str, Any],
    *,
    scope: str | Mapping[str, Any] | None,
    data: Mapping[str, list[Row]],
    training: Training,
    folder: Path | None = None,
    progress: Progress | None = None,
    dry: bool = False,
) -> Setup:
    """Resolve the method, encode the rows, prepare, resolve the scope, draw all steps.

    Args:
        dry: for plans and checks: the subject may be without weights.

    Raises:
        ParameterError, RequestError, RowError, ScopeError: what would stop the run.
    """
    chosen = part.resolve(settings)
    chain = _chain(part, chosen)
    for one, _ in chain:
        registry.check_serves(one, subject)
    inner, inner_settings = chain[-1]
    generator = torch.Generator().manual_seed(training.seed)
    needs, sides = _reads(chain)
    rows, held_out = _rows(subject, inner, inner_settings, sides, data, training, generator)
    case = Preparation(subject, chosen, scope, data, rows, training, folder, progress, asked=scope, dry=dry)
    for one, own in reversed(chain):
        if one.prepare is not None:
            case.settings = own
            one.prepare(case)
    resolved = resolve("all" if case.scope is None else case.scope, subject.model)
    read = None if case.taps.final else max((*case.taps.layers, *case.taps.routers))
    if read is not None and resolved.first_layer is not None and resolved.first_layer > read:
        raise ScopeError(
            f"scope {resolved.form!r} begins at block {resolved.first_layer}, and {inner.name} reads the states after "
            f"block {read}: nothing of it would receive a gradient. Take a lower scope or a higher layer."
        )
    leading = [side for side in sides if side != "retain"] or sides
    # Alternatives come in several variants of the forget rows: an epoch still is one pass over the latter.
    count = len(data.get("forget", [])) if leading != ["retain"] else None
    drawn = draw(rows, leading, training=training, generator=generator, count=count)
    # Whoever learns the rows once more does not end where they are forgotten.
    stop = training.stop if part is not REINFORCE and data.get("forget") else None
    rule = Rule(stop, subject, data) if stop else None
    return Setup(chain, needs | case.needs, case, resolved, drawn, held_out, rule)


def _chain(part: Part, settings: dict[str, Any]) -> Chain:
    """
    Raises:
        ParameterError: the objective inside is itself around another one, or takes no single step.
    """
    chain: Chain = [(part, settings)]
    if "objective" in settings:
        asked = settings["objective"]
        if not isinstance(asked, str) and len(asked) != 1:
            raise ParameterError(f"{part.name}: objective is {asked!r}; expected a name, or one name with its settings")
        name, own = (asked, {}) if isinstance(asked, str) else next(iter(asked.items()))
        inner = registry.get("methods", name)
        resolved = inner.resolve(own)
        if inner.card.kind != "optimise" or "objective" in resolved or "retain" not in resolved:
            raise ParameterError(
                f"{part.name}: objective {name!r} cannot stand inside another method; expected a plain objective such "
                "as npo, grad_diff or rmu"
            )
        chain.append((inner, resolved))
    return chain


def _reads(chain: Chain) -> tuple[set[str], list[str]]:
    """(named needs, row sets of a step in the order of the packed pass)."""
    needs: set[str] = set()
    for part, settings in chain:
        assert isinstance(part.card, MethodCard)
        needs |= set(part.card.needs)
        if settings.get("retain", "none") != "none":
            needs.add("retain")
        if settings.get("retain") == "kl":
            needs.add("retain.reference_hidden")
    named = {need.split(".")[0] for need in needs}
    return needs, [side for side in ("forget", "alternative", "retain") if side in named]


def recipe_of(setup: Setup) -> Recipe:
    """What the loop optimises."""
    chain, case = setup.chain, setup.case
    outer, outer_settings = chain[0]
    part, settings = chain[-1]

    def whole(step: Step) -> Tensor:
        return part.function(step, **settings)

    def forget(step: Step) -> Tensor:
        return part.function(step, **{**settings, "retain": "none"})

    def retain(step: Step) -> Tensor:
        term = step.retain_term(settings["retain"])
        return settings["retain_weight"] * torch.as_tensor(term, device=case.subject.device)

    splits = "retain" in settings and "retain_weight" in settings
    recipe = Recipe(
        loss=whole,
        sides=tuple(setup.drawn.rows),
        forget=forget if splits else whole,
        retain=retain if splits else None,
        taps=case.taps,
        given=case.given,
        around=case.around,
        after=case.after,
    )
    if len(chain) == 1:
        return recipe
    if next(iter(inspect.signature(outer.function).parameters)) == "turn":
        return replace(recipe, around=lambda turn: outer.function(turn, **outer_settings))
    return replace(recipe, loss=lambda step: outer.function(step, **outer_settings), inner=whole)


def _rows(
    subject: LanguageModel,
    part: Part,
    settings: dict[str, Any],
    sides: Sequence[str],
    data: Mapping[str, list[Row]],
    training: Training,
    generator: torch.Generator,
) -> tuple[dict[str, list[Encoded]], list[Encoded]]:
    """Encoded rows of every side, and the retain rows that the guard watches and nobody trains on."""
    forget, retain = data.get("forget", []), data.get("retain", [])
    held_out: list[Encoded] = []
    if training.guard and retain:
        order = torch.randperm(len(retain), generator=generator).tolist()
        count = min(training.guard.rows, len(retain) // 5)
        held_out = [subject.encode(retain[i]) for i in order[:count]]
        retain = [retain[i] for i in sorted(order[count:])]
    rows: dict[str, list[Encoded]] = {}
    for side in sides:
        if side == "retain":
            if not retain and forget:
                raise RequestError(
                    f"request.data.retain: 0 rows, but {part.name}(retain={settings.get('retain')!r}) needs at least 1"
                )
            rows[side] = [subject.encode(row) for row in retain]
        elif side == "forget":
            rows[side] = [subject.encode(row) for row in forget]
        else:
            rows[side] = _alternatives(subject, forget, settings.get("alternatives", "refusal"), generator)
    return rows, held_out


def refusals() -> list[str]:
    """A hundred ways of not answering."""
    text = resources.files(__package__).joinpath("refusals.txt").read_text(encoding="utf-8")
    return text.splitlines()


VARIANTS = 5
"""Alternatives drawn per forget row; an epoch uses the next one."""


def _alternatives(
    subject: LanguageModel, forget: Sequence[Row], kind: str, generator: torch.Generator
) -> list[Encoded]:
    """What is to be said instead of each forget answer, drawn by the plan's seed, variant by variant."""
    lines = refusals()
    found = []
    for _ in range(VARIANTS):
        for row in forget:
            where = row.source or f"row {row.id}"
            choices = lines if kind == "refusal" else list(row.perturbed_answers)
            if not choices:
                raise RowError(f"{where}: no perturbed answers, but alternatives = perturbed needs at least one")
            text = choices[int(torch.randint(len(choices), (1,), generator=generator))]
            if text.strip() == row.answer.strip():
                raise RowError(f"{where}: its alternative {text!r} equals its answer")
            found.append(subject.encode(row, answer=text))
    return found


def _needs(case: Preparation, needs: set[str], drawn: Drawn) -> None:
    """Compute what does not change during training, once, for the rows that were drawn."""
    drawn.constants.update(case.constants)
    for need in sorted(needs):
        side, _, quantity = need.partition(".")
        if not quantity or side not in drawn.rows:
            continue
        used = sorted({i for step in drawn.steps for i in step[side]})
        rows = [drawn.rows[side][i] for i in used]
        if quantity == "layers":
            values = activations(case.subject, rows, case.taps)
        else:
            values = references(case.subject, rows, hidden=quantity == "reference_hidden")
        stored = drawn.constants.setdefault(side, [{} for _ in drawn.rows[side]])
        for i, value in zip(used, values):
            stored[i].update(value)


def _working_copy(
    case: Preparation, resolved: Resolved
) -> tuple[LanguageModel, list[nn.Parameter], Callable[[], None]]:
    """A subject whose scope may move, sharing every other tensor with the base; its moving parameters; and what is to
    be called after training."""
    subject = case.subject
    moving = {name for name, _ in resolved.parameters}
    memo: dict[int, Any] = {id(p): p for name, p in subject.model.named_parameters() if name not in moving}
    working = subject.with_model(copy.deepcopy(subject.model, memo))
    # The base's tensors are shared, so their flags are too; they stay off, as nothing else trains a base.
    working.model.requires_grad_(False)
    if resolved.lora is not None:
        with torch.random.fork_rng(devices=[]):  # peft draws from the global generator
            torch.manual_seed(case.seed)
            add_adapters(working.model, resolved.lora)
        if resolved.lora.init in PRINCIPAL:
            forget, retain = _measured(case)
            about = fila.start(working, resolved.lora, forget, retain, seed=case.seed)
            case.warnings += about.pop("warnings", [])
            case.summary["adapters"] = about
    parameters = []
    for name, parameter in working.model.named_parameters():
        # Under adapters a wrapped layer's own tensor has another name.
        if name.replace(".base_layer.", ".") in moving or ".lora_" in name:
            parameters.append(parameter.requires_grad_(True))
    parameters += slices.take(working.model, resolved.slices)
    shifts, put_columns = columns.take(working.model, resolved.columns)

    def finish() -> None:
        slices.put(working.model)
        put_columns()

    return working, parameters + shifts, finish


def _measured(case: Preparation) -> tuple[list[Encoded], list[Encoded]]:
    """Forget and retain rows, whichever sides the objective reads."""
    encode = case.subject.encode
    forget, retain = (
        case.rows.get(side) or [encode(row) for row in case.data.get(side, [])] for side in ("forget", "retain")
    )
    return forget, retain


def add_adapters(model: nn.Module, spec: LoraSpec) -> None:
    """Put an adapter on every target, in place."""
    from peft import inject_adapter_in_model

    blocks = structure(model).blocks[0].name.rpartition(".")[0]
    inside = all(target.startswith(blocks + ".") for target in spec.targets)
    # Given a whole model peft may send MLP targets to its fused experts instead; given the list of blocks it does not.
    owner, prefix = (model.get_submodule(blocks), blocks + ".") if inside else (model, "")
    relative = replace(spec, targets=tuple(target.removeprefix(prefix) for target in spec.targets))
    inject_adapter_in_model(relative.config(), owner)
    missed = [target for target in spec.targets if not hasattr(model.get_submodule(target), "lora_A")]
    if missed:
        raise ScopeError(f"peft put no adapter on {missed[0]}; leave it out of the scope")


def _delta(subject: LanguageModel, working: LanguageModel, resolved: Resolved, lineage: dict[str, Any]) -> Delta:
    """What moved: dense differences for the scope's tensors, slices for its experts, A and B for adapters."""
    before = dict(subject.model.named_parameters())
    entries = slices.changes(subject.model, working.model, resolved.slices)
    entries |= columns.changes(subject.model, working.model, resolved.columns)
    moving = {name for name, _ in resolved.parameters}
    for name, parameter in working.model.named_parameters():
        plain = name.replace(".base_layer.", ".")
        if plain in moving and not torch.equal(before[plain], parameter):
            entries[plain] = {"difference": (parameter.detach().float() - before[plain].detach().float()).cpu()}
    if resolved.lora is not None:
        for target in resolved.lora.targets:
            layer = working.model.get_submodule(target)
            if f"{target}.weight" in entries:
                product = layer.get_delta_weight("default").detach().float().cpu()
                entries[f"{target}.weight"]["difference"] += product
            elif (entry := fila.low_rank(layer, transposed=resolved.lora.transposed)) is not None:
                entries[f"{target}.weight"] = entry
    return Delta(subject.fingerprint, entries, lineage)
