"""`expunge delta`: look at what a method changed, put it on a model, stack several, take it back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .catalogue import Json
from .console import say, say_json, say_table, size

app = typer.Typer()
Folder = Annotated[Path, typer.Argument(help="Delta folder, e.g. OUT/delta.")]


@app.callback()
def group() -> None:
    """What a method changed: show, apply, stack, negate. The base model is never modified."""


@app.command()
def show(delta: Folder, json: Json = False) -> None:
    """Show kind, size, tensors and lineage of a delta."""
    from ..deltas import Delta

    found = Delta.load(delta)
    cost = found.cost()
    entries = {name: {key: list(t.shape) for key, t in tensors.items()} for name, tensors in found.entries.items()}
    if json:
        say_json({"kind": found.kind, "base": found.base, "cost": cost, "lineage": found.lineage, "tensors": entries})
        return
    rows = [["kind", found.kind], ["base", found.base], *([k, v] for k, v in found.lineage.items())]
    rows += [["parameters moved", f"{cost['parameters']:,}"], ["size", size(cost["bytes"])]]
    say_table(["delta", str(delta)], rows)
    say()
    say_table(["tensor", "shape"], [[n, ", ".join(f"{k} {v}" for k, v in e.items())] for n, e in entries.items()])


@app.command()
def apply(
    deltas: Annotated[list[Path], typer.Argument(help="One delta folder or several, applied in this order.")],
    base: Annotated[str, typer.Option(help="The model the delta belongs to: folder, hub id, or the request file.")],
    out: Annotated[Path, typer.Option(help="Folder for the changed model.")],
    scale: Annotated[float, typer.Option(help="Share of the change; -1 moves the other way.")] = 1.0,
) -> None:
    """Write base + delta as an ordinary model folder.

    The base itself is what undoes it. Name the request file as the base where it has a template of its own.
    """
    from ..deltas import Delta, compose
    from ..errors import DeltaError
    from ..subjects.memory import remembers

    found = [Delta.load(folder) for folder in deltas]
    delta = found[0] if len(found) == 1 else compose(found)
    if Path(base).suffix in (".yaml", ".yml", ".json"):
        from ..request import load
        from ..run import load_subject

        subject = load_subject(load(base))
    else:
        from ..subjects.language import LanguageModel

        subject = LanguageModel.load(base)
    changed = delta.apply(subject, scale=scale)
    place = remembers(changed.model)
    if place:
        raise DeltaError(
            f"a model folder cannot hold the memory at {place}; keep base and delta, and serve them together"
        )
    changed.save(out)
    say(str(out))


@app.command()
def stack(
    deltas: Annotated[list[Path], typer.Argument(help="Delta folders in the order in which they were made.")],
    out: Annotated[Path, typer.Option(help="Folder for the one delta.")],
) -> None:
    """Combine deltas made one on top of the other into one."""
    from ..deltas import Delta, compose

    compose([Delta.load(folder) for folder in deltas]).save(out)
    say(str(out))


@app.command()
def negate(delta: Folder, out: Annotated[Path, typer.Option(help="Folder for the opposite delta.")]) -> None:
    """Write the delta that leads from the changed model back to its base."""
    from ..deltas import Delta

    Delta.load(delta).negate().save(out)
    say(str(out))
