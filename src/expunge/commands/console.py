"""Where a command speaks: results go to stdout, progress and remarks to stderr.

Of several processes of one launch only the first one speaks.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..processes import launched

PLAIN_SECONDS = 10.0
"""Without a terminal a phase says at most this often how far it is."""


def say(text: str = "") -> None:
    """One result, on stdout. A reader that has seen enough (`| head`) is no error."""
    if launched()[0]:
        return
    try:
        print(text, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def remark(text: str) -> None:
    """What is not a result, on stderr."""
    if not launched()[0]:
        print(text, file=sys.stderr, flush=True)


def say_json(document: Any) -> None:
    """The one JSON document of a command called with --json; numbers that are not finite become null."""
    from ..evidence import _finite

    say(json.dumps(_finite(document), indent=1, ensure_ascii=False, allow_nan=False, default=str))


def say_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Aligned columns. On a terminal the last one is wrapped to the width; elsewhere a row is one line."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max([len(column), *(len(row[i]) for row in cells)]) for i, column in enumerate(columns)]
    left = sum(widths[:-1]) + 2 * (len(widths) - 1)
    room = max(30, shutil.get_terminal_size().columns - left) if sys.stdout.isatty() else None
    header = "  ".join(column.ljust(width) for column, width in zip(columns, widths)).rstrip()
    say(header)
    say("-" * len(header))
    for row in cells:
        last = (textwrap.wrap(row[-1], room) or [""]) if room else [row[-1]]
        say("  ".join([*(cell.ljust(width) for cell, width in zip(row[:-1], widths)), last[0]]))
        for line in last[1:]:
            say(" " * left + line)


def say_rich(table: Any) -> None:
    """A table made with rich; wide enough for one line per row where nobody looks at a terminal."""
    from rich.console import Console

    if not launched()[0]:
        Console(width=None if sys.stdout.isatty() else 240).print(table)


def say_card(card: Any, folder: Path, json: bool) -> None:
    """A scorecard that lies in `folder`: as its file, or as tables and notes."""
    if json:
        say((folder / "scorecard.json").read_text(encoding="utf-8").rstrip("\n"))
        return
    from ..report import scorecard

    for table in [scorecard.table(card), *scorecard.tables(card)]:
        say_rich(table)
    for note in card.notes:
        say(note)
    say(f"scorecard: {folder / 'scorecard.html'}")


def duration(seconds: float) -> str:
    """45 s, 3 min 20 s, 5 h 12 min."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


class Progress:
    """Progress of one phase after another on stderr: bars with time left on a terminal, else a line now and then.

    Called as `progress(phase, done, total)`; `progress.phase(name)` is the same for one phase, `(done, total)`.
    """

    def __init__(self) -> None:
        self._task: Any = None
        self._name = ""
        self._started = self._told = 0.0
        self._bars: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bars

            self._bars = Bars(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bars.start()

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = time.monotonic()
        new, finished = phase != self._name, done >= total
        if new:
            self._name, self._started, self._told = phase, now, now
        if self._bars:
            if new:
                self._task = self._bars.add_task(phase, total=total)
            self._bars.update(self._task, completed=done, total=total)
        elif finished and self._told < math.inf:
            self._told = math.inf
            remark(f"{phase}: {total} of {total} in {duration(now - self._started)}")
        elif new:
            remark(f"{phase} ...")
        elif now - self._told >= PLAIN_SECONDS:
            self._told = now
            left = f", {duration((now - self._started) * (total - done) / done)} left" if done else ""
            remark(f"{phase}: {done} of {total}{left}")

    def phase(self, name: str) -> Callable[[int, int], None]:
        return lambda done, total: self(name, done, total)

    def close(self) -> None:
        if self._bars:
            self._bars.stop()


@contextmanager
def progressing(quiet: bool) -> Iterator[Progress | None]:
    """Progress while the block runs; None where one JSON document is all that was asked for."""
    if quiet or launched()[0]:
        yield None
        return
    progress = Progress()
    try:
        yield progress
    finally:
        progress.close()


def assignments(pairs: Sequence[str]) -> dict[str, Any]:
    """`["beta=0.2", "retain=kl"]` as a mapping; values are read as YAML, so numbers are numbers.

    Raises:
        ParameterError: a pair has no `=`, or its value is not YAML.
    """
    import yaml

    from ..errors import ParameterError

    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise ParameterError(f"--set {pair!r} is not of the form name=value, e.g. --set beta=0.2")
        try:
            found[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ParameterError(f"--set {pair!r}: {value!r} is not a YAML value; put text in quotes") from None
    return found
