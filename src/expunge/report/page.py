"""What one evidence report shows: evidence turned into the sentences, rows and pictures of its templates."""

from __future__ import annotations

import math
import re
from typing import Any

from markupsafe import Markup, escape

from ..evidence import Evidence, Interval, Judged, Knowing, Measured, Routing, SideEffect
from . import charts, tracks
from .headline import facts, judgement, speed, threshold
from .words import (
    GROUPS,
    NOT_MEASURED,
    ROLES,
    flag_words,
    in_sentence,
    label,
    listing,
    measured,
    number,
    pairs,
    percent,
    plain,
    points,
    verdict_words,
    with_interval,
)

CARD = ("paper", "kind", "intention", "keeps", "sequential", "known_weaknesses", "guarantee")
"""What a reader of the report needs of a method's card."""

QUOTES = 3
"""Answers shown as brought back by an attack."""


def content(evidence: Evidence) -> dict[str, Any]:
    """Everything the templates of one report need."""
    return {
        "evidence": evidence,
        "name": str(evidence.request.get("name") or "unnamed request"),
        "verdict": judgement(evidence),
        "facts": facts(evidence),
        "probes": [probe_row(probe) for probe in evidence.probes if probe.group != "reintroduce" and spoke(probe)],
        "forgotten": [metric_row(m, label(m.metric)) for m in evidence.metrics if about_forget(m) and drawable(m)],
        "kept": kept(evidence.metrics),
        "effects": [effect_row(effect) for effect in evidence.side_effects],
        "routing": [routing_row(one) for one in evidence.routing],
        "knowing": [knowing_row(one) for one in evidence.knowing],
        "golds": _golds(evidence),
        "recovery": recovery_groups(evidence),
        "recovery_scale": tracks.scale(
            [
                (0, "gold" if _golds(evidence) else "0%"),
                (threshold(evidence), percent(threshold(evidence))),
                (1, "original"),
            ],
            recovery_domain(evidence),
        ),
        "caveats": [(label(probe.attack), probe.caveat) for probe in evidence.probes if probe.caveat],
        "threshold": threshold(evidence),
        "curves": [
            {"title": label(probe.attack), "chart": curve_chart(probe), "words": speed(probe)}
            for probe in evidence.probes
            if any(measured(y) for _, y in probe.curves.get("after", []))
        ],
        "metrics": metric_table(evidence.metrics),
        "roles": ROLES,
        "examples": [example(row) for row in evidence.examples],
        "quotes": quotes(evidence),
        "self_test": self_test(evidence),
        "cost": cost_table(evidence.cost),
        "provenance": provenance(evidence),
        "runs": run_table(evidence),
    }


def _golds(evidence: Evidence) -> int:
    return sum(model.get("role") == "gold" for model in evidence.models)


def spoke(probe: Judged) -> bool:
    return any(measured(value) for value in (probe.before, probe.after, *probe.gold))


# The plots


def mean(values: list[float]) -> float:
    values = [value for value in values if measured(value)]
    return sum(values) / len(values) if values else math.nan


def three(before: Any, after: Any, gold: Any, show: Any) -> str:
    """What a screen reader says of one row."""
    said = zip(ROLES, (before, after, gold))
    return ", ".join(f"{role} {with_interval(v, show) if isinstance(v, Interval) else show(v)}" for role, v in said)


def probe_row(probe: Judged) -> dict[str, Any]:
    gold = mean(probe.gold)
    return {
        "label": label(probe.attack),
        "track": tracks.dots(probe.before, probe.after, gold, three(probe.before, probe.after, gold, percent)),
        "value": percent(probe.after),
        "flag": "",
    }


def drawable(m: Measured) -> bool:
    """Whether the metric fits the common scale of 0 to 1; the others are in the table only."""
    values = [interval.value for interval in (m.before, m.after, m.gold) if interval and measured(interval.value)]
    return bool(values) and all(-1e-9 <= value <= 1 + 1e-9 for value in values)


def about_forget(m: Measured) -> bool:
    """Whether the metric reads forget rows, alone or against others (`forget + holdout`)."""
    return "forget" in m.rows.split(" + ")


def kept(metrics: list[Measured]) -> list[tuple[str, list[dict[str, Any]]]]:
    """(metric, its row sets) for what the model should still know; holdout rows it never knew."""
    found: dict[str, list[dict[str, Any]]] = {}
    for m in metrics:
        if not about_forget(m) and m.rows != "holdout" and drawable(m):
            found.setdefault(label(m.metric), []).append(metric_row(m, m.rows))
    return list(found.items())


def metric_row(m: Measured, name: str) -> dict[str, Any]:
    return {
        "label": name,
        "track": tracks.dots(m.before, m.after, m.gold, three(m.before, m.after, m.gold, number)),
        "value": number(m.after.value) if m.after else NOT_MEASURED,
        "flag": m.flag,
    }


