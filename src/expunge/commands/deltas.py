"""`expunge delta`: look at what a method changed, put it on a model, stack or merge several, take it back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .catalogue import Json, Plugins, load_plugins
from .console import assignments, say, say_json, say_table

app = typer.Typer()
Folder = Annotated[Path, typer.Argument(help="Delta folder, e.g. OUT/delta.")]


@app.callback()
def group() -> None:
    """What a method changed: show, apply, stack, merge, negate. The base model is never modified."""


@app.command()
def show(delta: Folder, json: Json = False) -> None:
    """Show kind, size, tensors and lineage of a delta."""
    from ..deltas import Delta
    from ..report.words import size

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
    changed = delta.apply(_base(base), scale=scale)
    place = remembers(changed.model)
    if place:
        raise DeltaError(
            f"a model folder cannot hold the memory at {place}; keep base and delta, and serve them together"
        )
    changed.save(out)
    say(str(out))


def _base(source: str) -> Any:
    """The model a folder, hub id or request file names."""
    if Path(source).suffix in (".yaml", ".yml", ".json"):
        from ..request import load
        from ..run import load_subject

        return load_subject(load(source))
    from ..subjects.opening import open_subject

    return open_subject(source)


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
def merge(
    deltas: Annotated[list[Path], typer.Argument(help="Delta folders, all made on one base.")],
    out: Annotated[Path, typer.Option(help="Folder for the one delta.")],
    how: Annotated[str, typer.Option(help="The merge; `expunge list merges` shows all.")] = "task_arithmetic",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A parameter of the merge, e.g. density=0.2.", show_default=False)
    ] = None,
    base: Annotated[
        str, typer.Option(help="The base: folder, hub id or request file, for merges that look at it.")
    ] = "",
    rows: Annotated[
        list[Path] | None,
        typer.Option("--rows", help="Rows or pictures that such merges ask about; several make several sets."),
    ] = None,
    plugin: Plugins = None,
) -> None:
    """Make one delta of several that were made side by side on one base.

    So an unlearning and another fine-tune of the same model come together. Deltas of different bases are refused.
    """
    load_plugins(plugin)
    from ..deltas import Delta
    from ..merges.case import merge as carry_out
    from ..pictures import read_pictures
    from ..rows import Source, read_rows

    settings = assignments(set_ or [])
    found = [Delta.load(folder) for folder in deltas]
    subject = _base(base) if base else None
    read: Any = read_pictures if subject is not None and subject.modality == "image" else read_rows
    sets = [read(Source(str(path)), path.stem) for path in rows or []]
    carry_out(found, how, settings, subject=subject, rows=sets).save(out)
    say(str(out))


@app.command()
def negate(delta: Folder, out: Annotated[Path, typer.Option(help="Folder for the opposite delta.")]) -> None:
    """Write the delta that leads from the changed model back to its base."""
    from ..deltas import Delta

    Delta.load(delta).negate().save(out)
    say(str(out))
