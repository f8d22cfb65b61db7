"""The audit: every model is asked everything once, attacks and metrics read the answers, the verdict judges them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import ignorance, limits, registry, routing, side_effects
from .attacks.case import Case, carry_out
from .attacks.written import Written
from .errors import MismatchError, RequestError
from .evidence import Evidence, Judged, ProbeRun, Routing, SelfTest, Verdict
from .inference import Rule
from .metrics.measure import Asked, measure_all, more_tables
from .rows import Row, asked_for
from .tables.passes import Store, ask_all, longest_answer
from .tables.view import View
from .verdict import Judgement, Rules, Runs, auc, decide, judge, null

Progress = Callable[[str, int, int], None]
Attacks = Sequence[tuple[str, dict[str, Any]]]

STANDARD = (
    *("decoding", "direct", "linear_probe", "logit_lens", "membership", "nearest_features"),
    *("paraphrase", "quantise", "quantise_8bit", "relearn", "relearn_speed", "transformed"),
)
"""What runs unless a request names attacks, of those that serve the subject: one or two cheap ones of each group. The
others cost more, or need to be chosen for a subject."""

PROOF: dict[str, dict[str, dict[str, Any]]] = {
    "quick": {"decoding": {"samples": 8}, "relearn": {"steps": 16}, "relearn_speed": {"steps": 8}},
    "standard": {},
    "thorough": {"decoding": {"samples": 64}, "relearn": {"steps": 128}, "relearn_speed": {"steps": 64}},
}
"""What the depth of proof changes in the attacks' own budgets."""

FLAGS_OF_GUARDS = "keeps_forget_data"


def battery(proof: str = "standard", modality: str = "language") -> list[tuple[str, dict[str, Any]]]:
    """The attacks of an audit that names none, at the budget of a depth of proof."""
    serving = {part.name for part in registry.serving("attacks", modality)}
    return [(name, PROOF[proof].get(name, {})) for name in STANDARD if name in serving]


