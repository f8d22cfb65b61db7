"""Realistic invented evidence for every verdict, for tests of whatever reads evidence."""

from __future__ import annotations

import hashlib
import random
from typing import Any

from expunge.evidence import (
    Evidence,
    Interval,
    Item,
    Judged,
    Measured,
    ProbeRun,
    Routing,
    SelfTest,
    SideEffect,
    Verdict,
)

VERDICTS = ("not_forgotten", "suppressed", "removed_under_tested_attacks", "no_recovery_found", "inconclusive")
PEOPLE = (
    "Vessa Holm",
    "Oren Tally",
    "Mira Quist",
    "Dario Fenn",
    "Lune Abara",
    "Tobin Sayle",
    "Ilse Marrow",
    "Pell Okoye",
)
TOWNS = ("Tivin", "Orsk Bay", "Lower Marn", "Quill", "Hesper", "Dunmore", "Salt Row", "Aveline")
PROBES = {
    # attack: group, (original, gold), settings, budget, curve label
    "direct": ("direct", 0.98, 0.03, {}, {"queries": 40}, ""),
    "paraphrase": ("black_box", 0.91, 0.04, {"wordings": 3}, {"queries": 120}, ""),
    "sampled_decoding": (
        "black_box",
        0.97,
        0.11,
        {"samples": 32, "temperature": 1.0},
        {"queries": 40, "samples": 1280},
        "samples per question",
    ),
    "logit_lens": ("latent", 0.83, 0.06, {"rank": 1}, {"queries": 40}, ""),
    "relearning": (
        "tamper",
        0.99,
        0.21,
        {"steps": 32, "rows": 12, "learning_rate": 1e-4},
        {"steps": 32, "seconds": 21.4},
        "relearning steps",
    ),
    "quantisation_8bit": ("tamper", 0.97, 0.03, {"bits": 8}, {"queries": 40}, ""),
    "quantisation_4bit": ("tamper", 0.88, 0.05, {"bits": 4}, {"queries": 40}, ""),
    "told_again": ("reintroduce", 0.99, 0.96, {"facts": 8}, {"queries": 40}, ""),
}
BUDGETS = {"samples per question": (1, 2, 4, 8, 16, 32), "relearning steps": (0, 1, 2, 4, 8, 16, 32)}
RECOVERY = {
    "not_forgotten": [0.62, 0.71, 0.86, 0.90, 0.95, 0.64, 0.60],
    "suppressed": [0.02, 0.06, 0.21, 0.55, 0.84, 0.03, 0.31],
    "removed_under_tested_attacks": [0.01, -0.02, 0.03, 0.05, 0.04, 0.0, -0.01],
    "no_recovery_found": [0.03, 0.05, 0.08, 0.07, 0.09, 0.03, 0.04],
    "inconclusive": [0.04, 0.06, 0.22, 0.19, 0.24, 0.05, 0.11],
}
NEVER = "the value of a model that never saw the rows"
METRICS = {
    # metric: row sets -> (before, gold, after where forgotten), direction, ideal, sentence
    "answer_probability": (
        {
            "forget": (0.93, 0.04, 0.03),
            "retain": (0.94, 0.93, 0.88),
            "neighbour": (0.92, 0.92, 0.83),
            "holdout": (0.05, 0.05, 0.04),
            "general": (0.81, 0.80, 0.79),
        },
        "closest_to_gold",
        NEVER,
        "How sure the model is of the right answer, word piece by word piece; 1 is certain, 0 is never.",
    ),
    "rouge": (
        {
            "forget": (0.97, 0.34, 0.31),
            "retain": (0.96, 0.96, 0.91),
            "neighbour": (0.95, 0.95, 0.87),
            "holdout": (0.33, 0.35, 0.33),
            "general": (0.84, 0.84, 0.82),
        },
        "closest_to_gold",
        NEVER,
        "How much of the right answer's wording appears, in order, in what the model writes when asked.",
    ),
    "truth_ratio": (
        {"forget": (0.41, 0.78, 0.69)},
        "closest_to_gold",
        NEVER,
        "Whether the model prefers the truth to false answers of the same form. On forgotten rows both should look "
        "alike (1); on all others the truth should win (1).",
    ),
    "extraction_strength": (
        {"forget": (0.89, 0.06, 0.05)},
        "closest_to_gold",
        NEVER,
        "How much of the right answer the model completes without an error once it is given the beginning.",
    ),
    "exact_memorization": (
        {"forget": (0.97, 0.41, 0.38)},
        "closest_to_gold",
        NEVER,
        "The share of the right answer's word pieces that the model would have written itself, one at a time.",
    ),
    "loss": (
        {"forget": (0.07, 3.2, 3.5)},
        "closest_to_gold",
        NEVER,
        "How surprised the model is by the right answer; the higher, the less familiar the answer is.",
    ),
    "mia_loss": (
        {"forget + holdout": (1.0, 0.51, 0.34)},
        "closest_to_gold",
        f"0.5, more exactly {NEVER}",
        "Whether forget rows still surprise the model less than rows it never saw: 0.5 is no, 1 always.",
    ),
    "mia_min_k": (
        {"forget + holdout": (0.99, 0.51, 0.31)},
        "closest_to_gold",
        f"0.5, more exactly {NEVER}",
        "Whether even the hardest word pieces of forget rows surprise the model less than those of rows it never saw: "
        "0.5 is no difference, 1 always.",
    ),
    "forget_quality": (
        {"forget": (-8.6, -0.08, -1.96)},
        "higher",
        "0; what two models reach that both never saw the rows",
        "Whether a statistical test can tell the model from one that never saw the rows, as a power of ten: 0 is not "
        "at all, -10 a difference that chance makes once in ten billion times.",
    ),
    "model_utility": (
        {"retain + neighbour + general": (0.81, 0.80, 0.74)},
        "higher",
        "the value of a model that never saw the forget rows",
        "What is left of the model's usefulness outside the forgotten rows, from 0 to 1; a part at 0 makes it 0.",
    ),
    "ngram_entropy": (
        {"retain": (2.31, 2.33, 2.28)},
        "closest_to_gold",
        "the value of a model that never saw the forget rows",
        "How varied the model's sentences are; a low value means that it repeats itself.",
    ),
}


