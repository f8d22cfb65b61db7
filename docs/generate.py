"""Writes what the cards say into docs/reference/*.md and docs/systems.md; `--check` fails where a file is stale.

The forty systems are listed once, in docs/systems.csv: paper, the names of its parts in the product, and the ones that
come later. Whether a part is there is read from the registry.
"""

from __future__ import annotations

import csv
import sys
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

from expunge import cards, evidence
from expunge.cards import card_dict
from expunge.registry import ROOMS, Part, parts

DOCS = Path(__file__).parent
NOTE = "<!-- Written by `make docs` from the cards in src/expunge; edit those. -->\n"
COLUMNS = {
    "methods": ("kind", "intention", "paper"),
    "attacks": ("group", "access", "paper"),
    "metrics": ("direction", "ideal", "paper"),
    "benchmarks": ("paper",),
    "subjects": ("modality",),
}
INTRODUCTION = {
    "methods": "How to forget. Parameters: `method: {name: npo, beta: 0.2}` in the request, or `--set beta=0.2`.",
    "attacks": "How the audit tries to bring the knowledge back. All run by default, at the budget of their defaults.",
    "metrics": "What is measured before, after and on gold. A number is an interval over forget entities.",
    "benchmarks": "Published data with its published protocol.",
    "subjects": "What kinds of model can be changed and audited.",
}


def main() -> int:
    pages = {DOCS / "reference" / f"{room}.md": reference(room, parts(room)) for room in ROOMS}
    pages[DOCS / "systems.md"] = systems()
    stale = [path for path, text in pages.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv:
        for path in stale:
            print(f"{path.relative_to(DOCS.parent)} is stale: run `make docs` and commit the result", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.parent.mkdir(exist_ok=True)
        path.write_text(pages[path], encoding="utf-8")
        print(path.relative_to(DOCS.parent))
    return 0


def reference(room: str, found: list[Part]) -> str:
    columns = COLUMNS[room]
    rows = [[f"[`{p.name}`](#{p.name})", *(_entry(p, c) for c in columns), _first(p.card.summary)] for p in found]
    lines = [
        NOTE,
        f"# {room.capitalize()}\n",
        INTRODUCTION[room] + "\n",
        _table(["name", *columns, "what it does"], rows),
    ]
    return "\n".join(lines) + "".join("\n" + _section(part) for part in found)


def _section(part: Part) -> str:
    entries = card_dict(part.card)
    shown = [key for key, value in entries.items() if key not in ("name", "summary") and value not in ("", [], None)]
    lines = [f"## {part.name}\n", entries["summary"] + "\n"]
    lines += [f"- {key.replace('_', ' ')}: {_entry(part, key)}" for key in shown]
    if part.preset:
        lines.append("- stands for: " + ", ".join(f"`{key} = {value}`" for key, value in part.preset.items()))
    described = part.describe()
    if described:
        rows = [[f"`{d['name']}`", f"`{d['default']}`", d["type"].replace("|", "or")] for d in described]
        lines += ["", _table(["parameter", "default", "type"], rows)]
    return "\n".join(lines).rstrip("\n") + "\n"


def systems() -> str:
    """The table of docs/systems.csv with the state of each row."""
    names = {part.name for room in ROOMS for part in parts(room)}
    # Some papers became a field of every card or report, not a part.
    names |= {f.name for holder in (cards.MethodCard, evidence.Evidence) for f in fields(holder)}
    rows = []
    with open(DOCS / "systems.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            wanted = row["parts"].split()
            there = [name for name in wanted if name in names]
            state = (
                "registered" if len(there) == len(wanted) else "in part" if there else "later" if row["later"] else "-"
            )
            if any(find_spec(f"expunge.reproductions.{name}") for name in wanted):
                state += ", reproduced"
            shown = ", ".join(f"`{name}`" if name in names else name for name in wanted)
            rows.append([row["number"], row["paper"], shown, state])
    lines = [
        NOTE,
        "# Systems\n",
        "The forty papers the project sets out to cover, the names of their parts here, and how far each is.",
        "`registered`: every part can be run from the command line and from Python.",
        "`reproduced`: `expunge reproduce NAME` measures the paper's claim at small scale.\n",
        _table(["#", "paper", "here", "state"], rows),
    ]
    return "\n".join(lines)


def _entry(part: Part, key: str) -> str:
    value = getattr(part.card, key)
    if key == "paper" and value.startswith("arXiv:"):
        return f"[{value}](https://arxiv.org/abs/{value.removeprefix('arXiv:')})"
    if isinstance(value, tuple):
        return ", ".join("open" if item is None else f"{item}" for item in value)
    return str(value)


def _first(summary: str) -> str:
    return summary.split(". ")[0].rstrip(".:")


def _table(header: list[str] | tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