def effect_interval(effect: SideEffect) -> Interval | None:
    """The interval of after; evidence may state it for the change since before instead."""
    if not measured(effect.low) or not measured(effect.high) or not measured(effect.after):
        return None
    if effect.low <= effect.after <= effect.high or not measured(effect.before):
        return Interval(effect.low, effect.after, effect.high)
    return Interval(effect.before + effect.low, effect.after, effect.before + effect.high)


def effect_row(effect: SideEffect) -> dict[str, Any]:
    values = [effect.before, effect.after, effect.gold]
    share = all(0 <= value <= 1 for value in values if measured(value))
    change = effect.after - effect.before if measured(effect.before) and measured(effect.after) else math.nan
    show = percent if share else number
    after = effect_interval(effect) or effect.after
    words = three(effect.before, after, effect.gold, show)
    return {
        "label": label(effect.name),
        "sentence": effect.sentence,
        "n": effect.n,
        "track": tracks.dots(effect.before, after, effect.gold, words, tolerance=effect.tolerance, raised=effect.raised)
        if share
        else escape(words),
        "before": show(effect.before),
        "after": with_interval(after, show) if isinstance(after, Interval) else show(after),
        "gold": show(effect.gold),
        "value": points(change) if share else number(change),
        "tolerance": percent(effect.tolerance).removesuffix("%") if share else number(effect.tolerance),
        "raised": effect.raised,
        "flag": flag_words(effect.flag)[0] if effect.flag else "",
    }


def knowing_row(one: Knowing) -> dict[str, str]:
    """Whether a model's wrong answers are ignorance or errors despite knowledge."""
    shares = {name: percent(getattr(one, name)) for name in ("known", "suppressed", "ignorant")}
    return {"label": one.role.replace("/", " "), **shares, "n": number(one.n), "accuracy": percent(one.accuracy)}


def routing_row(one: Routing) -> dict[str, Any]:
    """How far tokens of a row set still take the experts they took."""
    shown = with_interval(one.overlap, percent)
    lowest = min(one.blocks, key=lambda block: one.blocks[block])
    moved = [
        f"{percent(before)} → {percent(after)} of tokens take an expert that moved in block {block}"
        for block, (before, after) in one.moved.items()
    ]
    return {
        "label": f"{label(one.rows)} tokens",
        "track": tracks.dots(1.0, one.overlap, None, f"before 100%, after {shown}"),
        "value": percent(one.overlap.value),
        "shown": shown,
        "lowest": f"{percent(one.blocks[lowest])} in block {lowest}",
        "moved": "; ".join(moved),
        "n": f"{number(one.tokens)} tokens of {number(one.n)} rows" + (f" of {number(one.of)}" * (one.n < one.of)),
        "blocks": ", ".join(f"{block}: {percent(value)}" for block, value in one.blocks.items()),
    }


def recovery_domain(evidence: Evidence) -> tuple[float, float]:
    """From a little below gold to a little above the original, wider where intervals need it."""
    values = [p.recovery for p in evidence.probes if p.recovery]
    ends = [v for r in values for v in (r.low, r.value, r.high) if measured(v)]
    return max(min([-0.15, *ends]), -0.6), min(max([1.1, *ends]), 1.5)


def recovery_groups(evidence: Evidence) -> list[dict[str, Any]]:
    """The probes by group, in the order of the groups, with their recovery or why there is none."""
    domain = recovery_domain(evidence)
    groups = []
    for group in dict.fromkeys([*GROUPS, *(probe.group for probe in evidence.probes)]):
        rows = [recovery_row(p, threshold(evidence), domain) for p in evidence.probes if p.group == group]
        if rows:
            whole = evidence.verdict.groups.get(group) if sum(bool(row["value"]) for row in rows) > 1 else None
            value = f"max {with_interval(whole, percent)}" if whole else ""
            groups.append({"label": GROUPS.get(group, label(group)), "value": value, "rows": rows})
    return groups


def unusable(probe: Judged) -> str:
    """Why a probe says nothing about recovery."""
    if probe.why.startswith("skipped"):
        return probe.why
    return f"not usable: {probe.why}" if probe.why else NOT_MEASURED


def recovery_row(probe: Judged, limit: float, domain: tuple[float, float]) -> dict[str, Any]:
    row = {"label": label(probe.attack), "why": probe.why, "track": "", "value": "", "state": ""}
    if probe.recovery is None or not measured(probe.recovery.value):
        return {**row, "why": unusable(probe)}
    shown = with_interval(probe.recovery, percent)
    return {
        **row,
        "track": tracks.recovery(probe.recovery, f"recovery {shown}", threshold=limit, domain=domain),
        "value": shown,
        "state": tracks.state(probe.recovery, limit) if probe.informative else "",
    }


def curve_chart(probe: Judged) -> Markup:
    lines = {role: probe.curves[role] for role in ROLES if probe.curves.get(role)}
    ends = ", ".join(f"{role} ends at {percent(line[-1][1])}" for role, line in lines.items())
    return charts.curves(lines, probe.curve_label, f"{label(probe.attack)} against {probe.curve_label}: {ends}")


# The tables


