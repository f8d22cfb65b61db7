"""Negative preference optimisation and its family: who runs away, who stays near a model that never knew.

Zhang et al., Negative preference optimization: from catastrophic collapse to effective unlearning, arXiv:2404.05868.
Beside it the objectives that answer to it: SimNPO (arXiv:2410.07163), IHL (2408.06621), WGA (2502.19301), CE-U
(2503.01224), PDU (2506.05314) and fine-tuning on refusals (TOFU, 2401.06121).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..registry import reproduction
from .case import Case, Claim, Findings, Row, number, spread
from .curves import COLUMNS, MEANING, curve, gather, table
from .measures import audited, measure, refused, said
from .mini import mini

DUAL = {"bound": 0.05, "multiplier": 1.0, "rate": 5.0, "warmup": 3.0, "forget_weight": 0.05}
"""PDU here: its forget term is quadratic in logits, so weights belong to a model. The bound is about three times the
start model's retain NLL."""
LONG = 32
"""Tokens of an answer that may be a refusal."""
WAY = {name: COLUMNS[name] for name in ("forget_accuracy", "retain_accuracy", "forget_nll", "retain_nll")}
GENTLE = ("simnpo", "ihl", "wga", "ceu")


def trial(
    method: str,
    seed: int,
    settings: dict[str, Any],
    scope: str = "all",
    steps: int = 0,
    learning_rate: float = 5e-4,
    at: Sequence[int] = (),
    relearn: int = 32,
    world: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A curve; the model that idk leaves is audited too, with so many steps of relearning.

    `original` and `gold` are no methods: these models are measured as they are.
    """
    made = mini(seed, world)
    if method in ("original", "gold"):
        model = made.original if method == "original" else made.golds[0]
        return {"points": [{"step": 0, **measure(model, made.data)}]}
    points, outcome = curve(
        made, method, settings=settings, scope=scope, steps=steps, learning_rate=learning_rate, at=at, seed=seed
    )
    found: dict[str, Any] = {"points": points}
    if method == "pdu":
        found |= _dual(outcome.summary, settings, len(made.data["forget"]))
    if method == "idk":
        asked = [row for row in made.data["forget"] if row.kind == "qa"]
        after = outcome.delta.apply(made.original)
        found |= {"refused": refused(said(after, asked, LONG)), **audited(made, after, steps=relearn)}
    return found


def _dual(summary: dict[str, Any], settings: dict[str, Any], forget: int) -> dict[str, Any]:
    """The multiplier after every epoch, by its published rule from the logged retain losses, and whether that ends
    where the run's own multiplier did; mean retain loss of every epoch."""
    losses = summary["log"]["nll"]["retain"]
    per_epoch = -(-forget // summary["training"]["batch_size"])
    multipliers = [settings["multiplier"]]
    for index, loss in enumerate(losses):
        moves = index // per_epoch >= settings["warmup"]
        multipliers.append(max(0.0, multipliers[-1] + moves * settings["rate"] * (loss - settings["bound"])))
    whole = [losses[i : i + per_epoch] for i in range(0, len(losses) - per_epoch + 1, per_epoch)]
    own = summary["log"]["memory"]["multiplier"]
    return {
        "epoch_losses": [sum(epoch) / len(epoch) for epoch in whole],
        "epoch_multipliers": multipliers[::per_epoch],
        "rule": abs(multipliers[-1] - own) <= 1e-3 * max(1.0, own),
    }


@reproduction(paper="arXiv:2404.05868", cost="5 min on 2 cores, and 2 once for the models of the worlds")
def npo(
    case: Case,
    *,
    steps: int = 120,
    learning_rate: float = 5e-4,
    beta: float = 0.9,
    world: dict[str, Any] | None = None,
) -> Findings:
    """Who runs away when made to forget, and who ends near a model that never knew: NPO and its family side by side.

    `beta`: NPO's, scaled to answers of four tokens; the published 0.1 runs beside it. `world`: sizes of the
    invented world, arguments of expunge.world.build.build.
    """

    def one(
        method: str, scope: str = "all", times: float = 1.0, faster: float = 1.0, **settings: Any
    ) -> dict[str, Any]:
        last = round(times * steps)
        at = sorted({steps // 4, steps // 2, steps, last})
        rate = learning_rate * faster
        shared = {"method": method, "settings": settings, "scope": scope, "world": world}
        return {**shared, "steps": last, "learning_rate": rate, "at": [step for step in at if step <= last]}

    scaled = f"beta {beta:g}"
    runs = {
        "original": {"method": "original", "settings": {}, "world": world},
        "gold": {"method": "gold", "settings": {}, "world": world},
        "gradient_ascent": one("gradient_ascent", times=2),
        "npo, beta 0.1": one("npo", times=2, beta=0.1, retain="none"),
        f"npo, {scaled}": one("npo", times=2, beta=beta, retain="none"),
        "grad_diff": one("grad_diff"),
        "npo, beta 0.1 + nll": one("npo", beta=0.1),
        f"npo, {scaled} + nll": one("npo", beta=beta),
        "npo, beta 0.1 + kl": one("npo", beta=0.1, retain="kl"),
        "simnpo": one("simnpo", beta=2.5),
        "simnpo, beta 4.5": one("simnpo", beta=4.5),
        "ihl": one("ihl"),
        "wga": one("wga"),
        "ceu": one("ceu"),
        "pdu": {**one("pdu"), "settings": DUAL},
        "idk": one("idk"),
        "npo in layers:-2-": one("npo", "layers:-2-", 1.5, 2, beta=0.1),
        "npo in role:mlp_out@0.25-0.75": one("npo", "role:mlp_out@0.25-0.75", 2, 4, beta=0.1),
        "npo in lora(r=4)": one("npo", "lora(r=4)", 2, 4, beta=0.1),
    }
    rows = gather(case, trial, runs)
    anchors, curves = ([row for row in rows if (row["step"] == 0) == anchor] for anchor in (True, False))
    known = {**COLUMNS, "holdout_nll": "holdout NLL", "holdout_value": "holdout value, nats"}
    return Findings(
        claims=judge(rows, steps, scaled),
        tables=[
            table(anchors, "Anchors", MEANING, known),
            table([row for row in curves if row["step"] >= steps], "After training"),
            table(curves, "On the way", columns=WAY),
        ],
        notes=NOTES,
    )


NOTES = [
    "The subject is the invented world's own: 4 layers, d = 96; 100 rows about 10 people are forgotten. The criteria "
    "were written on another mini subject, with 48 rows and 60 steps; here 120 steps of 16 + 16 rows make the same 19 "
    "passes. AdamW without weight decay, constant rate 5e-4, gradient norm clipped at 1. Runs without retain rows go "
    "on to twice the steps.",
    "NPO's brake works on the log-probability of whole answers: a row counts half once its answer is about e^(1/beta) "
    "times less likely. Our answers have 4 tokens, TOFU's about 35 (25.3 words), so the published beta = 0.1 lets "
    "each token fall nine times as far here. Both 0.1 and 0.1 x 35 / 4 = 0.9 are run and judged.",
    "Distances to gold are between mean log-probabilities of the forgotten values; gold was trained without the "
    "forget rows on the same world. Probabilities would hide how far NPO and GradDiff overshoot.",
    "idk: answers here are the bare value, so a refusal takes its place at the first token, and the value becomes "
    "unlikely under teacher forcing too. Where answers are sentences around the value it stays likely. That nothing "
    "was removed shows when it is relearned.",
    "Neighbours, the teachers of the forgotten people, are in no retain row: they show damage that retain accuracy "
    "hides.",
    "That WGA, SatImp and CE-U stop pushing on unlikely tokens is a statement about gradients, which "
    "tests/test_objectives.py checks exactly. benchmarks/npo_reference.py measures what stored references save.",
]


def judge(rows: Sequence[Row], steps: int, scaled: str) -> list[Claim]:
    """The claims from rows of all runs; criteria were fixed before (specs: gradient-objectives, section 6)."""
    gold = spread(rows, "forget_nll", run="gold").mean
    away = spread(rows, "forget_value", run="gold").mean

    def at(run: str, name: str, step: int | None = None) -> float:
        last = max(row["step"] for row in rows if row["run"] == run)
        return spread(rows, name, run=run, step=last if step is None else step).mean

    def distance(run: str) -> float:
        return abs(at(run, "forget_value", steps) - away)

    claims = [
        Claim(
            "Gradient ascent alone destroys the model",
            "TOFU, MUSE: utility 0 within a few epochs",
            f"retain accuracy at most 0.05 after {steps // 4} steps; forget NLL after {steps // 2} above 4 x gold's",
            f"accuracy {number(at('gradient_ascent', 'retain_accuracy', steps // 4))}; NLL "
            f"{number(at('gradient_ascent', 'forget_nll', steps // 2))}, gold {number(gold)}",
            at("gradient_ascent", "retain_accuracy", steps // 4) <= 0.05
            and at("gradient_ascent", "forget_nll", steps // 2) > 4 * gold,
        )
    ]
    for kind in ("beta 0.1", scaled):
        for step in (steps // 2, 2 * steps):
            ratios = [
                at(f"npo, {kind}", name, step) / at("gradient_ascent", name, step)
                for name in ("retain_nll", "forget_nll")
            ]
            claims.append(
                Claim(
                    f"NPO alone leaves the start model far more slowly than gradient ascent ({kind}, {step} steps)",
                    "exponentially slower (theory); utility lasts on TOFU",
                    "retain NLL at most 0.6 x, forget NLL at most 0.7 x gradient ascent's at the same step",
                    f"{number(ratios[0])} x and {number(ratios[1])} x",
                    ratios[0] <= 0.6 and ratios[1] <= 0.7,
                )
            )
    retained = ("grad_diff", "npo, beta 0.1 + nll", f"npo, {scaled} + nll", *GENTLE)
    forgets = {run: at(run, "forget_accuracy") for run in retained}
    keeps = {run: at(run, "retain_accuracy") for run in retained}
    losses = {run: at(run, "retain_nll") for run in retained}
    worst = {"forgets": max(forgets, key=forgets.__getitem__), "keeps": min(keeps, key=keeps.__getitem__)}
    claims += [
        Claim(
            "With likelihood of retain rows beside it every objective forgets and keeps",
            "TOFU, MUSE tables of each paper",
            f"after {steps} steps forget accuracy at most 0.10, retain accuracy at least 0.85: {', '.join(retained)}",
            f"highest forget accuracy {number(forgets[worst['forgets']])} ({worst['forgets']}), lowest retain accuracy "
            f"{number(keeps[worst['keeps']])} ({worst['keeps']})",
            max(forgets.values()) <= 0.10 and min(keeps.values()) >= 0.85,
        )
    ]
    for kind in ("beta 0.1", scaled):
        npo_loss = losses[f"npo, {kind} + nll"]
        claims.append(
            Claim(
                f"Damage is ordered: SimNPO and IHL less than NPO, NPO less than GradDiff ({kind})",
                "TOFU: utility of the papers' tables",
                f"retain NLL after {steps} steps: simnpo, ihl < npo < grad_diff",
                f"{number(losses['simnpo'])}, {number(losses['ihl'])}; {number(npo_loss)}; "
                f"{number(losses['grad_diff'])}",
                max(losses["simnpo"], losses["ihl"]) < npo_loss < losses["grad_diff"],
            )
        )
        ratio = at("grad_diff", "forget_nll") / at(f"npo, {kind} + nll", "forget_nll")
        claims.append(
            Claim(
                f"GradDiff stays unbounded although retain loss holds accuracy ({kind})",
                "TOFU, LoKU's analysis",
                f"forget NLL after {steps} steps above 2 x NPO's (with nll)",
                f"{number(at('grad_diff', 'forget_nll'))}, {number(ratio)} x",
                ratio > 2,
            )
        )
        others = ("gradient_ascent", "grad_diff", f"npo, {kind} + nll")
        claims.append(
            Claim(
                f"SimNPO needs no reference and ends nearer to a model that never knew than NPO, GradDiff, GA ({kind})",
                "better forget quality at equal utility (TOFU forget05, forget10)",
                f"mean log-probability of forgotten values after {steps} steps: nearer to gold's than all of theirs",
                f"distances: simnpo {number(distance('simnpo'))}; "
                + ", ".join(f"{run} {number(distance(run))}" for run in others),
                distance("simnpo") < min(map(distance, others)),
            )
        )
    claims += [_bound(rows), _refusals(rows), _readable(rows, steps), _suppressed(rows)]
    claims += _scopes(rows)
    return claims


def _bound(rows: Sequence[Row]) -> Claim:
    found = {row["seed"]: row for row in rows if row["run"] == "pdu"}.values()
    bound = DUAL["bound"]
    last = sum(row["epoch_losses"][-1] for row in found) / len(found)
    wrong = 0
    for row in found:
        multipliers = row["epoch_multipliers"]
        for epoch, loss in enumerate(row["epoch_losses"]):
            fell = multipliers[epoch + 1] < multipliers[epoch] or multipliers[epoch + 1] == 0
            wrong += epoch >= DUAL["warmup"] and loss < bound and not fell
    ruled = all(row["rule"] for row in found)
    return Claim(
        "PDU's multiplier holds the retain loss under a chosen bound",
        "TOFU, MUSE",
        f"mean retain NLL of the last epoch at most 1.1 x {bound:g}; the multiplier fell (or was 0) in every epoch "
        "whose mean was below the bound, and follows its rule",
        f"{number(last)}; {wrong} epochs in which it did not fall; rule followed: {'yes' if ruled else 'no'}",
        last <= 1.1 * bound and wrong == 0 and ruled,
    )


def _refusals(rows: Sequence[Row]) -> Claim:
    share = spread(rows, "refused", run="idk")
    return Claim(
        "Fine-tuning on refusals gives refusals",
        "TOFU: fluent refusals",
        "at least 90% of the greedy answers to forget questions refuse",
        str(share),
        share.mean >= 0.9,
    )


def _readable(rows: Sequence[Row], steps: int) -> Claim:
    left = spread(rows, "forget_probability", run="idk", step=steps)
    return Claim(
        "Fine-tuning on refusals leaves the fact readable by teacher forcing",
        "- (0.71 on the mini subject that the criteria were written for)",
        "mean probability of the value above 0.3",
        str(left),
        left.mean > 0.3,
    )


def _suppressed(rows: Sequence[Row]) -> Claim:
    found = {row["seed"]: row for row in rows if row["run"] == "idk"}.values()
    verdicts = [row["verdict"] for row in found]
    return Claim(
        "Fine-tuning on refusals suppresses, it does not remove",
        "-",
        "the audit (direct, relearn) says suppressed for every seed",
        ", ".join(verdicts) + f"; relearning recovers {spread(list(found), 'recovery')} (gold 0, original 1)",
        all(verdict == "suppressed" for verdict in verdicts),
    )


def _scopes(rows: Sequence[Row]) -> list[Claim]:
    """Scopes, section 6, criterion 5: NPO with retain NLL in parts of the model."""
    parts = ["npo, beta 0.1 + nll", *dict.fromkeys(row["run"] for row in rows if row["run"].startswith("npo in "))]
    claims = []
    for run in parts:
        last = max(row["step"] for row in rows if row["run"] == run)
        forget, retain = (spread(rows, f"{side}_accuracy", run=run, step=last) for side in ("forget", "retain"))
        claims.append(
            Claim(
                f"NPO forgets in a part of the weights too: {run.removeprefix('npo in ').replace(parts[0], 'all')}",
                "RMU: 2.4% of the weights; LoRA 0.1-1%",
                f"forget accuracy at most 0.10 and retain accuracy at least 0.85 after {last} steps",
                f"{forget}; {retain}",
                forget.mean <= 0.10 and retain.mean >= 0.85,
            )
        )
    return claims
