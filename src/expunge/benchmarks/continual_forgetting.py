"""Continual forgetting: requests for classes served one after the other, by any method, and what is left after each.

The model under test is the one before the first request. Every task starts from the model that the last one left, sees
the few rows the data allows, and is measured on unseen rows: accuracy on what it forgets, on what is still to be kept,
and on what earlier tasks took away. Its H-mean is the harmonic mean of what is kept and of what accuracy on the
forgotten classes lost (GS-LoRA, arXiv:2403.11530). Published accuracies subtract the training margin from the true
class's logit before the arg max, which makes forgetting look easier; here there is no margin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ParameterError
from ..evidence import Measured, Scorecard, Table
from ..metrics.measure import gather
from ..metrics.values import Aggregate, Units, Values
from ..pictures import Picture
from ..registry import benchmark
from ..tables.passes import Score, run
from ..world.facts import World
from .case import Bench
from .continual_data import Continual, Task, TaskFile, figures, h_mean, read, write
from .served import Way, kept, way


def mini(_: World, folder: Path) -> None:
    """Written digits; three tasks take two of them away each, 30 % of the rows may be used."""
    from ..world.pictures.draw import digits

    write(digits(), TaskFile(first=8, per_task=2, tasks=3, data_ratio=0.3), folder)


@benchmark(paper="arXiv:2403.11530", data="a folder with train, test and tasks.json", modality=("image",))
def continual_forgetting(
    bench: Bench,
    *,
    method: str = "gs_lora",
    settings: dict[str, Any] | None = None,
    per_task: dict[str, list[Any]] | None = None,
    scope: str = "",
    training: dict[str, Any] | None = None,
) -> Scorecard:
    """Accuracy on forgotten, earlier forgotten and kept classes after each task of a sequence, and its H-mean.

    `settings` are the method's, `per_task` those that differ from task to task, one value each; `training` is as in a
    request file (no guard unless asked for). Models of a killed command are found again.
    """
    case = read(bench.source(mini))
    ways = _ways(bench.seed, method, settings or {}, per_task or {}, scope, training or {}, len(case.tasks))
    labels = [row.answer for row in case.rows["test"]]
    start = bench.subject
    hits = [_hits(bench, start, case.rows["test"])]
    about = []
    for number, (task, how) in enumerate(zip(case.tasks, ways), start=1):
        delta = kept(bench, start, case.request(task), how, f"task {number}")
        about.append(delta.lineage["task"])
        start = delta.apply(start)
        hits.append(_hits(bench, start, case.rows["test"]))
    notes = [*case.notes, f"Method {method}, {len(case.rows['train'])} training rows may be used."]
    return bench.scorecard(
        _scores(bench, case, hits),
        headline=["h_mean", "retain_accuracy", "forgotten_accuracy"],
        tables=[_table(case.tasks, labels, hits, about)],
        notes=notes,
        rows={name: len(rows) for name, rows in case.rows.items()},
    )


def _ways(
    seed: int,
    method: str,
    settings: Mapping[str, Any],
    per_task: Mapping[str, Sequence[Any]],
    scope: str,
    training: Mapping[str, Any],
    count: int,
) -> list[Way]:
    for name, each in per_task.items():
        if len(each) != count:
            raise ParameterError(f"continual_forgetting: per_task: {name} has {len(each)} values for {count} tasks")
    found = [
        way(
            "continual_forgetting",
            "image",
            method,
            {**settings, **{name: each[i] for name, each in per_task.items()}},
            scope,
            {"seed": seed, **training},
        )
        for i in range(count)
    ]
    # Each task draws anew.
    return [replace(one, training=replace(one.training, seed=one.training.seed + i)) for i, one in enumerate(found)]


def _hits(bench: Bench, subject: Any, rows: Sequence[Picture]) -> np.ndarray:
    ask: Any = Score(tuple(((row.id, "answer"), row, None, None) for row in rows))  # type: ignore[misc]
    return np.asarray(run(subject, [ask], bench.store)[0].hit, dtype=np.float64)


# --- scores ----------------------------------------------------------------------------------------------------------


def _scores(bench: Bench, case: Continual, hits: Sequence[np.ndarray]) -> list[Measured]:
    """The mean of all tasks' H-means, what the last model keeps, and what it still says of all forgotten classes."""
    rows, last = case.rows["test"], case.tasks[-1]
    gone = {name for task in case.tasks for name in task.forget}
    golds = {f"gold/{i}": _hits(bench, gold, rows) for i, gold in enumerate(bench.golds)}
    found = [_mean_h(bench, case, hits)]
    for name, classes, direction, sentence in (
        ("retain_accuracy", last.retain, "higher", "How often unseen pictures of kept classes get their class."),
        ("forgotten_accuracy", gone, "closest_to_gold", "How often those of all forgotten classes still do."),
    ):
        chosen = [i for i, row in enumerate(rows) if row.answer in classes]
        each = {role: values[chosen] for role, values in {"before": hits[0], "after": hits[-1], **golds}.items()}
        ideal = "gold's value" if direction != "higher" else "the value before"
        roles: dict[str, list[Values]] = {}
        units = Units.of(("test", [rows[i] for i in chosen]))
        for role, one in each.items():
            roles.setdefault(role.partition("/")[0], []).append(Values(units, _mean(one), one))
        found.append(gather(name, roles, bench.draws, direction=direction, ideal=ideal, sentence=sentence))
    return found


