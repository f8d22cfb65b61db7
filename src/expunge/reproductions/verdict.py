"""The verdict as a classifier over models whose truth is known.

The criteria are those of the survey of Ren et al., SoK: Machine unlearning for large language models, arXiv:2506.09227
(removal or suppression), made checkable: who knows, who never saw the rows, and who merely does not say it is known
beforehand here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import registry
from ..audit import audit
from ..evidence import Evidence, Table
from ..methods.guard.case import GuardCase
from ..methods.optimise.loop import Training, fit
from ..methods.optimise.unlearn import unlearn
from ..registry import reproduction
from ..verdict import auc
from .case import Case, Claim, Findings, Row
from .mini import Mini, mini

KNOWING = ("original", "relearned gold")
HIDING = ("output_filter", "icu_prefix", "idk")
"""They answer otherwise; their weights hold what they held."""
GUARDS: dict[str, dict[str, Any]] = {
    "output_filter": {},
    # The shortest instruction: the models' context holds 128 tokens.
    "icu_prefix": {"wording": "list", "max_targets": 1},
}
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # settings, training; the world's own request where nothing is said
    "idk": ({}, {}),
    "grad_diff": ({}, {}),
    "npo": ({}, {}),
    "rmu": (
        {"layer": -1, "coefficient": "adaptive", "scale": 2.0, "retain_weight": 10.0},
        {"steps": 240, "learning_rate": 2e-3},
    ),
}
TRAINING = {"epochs": 12, "batch_size": 16, "learning_rate": 3e-4}
REMOVED = "removed_under_tested_attacks"
GOLDS = 3


def trial(
    seed: int,
    relearned: int = 160,
    attacks: list[str] | None = None,
    training: dict[str, Any] | None = None,
    world: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Every model of one world judged: verdict, `by`, flags, the probes' scores, the share of retained questions."""
    made = mini(seed, {"gold_seeds": GOLDS, **(world or {})})
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="expunge-verdict-") as folder:

        def judge(name: str, model: Any, golds: Sequence[Any]) -> None:
            evidence = audit(
                model,
                before=made.original,
                golds=golds,
                data=made.data,
                folder=Path(folder) / name.replace(" ", "-"),
                shared=Path(folder) / "shared",
                attacks=None if attacks is None else [(attack, {}) for attack in attacks],
                metrics=[],
                self_test=name == "original",
            )
            found[name] = _summary(evidence)

        judge("original", made.original, made.golds)
        for i, gold in enumerate(made.golds):
            judge(f"gold {i}", gold, [*made.golds[:i], *made.golds[i + 1 :]])
        judge("relearned gold", _taught(made, relearned, seed), made.golds)
        for name, settings in GUARDS.items():
            part = registry.get("methods", name)
            guarded = part.function(GuardCase(made.original, made.data), **part.resolve(settings))
            judge(name, guarded, made.golds)
        for name, (settings, own) in METHODS.items():
            plan = {**TRAINING, **own, **(training or {}), "seed": seed}
            judge(name, _changed(made, name, settings, plan), made.golds)
    return {"models": found}


def _taught(made: Mini, steps: int, seed: int) -> Any:
    """A gold model that was taught the forget rows after all."""
    model = made.golds[0].copy()
    items = [model.encode(row) for row in made.data["forget"]]
    fit(model, items, steps=steps, batch_size=16, learning_rate=5e-4, seed=seed)
    return model


def _changed(made: Mini, name: str, settings: dict[str, Any], training: dict[str, Any]) -> Any:
    part = registry.get("methods", name)
    plan = Training(**training)
    outcome = unlearn(made.original, part, part.resolve(settings), scope=None, data=made.data, training=plan)
    return outcome.delta.apply(made.original)


def _summary(evidence: Evidence) -> dict[str, Any]:
    effects = {effect.name: effect.after for effect in evidence.side_effects}
    verdict = evidence.verdict
    return {
        "verdict": verdict.verdict,
        "by": verdict.by,
        "flags": verdict.flags,
        "retain": effects["retain"],
        "scores": {run.attack: run.score for run in evidence.runs["after"] if run.status == "scored" and run.items},
        "self_test": None if evidence.self_test is None else evidence.self_test.passed,
    }


@reproduction(
    paper="arXiv:2506.09227",
    cost="4 min on 2 cores, and 5 once for the models of the worlds",
    systems=("verdict", "intention"),
)
def verdict(
    case: Case, *, relearned: int = 160, attacks: list[str] | None = None, world: dict[str, Any] | None = None
) -> Findings:
    """Whether the verdict tells models that know, that merely do not say it, and that never saw the rows.

    `relearned`: steps for which a gold model is taught the forget rows. `attacks`: all that run by default. `world`:
    sizes of the invented world, arguments of expunge.world.build.build.
    """
    rows = case.trials(trial, [{"relearned": relearned, "attacks": attacks, "world": world}])
    return Findings(claims=claims(rows), tables=[_verdicts(rows), _areas(rows)], notes=NOTES)


