"""Requests that a benchmark has a method serve on the way: a delta for each, kept in the benchmark's folder."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pydantic

from .. import registry
from ..deltas import Delta
from ..errors import ParameterError, suggest
from ..methods.edit.case import EditCase
from ..methods.optimise.loop import Training
from ..methods.optimise.unlearn import unlearn
from ..registry import Part
from ..tables.store import content_key
from .case import Bench

Look = Callable[[Any, int], str | None]
"""Looks at the model in training after an epoch; a sentence says why training ends there."""


@dataclass(frozen=True)
class Way:
    """How a request is served."""

    part: Part
    settings: Mapping[str, Any]
    scope: str | None
    training: Training


def way(
    asker: str, modality: str, method: str, settings: Mapping[str, Any], scope: str, training: Mapping[str, Any]
) -> Way:
    """
    Args:
        asker: the benchmark, for errors.
        training: as in a request file; no utility guard unless asked for.

    Raises:
        ParameterError: a method that changes no weights of such models, or a field of training that cannot be.
    """
    part = registry.get("methods", method)
    card = part.card
    if card.kind not in ("optimise", "edit", "exact") or modality not in card.modality:
        what = {"image": "image classifiers", "language": "language models"}[modality]
        raise ParameterError(f"{asker}: {method} changes no weights of {what}")
    if unknown := sorted(training.keys() - Training.__dataclass_fields__.keys()):
        fields = suggest(unknown[0], list(Training.__dataclass_fields__))
        raise ParameterError(f"{asker}: training has no field {unknown[0]!r}. {fields}")
    try:
        made = pydantic.TypeAdapter(Training).validate_python({"guard": None, **training})
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ParameterError(f"{asker}: training.{where}: {first['msg']}") from None
    return Way(part, part.resolve(settings), scope or None, made)


def serve(
    subject: Any,
    data: Mapping[str, Sequence[Any]],
    how: Way,
    progress: Callable[[int, int], None] | None = None,
    look: Look | None = None,
) -> tuple[Delta, dict[str, Any]]:
    """(what the method changes, what is reported of its run: seconds, rows, and for adapters the share of weights that
    could move and the groups that are active)

    Args:
        look: of gradient methods, called after every epoch but the last.
    """
    rows: Any = data
    began = time.monotonic()
    about: dict[str, Any] = {}
    if how.part.card.kind == "optimise":  # type: ignore[union-attr]
        outcome = unlearn(
            subject,
            how.part,
            how.settings,
            scope=how.scope,
            data=rows,
            training=how.training,
            evaluate_at=ends(data, how.training)[:-1] if look else (),
            evaluate=look and (lambda model, step: look(model, round(step / per_epoch(data, how.training)))),
            progress=progress,
        )
        delta, summary = outcome.delta, outcome.summary
        about["share"] = summary["scope"]["share"]
        if groups := summary.get("prepared", {}).get("groups"):
            about |= {"active": len(groups["active"]), "of": groups["of"]}
    else:
        case = EditCase(subject, rows, how.training, how.scope)
        delta = how.part.function(case, **how.settings)
    return delta, {**about, "rows": sum(map(len, data.values())), "seconds": round(time.monotonic() - began, 2)}


def per_epoch(data: Mapping[str, Sequence[Any]], training: Training) -> int:
    """Optimiser steps of a pass over the forget rows."""
    return math.ceil(len(data["forget"]) / training.batch_size)


def ends(data: Mapping[str, Sequence[Any]], training: Training) -> list[int]:
    """The steps at which epochs end; the last one is the run's."""
    size = per_epoch(data, training)
    steps = training.steps if training.steps is not None else math.ceil(training.epochs * size)
    return [*range(size, steps, size), steps]


def kept(
    bench: Bench,
    start: Any,
    data: Mapping[str, Sequence[Any]],
    how: Way,
    phase: str,
    look: Look | None = None,
    until: str = "",
    noted: Mapping[str, Any] | None = None,
) -> Delta:
    """A request's delta: what an earlier command left in the folder, or made now; `lineage["task"]` says of its run.

    Args:
        look: as for `serve`; `until` says what it looks for, `noted` is what it notes on the way, for the lineage.
    """
    rows = {name: [[row.id, row.answer] for row in several] for name, several in data.items()}
    plain = json.loads(json.dumps([how.settings, how.scope, vars(how.training)], default=vars))
    folder = bench.folder / "tasks" / content_key(start.fingerprint, how.part.name, plain, rows, until)
    if (folder / "delta.json").is_file():
        return Delta.load(folder)
    progress = bench.progress
    tell = None if progress is None else lambda done, total: progress(phase, done, total)
    delta, said = serve(start, data, how, tell, look)
    delta = replace(delta, lineage={**delta.lineage, "task": {**said, **(noted or {})}})
    delta.save(folder)
    return delta
