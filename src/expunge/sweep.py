"""Sweeps: one request carried out by many methods, scopes, settings and seeds, from one file; results in one table.

    name: which-method
    request: request.yaml
    methods: [grad_diff, {npo: {beta: 0.05}}]
    seeds: [0, 1, 2]
    benchmarks: [tofu]
    search: {trials: 8, parameters: {npo.beta: [0.05, 0.1, 0.5], training.learning_rate: {low: 1.0e-4, high: 1.0e-3}}}

Every run is an ordinary run folder under `runs/`, every result one JSON file: a killed sweep goes on with what is
missing. Models before unlearning and golds are asked once for the whole sweep.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field

from . import registry
from .errors import RequestError, suggest
from .files import write_text
from .request import Named, Request, Seed, load, named
from .tables.store import content_key
from .trials import run_trials

Progress = Callable[[str, int, int], None]
VERSION = 1
"""Raised when the same run of a sweep would give other figures."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Range(_Strict):
    """Numbers between two bounds."""

    low: float
    high: float
    log: bool = Field(True, description="Drawn evenly on a logarithmic scale.")

    @pydantic.model_validator(mode="after")
    def _in_order(self) -> Range:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError("low must be below high, and above 0 on a logarithmic scale")
        return self

    def at(self, share: float) -> float:
        """The value at `share` (0 to 1) of the way, to four digits."""
        value = self.low * (self.high / self.low) ** share if self.log else self.low + (self.high - self.low) * share
        return float(f"{value:.4g}")


class Search(_Strict):
    """A hyperparameter search with a stated budget; every trial is recorded."""

    trials: Annotated[int, Field(ge=1)] = Field(description="Trials of each method, on the first seed.")
    parameters: dict[str, list[Any] | Range] = Field(
        description="What is varied: npo.beta, beta (of every method that has it), or a field of the request."
    )
    set: dict[str, Any] = Field({}, description="Request fields of search trials alone, e.g. {proof: quick}.")
    choose: Literal["balance", "robust", "utility"] = Field(
        "balance", description="Which trial is best: highest min(stays gone, utility kept), or one of the two."
    )
    seed: Seed = Field(0, description="Draws the trials.")


class Sweep(_Strict):
    """The sweep file."""

    name: str = Field("", description="The file's name by default.")
    request: str = Field(description="Request file, relative to this one.")
    methods: Annotated[list[Named], Field(min_length=1)] = Field(description="Names, or {name: settings}.")
    scopes: list[str | dict[str, Any]] = Field([], description="The request's own by default.")
    seeds: Annotated[list[Seed], Field(min_length=1)] = Field([0], description="Of training; each is a run.")
    set: dict[str, Any] = Field({}, description="Request fields of all runs by dotted name.")
    benchmarks: list[Named] = Field([], description="Run on every result: names, or {name: settings}.")
    search: Search | None = None