NOTES = [
    "The model under judgement is never among the gold models it is compared with.",
    "icu_prefix is an instruction before every prompt; the invented world's models are no instruction followers, so "
    "it disturbs all answers alike, retained ones too.",
    "Every forgotten person counts as one entity: with ten of them intervals are wide, and `inconclusive` is the "
    "honest word for many a method's model. The report says that more forget entities help.",
]


def claims(rows: Sequence[Row]) -> list[Claim]:
    """Criteria of specs: taxonomy 6, decided beforehand."""

    def of(*names: str) -> list[tuple[str, str]]:
        return [(name, row["models"][name]["verdict"]) for row in rows for name in names]

    def told(found: Sequence[tuple[str, str]]) -> str:
        counts = {pair: found.count(pair) for pair in dict.fromkeys(found)}
        return ", ".join(f"{name} {verdict} {n} x" for (name, verdict), n in counts.items())

    golds = [name for name in rows[0]["models"] if name.startswith("gold ")]
    plain, knowing = of("original"), of(*KNOWING, *HIDING)
    caught = [
        any(
            row["models"][name]["verdict"] == "suppressed" or "damaged" in row["models"][name]["flags"]
            for name in ("npo", "grad_diff")
        )
        for row in rows
    ]
    return [
        Claim(
            "A model that knows is found out",
            "-",
            "the original is not_forgotten on every seed, and its self-test passes",
            told(plain),
            all(found == "not_forgotten" for _, found in plain)
            and all(row["models"]["original"]["self_test"] for row in rows),
        ),
        Claim(
            "Gold that was taught the rows after all is found out",
            "-",
            "not_forgotten on every seed",
            told(of("relearned gold")),
            all(found == "not_forgotten" for _, found in of("relearned gold")),
        ),
        Claim(
            "No model that never saw the rows is accused",
            "-",
            "no held-out gold is suppressed or not_forgotten",
            told(of(*golds)),
            all(found not in ("suppressed", "not_forgotten") for _, found in of(*golds)),
        ),
        Claim(
            "Hiding is not removing",
            "suppression-intended methods leave the knowledge in the weights",
            "output_filter, icu_prefix and idk are suppressed (or not_forgotten) on every seed",
            told(of(*HIDING)),
            all(found in ("suppressed", "not_forgotten") for _, found in of(*HIDING)),
        ),
        Claim(
            "No false `removed`",
            "-",
            "no model that knows or hides is removed_under_tested_attacks",
            f"{sum(found == REMOVED for _, found in knowing)} of {len(knowing)}",
            all(found != REMOVED for _, found in knowing),
        ),
        Claim(
            "Common removal-intended methods suppress, or damage",
            "gradient ascent and its kin often behave like suppression",
            "npo or grad_diff is suppressed or flagged damaged on every seed",
            f"{sum(caught)} of {len(caught)} seeds: {told(of('npo', 'grad_diff', 'rmu'))}",
            all(caught),
        ),
    ]


def _verdicts(rows: Sequence[Row]) -> Table:
    short = {REMOVED: "removed"}

    def cell(found: dict[str, Any]) -> str:
        by = f" by {', '.join(found['by'])}" if found["by"] and found["verdict"] != "not_forgotten" else ""
        flags = f"; {', '.join(found['flags'])}" if found["flags"] else ""
        return f"{short.get(found['verdict'], found['verdict'])}{by}{flags} (retain {found['retain']:.2f})"

    return Table(
        "Verdicts",
        ["model", *(f"seed {row['seed']}" for row in rows)],
        [[name, *(cell(row["models"][name]) for row in rows)] for name in rows[0]["models"]],
        "removed stands for removed_under_tested_attacks; retain is the share of retained questions still answered.",
    )


def _areas(rows: Sequence[Row]) -> Table:
    def scores(attack: str, names: Sequence[str]) -> list[float]:
        found = [row["models"][name]["scores"].get(attack) for row in rows for name in names]
        return [score for score in found if score is not None]

    golds = [name for name in rows[0]["models"] if name.startswith("gold ")]
    attacks = list(rows[0]["models"]["original"]["scores"])
    lines = []
    for attack in attacks:
        ignorant = scores(attack, golds)
        groups = (KNOWING, HIDING, tuple(METHODS))
        lines.append([attack, *(f"{auc(scores(attack, names), ignorant):.2f}" for names in groups)])
    return Table(
        "AUC of every probe against gold",
        ["probe", "models that know", "models that hide it", "idk, grad_diff, npo, rmu"],
        lines,
        "How often the probe brings more out of such a model than out of one that never saw the rows, ties half. A "
        "probe that sees through hiding has a high second column.",
    )
