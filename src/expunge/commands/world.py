"""`expunge world`: the invented world on which everything runs offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .catalogue import Json
from .console import progressing, say, say_json

app = typer.Typer()


@app.callback()
def group() -> None:
    """The invented world on which everything runs offline."""


@app.command()
def build(
    out: Annotated[Path, typer.Option(help="Folder for data, models and a request ready to run.")],
    seed: Annotated[int, typer.Option(help="Another seed is another world.")] = 0,
    gold_seeds: Annotated[int, typer.Option(min=1, help="Models trained without the forget rows.")] = 3,
    json: Json = False,
) -> None:
    """Write a seeded world: rows, an original model, models that never saw the forget rows, and request.yaml."""
    from .. import world

    with progressing(json) as progress:
        world.build(
            out, seed=seed, gold_seeds=gold_seeds, progress=progress.phase("build the world") if progress else None
        )
    if json:
        say_json({"folder": out, "request": out / "request.yaml"})
    else:
        say(f"{out}: data/, models/ and request.yaml. Next: expunge run {out / 'request.yaml'}")
