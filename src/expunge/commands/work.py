"""`expunge demo`, `run`, `plan`, `audit`, `compare`: the work itself."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import processes
from ..errors import ParameterError
from .catalogue import Json, Plugins, load_plugins
from .console import assignments, duration, progressing, remark, say, say_json, say_rich, say_table

if TYPE_CHECKING:
    from ..evidence import Evidence
    from ..plan import Plan

NOT_MET = 3
"""Exit code of --require."""

RequestFile = Annotated[Path, typer.Argument(help="The request file, YAML or JSON; `expunge schema` describes it.")]
Method = Annotated[str | None, typer.Option(help="Another method than the request's.", show_default=False)]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="A parameter of the method (beta=0.2) or a field of the request (training.epochs=3, proof=quick).",
        show_default=False,
    ),
]
Scope = Annotated[str | None, typer.Option(help="Which weights may move, e.g. role:mlp_out@5-7.", show_default=False)]
Out = Annotated[Path | None, typer.Option(help="Folder for delta, tables and report.", show_default=False)]
Require = Annotated[
    list[str] | None,
    typer.Option(
        "--require", help="Exit with status 3 unless the verdict is this one (or one of several).", show_default=False
    ),
]


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the world and the report.")] = Path("runs/demo"),
    method: Method = None,
    json: Json = False,
) -> None:
    """Forget some people of an invented world, and prove it.

    Builds the world and its models, changes the model, attacks the result, writes the report. Offline, in minutes.
    """
    from .. import world
    from ..request import load
    from ..run import run as carry_out

    with progressing(json) as progress:
        world.build(out / "world", progress=progress.phase("build the world") if progress else None)
        request = load(out / "world" / "request.yaml")
        evidence = carry_out(request, out=out / "report", method=method, progress=progress)
    _tell(evidence, out / "report", json)


def run(
    request: RequestFile,
    method: Method = None,
    set_: Set = None,
    scope: Scope = None,
    out: Out = None,
    plugin: Plugins = None,
    save_model: Annotated[
        bool, typer.Option("--save-model", help="Also write the changed model as a model folder.")
    ] = False,
    require: Require = None,
    json: Json = False,
) -> int:
    """Carry out a request: change, attack, judge, report.

    The same command goes on where a killed or interrupted one stopped.
    """
    _known_verdicts(require)
    settings, fields = _split(set_)
    load_plugins(plugin)
    read = _load(request, fields)
    from ..run import run as carry_out

    folder = out or _folder(read)
    with progressing(json) as progress:
        evidence = carry_out(read, out=folder, method=method, settings=settings, scope=scope, progress=progress)
        if save_model and processes.first():
            _save_model(read, folder)
    _tell(evidence, folder, json)
    return _met(evidence, require)


def plan(
    request: RequestFile,
    method: Method = None,
    set_: Set = None,
    scope: Scope = None,
    plugin: Plugins = None,
    json: Json = False,
) -> None:
    """Say what a run will need before anything starts.

    Trainable parameters, tokens, FLOPs, peak memory, time on this machine, and the passes of the audit.
    """
    settings, fields = _split(set_)
    load_plugins(plugin)
    read = _load(request, fields)
    from ..plan import plan as make
    from ..run import with_method

    made = make(with_method(read, method, settings, scope))
    if json:
        say_json(asdict(made))
        return
    for title, rows in _spoken(made):
        say_table([title, ""], rows)
        say()
    for remarked in made.remarks:
        remark(remarked)


def audit(
    model: Annotated[
        str, typer.Argument(help="Model that is said to have forgotten: folder or hub id, or a run's folder.")
    ],
    request: Annotated[Path, typer.Option(help="Request file that names what should be gone.")],
    gold: Annotated[
        list[str] | None, typer.Option("--gold", help="Model retrained without the forget rows.", show_default=False)
    ] = None,
    original: Annotated[str | None, typer.Option(help="The model before.", show_default=False)] = None,
    out: Out = None,
    set_: Set = None,
    plugin: Plugins = None,
    require: Require = None,
    json: Json = False,
) -> int:
    """Attack and judge a model that is said to have forgotten."""
    _known_verdicts(require)
    settings, fields = _split(set_)
    if settings:
        raise ParameterError(
            f"--set {next(iter(settings))}: an audit sets no method, only fields of the request such as audit.seed=3"
        )
    load_plugins(plugin)
    read = _load(request, fields)
    from ..run import audit_model

    folder = out or Path("runs") / f"{read.name}-audit"
    with progressing(json) as progress:
        evidence = audit_model(model, request=read, gold=gold, original=original, out=folder, progress=progress)
    _tell(evidence, folder, json)
    return _met(evidence, require)


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of two or more runs.")],
    out: Annotated[Path, typer.Option(help="Folder for the comparison.")] = Path("runs/comparison"),
    allow_mismatch: Annotated[
        bool, typer.Option("--allow-mismatch", help="Compare runs of different requests, models or attacks.")
    ] = False,
    json: Json = False,
) -> None:
    """Set runs side by side: a table and the frontier plot."""
    from ..evidence import Evidence

    if len(runs) < 2:
        raise typer.BadParameter(f"compare needs the folders of at least two runs, found only {runs[0]}.")
    found = [Evidence.load(folder / "evidence.json") for folder in runs]
    from ..report import compare as comparison

    names = [folder.name for folder in runs] if len({folder.name for folder in runs}) == len(runs) else None
    paths = comparison.write(found, out, names, allow_mismatch=allow_mismatch)
    if json:
        say(paths["compare.json"].read_text(encoding="utf-8").rstrip("\n"))
    else:
        say_rich(comparison.table(found, names))
        say(f"comparison: {paths['compare.html']}")


def _spoken(plan: Plan) -> list[tuple[str, list[list[str]]]]:
    """The plan in words: titles, and rows of what and how much."""
    from ..report.words import size

    p, t = plan.parameters, plan.tokens
    what = [
        ["model", plan.model],
        ["scope", plan.scope],
        ["trainable parameters", f"{p['trainable']:,} of {p['total']:,} ({100 * p['share']:.3g} %)"],
        ["optimiser steps", f"{t['steps']:,} ({t['steps per epoch']:,} per epoch)"],
        ["tokens", f"{t['fed']:,} ({t['fed per epoch']:,} per epoch), {t['answer tokens']:,} of answers"],
    ]

    def amounts(of: dict[str, float], unit: str) -> list[list[str]]:
        return [[name, size(value, unit)] for name, value in of.items() if value or name == "total"]

    return [
        (f"{plan.request}: {plan.method}", what),
        ("compute", amounts(plan.flops, "FLOP")),
        ("peak memory", amounts(plan.memory, "B")),
        (
            "time on this machine",
            [
                ["products", f"{size(plan.time['FLOP per second'], 'FLOP/s')}"],
                ["method, about", duration(plan.time["seconds"])],
            ],
        ),
        ("audit", [[name, str(value)] for name, value in plan.audit.items()]),
    ]


def _load(file: Path, fields: dict[str, Any]) -> Any:
    """The request; a mistake in it is found before anything heavy is imported."""
    from ..request import load

    return load(file, fields)


def _folder(request: Any) -> Path:
    """Where a run goes without --out."""
    return Path(request.out) if request.out else Path("runs") / request.name


def _split(pairs: list[str] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """--set values: (parameters of the method, fields of the request by dotted name)."""
    from ..request import Request

    given = assignments(pairs or [])
    fields = {name for name in given if "." in name or name in Request.model_fields}
    return ({k: v for k, v in given.items() if k not in fields}, {k: given[k] for k in given if k in fields})


def _known_verdicts(wanted: list[str] | None) -> None:
    from ..errors import UnknownNameError, suggest
    from ..report.words import VERDICTS

    for name in wanted or []:
        if name not in VERDICTS:
            raise UnknownNameError(f"--require: no verdict is called {name!r}. {suggest(name, VERDICTS)}")


def _met(evidence: Evidence, wanted: list[str] | None) -> int:
    if not wanted or evidence.verdict.verdict in wanted:
        return 0
    remark(f"--require not met: the verdict is {evidence.verdict.verdict}, wanted {' or '.join(wanted)}")
    return NOT_MET


def _tell(evidence: Evidence, folder: Path, json: bool) -> None:
    """The verdict and where the report is."""
    verdict = evidence.verdict
    if json:
        say_json({"out": folder, **asdict(evidence)})
        return
    flags = f" [{', '.join(verdict.flags)}]" if verdict.flags else ""
    say(f"verdict: {verdict.verdict}{flags}")
    say(verdict.because)
    if speed := _speed(evidence.cost.get("change") or {}):
        say(speed)
    say(f"report: {folder / 'report.html'}")


def _save_model(request: Any, folder: Path) -> None:
    from ..deltas import Delta
    from ..run import load_subject

    Delta.load(folder / "delta").apply(load_subject(request)).save(folder / "model")


def _speed(spent: dict[str, Any]) -> str:
    """What the method's steps reached; "" where that is not known."""
    from ..report.words import size

    rate, share = spent.get("flop_per_second"), spent.get("machine_share")
    if rate is None:
        return ""
    beside = f", {share:.0%} of this machine's matrix products" if share is not None else ""
    return f"steps: {size(rate, 'FLOP/s')}{beside}"
