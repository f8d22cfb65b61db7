"""Runs side by side: one row per run, the frontier of forgetting against usefulness, every attack on every run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MismatchError
from ..evidence import Evidence, Interval
from ..files import write_text
from . import charts, tracks
from .headline import flags, threshold, total_seconds, worst
from .words import (
    NOT_MEASURED,
    duration,
    label,
    listing,
    measured,
    percent,
    plain,
    points,
    verdict_words,
    with_interval,
)

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Entry:
    """One run in a comparison."""

    name: str
    method: str
    verdict: str
    flags: tuple[str, ...]
    direct: float
    """Recovery when asked directly: 0 at gold, 1 at the original."""
    worst: str
    """The attack that recovers most."""
    worst_recovery: Interval | None
    retain_change: float
    """Change of accuracy on retained rows; 0.03 is 3 points."""
    utility: float
    """What is left of the original's usefulness; 1 is all."""
    seconds: float
    best: bool = False
    """No other run is at least as good in usefulness and in robustness, and better in one."""

    @property
    def robust(self) -> float:
        """The share of the knowledge that stays gone under the strongest attack."""
        return _stays_gone(self.worst_recovery.value if self.worst_recovery else math.nan)


def write(
    evidences: Sequence[Evidence], folder: Path, names: Sequence[str] | None = None, *, allow_mismatch: bool = False
) -> dict[str, Path]:
    """Write compare.html, compare.md and compare.json into `folder`.

    Args:
        evidences: of runs that answer one request on one model.
        folder: where to write.
        names: of the runs; without them, the methods' names.
        allow_mismatch: compare although the runs differ in request, rows or base; the page then says in what.

    Returns:
        The path of each file by its name.

    Raises:
        MismatchError: the runs differ in what they forgot, from what, or how they were attacked.
        OutputError: the folder cannot be written.
    """
    from .render import render

    names = run_names(evidences, names)
    found = differences(evidences, names)
    if found and not allow_mismatch:
        raise MismatchError(
            f"these runs cannot be compared, they differ in {listing(found)}. Compare runs that answer one request on "
            "one base model under the same attacks, or allow the mismatch (allow_mismatch=True)."
        )
    rows = entries(evidences, names)
    context = {
        "rows": [(entry, _cells(entry)) for entry in rows],
        "columns": COLUMNS,
        "differences": found,
        "plot": _plot(rows),
        "attacks": _attack_rows(evidences),
        "settings": _setting_rows(evidences),
        "request": str(evidences[0].request.get("name") or "unnamed request"),
        "words": {entry.verdict: verdict_words(entry.verdict) for entry in rows},
        "best": [entry.name for entry in rows if entry.best],
    }
    paths = {name: Path(folder) / name for name in ("compare.html", "compare.md", "compare.json")}
    write_text(paths["compare.html"], render("compare.html.j2", context))
    write_text(paths["compare.md"], render("compare.md.j2", context))
    write_text(
        paths["compare.json"], json.dumps(_plain(rows, found), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    )
    return paths


def entries(evidences: Sequence[Evidence], names: Sequence[str] | None = None) -> list[Entry]:
    """One entry per run, those on the frontier marked."""
    from dataclasses import replace

    rows = [_entry(evidence, name) for evidence, name in zip(evidences, run_names(evidences, names))]
    best = pareto([(entry.utility, entry.robust) for entry in rows])
    return [replace(entry, best=on) for entry, on in zip(rows, best)]


def run_names(evidences: Sequence[Evidence], names: Sequence[str] | None = None) -> list[str]:
    """A name for each run that no other run has."""
    wanted = [str(name) for name in names] if names else [str(e.method.get("name") or "run") for e in evidences]
    if len(wanted) != len(evidences):
        raise MismatchError(f"{len(evidences)} runs were given with {len(wanted)} names")
    return [
        name if wanted.count(name) == 1 else f"{name} ({wanted[: place + 1].count(name)})"
        for place, name in enumerate(wanted)
    ]


def pareto(places: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether each place has no other that is at least as high in both directions and higher in one.

    A place with an unknown coordinate is never on the frontier and keeps nobody off it.
    """
    known = [place for place in places if all(map(measured, place))]
    return [
        place in known and not any(a >= place[0] and b >= place[1] and (a, b) != place for a, b in known)
        for place in places
    ]


def differences(evidences: Sequence[Evidence], names: Sequence[str] | None = None) -> list[str]:
    """What two runs must share to be comparable and do not, as `base model (a: 06f1, b: 9ac2)`."""
    names = run_names(evidences, names)
    identities = [_identity(evidence) for evidence in evidences]
    found = []
    for key in dict.fromkeys(key for identity in identities for key in identity):
        values = [identity.get(key, "none") for identity in identities]
        if len(set(values)) > 1:
            shown = ", ".join(f"{name}: {_short(value)}" for name, value in zip(names, values))
            found.append(f"{key} ({shown})")
    return found


def table(evidences: Sequence[Evidence], names: Sequence[str] | None = None) -> Table:
    """The comparison as a table for the terminal; a star marks the frontier."""
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in COLUMNS:
        made.add_column(column, overflow="fold")
    colours = {"good": "green", "bad": "red", "fair": "cyan", "open": "yellow"}
    for entry in entries(evidences, names):
        cells = [Text(cell) for cell in _cells(entry)]
        cells[0] = Text(f"★ {entry.name}" if entry.best else f"  {entry.name}")
        cells[1].stylize(colours[verdict_words(entry.verdict).tone])
        made.add_row(*cells)
    return made


COLUMNS = ("run", "verdict", "asked directly", "strongest attack", "gets back", "retain", "utility kept", "took")


def _cells(entry: Entry) -> list[str]:
    return [
        entry.name,
        " · ".join([verdict_words(entry.verdict).title, *entry.flags]),
        percent(entry.direct),
        label(entry.worst) if entry.worst else NOT_MEASURED,
        with_interval(entry.worst_recovery, percent),
        points(entry.retain_change),
        percent(entry.utility),
        duration(entry.seconds),
    ]


def _entry(evidence: Evidence, name: str) -> Entry:
    strongest = worst(evidence)
    asked = [probe.recovery.value for probe in evidence.probes if probe.group == "direct" and probe.recovery]
    effects = [effect for effect in evidence.side_effects if effect.flag == "damaged"]
    retain = next((effect for effect in effects if effect.name == "retain"), effects[0] if effects else None)
    return Entry(
        name=name,
        method=str(evidence.method.get("name") or ""),
        verdict=evidence.verdict.verdict,
        flags=tuple(flags(evidence)),
        direct=max(asked) if asked else math.nan,
        worst=strongest.attack if strongest else "",
        worst_recovery=strongest.recovery if strongest else None,
        retain_change=retain.after - retain.before if retain else math.nan,
        utility=_utility(evidence),
        seconds=total_seconds(evidence.cost),
    )


def _utility(evidence: Evidence) -> float:
    """After against before: model utility where it was measured, else the mean of the retained side effects."""
    for m in evidence.metrics:
        if m.metric == "model_utility" and m.before and m.after and measured(m.before.value) and m.before.value > 0:
            return m.after.value / m.before.value
    shares = [
        effect.after / effect.before
        for effect in evidence.side_effects
        if effect.flag == "damaged" and measured(effect.after) and measured(effect.before) and effect.before > 0
    ]
    return sum(shares) / len(shares) if shares else math.nan


def _stays_gone(recovery: float) -> float:
    return 1 - min(max(recovery, 0.0), 1.0) if measured(recovery) else math.nan


def _identity(evidence: Evidence) -> dict[str, str]:
    """What makes two runs answers to one question: base, rows, gold, attacks and thresholds."""
    request = evidence.request
    found = {"base model": ", ".join(str(m.get("fingerprint")) for m in evidence.models if m.get("role") == "before")}
    prints = request.get("fingerprints") or {}
    prints = prints if isinstance(prints, Mapping) else {"data": prints}
    found |= {f"{rows} rows": str(value) for rows, value in prints.items()}
    golds = sorted(str(m.get("fingerprint")) for m in evidence.models if m.get("role") == "gold")
    found["gold models"] = ", ".join(golds) or "none"
    found["thresholds"] = plain(evidence.verdict.thresholds)
    for run in evidence.runs.get("after", []):
        found[f"settings of {run.attack}"] = plain(run.settings)
    asked = sorted({item.row for run in evidence.runs.get("after", []) for item in run.items if run.group == "direct"})
    if not prints and asked:
        found["forget rows"] = ", ".join(asked)
    return found


def _short(text: str) -> str:
    text = plain(text)
    return text if len(text) <= 48 else text[:47] + "…"


def _plot(rows: Sequence[Entry]) -> str:
    spots = [
        charts.Spot(row.name, row.utility, row.robust, _stays_gone(row.direct), row.best)
        for row in rows
        if measured(row.utility) and measured(row.robust)
    ]
    if not spots:
        return ""
    said = "; ".join(
        f"{spot.name} keeps {percent(spot.utility)} of its utility and {percent(spot.robust)} stays gone"
        for spot in spots
    )
    return charts.frontier(spots, said, "utility kept", "knowledge that stays gone")


def _attack_rows(evidences: Sequence[Evidence]) -> list[tuple[str, list[tuple[str, str]]]]:
    """(attack, [(recovery, state)] per run)"""
    found = []
    for attack in dict.fromkeys(probe.attack for e in evidences for probe in e.probes if probe.group != "reintroduce"):
        cells = []
        for evidence in evidences:
            probe = next((probe for probe in evidence.probes if probe.attack == attack), None)
            if probe is None or probe.recovery is None or not probe.informative:
                cells.append(("not usable" if probe else NOT_MEASURED, ""))
            else:
                state = tracks.state(probe.recovery, threshold(evidence))
                cells.append((with_interval(probe.recovery, percent), state))
        found.append((label(attack), cells))
    return found


def _setting_rows(evidences: Sequence[Evidence]) -> list[tuple[str, list[str]]]:
    """What was set differently between the runs."""
    flat = []
    for evidence in evidences:
        given = {"method": evidence.method.get("name"), "scope": evidence.method.get("scope")}
        for part in ("settings", "training"):
            given |= {f"{part}: {key}": value for key, value in (evidence.method.get(part) or {}).items()}
        flat.append({key: plain(value, key) for key, value in given.items() if value is not None})
    keys = dict.fromkeys(key for given in flat for key in given)
    rows = [(label(key), [given.get(key, "–") for given in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _plain(rows: Sequence[Entry], found: list[str]) -> dict[str, Any]:
    def finite(value: float) -> float | None:
        return value if measured(value) else None

    return {
        "runs": [
            {
                "name": row.name,
                "method": row.method,
                "verdict": row.verdict,
                "flags": list(row.flags),
                "direct_recovery": finite(row.direct),
                "worst_probe": row.worst or None,
                "worst_recovery": [finite(v) for v in (r.low, r.value, r.high)] if (r := row.worst_recovery) else None,
                "retain_change": finite(row.retain_change),
                "utility_kept": finite(row.utility),
                "seconds": finite(row.seconds),
                "on_frontier": row.best,
            }
            for row in rows
        ],
        "differences": found,
    }