def read(path: str | Path) -> Sweep:
    """The sweep file, its request path made absolute.

    Raises:
        RequestError: it is missing or malformed, or names methods, benchmarks or parameters that do not exist.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(f"sweep file {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RequestError(f"sweep file {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise RequestError(f"sweep file {path} holds {type(values).__name__}, expected a mapping with request, methods")
    for key in values:
        if key not in Sweep.model_fields:
            raise RequestError(f"{path}: there is no field {key!r}. {suggest(str(key), Sweep.model_fields)}")
    try:
        made = Sweep.model_validate(values)
    except pydantic.ValidationError as error:
        first = error.errors()[-1]  # of a union the last form, which is the fullest
        kinds = ("list[", "function-", "Range")
        where = ".".join(str(part) for part in first["loc"] if not str(part).startswith(kinds))
        raise RequestError(f"{path}: {where} = {first['input']!r}: {first['msg']}") from None
    for name, settings in named(made.methods) or []:
        registry.get("methods", name).resolve(settings)
    for name, settings in named(made.benchmarks) or []:
        registry.get("benchmarks", name).resolve(settings)
    target = path.absolute().parent / made.request
    if not target.is_file():
        raise RequestError(f"{path}: request {made.request!r} is not a file (looked for {target})")
    return made.model_copy(update={"request": str(target), "name": made.name or path.stem})


Run = dict[str, Any]
"""Arguments of `one`: a run of the sweep."""


def plan(sweep: Sweep) -> list[Run]:
    """The runs that the file names, without those of the search.

    Raises:
        RequestError: a field that does not exist.
    """
    load(sweep.request, sweep.set)
    return [
        _run(sweep, method, settings, scope, seed, sweep.set)
        for method, settings in named(sweep.methods) or []
        for scope in (sweep.scopes or [None])  # type: ignore[list-item]
        for seed in sweep.seeds
    ]


def _run(
    sweep: Sweep, method: str, settings: Mapping[str, Any], scope: Any, seed: int, fields: Mapping[str, Any]
) -> Run:
    return {
        "request": sweep.request,
        "method": method,
        "settings": dict(settings),
        "scope": scope,
        "seed": seed,
        "fields": dict(fields),
        "benchmarks": [[name, own] for name, own in named(sweep.benchmarks) or []],
    }


def trials(sweep: Sweep) -> list[Run]:
    """The runs of the search: quasi-random points (Halton) for each method, the same for the same seed.

    Raises:
        RequestError: a parameter that no method has and that is no field of the request.
    """
    from scipy.stats import qmc

    search = sweep.search
    if search is None:
        return []
    found = []
    reached: set[str] = set()
    for method, settings in named(sweep.methods) or []:
        part = registry.get("methods", method)
        mine = {
            name: values
            for name, values in search.parameters.items()
            if _owner(name) in (None, method) and (_is_field(name) or _own(name) in part.parameters.model_fields)
        }
        reached |= set(mine)
        if not mine:
            continue
        points = qmc.Halton(len(mine), seed=search.seed).random(search.trials)
        for point in points:
            chosen, fields = dict(settings), {**sweep.set, **search.set}
            for (name, values), share in zip(mine.items(), point):
                value = values.at(share) if isinstance(values, Range) else values[int(share * len(values))]
                if _is_field(name):
                    fields[name] = value
                else:
                    chosen[_own(name)] = value
            part.resolve(chosen)
            scope = sweep.scopes[0] if sweep.scopes else None
            found.append(_run(sweep, method, chosen, scope, sweep.seeds[0], fields))
    for name in search.parameters:
        if name not in reached:
            known = [f"{m}.{p}" for m, _ in named(sweep.methods) or [] for p in _parameters(m)]
            raise RequestError(f"search.parameters: no method has {name!r}. {suggest(name, known)}")
    return found


def _parameters(method: str) -> list[str]:
    return list(registry.get("methods", method).parameters.model_fields)


def _is_field(name: str) -> bool:
    return name.partition(".")[0] in Request.model_fields


def _owner(name: str) -> str | None:
    """The method of `npo.beta`; None where the name is for all."""
    return None if _is_field(name) or "." not in name else name.partition(".")[0]


def _own(name: str) -> str:
    return name.rpartition(".")[2]


def one(
    *,
    folder: str,
    request: str,
    method: str,
    settings: dict[str, Any],
    scope: Any,
    seed: int,
    fields: dict[str, Any],
    benchmarks: list[list[Any]],
) -> dict[str, Any]:
    """Carry out one run and say how it went, in plain values."""
    from .bench import bench
    from .report.compare import entries
    from .run import run

    key = content_key(VERSION, request, method, settings, scope, seed, fields)
    out = Path(folder) / "runs" / f"{method}-{seed}-{key[:8]}"
    made = load(request, {**fields, "training.seed": seed})
    evidence = run(made, method=method, settings=settings, scope=scope, out=out)
    entry = entries([evidence])[0]
    strongest = entry.worst_recovery
    scores: dict[str, float] = {}
    for name, own in benchmarks:
        card = bench(name, out, gold=made.gold, settings=own, out=out / "bench" / name)
        scores |= {f"{name}.{score}": card.value(score) for score in card.headline}
    return {
        "folder": str(out.relative_to(folder)),
        "verdict": entry.verdict,
        "flags": list(entry.flags),
        "direct": entry.direct,
        "worst_probe": entry.worst,
        "worst": strongest.value if strongest else None,
        "stays_gone": entry.robust,
        "utility": entry.utility,
        "retain_change": entry.retain_change,
        "seconds": entry.seconds,
        "tokens": evidence.method.get("tokens", 0),
        **scores,
    }


def sweep(
    file: str | Path | Sweep,
    out: str | Path,
    *,
    workers: int | None = None,
    engine: str = "processes",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Carry out a sweep; writes results.csv, results.json and leaderboard.html into `out`.

    The search comes first: its best trial of each method is then run on all seeds like the methods of the file.

    Returns:
        {"runs": rows, "search": rows}; a row is the run's settings and its figures.

    Raises:
        RequestError: the file cannot be used. Errors of runs, as they are; finished runs are kept.
    """
    from .report import leaderboard

    made = file if isinstance(file, Sweep) else read(file)
    folder = Path(out).absolute()
    grid = plan(made)

    def carry_out(runs: Sequence[Run], phase: str) -> list[dict[str, Any]]:
        asked = [{"folder": str(folder), **one_} for one_ in runs]
        tell = None if progress is None else lambda done, total: progress(phase, done, total)
        found = run_trials(
            one, asked, folder / "results", version=VERSION, workers=workers, engine=engine, progress=tell
        )
        return [{**about, **result} for about, result in zip(runs, found)]

    searched = carry_out(trials(made), "search") if made.search else []
    chosen = best(searched, made.search.choose) if made.search else []
    for row in chosen:
        row["chosen"] = True
        grid += [
            _run(made, row["method"], row["settings"], row["scope"], seed, _without(row["fields"], made))
            for seed in made.seeds
        ]
    runs = carry_out(grid, "runs")
    results = {"name": made.name, "runs": runs, "search": searched}
    write_text(folder / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    write_text(folder / "results.csv", _csv([*runs, *searched]))
    leaderboard.write(results, folder, made.search.choose if made.search else None)
    return results


def _without(fields: dict[str, Any], made: Sweep) -> dict[str, Any]:
    """The fields of a search trial for the final runs: what holds for search trials alone is left out."""
    assert made.search is not None
    return {**{k: v for k, v in fields.items() if k not in made.search.set}, **made.set}


def best(rows: Sequence[dict[str, Any]], rule: str) -> list[dict[str, Any]]:
    """The best trial of each method by the stated rule; of equal ones the first."""

    def worth(row: dict[str, Any]) -> float:
        gone, kept = (float("-inf") if row[k] is None else float(row[k]) for k in ("stays_gone", "utility"))
        value = {"balance": min(gone, kept), "robust": gone, "utility": kept}[rule]
        return value if value == value else float("-inf")

    methods = dict.fromkeys(row["method"] for row in rows)
    return [max((row for row in rows if row["method"] == method), key=worth) for method in methods]


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    names = dict.fromkeys(name for row in rows for name in row if name not in ("request", "benchmarks"))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(names), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: json.dumps(v) if isinstance(v, dict | list) else v for k, v in row.items()})
    return text.getvalue()
