"""The report: evidence as one page for people, one summary for a model card and one file for programs."""

from __future__ import annotations

from pathlib import Path

from ..evidence import Evidence
from ..files import write_text


def write(evidence: Evidence, folder: Path) -> dict[str, Path]:
    """Write report.html, report.md and evidence.json into `folder`.

    report.html is one self-contained page: no script, nothing fetched from elsewhere, two A4 pages in print. It quotes
    rows; report.md, which is meant for a model card, quotes none.

    Returns:
        The path of each file by its name.

    Raises:
        OutputError: the folder cannot be written.
    """
    from .page import content
    from .render import render

    context = content(evidence)
    paths = {name: Path(folder) / name for name in ("report.html", "report.md", "evidence.json")}
    write_text(paths["report.html"], render("report.html.j2", context))
    write_text(paths["report.md"], render("report.md.j2", context))
    evidence.save(paths["evidence.json"])
    return paths