def audit(
    after: Any,
    *,
    before: Any | None,
    golds: Sequence[Any] = (),
    data: dict[str, list[Row]],
    folder: Path,
    method: dict[str, Any] | None = None,
    request: dict[str, Any] | None = None,
    attacks: Attacks | None = None,
    metrics: Sequence[Asked] | None = None,
    rules_of_inference: Sequence[Rule] = (),
    gold_kind: str = "exact",
    access: str = "weights",
    proof: str = "standard",
    seed: int = 0,
    bootstrap: int = 1000,
    max_new_tokens: int | None = None,
    self_test: bool = True,
    shared: Path | None = None,
    environment: dict[str, Any] | None = None,
    cost: dict[str, Any] | None = None,
    warnings: Sequence[str] = (),
    progress: Progress | None = None,
) -> Evidence:
    """Attack and measure a model beside the one before and retrained ones, and judge it.

    Args:
        after: the model under suspicion: any subject that answers, or a guard around one.
        before: the model that knew; without it full recall counts as 1 and nothing can be called a side effect.
        golds: models trained without the forget rows, one per seed.
        data: row sets by name; `forget` is needed, `retain`, `neighbour`, `holdout`, `general` are used where given. Of
            running text the second half is asked for, given the first.
        folder: where tables are kept (`folder/tables`); what is there is not computed again.
        attacks: (name, settings); those of `STANDARD` that serve the model, at the budget of `proof`, by default.
        rules_of_inference: how relations compose; what follows of the forgotten from what is kept is listed.
        max_new_tokens: length of answers; by default the longest known answer and a few tokens.
        self_test: try the instrument on the model before, held-out golds and a filter around the model before.
        shared: a second folder of tables that other runs use too.

    Raises:
        RequestError: there is nothing to judge, or an attack or metric is for models of another kind.
        MismatchError: models that cannot be compared.
    """
    if not data.get("forget"):
        raise RequestError("nothing to judge: the request has no knowledge queries (0 forget rows)")
    comparable(after, [m for m in (before, *golds) if m is not None])
    data = {name: asked_for(rows) for name, rows in data.items() if rows}
    for room, named in (("attacks", attacks), ("metrics", metrics)):
        for one in named or ():
            registry.check_serves(registry.get(room, one if isinstance(one, str) else one[0]), after)
    asked = list(attacks) if attacks is not None else battery(proof, after.modality)
    limit = max_new_tokens or longest_answer(after, data)
    store = Store(folder / "tables", shared)
    written = Written(store)
    spent = dict(cost or {})
    models: dict[str, Any] = {"before": before} if before is not None else {}
    retrained = {f"gold/{i}": gold for i, gold in enumerate(golds)}
    models |= {"after": after, **retrained}

    more = more_tables(metrics, after.modality)
    views: dict[str, View] = {}
    runs: dict[str, list[ProbeRun]] = {}
    for role, model in models.items():
        began = time.monotonic()
        tell = _phase(progress, f"ask: {role}")
        views[role] = ask_all(
            model, data, limit, store, more=more, host=before, golds=retrained, seed=seed, name=role, progress=tell
        )
        middle = time.monotonic()
        case = Case(model, data, seed, limit, written)
        runs[role] = carry_out(case, asked, store, _phase(progress, f"attack: {role}"))
        spent[f"ask: {role}"] = {"seconds": round(middle - began, 3)}
        spent[f"attack: {role}"] = {"seconds": round(time.monotonic() - middle, 3)}

    began = time.monotonic()
    gold_views = [views[f"gold/{i}"] for i in range(len(golds))]
    measured, notes = measure_all(
        views.get("before"), views["after"], gold_views, metrics=metrics, seed=seed, bootstrap=bootstrap
    )
    effects = side_effects.measure(views.get("before"), views["after"], gold_views, seed)
    golds_runs = [runs[f"gold/{i}"] for i in range(len(golds))]
    effects += side_effects.suppression(runs.get("before", []), runs["after"], golds_runs)
    spent["metrics"] = {"seconds": round(time.monotonic() - began, 3)}
    routes: list[Routing] = []
    if before is not None:
        began = time.monotonic()
        tell = _phase(progress, "experts")
        routes, note = routing.measure(before, after, data, store, method=method, seed=seed, progress=tell)
        notes += [note] if note else []
        spent |= {"experts": {"seconds": round(time.monotonic() - began, 3)}} if routes else {}

    rules = Rules(draws=bootstrap, seed=seed)
    all_runs = Runs(runs.get("before", []), runs["after"], golds_runs)
    judgement = judge(all_runs, rules)
    all_runs = all_runs.settled(judgement)
    chance = null(all_runs, rules)
    _caveats(judgement.probes)
    began = time.monotonic()
    tested = None
    if self_test and before is not None:
        tested = _self_test(
            Case(before, data, seed, limit, written), asked, all_runs, chance, rules, access, store, progress
        )
        spent["self-test"] = {"seconds": round(time.monotonic() - began, 3)}
    card = (method or {}).get("card") or {}
    follows = side_effects.follows(data, rules_of_inference)
    flags = [effect.flag for effect in effects if effect.raised]
    flags += ["composition_leak"] if follows else []
    flags += [FLAGS_OF_GUARDS] if card.get("keeps") else []
    flags += ["needs_filter"] if limits.needs_filter(runs["after"]) else []
    flags += [] if "retain" in data and before is not None else ["utility_unknown"]
    verdict = decide(
        judgement,
        chance=chance,
        has_gold=bool(golds),
        self_test=tested.passed if tested else None,
        access=access,
        flags=list(dict.fromkeys(flags)),
        rules=rules,
    )
    if tested and not tested.passed:
        verdict.because = f"{verdict.because} {tested.note}".strip()
    if access == "api":
        notes.append(
            "Latent and tamper probes were run but not judged: the request says that weights are out of reach."
        )
    return Evidence(
        request={"rows": _counts(data), "entities": _entities(data), "gold_kind": gold_kind, **(request or {})},
        method=method or {},
        models=[
            {"role": role.partition("/")[0], "name": model.name, "fingerprint": model.fingerprint}
            for role, model in models.items()
        ],
        probes=judgement.probes,
        runs=runs,
        metrics=measured,
        side_effects=effects,
        self_test=tested,
        verdict=verdict,
        limits=limits.lines(
            runs=runs["after"],
            method=method or {},
            golds=len(golds),
            gold_kind=gold_kind,
            access=access,
            verdict=verdict,
            implied=follows if rules_of_inference else None,
            safety=len(data.get("safety", [])),
            prompts=not all(row.closed for row in data["forget"]),
            notes=notes,
        ),
        examples=_examples(data, views, seed),
        cost=spent,
        environment=environment or {},
        warnings=list(warnings),
        routing=routes,
        implied=follows,
        knowing=ignorance.read(runs),
    )


