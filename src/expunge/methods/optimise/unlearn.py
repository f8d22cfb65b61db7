"""From a request's rows to a delta: what one objective changes in one subject."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...cards import MethodCard
from ...deltas import Delta
from ...errors import RequestError, RowError, ScopeError
from ...registry import Part
from ...rows import Row
from ...subjects.anatomy import anatomy
from ...subjects.language import LanguageModel, Progress
from ...subjects.packed import Encoded
from ...tables.store import content_key
from .loop import Drawn, Training, draw, references, train
from .scope import LoraSpec, Resolved, resolve
from .terms import Step


@dataclass(frozen=True)
class Outcome:
    """What a method leaves behind."""

    delta: Delta
    summary: dict[str, Any]
    """Resolved settings, scope, training log, counts: everything the report says about the method."""


def unlearn(
    subject: LanguageModel,
    part: Part,
    settings: dict[str, Any],
    *,
    scope: str | dict[str, Any],
    data: dict[str, list[Row]],
    training: Training,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Run an `optimise` method. The subject is not changed; the delta leads from it to the changed model.

    Args:
        data: row sets by name; `forget` and `retain` are trained on.
        folder: where a killed run finds its checkpoint again; None runs without.

    Raises:
        RequestError: rows the objective needs are missing.
        RowError: a row does not fit the model.
        ScopeError: the scope matches nothing that can move.
        TrainingError: the loss is not finite.
    """
    chosen = part.resolve(settings)
    resolved = resolve(scope, subject.model)
    generator = torch.Generator().manual_seed(training.seed)
    sides = _sides(part, chosen)
    rows, held_out = _rows(subject, part, chosen, sides, data, training, generator)
    leading = [side for side in sides if side != "retain"]
    drawn = draw(rows, leading, training=training, generator=generator, count=len(data.get("forget", [])))
    _needs(subject, part, chosen, drawn)

    working, parameters = _working_copy(subject, resolved)
    key = content_key(
        subject.fingerprint,
        part.name,
        chosen,
        resolved.json(),
        asdict(replace(training, checkpoint_seconds=0.0)),
        {name: [row.ids for row in items] for name, items in rows.items()},
    )
    log = train(
        working,
        parameters,
        drawn,
        lambda step: _objective(part, step, chosen),
        training,
        held_out=held_out,
        frozen_head=subject.head,
        checkpoint=folder / "checkpoint" if folder is not None and parameters else None,
        key=key,
        progress=progress,
    )
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
        "warnings": log.warnings,
    }
    lineage = {"method": part.name, "settings": chosen, "scope": resolved.json()["form"], "key": key}
    return Outcome(_delta(subject, working, resolved, lineage), summary)


def _objective(part: Part, step: Step, settings: dict[str, Any]) -> Tensor:
    return part.function(step, **settings)


def _sides(part: Part, settings: dict[str, Any]) -> list[str]:
    """Which row sets a step of this objective reads, in the order of the packed pass."""
    assert isinstance(part.card, MethodCard)
    named = {need.split(".")[0] for need in part.card.needs}
    if settings.get("retain", "none") != "none":
        named.add("retain")
    return [side for side in ("forget", "alternative", "retain") if side in named]


def _rows(
    subject: LanguageModel,
    part: Part,
    settings: dict[str, Any],
    sides: Sequence[str],
    data: dict[str, list[Row]],
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


def _needs(subject: LanguageModel, part: Part, settings: dict[str, Any], drawn: Drawn) -> None:
    """Compute what does not change during training, once, for the rows that were drawn."""
    assert isinstance(part.card, MethodCard)
    needs = set(part.card.needs)
    if settings.get("retain") == "kl":
        needs.add("retain.reference_hidden")
    for need in sorted(needs):
        side, _, quantity = need.partition(".")
        if not quantity:
            continue
        used = sorted({i for step in drawn.steps for i in step[side]})
        values = references(subject, [drawn.rows[side][i] for i in used], hidden=quantity == "reference_hidden")
        stored = drawn.constants.setdefault(side, [{} for _ in drawn.rows[side]])
        for i, value in zip(used, values):
            stored[i].update(value)


def _working_copy(subject: LanguageModel, resolved: Resolved) -> tuple[LanguageModel, list[nn.Parameter]]:
    """A subject whose scope may move, sharing every other tensor with the base; and its moving parameters."""
    moving = {name for name, _ in resolved.parameters}
    memo: dict[int, Any] = {id(p): p for name, p in subject.model.named_parameters() if name not in moving}
    working = subject.with_model(copy.deepcopy(subject.model, memo))
    # The base's tensors are shared, so their flags are too; they stay off, as nothing else trains a base.
    working.model.requires_grad_(False)
    if resolved.lora is not None:
        _add_adapters(working.model, resolved.lora)
    parameters = []
    for name, parameter in working.model.named_parameters():
        # Under adapters a wrapped layer's own tensor has another name.
        if name.replace(".base_layer.", ".") in moving or ".lora_" in name:
            parameters.append(parameter.requires_grad_(True))
    return working, parameters


def _add_adapters(model: nn.Module, spec: LoraSpec) -> None:
    """Put an adapter on every target, in place."""
    from peft import inject_adapter_in_model

    blocks = anatomy(model).blocks[0].name.rpartition(".")[0]
    inside = all(target.startswith(blocks + ".") for target in spec.targets)
    # Given a whole model peft may send MLP targets to its fused experts instead; given the list of blocks it does not.
    owner, prefix = (model.get_submodule(blocks), blocks + ".") if inside else (model, "")
    relative = replace(spec, targets=tuple(target.removeprefix(prefix) for target in spec.targets))
    inject_adapter_in_model(relative.config(), owner)
    missed = [target for target in spec.targets if not hasattr(model.get_submodule(target), "lora_A")]
    if missed:
        raise ScopeError(f"peft put no adapter on {missed[0]}; leave it out of the scope")


def _delta(subject: LanguageModel, working: LanguageModel, resolved: Resolved, lineage: dict[str, Any]) -> Delta:
    """What moved: dense differences for the scope's tensors, A and B for adapters."""
    before = dict(subject.model.named_parameters())
    entries: dict[str, dict[str, Tensor]] = {}
    moving = {name for name, _ in resolved.parameters}
    for name, parameter in working.model.named_parameters():
        plain = name.replace(".base_layer.", ".")
        if plain in moving and not torch.equal(before[plain], parameter):
            entries[plain] = {"difference": (parameter.detach().float() - before[plain].detach().float()).cpu()}
    if resolved.lora is not None:
        for target in resolved.lora.targets:
            layer = working.model.get_submodule(target)
            a, b = (getattr(layer, part)["default"].weight.detach().float().cpu() for part in ("lora_A", "lora_B"))
            if resolved.lora.transposed:  # the layer keeps (in, out): (B A)^T = A^T B^T
                a, b = b.T, a.T
            if f"{target}.weight" in entries:
                product = layer.get_delta_weight("default").detach().float().cpu()
                entries[f"{target}.weight"]["difference"] += product
            elif bool(b.any()):
                entries[f"{target}.weight"] = {"A": a, "B": b, "scale": torch.tensor(float(layer.scaling["default"]))}
    return Delta(subject.fingerprint, entries, lineage)
