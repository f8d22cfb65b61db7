"""Other facts, for editors that learn from some before they edit those that are tested: `serac`, `mend`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ..edit_scores import questions
from ..edits import EditRow, read_edits
from ..errors import RequestError
from ..registry import Part
from ..rows import Source

FILE = "demonstrations.jsonl"
LEAST = 2


def demonstrations(
    editor: Part,
    folder: Path,
    path: str,
    asked: Callable[[], Iterable[str]],
    own: Callable[[], Sequence[EditRow]] = list,
) -> tuple[list[EditRow], list[str]]:
    """Edit rows that an editor is given beside the edits, and what a scorecard says of them.

    Those of `path`, else of `demonstrations.jsonl` in the folder, else the benchmark's own; of them the ones that the
    benchmark asks nothing of. None for an editor that does not learn from other facts, unless a path is given.

    Args:
        asked: all prompts of the benchmark.
        own: the benchmark's training rows.

    Raises:
        RequestError: the editor learns from other facts, and there are fewer than two.
        RowError: a row is not what it must be.
    """
    if not editor.learns and not path:
        return [], []
    beside = folder / FILE
    found = read_edits(Source(path or str(beside)), "demonstrations") if path or beside.is_file() else list(own())
    tested = set(asked())
    kept = [one for one in found if tested.isdisjoint(question.prompt for question in questions([one]))]
    if editor.learns and len(kept) < LEAST:
        left = f", of which {len(found) - len(kept)} are asked about" if len(kept) < len(found) else ""
        raise RequestError(
            f"{editor.name} learns from other facts than those that are tested, and there are {len(found)}{left}; give "
            f"at least {LEAST} edit rows, better hundreds, with rephrasings and locality (demonstrations=FILE, or "
            f"{beside})"
        )
    note = f"{editor.name} was given {len(kept)} other facts."
    if len(kept) < len(found):
        note += f" {len(found) - len(kept)} more were left out: the benchmark asks about them."
    return kept, [note]
