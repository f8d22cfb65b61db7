"""`expunge list`, `expunge card`, `expunge schema`: what there is, from the registry's cards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .console import say, say_json, say_table

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Plugins = Annotated[
    list[Path] | None,
    typer.Option("--plugin", help="Python file whose decorated functions become parts.", show_default=False),
]


def load_plugins(files: list[Path] | None) -> None:
    from ..registry import load_plugin

    for file in files or []:
        load_plugin(file)


def list_parts(
    room: Annotated[
        str, typer.Argument(help="methods, merges, attacks, metrics, benchmarks, subjects or reproductions.")
    ],
    json: Json = False,
    plugin: Plugins = None,
) -> None:
    """List the parts of one kind."""
    from ..cards import card_dict, first_sentence
    from ..registry import parts

    load_plugins(plugin)
    found = parts(room)
    if json:
        say_json([{**card_dict(part.card), "parameters": part.describe()} for part in found])
        return
    third = {"methods": "intention", "attacks": "group", "metrics": "direction"}.get(room)
    rows = [
        [part.name, *([getattr(part.card, third)] if third else []), first_sentence(part.card.summary)]
        for part in found
    ]
    say_table(["name", *([third] if third else []), "what it does"], rows)


def card(
    name: Annotated[str, typer.Argument(help="Name of a method, attack, metric, benchmark, subject or reproduction.")],
    json: Json = False,
    plugin: Plugins = None,
) -> None:
    """Show what a part says of itself.

    Paper, intention, needs, cost, known weaknesses, parameters with their defaults.
    """
    from ..cards import card_dict

    load_plugins(plugin)
    part = find_part(name)
    entries = card_dict(part.card)
    if json:
        say_json({"room": part.room, **entries, "parameters": part.describe()})
        return
    say(f"{part.name} ({entries.pop('kind')})")
    say(entries.pop("summary"))
    say()
    rows = [[key.replace("_", " "), _words(value)] for key, value in entries.items() if key != "name"]
    say_table(["what", "value"], [row for row in rows if row[1]])
    described = part.describe()
    if described:
        say()
        say_table(["parameter", "default", "type"], [[d["name"], d["default"], d["type"]] for d in described])


def find_part(name: str) -> Any:
    """The part of that name, whatever its room.

    Raises:
        UnknownNameError: with the nearest names of all rooms.
    """
    from ..errors import UnknownNameError, suggest
    from ..registry import ROOMS, get, parts

    # A reproduction has the name of what it is about.
    for room in ROOMS:
        try:
            return get(room, name)
        except UnknownNameError:
            continue
    names = {part.name for room in ROOMS for part in parts(room)}
    raise UnknownNameError(f"nothing in the catalogue is called {name!r}. {suggest(name, names)}")


def schema() -> None:
    """Print the JSON schema of the request file."""
    from ..request import schema as request_schema

    say_json(request_schema())


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join("open" if item is None else str(item) for item in value)
    return str(value)
