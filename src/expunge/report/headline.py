"""The top of a report: the verdict in plain words, what brings the knowledge back, what to do, the key facts."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from ..evidence import Evidence, Judged
from .words import (
    NOT_MEASURED,
    ROLES,
    duration,
    flag_words,
    in_sentence,
    label,
    listing,
    measured,
    number,
    percent,
    plain,
    verdict_words,
    with_interval,
)

BROKEN = {"damaged", "neighbour_damage", "skill_loss"}
"""With these flags even a model that has forgotten is no replacement: a ruined one passes every attack."""
SHOWN = 3
"""Attacks beside the verdict; all of them are in the plot."""


def threshold(evidence: Evidence) -> float:
    return evidence.verdict.thresholds.get("tau", 0.2)


def headline(evidence: Evidence) -> str:
    """The verdict and every flag, in one line: a collapsed model passes every attack, so they are read together."""
    return " · ".join([verdict_words(evidence.verdict.verdict).title, *flags(evidence)])


def flags(evidence: Evidence) -> list[str]:
    return [flag_words(flag)[0] for flag in evidence.verdict.flags]


def judgement(evidence: Evidence) -> dict[str, Any]:
    words = verdict_words(evidence.verdict.verdict)
    flagged = [(name, meaning) for name, meaning, _ in map(flag_words, evidence.verdict.flags)]
    broken = BROKEN & set(evidence.verdict.flags)
    first = "Do not ship this model: what it was meant to keep is hurt." if broken else words.action
    if broken and words.tone == "good":
        words = words._replace(tone="fair", sign="!")
    actions = [first, *(flag_words(flag)[2] for flag in evidence.verdict.flags)]
    return {
        "words": words,
        "headline": headline(evidence),
        "flags": flagged,
        "back": brings_back(evidence),
        "actions": [action for action in actions if action],
    }


def brings_back(evidence: Evidence) -> list[tuple[str, str]]:
    """(what, how much): the probes that the verdict names, or the strongest one where it names none."""
    judged = {probe.attack: probe for probe in evidence.probes}
    named = sorted(evidence.verdict.by, key=lambda attack: -_recovered(judged.get(attack)))
    found = []
    for attack in named[:SHOWN]:
        probe = judged.get(attack)
        much = f"{with_interval(probe.recovery, percent)} comes back" if probe and probe.recovery else ""
        found.append((label(attack), ". ".join(filter(None, (much, speed(probe) if probe else "")))))
    if named[SHOWN:]:
        found.append((f"{len(named) - SHOWN} more", listing([in_sentence(attack) for attack in named[SHOWN:]])))
    if found:
        return found
    strongest = worst(evidence)
    if strongest is None:
        return [("Not known", "No attack gave a usable measurement.")]
    tried = sum(probe.informative and probe.group != "reintroduce" for probe in evidence.probes)
    value = with_interval(strongest.recovery, percent)
    many = "the one usable attack" if tried == 1 else f"{tried} usable attacks"
    if evidence.verdict.verdict == "inconclusive":
        return [("Not settled", f"The most that {many} got back: {value}, by {in_sentence(strongest.attack)}.")]
    return [
        (
            "Nothing tried here",
            f"The most that {many} got back: {value}, by {in_sentence(strongest.attack)}; "
            f"more than {percent(threshold(evidence))} would count.",
        )
    ]


def _recovered(probe: Judged | None) -> float:
    return probe.recovery.value if probe and probe.recovery and measured(probe.recovery.value) else -math.inf


def worst(evidence: Evidence) -> Judged | None:
    """The informative probe that recovers most; telling the model again in the prompt does not count."""
    usable = [
        (probe.recovery.value, -place)
        for place, probe in enumerate(evidence.probes)
        if probe.informative and probe.group != "reintroduce" and probe.recovery and measured(probe.recovery.value)
    ]
    return evidence.probes[-max(usable)[1]] if usable else None


def speed(probe: Judged) -> str:
    """How soon the curve of an attack reaches half of what the original knows."""
    after, gold = probe.curves.get("after"), probe.curves.get("gold")
    if not after or not measured(probe.before) or probe.before <= 0:
        return ""
    unit = probe.curve_label or "steps"

    def reaches(curve: Iterable[tuple[float, float]]) -> float | None:
        return next((x for x, y in sorted(curve) if measured(y) and y >= probe.before / 2), None)

    soon, late = reaches(after), reaches(gold or [])
    if soon is None:
        return f"It stays below half of what the original knew up to {number(max(x for x, _ in after))} {unit}."
    text = f"Half of what the original knew is there at {number(soon)} {unit}"
    if not gold:
        return text + "."
    return f"{text}; gold {f'needs {number(late)}' if late is not None else 'does not get there'}."


def facts(evidence: Evidence) -> list[tuple[str, str]]:
    """The line of key facts under the verdict."""
    request, method = evidence.request, evidence.method
    names = {role: [m["name"] for m in evidence.models if m.get("role") == role] for role in ROLES}
    scope = method.get("scope")
    scope = scope.get("form", scope) if isinstance(scope, dict) else scope
    golds = len(names["gold"])
    kind = request.get("gold_kind") or "exact"
    usable = sum(probe.informative for probe in evidence.probes)
    rows, entities = (request.get(key) or {} for key in ("rows", "entities"))
    forget = f"{plain(rows['forget'])} rows" if isinstance(rows, dict) and "forget" in rows else ""
    if isinstance(entities, dict) and "forget" in entities:
        forget += f" about {plain(entities['forget'])} entities"
    found = [
        ("To forget", forget),
        ("Reason", str(request.get("reason") or "")),
        ("Model", listing(names["before"])) if names["before"] else ("Model", ""),
        ("Method", str(method.get("name") or "")),
        ("May change", plain(scope) if scope else ""),
        ("Gold", f"{golds} {kind} model{'s' * (golds != 1)}" if golds else "none"),
        ("Probes", f"{usable} usable of {len(evidence.probes)}"),
        ("Took", duration(total_seconds(evidence.cost))),
    ]
    return [(name, text) for name, text in found if text and text != NOT_MEASURED]


def total_seconds(cost: dict[str, Any]) -> float:
    if measured(cost.get("seconds")):
        return cost["seconds"]
    spent = [phase["seconds"] for phase in cost.values() if isinstance(phase, dict) and measured(phase.get("seconds"))]
    return sum(spent) if spent else math.nan
