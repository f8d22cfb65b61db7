"""`expunge ledger`: the append-only record of requests and what became of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .catalogue import Json
from .console import say, say_json, say_table

app = typer.Typer()
Place = Annotated[Path | None, typer.Option("--ledger", help="Ledger file; by default the user's.", show_default=False)]


@app.callback()
def group() -> None:
    """The append-only record of requests and what became of them."""


@app.command("list")
def list_entries(ledger: Place = None, json: Json = False) -> None:
    """One line per entry."""
    from ..ledger import Ledger

    entries = Ledger(ledger).list()
    if json:
        say_json(entries)
        return
    say_table(
        ["entry", "time", "event", "request"], [[e["number"], e["time"], e["event"], e["request"]] for e in entries]
    )


@app.command()
def show(number: Annotated[int, typer.Argument(help="Number of the entry.")], ledger: Place = None) -> None:
    """One entry in full, as JSON."""
    from ..ledger import Ledger

    say_json(Ledger(ledger).show(number))


@app.command()
def verify(ledger: Place = None) -> None:
    """Recompute the hash chain; exit status 2 and the number of the first broken entry where it does not hold."""
    from ..ledger import Ledger

    count = Ledger(ledger).verify()
    say(f"{count} entries, the chain holds")


@app.command()
def export(
    out: Annotated[Path | None, typer.Option(help="File to write; stdout by default.", show_default=False)] = None,
    ledger: Place = None,
) -> None:
    """All entries with their hashes, as JSON lines, for somebody else to verify."""
    from ..files import write_text
    from ..ledger import Ledger

    text = Ledger(ledger).export()
    if out is None:
        say(text.rstrip("\n"))
    else:
        write_text(out, text)
