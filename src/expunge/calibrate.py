"""Which metrics to trust on the user's own models: the metrics are measured on models whose truth is known.

Knowing models are the request's original and others that were trained on the forget rows; ignorant ones are its golds.
Each also stands in the pool after a little training on retain rows, which changes neither (`drift`). For every metric

- faithfulness: AUC of telling knowing from ignorant models, turned so that the original's side counts as knowing;
- quantisation, relearning: how still the value holds, 1 - mean |change| / gap, at least 0, where the gap is the
  distance between the means of both pools: under 4-bit rounding, and on untaught forget rows after the other half was
  relearned;
- trust: the harmonic mean of the three, with faithfulness rescaled so that chance is 0.

Metrics that some model has no value of are left out, each with the reason.

After OpenUnlearning's meta-evaluation (arXiv:2506.12618, section 5), which compares unlearned models' change with
gold's; here only models of known truth are used, so that no unlearning method decides what a metric is worth.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, harmonic_mean
from typing import Any

from . import registry
from .errors import RequestError
from .files import write_text
from .request import load
from .trials import run_trials

Progress = Callable[[str, int, int], None]
VERSION = 2
"""Raised when the same model would get other values."""
FAITHFUL, STEADY = 0.9, 0.75
"""AUC and stability from which a metric counts as trusted."""
CHANGES = ("none", "drift", "quantise", "relearn")


@dataclass(frozen=True)
class Calibrated:
    """What one metric is worth on this family of models."""

    metric: str
    faithfulness: float
    quantisation: float
    relearning: float
    trust: float
    known: float
    """Mean over knowing models."""
    unknown: float
    """Mean over ignorant models."""
    models: int
    """Values in both pools."""

    @property
    def word(self) -> str:
        if self.faithfulness >= FAITHFUL and min(self.quantisation, self.relearning) >= STEADY:
            return "trust"
        return "with care" if self.faithfulness >= FAITHFUL else "do not trust"


@dataclass(frozen=True)
class Calibration:
    """What came of it."""

    metrics: list[Calibrated]
    """The most trusted first."""
    left_out: dict[str, str]
    """metric -> why some model has no value of it."""


def one(
    *, request: str, fields: dict[str, Any], model: str, change: str, number: int, steps: int, rate: float, folder: str
) -> dict[str, Any]:
    """Values of every metric on one changed model: {part of the forget rows: {metric: a value, or why there is none}}.

    For `relearn`, `half` is the untaught half after relearning, `half before` the same rows before.
    """
    from .methods.optimise.loop import fit
    from .request import read_data
    from .rows import asked_for
    from .run import load_subject
    from .subjects.rounding import round_to_nearest
    from .tables.passes import Store

    made = load(request, fields)
    data = {name: asked_for(rows) for name, rows in read_data(made).items()}
    subject = load_subject(made, model)
    golds = [load_subject(made, path) for path in made.gold if path != model]
    host = subject if model == made.model else load_subject(made)
    store = Store(Path(folder) / "tables")
    if change == "none":
        return {"all": _values(subject, golds, host, data, store)}
    entities = sorted({row.entity or row.id for row in data["forget"]})
    taught = set(entities[number % 2 :: 2])
    lesson = [row for row in data["forget"] if (row.entity or row.id) in taught]
    rest = {**data, "forget": [row for row in data["forget"] if (row.entity or row.id) not in taught]}
    changed = subject.copy()
    if change == "quantise":
        round_to_nearest(changed.model, 4)
        changed.__dict__.pop("fingerprint", None)
        return {"all": _values(changed, golds, host, data, store)}
    rows = lesson if change == "relearn" else data["retain"]
    encoded = [changed.encode(row) for row in rows]
    fit(changed, encoded, steps=steps, batch_size=16, learning_rate=rate, seed=number)
    if change == "drift":
        return {"all": _values(changed, golds, host, data, store)}
    return {
        "half before": _values(subject, golds, host, rest, store),
        "half": _values(changed, golds, host, rest, store),
    }


def _values(subject: Any, golds: Sequence[Any], host: Any, data: dict[str, Any], store: Any) -> dict[str, float | str]:
    from dataclasses import replace

    from .metrics.measure import more_tables, values
    from .tables.passes import ask_all, longest_answer
    from .tables.view import NotApplicable

    limit = longest_answer(subject, data)
    parts = [part for part in registry.serving("metrics", subject.modality) if part.own]
    more = more_tables([part.name for part in parts])
    named = {f"gold/{i}": gold for i, gold in enumerate(golds)}
    view, *others = (
        ask_all(model, data, limit, store, more=more, host=host, golds=named, name=name)
        for name, model in {subject.name: subject, **named}.items()
    )
    view = replace(view, golds=others)
    found: dict[str, float | str] = {}
    for part in parts:
        try:
            found[part.name] = values(part, view).value
        except NotApplicable as reason:
            found[part.name] = str(reason)
    return found


def calibrate(
    request: str | Path,
    out: str | Path,
    *,
    knowing: Sequence[str] = (),
    ignorant: Sequence[str] = (),
    variants: int = 2,
    steps: int = 16,
    learning_rate: float = 3e-4,
    fields: dict[str, Any] | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Measure all metrics on models whose truth is known; writes calibration.json and calibration.html into `out`.

    Args:
        request: its model knows, its golds do not; forget, retain and (for membership) holdout rows are needed.
        knowing, ignorant: further models.
        variants: drifted copies of each model, each with another seed.
        steps: optimiser steps of drift and of relearning.

    Raises:
        RequestError: no ignorant model, or no retain rows.
    """
    made = load(request, fields or {})
    known = [made.model, *knowing]
    unknown = [*made.gold, *ignorant]
    if not unknown:
        raise RequestError(f"{request}: calibration needs models that never saw the forget rows: gold, or --ignorant")
    if made.data.retain is None:
        raise RequestError(
            f"{request}: calibration needs data.retain, for drift that changes no knowledge of forget rows"
        )
    folder = Path(out).absolute()
    grid = [
        {
            "request": str(Path(request).absolute()),
            "fields": dict(fields or {}),
            "model": model,
            "change": change,
            "number": number,
            "steps": steps,
            "rate": learning_rate,
            "folder": str(folder),
        }
        for model in (*known, *unknown)
        for change in CHANGES
        for number in range({"none": 1, "quantise": 1, "relearn": 2, "drift": variants}[change])
    ]
    tell = None if progress is None else lambda done, total: progress("calibrate", done, total)
    found = run_trials(one, grid, folder / "values", version=VERSION, workers=workers, progress=tell)
    rows = [{**asked, "values": result} for asked, result in zip(grid, found)]
    judged = judge(rows, set(known))
    write_text(
        folder / "calibration.json",
        json.dumps({**asdict(judged), "values": rows}, indent=1, ensure_ascii=False) + "\n",
    )
    from .report.render import render

    context = {
        "name": made.name,
        "lines": judged.metrics,
        "left_out": judged.left_out,
        "known": known,
        "unknown": unknown,
        "steps": steps,
    }
    write_text(folder / "calibration.html", render("calibration.html.j2", context))
    return judged


