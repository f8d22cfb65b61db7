"""`expunge edit`: facts that a model is to state differently."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .catalogue import Json, Plugins, load_plugins
from .console import assignments, progressing, say, say_rich


def edit(
    request: Annotated[Path, typer.Argument(help="The edit request, YAML or JSON; docs/editing.md describes it.")],
    method: Annotated[str | None, typer.Option(help="Another editor than the request's.", show_default=False)] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="A parameter of the editor, e.g. layer=0.2.", show_default=False),
    ] = None,
    mode: Annotated[
        str | None, typer.Option(help="one, batch or sequence, in place of the request's.", show_default=False)
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for deltas and scorecard.", show_default=False)] = None,
    plugin: Plugins = None,
    json: Json = False,
) -> None:
    """Edit facts and measure what that did.

    Success, rephrasings, portability, locality and fluency; every edit is a delta that can be left out again.
    """
    load_plugins(plugin)
    settings = assignments(set_ or [])
    from ..editing import edit as carry_out
    from ..editing import load

    read = load(request)
    folder = out or Path(read.out or Path("runs") / read.name)
    with progressing(json) as progress:
        card = carry_out(read, out=folder, method=method, settings=settings, mode=mode, progress=progress)
    if json:
        say((folder / "scorecard.json").read_text(encoding="utf-8").rstrip("\n"))
        return
    from ..report import scorecard

    for table in [scorecard.table(card), *scorecard.tables(card)]:
        say_rich(table)
    for note in card.notes:
        say(note)
    say(f"scorecard: {folder / 'scorecard.html'}")