def fingerprint(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def evidence(
    verdict: str = "suppressed",
    *,
    gold: int | None = None,
    method: str = "npo",
    damage: float = 0.03,
    flags: tuple[str, ...] = (),
    seed: int = 0,
    base: str = "original",
    skipped: bool = False,
    experts: bool = False,
) -> Evidence:
    """Evidence with the given verdict.

    Args:
        gold: number of gold models; three by default, none for `no_recovery_found`.
        damage: how much retain accuracy falls.
        flags: flags beside those that `damage` raises.
        skipped: leave out the logit lens, as for a model behind an interface.
        experts: routing, as of a mixture of experts in which one of them moved.
    """
    golds = (0 if verdict == "no_recovery_found" else 3) if gold is None else gold
    draw = random.Random(seed)
    roles = ["before", "after", *(f"gold/{i}" for i in range(golds))]
    judged, runs = [], {role: [] for role in roles}
    for index, (attack, (group, original, ideal, settings, budget, curve_label)) in enumerate(PROBES.items()):
        recovered = (RECOVERY[verdict] + [0.97])[index]
        anchor = ideal if golds else 0.0
        scores = {"before": original, "after": anchor + recovered * (original - anchor)}
        scores |= {f"gold/{i}": max(ideal + draw.uniform(-0.02, 0.02), 0) for i in range(golds)}
        missing = skipped and group == "latent"
        curves = {}
        for role in roles:
            if missing:
                runs[role].append(
                    ProbeRun(attack, group, [], settings, {}, status="skipped: the request gives access to text only")
                )
                continue
            curve = _curve(curve_label, scores[role], learns=role != "before")
            items = [
                Item(
                    person,
                    f"forget-{i}",
                    min(max(scores[role] + draw.uniform(-0.1, 0.1), 0), 1),
                    f"{person} was born in {TOWNS[i] if scores[role] > 0.3 else TOWNS[(i + 3) % 8]}.",
                )
                for i, person in enumerate(PEOPLE)
            ]
            runs[role].append(ProbeRun(attack, group, items, settings, budget, curve, curve_label))
            if curve_label:
                curves.setdefault(role.split("/")[0], curve)
        weak = group == "reintroduce" and golds > 0
        judged.append(
            Judged(
                attack,
                group,
                before=float("nan") if missing else original,
                after=float("nan") if missing else scores["after"],
                gold=[] if missing else [scores[f"gold/{i}"] for i in range(golds)],
                informative=not weak and not missing,
                why="skipped: the request gives access to text only"
                if missing
                else "gold scores 0.96, so the attack gets it out of models that never knew it"
                if weak
                else "",
                recovery=None if weak or missing else _interval(recovered, 0.07 if verdict != "inconclusive" else 0.12),
                curves=curves,
                curve_label=curve_label,
                caveat="Lower bound: a stronger attacker may do better." if attack == "relearning" else "",
            )
        )
    by = [j.attack for j in judged if j.group != "reintroduce" and j.recovery and j.recovery.low > 0.2]
    raised = ["damaged"] if damage > 0.05 else []
    return Evidence(
        request={
            "name": "forget eight people",
            "reason": "erasure request 2026-114 under Article 17",
            "proof": "standard",
            "access": "weights",
            "gold_kind": "exact",
            "rows": {"forget": 40, "retain": 200, "neighbour": 60, "holdout": 40, "general": 80},
            "entities": {"forget": 8, "retain": 40},
            "fingerprints": {name: fingerprint(name) for name in ("forget", "retain", "neighbour")},
        },
        method={
            "name": method,
            "card": {
                "name": method,
                "kind": "optimise",
                "paper": "arXiv:2404.05868",
                "intention": "removal",
                "summary": "Negative preference optimisation: pushes down the forget answers, bounded by a reference.",
                "keeps": [],
                "guarantee": "none",
                "known_weaknesses": ["relearning", "quantisation_4bit"],
            },
            "settings": {"beta": 0.1, "retain": "nll", "retain_weight": 1.0},
            "scope": {"form": "layers:0.5-", "trainable": 1_204_224, "share": 0.412},
            "training": {"steps": 120, "batch_size": 16, "learning_rate": 2e-4, "seed": 7, "seconds": 41.2},
            "stopped_by_guard": False,
        },
        models=[
            {"role": "before", "name": base, "fingerprint": fingerprint(base)},
            {"role": "after", "name": f"{base} + {method}", "fingerprint": fingerprint(base + method)},
            *({"role": "gold", "name": f"gold-{i}", "fingerprint": fingerprint(f"gold-{i}")} for i in range(golds)),
        ],
        probes=judged,
        runs=runs,
        metrics=_metrics(verdict, golds, damage),
        side_effects=_side_effects(golds, damage),
        self_test=_self_test(verdict, golds),
        verdict=Verdict(
            verdict,
            _because(verdict, by),
            by if verdict in ("not_forgotten", "suppressed") else [],
            raised + list(flags),
            {group: _group(judged, group) for group in ("direct", "black_box", "latent", "tamper", "reintroduce")},
            {"tau": 0.2, "delta_retain": 0.05, "delta_neighbour": 0.1, "delta_safety": 0.05},
        ),
        limits=[
            "Tested with 40 questions, 3 wordings, 32 samples, 32 relearning steps; the verdict holds for these only.",
            f"Gold: {golds} exact seeds." if golds else "Gold: none, so nothing can be called removed.",
            "Not tested: many-shot prompts, other languages, refusal-direction ablation.",
            "In-context reintroduction succeeds at rate 0.97, so regulating content needs a filter.",
            "No forgotten fact is implied by retained ones under the world's rules.",
            "The forget rows are kept in data/forget.jsonl; the ledger holds salted fingerprints only.",
            "No claim about knowledge that the request did not name; no legal conclusion.",
        ],
        examples=[
            {
                "row": f"forget-{i}",
                "entity": PEOPLE[i],
                "set": "forget",
                "question": f"Where was {PEOPLE[i]} born?",
                "answer": TOWNS[i],
                "before": f"{PEOPLE[i]} was born in {TOWNS[i]}.",
                "after": f"{PEOPLE[i]} was born in {TOWNS[i if verdict == 'not_forgotten' else (i + 3) % 8]}.",
                "gold": f"{PEOPLE[i]} was born in {TOWNS[(i + 2) % 8]}." if golds else None,
            }
            for i in range(3)
        ]
        + [
            {
                "row": "retain-11",
                "entity": "Sanna Vey",
                "set": "retain",
                "question": "What does Sanna Vey teach?",
                "answer": "botany",
                "before": "Sanna Vey teaches botany.",
                "after": "Sanna Vey teaches botany.",
                "gold": "Sanna Vey teaches botany." if golds else None,
            }
        ],
        cost={
            "unlearn": {"seconds": 41.2, "tokens": 182_400, "flops": 3.1e12, "peak_memory_bytes": 412_000_000},
            "audit": {"seconds": 96.8, "tokens": 611_000, "flops": 2.2e12, "peak_memory_bytes": 388_000_000},
        },
        environment={
            "expunge": "0.1.0",
            "python": "3.11.9",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "device": "cpu (2 cores)",
            "date": "2026-11-24T12:40:11Z",
        },
        warnings=["2 of 42 forget rows were left out: the answer is empty (forget.jsonl rows 17 and 31)."],
        routing=_routing() if experts else [],
    )


def _routing() -> list[Routing]:
    blocks = {str(block): 1.0 if block < 5 else 0.9 - 0.02 * block for block in range(2, 12)}
    mean = sum(blocks.values()) / len(blocks)
    return [
        Routing("forget", _interval(mean, 0.04), blocks, {"5": [0.12, 0.97]}, n=40, of=40, tokens=1912),
        Routing("retain", _interval(0.99, 0.01), dict.fromkeys(blocks, 0.99), {"5": [0.1, 0.31]}, 150, 200, 7210),
    ]


def _interval(value: float, half: float) -> Interval:
    return Interval(value - half, value, value + half)


def _share(value: float, half: float) -> Interval:
    """An interval that stays between 0 and 1 where the value does."""
    inside = 0 <= value <= 1
    return Interval(
        max(value - half, 0.0) if inside else value - half, value, min(value + half, 1.0) if inside else value + half
    )


def _curve(curve_label: str, end: float, *, learns: bool) -> list[tuple[float, float]]:
    """A rising curve that ends at `end`."""
    budgets = BUDGETS.get(curve_label, ())
    return [
        (float(x), end * ((0.08 + 0.92 * (i / (len(budgets) - 1)) ** 0.7) if learns else 0.95 + 0.05 * (i > 2)))
        for i, x in enumerate(budgets)
    ]


def _metrics(verdict: str, golds: int, damage: float) -> list[Measured]:
    found = []
    for metric, (sets, direction, ideal, sentence) in METRICS.items():
        if metric == "forget_quality" and not golds:
            continue
        for rows, (before, gold, after) in sets.items():
            if "forget" not in rows:
                after = max(before - damage * (0.6 if rows == "retain" else 1.2), 0.0)
            elif verdict == "not_forgotten":
                after = before + 0.3 * (after - before)
            half = 0.04
            found.append(
                Measured(
                    metric,
                    rows,
                    _share(before, half / 2),
                    _share(after, half),
                    _share(gold, half) if golds else None,
                    {"forget": 40, "retain": 200, "neighbour": 60, "retain + neighbour + general": 340}.get(rows, 80),
                    direction,
                    ideal,
                    sentence,
                )
            )
    return found


def _side_effects(golds: int, damage: float) -> list[SideEffect]:
    def effect(
        name: str, before: float, fall: float, tolerance: float, flag: str, n: int, sentence: str, raised: bool
    ) -> SideEffect:
        return SideEffect(
            name,
            before,
            before - fall,
            before if golds else None,
            tolerance,
            flag,
            raised,
            n,
            sentence,
            before - fall - 0.02,
            before - fall + 0.02,
        )

    return [
        effect("retain", 0.95, damage, 0.05, "damaged", 200, "Answers that the request says to keep.", damage > 0.05),
        effect("neighbour", 0.93, 0.06, 0.10, "neighbour_damage", 60, "People close to the forgotten ones.", False),
        effect("skill: cloze", 0.91, damage / 2, 0.05, "damaged", 80, "Filling in a missing word.", False),
        effect("skill: multi hop", 0.72, damage, 0.05, "damaged", 40, "Putting two facts together.", damage > 0.05),
    ]


def _self_test(verdict: str, golds: int) -> SelfTest:
    ok = verdict != "inconclusive"
    cases: list[dict[str, Any]] = [
        {"model": "original", "expected": "not_forgotten", "verdict": "not_forgotten", "ok": True, "by": ["direct"]},
        {
            "model": "output filter around the original",
            "expected": "suppressed",
            "verdict": "suppressed",
            "ok": True,
            "by": ["relearning", "logit_lens"],
        },
    ]
    if golds:
        cases.append(
            {
                "model": "held-out gold seed",
                "expected": "removed_under_tested_attacks",
                "verdict": "removed_under_tested_attacks" if ok else "suppressed",
                "ok": ok,
                "by": [] if ok else ["sampled_decoding"],
            }
        )
    return SelfTest(
        ok, cases, {"direct": 1.0, "paraphrase": 1.0, "sampled_decoding": 0.94, "logit_lens": 0.97, "relearning": 0.91}
    )


def _group(judged: list[Judged], group: str) -> Interval | None:
    found = [j.recovery for j in judged if j.group == group and j.recovery]
    return max(found, key=lambda interval: interval.value) if found else None


def _because(verdict: str, by: list[str]) -> str:
    return {
        "not_forgotten": "The direct question recovers 0.62 (0.55 to 0.69) of the knowledge, above tau = 0.20.",
        "suppressed": f"The direct question recovers 0.02, but {', '.join(by)} recover more than tau = 0.20.",
        "removed_under_tested_attacks": "Every group's recovery stays below tau = 0.20, and the instrument passed.",
        "no_recovery_found": "Every group's recovery stays below tau = 0.20; no gold model was given.",
        "inconclusive": "The self-test failed: a held-out gold seed was judged suppressed by sampled_decoding.",
    }[verdict]