def judge(rows: Sequence[dict[str, Any]], known: set[str]) -> Calibration:
    """Metrics by trust, from the values of all models."""
    from .verdict import auc

    whole = [row for row in rows if "all" in row["values"]]
    left_out: dict[str, str] = {}
    for row in rows:
        for part in row["values"].values():
            for name, value in part.items():
                if isinstance(value, str):
                    left_out.setdefault(name, value)
    metrics = [name for name in whole[0]["values"]["all"] if name not in left_out]
    found = []
    for name in metrics:
        pool = {
            side: [
                r["values"]["all"][name] for r in whole if r["change"] != "quantise" and (r["model"] in known) == side
            ]
            for side in (True, False)
        }
        gap = fmean(pool[True]) - fmean(pool[False])
        sign = 1 if gap >= 0 else -1
        faithful = auc([sign * v for v in pool[True]], [sign * v for v in pool[False]])
        start = {row["model"]: row["values"]["all"][name] for row in whole if row["change"] == "none"}
        quantised = [abs(r["values"]["all"][name] - start[r["model"]]) for r in whole if r["change"] == "quantise"]
        relearned = [
            abs(r["values"]["half"][name] - r["values"]["half before"][name])
            for r in rows
            if r["change"] == "relearn" and r["model"] not in known
        ]
        still = [max(0.0, 1 - fmean(moved) / abs(gap)) if gap else 0.0 for moved in (quantised, relearned)]
        found.append(
            Calibrated(
                metric=name,
                faithfulness=faithful,
                quantisation=still[0],
                relearning=still[1],
                trust=harmonic_mean([max(0.0, 2 * faithful - 1), *still]),
                known=fmean(pool[True]),
                unknown=fmean(pool[False]),
                models=sum(map(len, pool.values())),
            )
        )
    return Calibration(sorted(found, key=lambda one_: (-one_.trust, -one_.faithfulness, one_.metric)), left_out)