def metric_table(metrics: list[Measured]) -> list[dict[str, Any]]:
    """Metrics with their row sets, the forget set first."""
    groups: dict[str, list[Measured]] = {}
    for m in sorted(metrics, key=lambda m: not about_forget(m)):
        groups.setdefault(m.metric, []).append(m)
    return [{"label": label(name), "first": found[0], "rows": found} for name, found in groups.items()]


def example(row: dict[str, Any]) -> dict[str, Any]:
    answer = str(row.get("answer") or "")
    said = [highlight(row.get(role), answer) for role in ROLES]
    return {
        "question": "",
        "picture": "",
        "row": "",
        **row,
        "answer": answer,
        "set": str(row.get("set") or ""),
        "said": said,
    }


def highlight(text: str | None, answer: str) -> Markup:
    """`text`, escaped, with `answer` marked where it occurs."""
    if text is None:
        return Markup('<span class="none">{}</span>').format(NOT_MEASURED)
    if not text.strip():
        return Markup('<span class="none">says nothing</span>')
    if not answer:
        return escape(text)
    pieces = re.split(f"({re.escape(answer)})", text, flags=re.IGNORECASE)
    return Markup("").join(
        Markup("<mark>{}</mark>").format(piece) if i % 2 else escape(piece) for i, piece in enumerate(pieces)
    )


def quotes(evidence: Evidence) -> list[dict[str, Any]]:
    """One answer per attack that the verdict names: what the changed model said when the knowledge came back."""
    answers = {str(row.get("row")): str(row.get("answer") or "") for row in evidence.examples}
    found = []
    for run in evidence.runs.get("after", []):
        said = [item for item in run.items if item.text and measured(item.recovered) and item.recovered >= 0.5]
        if run.attack in evidence.verdict.by and said:
            best = max(said, key=lambda item: item.recovered)
            text = highlight(best.text, answers.get(best.row, ""))
            found.append({"attack": in_sentence(run.attack), "entity": best.entity, "row": best.row, "text": text})
    return found[:QUOTES]


def self_test(evidence: Evidence) -> dict[str, Any]:
    test = evidence.self_test
    if test is None:
        return {"state": "not run", "cases": [], "auc": "", "note": "The instrument was not tried on known models."}
    cases = [
        {
            "model": case.get("model", ""),
            "expected": verdict_words(str(case.get("expected", ""))).title,
            "verdict": verdict_words(str(case.get("verdict", ""))).title,
            "ok": bool(case.get("ok")),
            "by": listing([in_sentence(name) for name in case.get("by") or []]),
        }
        for case in test.cases
    ]
    auc = ", ".join(f"{in_sentence(name)} {number(value)}" for name, value in test.auc.items())
    return {"state": "passed" if test.passed else "failed", "cases": cases, "auc": auc, "note": test.note}


def cost_table(cost: dict[str, Any]) -> dict[str, Any]:
    """Phases against quantities; what is not a phase is listed beneath."""
    phases = {name: phase for name, phase in cost.items() if isinstance(phase, dict)}
    columns = list(dict.fromkeys(key for phase in phases.values() for key in phase))
    return {
        "columns": [label(column.removesuffix("_bytes").replace("seconds", "time")) for column in columns],
        "rows": [(label(name), [plain(phase.get(c), c) for c in columns]) for name, phase in phases.items()],
        "rest": pairs({name: value for name, value in cost.items() if name not in phases}),
    }


def provenance(evidence: Evidence) -> list[tuple[str, list[tuple[str, str]]]]:
    """(heading, [(name, text)]): enough to repeat the run."""
    method = {key: value for key, value in evidence.method.items() if key != "card"}
    card = evidence.method.get("card") or {}
    models = [
        (f"{label(str(m.get('role', 'model')))}: {m.get('name', '')}", plain(m.get("fingerprint")))
        for m in evidence.models
    ]
    request = {key: value for key, value in evidence.request.items() if key != "name"}
    return [
        ("Models", models),
        ("Request", pairs(request)),
        ("Method", pairs(method)),
        ("What the method says of itself", pairs({key: card[key] for key in CARD if card.get(key)})),
        ("Thresholds", pairs(evidence.verdict.thresholds)),
        ("Software", [*pairs(evidence.environment), ("Evidence schema", str(evidence.schema))]),
    ]


def run_table(evidence: Evidence) -> list[dict[str, Any]]:
    """What each probe was told to do and what it spent on the changed model."""
    return [
        {
            "label": label(run.attack),
            "settings": plain(run.settings),
            "budget": plain(run.budget),
            "scores": ", ".join(f"{role} {percent(score)}" for role, score in _scores(evidence, run.attack)),
            "status": "" if run.status == "scored" else run.status,
            "note": run.note,
        }
        for run in evidence.runs.get("after", [])
    ]


def _scores(evidence: Evidence, attack: str) -> list[tuple[str, float]]:
    return [
        (role, mean([item.recovered for item in run.items]))
        for role, runs in evidence.runs.items()
        for run in runs
        if run.attack == attack
    ]
