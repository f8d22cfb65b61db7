"""`expunge bench`, `sweep`, `calibrate`, `reproduce`: published protocols and published claims."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .catalogue import Json, Plugins, load_plugins
from .console import assignments, progressing, say, say_card, say_json, say_rich, say_table
from .work import NOT_MET

Set = Annotated[
    list[str] | None, typer.Option("--set", help="A parameter of the part, e.g. split=forget05.", show_default=False)
]


def bench(
    name: Annotated[str, typer.Argument(help="The benchmark; `expunge list benchmarks` shows all.")],
    model: Annotated[str, typer.Argument(help="Model under test: folder or hub id, or a run's folder.")],
    original: Annotated[str | None, typer.Option(help="The model before unlearning.", show_default=False)] = None,
    gold: Annotated[
        list[str] | None, typer.Option("--gold", help="Model retrained without the forget rows.", show_default=False)
    ] = None,
    data: Annotated[
        str, typer.Option(help="Folder with the published files, or a hub id. Without it: the mini version.")
    ] = "",
    set_: Set = None,
    out: Annotated[Path | None, typer.Option(help="Folder for tables and scorecard.", show_default=False)] = None,
    world: Annotated[
        Path | None,
        typer.Option(help="Folder of the world that the mini version is about.", show_default="the model's own"),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ...", show_default=False)] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 ...", show_default="as stored")] = None,
    plugin: Plugins = None,
    json: Json = False,
) -> None:
    """Run a benchmark on a model.

    Its published protocol, on published data or on the mini version about the invented world. The same
    command goes on where a killed one stopped.
    """
    load_plugins(plugin)
    settings = assignments(set_ or [])
    from ..bench import bench as carry_out
    from ..registry import get

    get("benchmarks", name).resolve(settings)
    folder = out or Path("runs") / "bench" / name
    with progressing(json) as progress:
        card = carry_out(
            name,
            model,
            original=original,
            gold=gold or [],
            data=data,
            settings=settings,
            out=folder,
            world=world,
            device=device,
            dtype=dtype,
            progress=progress,
        )
    say_card(card, folder, json)


def sweep(
    file: Annotated[Path, typer.Argument(help="The sweep file, YAML; docs/sweep.md describes it.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the sweep.", show_default="runs/NAME")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes.", show_default="as many as cores")] = None,
    engine: Annotated[str, typer.Option(help="processes, or ray.")] = "processes",
    plugin: Plugins = None,
    json: Json = False,
) -> None:
    """Carry out a request by many methods and seeds.

    Methods x scopes x seeds x benchmarks from one file, with a hyperparameter search if it asks for one. Results as
    one table and a leaderboard page. The same command goes on where a killed one stopped.
    """
    load_plugins(plugin)
    from ..sweep import read
    from ..sweep import sweep as carry_out

    made = read(file)
    folder = out or Path("runs") / made.name
    with progressing(json) as progress:
        results = carry_out(made, folder, workers=workers, engine=engine, progress=progress)
    if json:
        say_json(results)
        return
    from ..report import leaderboard

    say_rich(leaderboard.table(results))
    say(f"leaderboard: {folder / 'leaderboard.html'}")


def calibrate(
    request: Annotated[Path, typer.Argument(help="Request file: its model knows the forget rows, its golds do not.")],
    knowing: Annotated[
        list[str] | None, typer.Option("--knowing", help="Another model that knows them.", show_default=False)
    ] = None,
    ignorant: Annotated[
        list[str] | None, typer.Option("--ignorant", help="Another model that never saw them.", show_default=False)
    ] = None,
    variants: Annotated[int, typer.Option(help="Drifted copies of each model.")] = 2,
    steps: Annotated[int, typer.Option(help="Steps of drift and of relearning.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Of drift and relearning.")] = 3e-4,
    out: Annotated[
        Path | None, typer.Option(help="Folder of values and page.", show_default="runs/NAME-calibration")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes.", show_default="as many as cores")] = None,
    json: Json = False,
) -> None:
    """Find out which metrics to trust on your models.

    Measures every metric on models whose truth is known: does it tell models that know from models that do not, and
    does it hold still under quantisation and relearning? The same command goes on where a killed one stopped.
    """
    from dataclasses import asdict

    from ..calibrate import calibrate as carry_out
    from ..request import load

    folder = out or Path("runs") / f"{load(request).name}-calibration"
    with progressing(json) as progress:
        found = carry_out(
            request,
            folder,
            knowing=knowing or [],
            ignorant=ignorant or [],
            variants=variants,
            steps=steps,
            learning_rate=learning_rate,
            workers=workers,
            progress=progress,
        )
    if json:
        say_json({"metrics": [{**asdict(one), "use": one.word} for one in found.metrics], "left_out": found.left_out})
        return
    columns = ["metric", "trust", "faithfulness", "quantisation", "relearning", "know it", "never saw it", "use"]
    rows = [
        [
            one.metric,
            *(f"{v:.2f}" for v in (one.trust, one.faithfulness, one.quantisation, one.relearning)),
            *(f"{v:.3g}" for v in (one.known, one.unknown)),
            one.word,
        ]
        for one in found.metrics
    ]
    say_table(columns, rows)
    for name, reason in found.left_out.items():
        say(f"{name} is not judged: {reason}")
    say(f"calibration: {folder / 'calibration.html'}")


def reproduce(
    name: Annotated[str, typer.Argument(help="The reproduction; `expunge list reproductions` shows all.")],
    seed: Annotated[
        list[int] | None, typer.Option("--seed", help="A seed; several give several.", show_default="0 1 2")
    ] = None,
    set_: Set = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for trials and findings.", show_default="runs/reproduce/NAME"),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Processes.", show_default="as many as cores")] = None,
    record: Annotated[
        Path | None, typer.Option(help="Also write NAME.md, its figures and NAME.json here, e.g. docs/reproductions.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with status 3 unless every claim holds.")] = False,
    plugin: Plugins = None,
    json: Json = False,
) -> int:
    """Test a paper's claims at small scale.

    Claim, published figures, criterion, measurement, verdict. Runs on the invented world, offline, over several
    seeds. The same command goes on where a killed one stopped.
    """
    load_plugins(plugin)
    changed = assignments(set_ or [])
    from ..environment import environment
    from ..registry import get
    from ..reproductions import page
    from ..reproductions.case import Case

    part = get("reproductions", name)
    settings = part.resolve(changed)
    seeds = seed or [0, 1, 2]
    folder = out or Path("runs") / "reproduce" / name
    with progressing(json) as progress:
        case = Case(
            folder,
            seeds,
            part.card.version,  # type: ignore[union-attr]
            workers,
            progress.phase(f"reproduce {name}") if progress else None,
        )
        findings = part.function(case, **settings)
    about = {**environment(), "minutes": case.seconds / 60}
    found = page.record(part, settings, changed, seeds, findings, about)
    path = page.write(found, folder)
    if record is not None:
        path = page.write(found, record)
    if json:
        say_json(found)
    else:
        for table in findings.tables:
            say(table.title)
            say_table([str(c) for c in table.columns], table.rows)
            say()
        for claim in findings.claims:
            say(f"{page.WORDS[claim.holds].upper()}: {claim.claim}")
            say(f"  published: {claim.published}")
            say(f"  criterion: {claim.criterion}")
            say(f"  measured:  {claim.measured}")
        say(f"findings: {path}")
    return NOT_MET if strict and not all(claim.holds for claim in findings.claims) else 0
