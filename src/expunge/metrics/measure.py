"""Measure: run metrics on the models of an audit, with intervals, a flag where a value cannot be, and no silence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .. import registry
from ..errors import CardError, TableError
from ..evidence import Interval, Measured
from ..registry import Part
from ..tables.passes import MORE
from ..tables.view import NotApplicable, View
from .bootstrap import Bootstrap, interval
from .values import Values

Asked = str | tuple[str, Mapping[str, Any]]
"""A metric's name, or its name with settings."""

EVERYWHERE = ("accuracy", "answer_probability", "rouge")
"""Metrics that by default are taken on every row set, not only where their settings point, if the subject has them."""


def values(metric: str | Part, view: View, settings: Mapping[str, Any] | None = None) -> Values:
    """What one metric finds on one model.

    Raises:
        UnknownNameError, ParameterError: no such metric or setting.
        NotApplicable, TableError: the tables lack what it reads, or hold what cannot be.
    """
    part = registry.get("metrics", metric) if isinstance(metric, str) else metric
    found = part.function(view, **part.resolve(settings))
    if not isinstance(found, Values):
        raise CardError(f"metric {part.name} returned {type(found).__name__}; expected expunge.metrics.values.Values")
    if not np.isfinite(found.value):
        raise TableError(f"metric {part.name} of {view.name} is {found.value}; the tables hold numbers it cannot use")
    return found


def measure(
    metric: str | Part, view: View, settings: Mapping[str, Any] | None = None, *, seed: int = 0, bootstrap: int = 1000
) -> Interval:
    """One metric on one model, with a 95 % bootstrap interval over entities; errors as `values`."""
    found = values(metric, view, settings)
    return interval(found.value, Bootstrap(bootstrap, seed).distribution(found))


def standard(modality: str) -> list[str]:
    """Metrics that are measured unasked: every registered one under its own name, but those that cost passes of their
    own over several models."""
    parts = registry.serving("metrics", modality)
    return [part.name for part in parts if part.own and part.card.standard]  # type: ignore[union-attr]


def default_metrics(view: View) -> list[tuple[str, Mapping[str, Any]]]:
    """The standard metrics as they are set by default, and the basic ones on the other row sets too."""
    names = standard(view.modality)
    elsewhere = [rows for rows in view.rows if view.rows[rows] and rows != "forget"]
    asked: list[tuple[str, Mapping[str, Any]]] = [(name, {}) for name in names]
    return asked + [(name, {"rows": rows}) for rows in elsewhere for name in EVERYWHERE if name in names]


def more_tables(metrics: Sequence[Asked] | None = None, modality: str = "language") -> set[str]:
    """What metrics read beside scores and generations (passes.MORE); the standard ones where none are named."""
    names = standard(modality) if metrics is None else metrics
    parts = [registry.get("metrics", name if isinstance(name, str) else name[0]) for name in names]
    read = {need for part in parts for need in part.card.needs}  # type: ignore[union-attr]
    if any(not isinstance(name, str) and name[1].get("by") == "gradnorm" for name in names):
        read.add("gradients")
    return read & set(MORE)