def _phase(progress: Progress | None, name: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(name, done, total)


def comparable(after: Any, others: Sequence[Any]) -> None:
    """Models that are compared must share what they answer with: a tokenizer, or classes.

    Raises:
        MismatchError: one has another.
    """
    if hasattr(after, "classes"):
        for other in others:
            if getattr(other, "classes", None) != after.classes:
                raise MismatchError(
                    f"{other.name} has other classes than {after.name}; models that are compared must share them"
                )
        return
    vocabulary = after.tokenizer.get_vocab()
    for other in others:
        if other.tokenizer.get_vocab() != vocabulary:
            raise MismatchError(
                f"{other.name} has another tokenizer ({len(other.tokenizer)} tokens) than {after.name} "
                f"({len(after.tokenizer)}); models that are compared must share one"
            )


def _caveats(probes: Sequence[Judged]) -> None:
    for probe in probes:
        probe.caveat = getattr(registry.get("attacks", probe.attack).card, "caveat", "")


def _self_test(
    case: Case,
    attacks: Attacks,
    runs: Runs,
    chance: dict[str, float],
    rules: Rules,
    access: str,
    store: Store,
    progress: Progress | None,
) -> SelfTest:
    """Judge models whose truth is known; each must come out right, or no verdict is printed.

    Args:
        case: of the model before.
    """
    from .methods.guard.case import GuardCase

    filtered = registry.get("methods", "output_filter").function(GuardCase(case.subject, case.rows))
    hidden = carry_out(replace(case, subject=filtered), attacks, store, _phase(progress, "self-test"))
    cases: list[dict[str, Any]] = []

    def tried(name: str, wanted: tuple[str, ...], forbidden: tuple[str, ...], judged: Runs) -> Verdict:
        bars = null(judged, rules) if judged is not runs and len(judged.golds) > 1 else chance
        judgement = judge(judged, rules)
        found = decide(judgement, chance=bars, has_gold=bool(judged.golds), access=access, rules=rules)
        right = found.verdict in wanted if wanted else found.verdict not in forbidden
        expected = " or ".join(wanted) if wanted else f"not {' or '.join(forbidden)}"
        cases.append({"model": name, "expected": expected, "verdict": found.verdict, "ok": right, "by": found.by})
        return found

    tried("original", ("not_forgotten",), (), runs.with_candidate(runs.before, runs.golds))
    for i, gold in enumerate(runs.golds if len(runs.golds) > 1 else []):
        rest = [*runs.golds[:i], *runs.golds[i + 1 :]]
        tried(f"gold {i}, held out", (), ("suppressed", "not_forgotten"), runs.with_candidate(gold, rest))
    if access == "weights":
        tried("output filter around the original", ("suppressed",), (), runs.with_candidate(hidden, runs.golds))
    few = _few(runs)
    passed = few or all(case["ok"] for case in cases)
    wrong = [case for case in cases if not case["ok"]]
    note = "".join(
        f"{case['model']} was judged {case['verdict']}, expected {case['expected']}"
        f"{' (' + ', '.join(case['by']) + ')' if case['by'] else ''}. "
        for case in wrong
    ).strip()
    if few:
        note = "Too few entities for a verdict, so none of the known models could get one either."
    knowing = {run.attack: run.score for run in runs.before}
    areas = {}
    for i, run_ in enumerate(runs.before):
        ignorant = [gold[i].score for gold in runs.golds if gold[i].items]
        if run_.items and ignorant:
            areas[run_.attack] = auc([knowing[run_.attack]], ignorant)
    return SelfTest(passed, cases, areas, note)


def _few(runs: Runs) -> bool:
    return len({item.entity for run in runs.after for item in run.items}) < Rules().entities


def _counts(data: dict[str, list[Row]]) -> dict[str, int]:
    return {name: len(rows) for name, rows in data.items()}


def _entities(data: dict[str, list[Row]]) -> dict[str, int]:
    return {name: len({row.entity or row.id for row in rows}) for name, rows in data.items()}


def _examples(data: dict[str, list[Row]], views: dict[str, View], seed: int) -> list[dict[str, Any]]:
    """A few rows as every model answers them, one per entity, drawn by the seed."""
    import random

    found = []
    for name, count in (("forget", 5), ("retain", 3), ("neighbour", 2)):
        rows = data.get(name, [])
        chosen: dict[str, Row] = {}
        for row in random.Random(seed).sample(rows, len(rows)):
            chosen.setdefault(row.entity or row.id, row)
        for row in list(chosen.values())[:count]:
            said = {role: view.outputs(name, ids=[row.id])[0][0] for role, view in views.items()}
            found.append(
                {
                    "set": name,
                    "row": row.id,
                    "entity": row.entity,
                    **row.shown(),
                    "answer": row.answer,
                    "before": said.get("before", ""),
                    "after": said["after"],
                    "gold": said.get("gold/0", ""),
                }
            )
    return found


__all__ = ["Judgement", "audit", "battery"]
