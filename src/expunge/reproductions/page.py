"""A reproduction's findings as JSON and as a page of the docs with its figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..files import write_text
from ..registry import Part
from .case import Findings
from .figures import filled, svg

WORDS = {True: "holds", False: "does not hold", None: "not testable here"}


def record(
    part: Part,
    settings: dict[str, Any],
    changed: dict[str, Any],
    seeds: Sequence[int],
    findings: Findings,
    about: dict[str, Any],
) -> dict[str, Any]:
    """Everything about one run as plain JSON values; `changed` are the settings the user gave."""
    return {
        "name": part.name,
        "paper": part.card.paper,
        "summary": part.card.summary,
        "settings": settings,
        "changed": changed,
        "seeds": list(seeds),
        **asdict(findings),
        "environment": about,
    }


def command(found: dict[str, Any]) -> str:
    """The command that gives these findings."""
    settings = "".join(f" --set {key}={value}" for key, value in found["changed"].items())
    seeds = " ".join(f"--seed {seed}" for seed in found["seeds"]) if found["seeds"] != [0, 1, 2] else ""
    return f"expunge reproduce {found['name']}{settings} {seeds}".strip()


def markdown(found: dict[str, Any]) -> str:
    paper = found["paper"]
    link = f"[{paper}](https://arxiv.org/abs/{paper.removeprefix('arXiv:')})" if paper.startswith("arXiv:") else paper
    about = found["environment"]
    lines = [
        f"# {found['name']}\n",
        f"{found['summary']}\n",
        f"{link}; seeds {', '.join(map(str, found['seeds']))}; {about['date']}, expunge {about['expunge']}, torch "
        f"{about['torch']}, transformers {about['transformers']}, {about['device']}, trials took "
        f"{about['minutes']:.1f} min.\n",
        f"    {command(found)}\n",
        "## Claims\n",
        table(
            ["claim", "published", "criterion here", "measured", "verdict"],
            [
                [claim["claim"], claim["published"], claim["criterion"], claim["measured"], WORDS[claim["holds"]]]
                for claim in found["claims"]
            ],
        ),
    ]
    for one in _shown(found):
        lines += [f"## {one['title']}\n", f"![{one['title']}]({_file(found, one)})\n"]
        lines += [one["note"] + "\n"] if one["note"] else []
    for one in found["tables"]:
        lines += [f"## {one['title']}\n", table(one["columns"], one["rows"])]
        lines += [one["note"] + "\n"] if one["note"] else []
    if found["notes"]:
        lines += ["## Notes\n", *(f"- {note}" for note in found["notes"]), ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def write(found: dict[str, Any], folder: Path) -> Path:
    """NAME.json, NAME.md and the figures beside it; returns the page."""
    write_text(folder / f"{found['name']}.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    for one in _shown(found):
        write_text(folder / _file(found, one), svg(one))
    path = folder / f"{found['name']}.md"
    write_text(path, markdown(found))
    return path


def _shown(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Figures with a point at least, as plain values."""
    return [one for one in found.get("figures", []) if filled(one)]


def _file(found: dict[str, Any], figure: dict[str, Any]) -> str:
    return f"{found['name']}-{figure['name']}.svg"
