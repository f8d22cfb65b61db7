"""Writes what the cards say into docs/reference/*.md and docs/systems.md; `--check` fails where a file is stale.

The forty systems are listed once, in docs/systems.csv: paper, the names of its parts in the product, and the ones that
come later. Whether a part is there is read from the registry.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from expunge import cards, evidence
from expunge.audit import STANDARD
from expunge.cards import card_dict, first_sentence
from expunge.registry import ROOMS, Part, parts
from expunge.request import schema

DOCS = Path(__file__).parent
NOTE = "<!-- Written by `make docs` from the cards in src/expunge; edit those. -->\n"
COLUMNS = {
    "methods": ("kind", "intention", "paper"),
    "merges": ("paper", "cost"),
    "attacks": ("group", "access", "paper"),
    "metrics": ("direction", "ideal", "paper"),
    "benchmarks": ("paper", "data"),
    "subjects": ("modality",),
    "reproductions": ("paper", "cost"),
}
INTRODUCTION = {
    "methods": "How to forget. Parameters: `method: {name: npo, beta: 0.2}` in the request, or `--set beta=0.2`.",
    "merges": "How several deltas of one base become one: `expunge delta merge A B --how ties --set density=0.2 "
    "--out DIR`. [What for](../deltas.md).",
    "attacks": "How the audit tries to bring the knowledge back. By default these run: "
    + ", ".join(f"`{name}`" for name in STANDARD)
    + "; a request names others: `audit: {attacks: [direct, many_shot, {relearn: {steps: 64}}]}`.",
    "metrics": "What is measured before, after and on gold. A number is an interval over forget entities.",
    "benchmarks": "Published data with its published protocol: `expunge bench NAME MODEL [--gold M] [--data PATH]`. "
    "Without data: a mini version about the invented world, in the very same format.",
    "subjects": "What kinds of model can be changed and audited.",
    "reproductions": "Claims of papers, tested at small scale: `expunge reproduce NAME`. Recorded runs: "
    "[docs/reproductions](../reproductions).",
}


def main() -> int:
    pages = {DOCS / "reference" / f"{room}.md": reference(room, parts(room)) for room in ROOMS}
    pages[DOCS / "systems.md"] = systems()
    pages[DOCS / "reference" / "request.md"] = request()
    pages[DOCS / "rooms.md"] = rooms()
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
    rows = [
        [f"[`{p.name}`](#{p.name})", *(_entry(p, c) for c in columns), first_sentence(p.card.summary)] for p in found
    ]
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
            state += "".join(f", [{name}](reproductions/{name}.md)" for name in recorded(wanted))
            shown = ", ".join(f"`{name}`" if name in names else name for name in wanted)
            rows.append([row["number"], row["paper"], shown, state])
    lines = [
        NOTE,
        "# Systems\n",
        "The forty papers the project sets out to cover, the names of their parts here, and how far each is.",
        "`registered`: every part can be run from the command line and from Python.",
        "A link: what `expunge reproduce NAME` measured of the paper's claims at small scale.\n",
        _table(["#", "paper", "here", "state"], rows),
    ]
    return "\n".join(lines)


MODALITIES = {
    "language": ("subjects.language", "world.build", "world.corpus", "world.models"),
    "pictures": ("subjects.image", "pictures", "world.pictures"),
}
"""Modules that hold what is peculiar to a modality."""


def rooms() -> str:
    """The import graph, layer by layer, and who knows which modality."""
    import grimp

    graph = grimp.build_graph("expunge")
    with open(DOCS.parent / "pyproject.toml", "rb") as file:
        contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    layers = next(c["layers"] for c in contracts if c["type"] == "layers")

    def members(names: Sequence[str]) -> set[str]:
        return {m for m in graph.modules for name in names if f"{m}.".startswith(f"expunge.{name}.")}

    placed = [re.split(r" [:|] ", layer) for layer in layers]
    owner = {module: name for names in placed for name in names for module in members([name])}
    rows = []
    for names in placed:
        for name in names:
            used = {owner.get(i, "") for m in members([name]) for i in graph.find_modules_directly_imported_by(m)}
            rows.append([f"`{name}`", len(members([name])), ", ".join(sorted(used - {"", name}))])
    known = {kind: members(names) for kind, names in MODALITIES.items()}

    def knows(module: str, kind: str) -> bool:
        return bool(graph.find_modules_directly_imported_by(module) & known[kind])

    crossing = [
        f"`{module}` imports {b}"
        for a, b in itertools.permutations(MODALITIES, 2)
        for module in known[a]
        if graph.find_modules_directly_imported_by(module) & known[b]
    ]
    outside = [m for m in sorted(graph.modules) if not any(m in modules for modules in known.values())]
    who = [m.removeprefix("expunge.") for m in outside if knows(m, "pictures")]
    both = {m.removeprefix("expunge.") for m in outside if knows(m, "pictures") and knows(m, "language")}
    lines = [
        NOTE,
        "# Rooms\n",
        "Every layer imports only from those below it; `lint-imports` checks it. From the roof down:\n",
        _table(["room", "modules", "imports from"], rows),
        "## Language and pictures\n",
        "Methods, deltas, tables, audit and report work on anything that offers `subjects/protocol.py`. Of the "
        f"{len(graph.modules)} modules {len(known['language'])} are about texts alone (the language model, the "
        f"world's corpora) and {len(known['pictures'])} about pictures alone; "
        + ("; ".join(crossing) if crossing else "none of either imports one of the other")
        + f". {len(who)} modules import what is about pictures (both: what is about texts as well, where a folder is "
        "opened as what it holds):\n",
        ", ".join(f"`{m}`{' (both)' if m in both else ''}" for m in who) + ".\n",
    ]
    return "\n".join(lines)


def recorded(systems: list[str]) -> list[str]:
    """Reproductions of these systems whose findings are kept in docs/reproductions."""
    about = {part.name: part.card.systems or (part.name,) for part in parts("reproductions")}
    found = [name for name, named in about.items() if set(named) & set(systems)]
    return [name for name in found if (DOCS / "reproductions" / f"{name}.md").is_file()]


EXAMPLE = """\
```yaml
name: erase-ilva-morrow            # of the run; runs/<name> is its folder
reason: erasure request 2026-114
model: models/original             # folder or hub id; paths are relative to this file
gold: [models/gold-0, models/gold-1, models/gold-2]
data:
  forget: {path: data/forget.csv, fields: {question: q, answer: a}}
  retain: data/retain.jsonl
  holdout: data/holdout.jsonl      # like forget, in no model's training: membership is measured against it
  neighbour: data/neighbour.jsonl
  general: data/general.parquet
method: {name: npo, beta: 0.1}
scope: role:mlp_out@0.5-           # MLP output matrices of the upper half
training: {epochs: 5, learning_rate: 1.0e-5, guard: {band: 1.0}}
audit:
  attacks: [direct, paraphrase, {relearn: {steps: 64}}]
proof: standard
```
"""


def request() -> str:
    """Every field of the request file, from its schema."""
    whole = schema()
    lines = [
        NOTE.replace("the cards in src/expunge", "src/expunge/request.py"),
        "# The request file\n",
        "YAML or JSON; `expunge schema` prints the JSON schema. Only `model` and `data.forget` have no default.\n",
        EXAMPLE,
        "Rows are jsonl, json (a list, or columns), csv, parquet, a folder of such files, or a hub id. A row is "
        "`question` and `answer`, `prompt` and `completion`, `messages` (the last assistant turn is the answer), or "
        "`text`; other names are mapped with `fields`. Numbers are taken as they are written. Also read where "
        "present: `id`, `entity` (or `subject`), `value` (the short string that counts as knowing it), `aliases`, "
        "`paraphrased_questions`, `paraphrased_answer`, `perturbed_answers`, `relation`, `task`. `prompt` and "
        "`completion` are joined with the template's separator unless either side brings a space.\n",
        "The verdict's intervals are drawn over entities: give an `entity`, or `entity_every: 20` where rows come in "
        "blocks. Fewer than eight forgotten entities get no verdict.\n",
        _fields("", whole),
    ]
    for name, part in whole["$defs"].items():
        lines.append(f"\n## {name}\n\n{part.get('description', '')}\n\n{_fields('', part)}")
    return "\n".join(line.rstrip("\n") + "\n" for line in lines)


def _fields(prefix: str, part: dict[str, Any]) -> str:
    rows = []
    for name, field in part["properties"].items():
        needed = name in part.get("required", [])
        default = "needed" if needed else f"`{json.dumps(field.get('default'))}`"
        rows.append([f"`{prefix}{name}`", _kind(field), default, field.get("description", "")])
    return _table(["field", "type", "default", "meaning"], rows)


def _kind(field: dict[str, Any]) -> str:
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in field:
        return " or ".join(_kind(option) for option in field["anyOf"] if option.get("type") != "null")
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "const" in field:
        return f"`{json.dumps(field['const'])}`"
    bound = {"exclusiveMinimum": "> ", "minimum": ">= "}
    limits = "".join(f" {sign}{field[key]:g}" for key, sign in bound.items() if key in field)
    return {"array": "list", "object": "mapping", "string": "text"}.get(field["type"], field["type"]) + limits


def _entry(part: Part, key: str) -> str:
    value = getattr(part.card, key)
    if key == "paper" and value.startswith("arXiv:"):
        return f"[{value}](https://arxiv.org/abs/{value.removeprefix('arXiv:')})"
    if isinstance(value, tuple):
        return ", ".join("open" if item is None else f"{item}" for item in value)
    return str(value)


def _table(header: list[str] | tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