def measure_all(
    before: View | None,
    after: View,
    golds: Sequence[View] = (),
    *,
    metrics: Sequence[Asked] | None = None,
    seed: int = 0,
    bootstrap: int = 1000,
) -> tuple[list[Measured], list[str]]:
    """Every metric on every model.

    Gold's value is the mean over the golds, each compared with the other golds where a metric compares with gold.
    `extra` of each `Measured` holds the settings, the number of entities, what the metric adds for each model, and
    `each`, the per-row values of all models.

    Args:
        before: the model as it was; None where only the changed one is known.
        after: the changed model.
        golds: models that never saw the forget rows.
        metrics: names or (name, settings); None measures all.
        seed: of the bootstrap.
        bootstrap: resamples of entities.

    Returns:
        What was measured, and a sentence for everything that was asked for and could not be.

    Raises:
        TableError: models with different rows, broken tables.
    """
    models: dict[str, list[View]] = {"before": [] if before is None else [replace(before, golds=golds, name="before")]}
    models["after"] = [replace(after, golds=golds, name="after")]
    models["gold"] = [
        replace(gold, golds=[*golds[:i], *golds[i + 1 :]], name=f"gold {i}") for i, gold in enumerate(golds)
    ]
    for view in [*models["before"], *models["gold"]]:
        _same_rows(models["after"][0], view)
    draws = Bootstrap(bootstrap, seed)
    measured: list[Measured] = []
    notes: list[str] = []
    for asked in default_metrics(after) if metrics is None else metrics:
        name, settings = (asked, {}) if isinstance(asked, str) else asked
        part = registry.get("metrics", name)
        resolved = part.resolve(settings)
        label = f"{name} on {settings['rows']}" if "rows" in settings else name
        found: dict[str, list[Values]] = {}
        reasons: dict[str, str] = {}
        for role, views in models.items():
            try:
                found[role] = [values(part, view, resolved) for view in views]
            except NotApplicable as reason:
                found[role] = []
                reasons[role] = str(reason)
        if "after" in reasons:
            notes.append(f"{label} was not measured: {reasons['after']}")
            continue
        notes += [f"{label} was not measured for {role}: {reason}" for role, reason in reasons.items()]
        measured.append(_measured(part, resolved, found, draws))
    return measured, notes


def _measured(part: Part, settings: dict[str, Any], found: Found, draws: Bootstrap) -> Measured:
    card = part.card
    return gather(
        part.name,
        found,
        draws,
        direction=card.direction,  # type: ignore[union-attr]
        ideal=card.ideal,  # type: ignore[union-attr]
        sentence=card.sentence,  # type: ignore[union-attr]
        version=card.version,  # type: ignore[union-attr]
        settings=settings,
    )


Found = Mapping[str, Sequence[Values]]
"""before, after, gold: what one metric found on each model of that role."""


def gather(
    name: str,
    found: Found,
    draws: Bootstrap,
    *,
    direction: str,
    ideal: str,
    sentence: str,
    version: int = 1,
    settings: Mapping[str, Any] | None = None,
) -> Measured:
    """One number on all models, with intervals. Gold's is the mean over the golds."""
    after = found["after"][0]
    intervals: dict[str, Interval | None] = {}
    for role in ("before", "after", "gold"):
        several = found.get(role, [])
        value = float(np.mean([one.value for one in several])) if several else 0.0
        drawn = [draws.distribution(one) for one in several]
        intervals[role] = interval(value, np.mean(drawn, axis=0)) if several else None
    extra: dict[str, Any] = {
        "settings": dict(settings or {}),
        "entities": len(set(zip(after.units.sets, after.units.entities))),
    }
    extra |= {role: [one.extra for one in several] for role, several in found.items() if several}
    if after.each is not None:
        extra["each"] = {"row": list(after.units.ids)}
        for role, several in found.items():
            if several:
                mean = np.mean(np.array([one.each for one in several], dtype=np.float64), axis=0)
                extra["each"][role] = [float(f"{number:.5g}") for number in mean]
    flags = [f"{role}: {one.flag}" for role, several in found.items() for one in several if one.flag]
    return Measured(
        metric=name,
        rows=" + ".join(dict.fromkeys(after.units.sets)),
        **intervals,
        n=len(after.units),
        direction=direction,
        ideal=ideal,
        sentence=sentence,
        version=version,
        flag="; ".join(dict.fromkeys(flags)),
        extra=extra,
    )


def _same_rows(after: View, other: View) -> None:
    """Comparing models on different rows compares nothing."""
    for rows in set(after.rows) & set(other.rows):
        mine, theirs = [row.id for row in after.rows[rows]], [row.id for row in other.rows[rows]]
        if mine != theirs and set(mine) == set(theirs):
            raise TableError(f"{other.name} has the {rows} rows in another order than {after.name}")
        if mine != theirs:
            missing = [i for i in mine if i not in set(theirs)]
            surplus = [i for i in theirs if i not in set(mine)]
            raise TableError(
                f"{other.name} table has {len(theirs)} {rows} rows, {after.name} has {len(mine)}: "
                f"missing {', '.join(missing[:4]) or 'none'} ({len(missing)}), "
                f"surplus {', '.join(surplus[:4]) or 'none'} ({len(surplus)})"
            )