def _mean_h(bench: Bench, case: Continual, hits: Sequence[np.ndarray]) -> Measured:
    rows = case.rows["test"]
    spans: list[tuple[slice, np.ndarray]] = []
    units: list[tuple[str, list[Picture]]] = []
    count = 0
    for number, (task, before, after) in enumerate(zip(case.tasks, hits, hits[1:]), start=1):
        for kind, classes, values in (("forget", task.forget, before - after), ("retain", task.retain, after)):
            chosen = [i for i, row in enumerate(rows) if row.answer in classes]
            units.append((f"{kind} {number}", [rows[i] for i in chosen]))
            spans.append((slice(count, count + len(chosen)), values[chosen]))
            count += len(chosen)

    def aggregate(weights: np.ndarray) -> np.ndarray:
        means = [_mean(values)(weights[:, span]) for span, values in spans]
        return np.mean([h_mean(retain, drop) for drop, retain in zip(means[::2], means[1::2])], axis=0)

    values = {"after": [Values(Units.of(*units), aggregate)]}
    sentence = "Harmonic mean of accuracy kept and of accuracy lost on what was to be forgotten, mean over tasks."
    return gather("h_mean", values, bench.draws, direction="higher", ideal="1", sentence=sentence)


def _mean(each: np.ndarray) -> Aggregate:
    """The weighted mean; a draw without any of the rows counts as 0."""
    return lambda weights: weights @ each / np.maximum(weights.sum(axis=1), 1e-12)


def _table(
    tasks: Sequence[Task], labels: Sequence[str], hits: Sequence[np.ndarray], about: Sequence[Mapping[str, Any]]
) -> Table:
    lines = []
    for number, (task, before, after, told) in enumerate(zip(tasks, hits, hits[1:], about), start=1):
        got = figures(task, labels, before, after)
        cells = ["" if value is None else f"{100 * value:.1f}" for value in got.values()]
        active = f"{told['active']} of {told['of']}" if "active" in told else ""
        share = f"{100 * told['share']:.2f}" if "share" in told else ""
        lines.append([number, ", ".join(task.forget), *cells, share, active, told["rows"], told["seconds"]])
    columns = ["task", "classes", "before", "forget", "retain", "old", "missing", "H", "trainable %", "active", "rows"]
    return Table("Tasks", [*columns, "seconds"], lines, "Accuracies on unseen rows in percent; `old`: earlier tasks'.")
