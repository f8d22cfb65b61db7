"""`expunge ledger`: the append-only record of requests and what became of them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .catalogue import Json
from .console import say, say_json, say_table

app = typer.Typer()
Place = Annotated[
    Path | None,
    typer.Option("--ledger", help="Ledger file; by default EXPUNGE_LEDGER or the user's.", show_default=False),
]


@app.callback()
def group() -> None:
    """The append-only record of requests and what became of them."""


@app.command("list")
def list_entries(ledger: Place = None, json: Json = False) -> None:
    """One line per entry."""
    from ..ledger import Ledger

    entries = Ledger(ledger).list()
    if json:
        say_json([asdict(entry) for entry in entries])
        return
    rows = [
        [e.number, e.time, e.event, *(e.body.get(key, "") for key in ("kind", "method", "verdict"))] for e in entries
    ]
    say_table(["number", "time", "event", "kind", "method", "verdict"], rows)


@app.command()
def show(number: Annotated[int, typer.Argument(help="Number of the entry.")], ledger: Place = None) -> None:
    """One entry in full, as JSON."""
    from ..ledger import Ledger

    say_json(asdict(Ledger(ledger).show(number)))


@app.command()
def verify(ledger: Place = None) -> None:
    """Recompute the hash chain.

    Exit status 2 and the first broken entry where it does not hold.
    """
    from ..errors import LedgerError
    from ..ledger import Ledger

    whole, sentence = Ledger(ledger).verify()
    if not whole:
        raise LedgerError(sentence)
    say(sentence)


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
