"""The verdict: pure functions from probe runs to a judgement (specs: taxonomy 3.3-3.5).

Every probe's recovery lies between two anchors, 0 = gold (retrained without the forget rows) and 1 = the model before.
Intervals come from a bootstrap over forgotten entities, the same draws for all models; a group's recovery is the
largest among its probes, and is compared with what the same maximum gives for gold models held out from one another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from .errors import MismatchError
from .evidence import GROUPS, Interval, Judged, ProbeRun, Verdict

TAU = 0.20
"""Recovery above which knowledge counts as back (own choice, calibrated by the self-test)."""
POWER = 0.10
"""A probe whose scores on the model before and on gold are nearer than this shows nothing."""
APART = 0.5
"""Of gold models that lie further apart than this share of their distance to the model before, one may look like it."""
CEILING = 0.50
"""A probe that brings so much out of gold would bring it out of anything."""
ENTITIES = 8
"""With fewer forgotten entities there is no verdict."""
JUDGED_GROUPS = GROUPS[:4]
"""`reintroduce` is reported and never part of the verdict."""


@dataclass(frozen=True)
class Rules:
    """Thresholds, fixed before a candidate is seen, and stored in the report."""

    tau: float = TAU
    power: float = POWER
    ceiling: float = CEILING
    entities: int = ENTITIES
    draws: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class Runs:
    """The same probes on all models."""

    before: Sequence[ProbeRun]
    """May be empty: then full recall counts as 1."""
    after: Sequence[ProbeRun]
    golds: Sequence[Sequence[ProbeRun]] = ()
    """One list of runs for each gold model; without any, 0 is the lower anchor."""
    silent: Mapping[int, str] = field(default_factory=dict)
    """Places of probes that show nothing whatever the candidate, and why: what is told by all anchors together is not
    told again by some of them."""

    def with_candidate(self, runs: Sequence[ProbeRun], golds: Sequence[Sequence[ProbeRun]]) -> Runs:
        return replace(self, after=runs, golds=golds)

    def settled(self, judgement: Judgement) -> Runs:
        """The same runs, with the probes that showed nothing in a judgement by all anchors left out of every other."""
        return replace(self, silent={i: probe.why for i, probe in enumerate(judgement.probes) if not probe.informative})


@dataclass(frozen=True)
class _Probe:
    """Scores of one probe on resampled entities: column 0 is what was measured, the rest are draws."""

    judged: Judged
    draws: np.ndarray | None
    """(1 + draws,) recovery R; None where the probe is not informative."""


@dataclass
class Judgement:
    """All probes judged, and the recovery of every group."""

    probes: list[Judged]
    groups: dict[str, Interval | None]
    """None where a group has no informative probe."""
    entities: int
    present: set[str] = field(default_factory=set)

    @cached_property
    def by_group(self) -> dict[str, list[Judged]]:
        return {g: [p for p in self.probes if p.group == g and p.informative] for g in JUDGED_GROUPS}


def judge(runs: Runs, rules: Rules | None = None) -> Judgement:
    """Normalise every probe between gold and the model before, with intervals.

    Raises:
        MismatchError: models were attacked with different probes or different rows.
    """
    rules = rules or Rules()
    probes = [_probe(index, runs, rules) for index in range(len(runs.after))]
    groups: dict[str, Interval | None] = {}
    for group in GROUPS:
        draws = [p.draws for p in probes if p.judged.group == group and p.draws is not None]
        groups[group] = _interval(np.max(draws, axis=0)) if draws else None
    entities = {item.entity for run in runs.after for item in run.items}
    return Judgement([p.judged for p in probes], groups, len(entities), {p.judged.group for p in probes})


def _interval(values: np.ndarray) -> Interval:
    low, high = np.percentile(values[1:], [2.5, 97.5]) if len(values) > 1 else (values[0], values[0])
    return Interval(float(low), float(values[0]), float(high))


def _probe(index: int, runs: Runs, rules: Rules) -> _Probe:
    after = runs.after[index]
    others = [*([runs.before[index]] if runs.before else []), *(gold[index] for gold in runs.golds)]
    for other in others:
        if other.attack != after.attack or [i.row for i in other.items] != [i.row for i in after.items]:
            if other.attack == after.attack and _unscored([after, other]):
                continue
            raise MismatchError(f"probe {after.attack}: models were asked different rows, they cannot be compared")
    before = runs.before[index] if runs.before else None
    golds = [gold[index] for gold in runs.golds]
    judged = Judged(
        attack=after.attack,
        group=after.group,
        before=before.score if before else float("nan"),
        after=after.score,
        gold=[gold.score for gold in golds],
        informative=False,
        curves=_curves(before, after, golds),
        curve_label=after.curve_label,
    )
    judged.why = runs.silent.get(index) or _unscored([after, *others])
    if judged.why:
        return _Probe(judged, None)
    weights = _weights(after, rules)
    resampled = {id(run): _scores(run, weights) for run in [after, *others]}
    floor = np.mean([resampled[id(gold)] for gold in golds], axis=0) if golds else np.zeros(len(weights))
    top = resampled[id(before)] if before else np.ones(len(weights))
    span = top[0] - floor[0]
    if golds and floor[0] > rules.ceiling:
        judged.why = f"brings {floor[0]:.2f} out of gold, which never saw the rows: it would bring it out of any model"
    elif span < rules.power:
        judged.why = f"the model before ({top[0]:.2f}) and gold ({floor[0]:.2f}) are too near one another"
    elif golds and (apart := float(np.ptp([resampled[id(gold)][0] for gold in golds]))) > APART * span:
        judged.why = f"gold models lie {apart:.2f} apart, the model before only {span:.2f} from them: that is chance"
    if judged.why:
        return _Probe(judged, None)
    # A draw in which the anchors nearly meet would blow the ratio up; half the measured span is its least.
    draws = (resampled[id(after)] - floor) / np.maximum(top - floor, span / 2)
    judged.informative, judged.recovery = True, _interval(draws)
    return _Probe(judged, draws)


def _curves(
    before: ProbeRun | None, after: ProbeRun, golds: Sequence[ProbeRun]
) -> dict[str, list[tuple[float, float]]]:
    """before, after, and the mean of gold."""
    found = {role: run.curve for role, run in (("before", before), ("after", after)) if run and run.curve}
    several = [dict(run.curve) for run in golds if run.curve]
    if several:
        budgets = [budget for budget, _ in golds[0].curve if all(budget in curve for curve in several)]
        found["gold"] = [(b, float(np.mean([curve[b] for curve in several]))) for b in budgets]
    return found


def _unscored(runs: Sequence[ProbeRun]) -> str:
    for run in runs:
        if run.status != "scored":
            return run.status
        if not run.items:
            return "nothing was asked"
    return ""


def _weights(run: ProbeRun, rules: Rules) -> np.ndarray:
    """(1 + draws, items): how often each item counts; the first row counts each once."""
    entities, index = np.unique([item.entity for item in run.items], return_inverse=True)
    generator = np.random.default_rng(rules.seed)
    drawn = generator.multinomial(len(entities), np.full(len(entities), 1 / len(entities)), rules.draws)
    return np.concatenate([np.ones((1, len(index))), drawn[:, index]]).astype(np.float64)


def _scores(run: ProbeRun, weights: np.ndarray) -> np.ndarray:
    values = np.array([item.recovered for item in run.items])
    totals = weights.sum(1)
    return np.divide(weights @ values, totals, out=np.full(len(weights), values.mean()), where=totals > 0)


def null(runs: Runs, rules: Rules | None = None) -> dict[str, float]:
    """Per group the largest recovery of a gold model judged against the other gold models: what chance gives."""
    found: dict[str, float] = dict.fromkeys(JUDGED_GROUPS, 0.0)
    if len(runs.golds) < 2:
        return found
    quick = Rules(**{**vars(rules or Rules()), "draws": 0})
    for i, gold in enumerate(runs.golds):
        held_out = judge(runs.with_candidate(gold, [*runs.golds[:i], *runs.golds[i + 1 :]]), quick)
        for group in JUDGED_GROUPS:
            interval = held_out.groups[group]
            if interval is not None:
                found[group] = max(found[group], interval.value)
    return found


def decide(
    judgement: Judgement,
    *,
    chance: dict[str, float] | None = None,
    has_gold: bool = True,
    self_test: bool | None = None,
    access: str = "weights",
    flags: Sequence[str] = (),
    rules: Rules | None = None,
) -> Verdict:
    """First match wins; a total function.

    Args:
        chance: `null` of the gold models; a group must pass both it and tau.
        self_test: False if the instrument failed on known models, None if it was not tried.
        access: with "api" nobody can reach weights or hidden states, so only text probes are judged.
    """
    rules = rules or Rules()
    bars = {group: max(rules.tau, (chance or {}).get(group, 0.0)) for group in JUDGED_GROUPS}
    groups = judgement.groups
    judged_groups = JUDGED_GROUPS[1:] if access == "weights" else JUDGED_GROUPS[1:2]

    def back(group: str) -> bool:
        interval = groups[group]
        return interval is not None and interval.low > bars[group]

    by = [
        probe.attack
        for group in ("direct", *judged_groups)
        for probe in judgement.by_group[group]
        if back(group) and probe.recovery is not None and probe.recovery.low > bars[group]
    ]
    thresholds = {"tau": rules.tau, **{f"tau_{group}": round(bar, 4) for group, bar in bars.items()}}
    thresholds |= {"power": rules.power, "ceiling": rules.ceiling, "entities": float(rules.entities)}

    def verdict(name: str, because: str) -> Verdict:
        return Verdict(name, because, by, list(flags), groups, thresholds)

    direct = groups["direct"]
    if judgement.entities < rules.entities:
        return verdict(
            "inconclusive",
            f"The request names {judgement.entities} entities; below {rules.entities} chance is too large to judge.",
        )
    if direct is None:
        why = next((p.why for p in judgement.probes if p.group == "direct"), "it was not asked")
        return verdict("inconclusive", f"Asking directly shows nothing: {why}.")
    if self_test is False:
        return verdict("inconclusive", "The instrument failed its own test on models whose truth is known.")
    if direct.low > bars["direct"]:
        return verdict(
            "not_forgotten",
            f"Asked directly, the model still gives {_share(direct.value)} of what it knew beyond a model that never "
            "saw the data.",
        )
    if direct.high > bars["direct"]:
        return verdict(
            "inconclusive",
            f"Asked directly, the model gives {_share(direct.value)} of what it knew; the interval reaches from "
            f"{_share(direct.low)} to {_share(direct.high)}, so it cannot be told from chance. More forget "
            "entities help.",
        )
    found = [group for group in judged_groups if back(group)]
    if found:
        if not by:  # only together do the group's probes pass the bar: name the strongest
            by.extend(max(judgement.by_group[group], key=_value).attack for group in found)
        return verdict(
            "suppressed",
            f"Asked directly, the model no longer tells, but the knowledge comes back through {', '.join(by)}.",
        )
    missing = [group for group in judged_groups if groups[group] is None]
    if missing:
        return verdict(
            "inconclusive", f"No informative probe of group {' and '.join(missing)}: nothing can be said about it."
        )
    unsure = [group for group in judged_groups if (interval := groups[group]) and interval.high > bars[group]]
    if unsure:
        worst = {g: i for g in unsure if (i := groups[g]) is not None}
        text = ", ".join(f"{g} {_share(i.value)} (up to {_share(i.high)})" for g, i in worst.items())
        return verdict("inconclusive", f"Recovery cannot be told from chance in: {text}. More forget entities help.")
    if not has_gold:
        return verdict(
            "no_recovery_found",
            "No tested attack brought the knowledge back; without a model retrained without the data nothing more can "
            "be said.",
        )
    return verdict(
        "removed_under_tested_attacks",
        "Under every tested attack the model behaves like one that never saw the data.",
    )


def _value(probe: Judged) -> float:
    return probe.recovery.value if probe.recovery else float("-inf")


def _share(value: float) -> str:
    return f"{100 * max(0.0, value):.0f} %"


def auc(knowing: Sequence[float], ignorant: Sequence[float]) -> float:
    """How often a model that knows scores above one that does not; ties count half."""
    pairs = [(a > b) + 0.5 * (a == b) for a in knowing for b in ignorant]
    return float(np.mean(pairs)) if pairs else float("nan")
