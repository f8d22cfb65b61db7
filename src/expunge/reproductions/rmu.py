"""Representation misdirection, with a fixed coefficient and with one that follows the activations' size.

Li et al., The WMDP benchmark, arXiv:2403.03218 (RMU); Dang et al., On effects of steering latent representation for LLM
unlearning, arXiv:2408.06223 (adaptive coefficient).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..metrics.texts import entropy
from ..registry import reproduction
from ..subjects.language import LanguageModel
from .case import Case, Claim, Findings, Row, number, spread
from .curves import COLUMNS, MEANING, WATCHED, curve, gather, table
from .measures import audited, choice_accuracy, measure, said
from .mini import mini


def trial(
    method: str,
    seed: int,
    settings: dict[str, Any],
    steps: int = 0,
    learning_rate: float = 2e-3,
    at: Sequence[int] = (),
    relearn: int = 0,
    world: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A curve in the method's own scope, with multiple choice and how varied the model's answers are; audited at the
    end with `relearn` steps of relearning, where there are any. `original` and `gold` are measured as they are."""
    made = mini(seed, world)
    watched = {name: made.data[name] for name in WATCHED}

    def observe(model: LanguageModel, _: int = 0) -> dict[str, Any]:
        texts = said(model, [row for row in watched["forget"] if row.kind == "qa"])
        return {
            **measure(model, watched),
            "choice_accuracy": choice_accuracy(model, watched["forget"]),
            "entropy": sum(entropy(text, 2) for text in texts) / len(texts),
        }

    if method in ("original", "gold"):
        model = made.original if method == "original" else made.golds[0]
        return {"points": [{"step": 0, **observe(model)}]}
    points, outcome = curve(
        made,
        method,
        settings=settings,
        steps=steps,
        learning_rate=learning_rate,
        at=at,
        seed=seed,
        observe=observe,
    )
    found: dict[str, Any] = {"points": points, **outcome.summary.get("prepared", {})}
    if relearn:
        found |= audited(made, outcome.delta.apply(made.original), steps=relearn)
    return found


@reproduction(paper="arXiv:2403.03218", cost="2 min on 2 cores, and 2 once for the models of the worlds")
def rmu(
    case: Case,
    *,
    steps: int = 240,
    learning_rate: float = 2e-3,
    relearn: int = 32,
    world: dict[str, Any] | None = None,
) -> Findings:
    """Whether misdirected representations forget at little cost, and with which coefficient and retain weight.

    `relearn`: steps of the attack on the adaptive run. `world`: sizes of the invented world, arguments of
    expunge.world.build.build.
    """
    shared = {"method": "rmu", "steps": steps, "learning_rate": learning_rate, "world": world}
    shared["at"] = sorted({steps // 8, steps // 4, steps // 2, steps})

    def one(layer: int, coefficient: float | str, scale: float, weight: float, **other: Any) -> dict[str, Any]:
        settings = {"layer": layer, "coefficient": coefficient, "scale": scale, "retain_weight": weight}
        return {**shared, "settings": settings, **other}

    runs = {
        "original": {"method": "original", "settings": {}, "world": world},
        "gold": {"method": "gold", "settings": {}, "world": world},
        "adaptive, l = 2": one(-2, "adaptive", 2.0, 10.0, relearn=relearn),
        "adaptive, last": one(-1, "adaptive", 2.0, 10.0),
        "c = 6.5, last": one(-1, 6.5, 5.0, 10.0),
        "scale 5, alpha 1": one(-2, "adaptive", 5.0, 1.0),
        "scale 5, alpha 100": one(-2, "adaptive", 5.0, 100.0, learning_rate=learning_rate / 2),
        "gradient_ascent": {**shared, "method": "gradient_ascent", "settings": {}, "learning_rate": 5e-4},
    }
    rows = gather(case, trial, runs)
    columns = {**COLUMNS, "choice_accuracy": "choice of 6", "entropy": "2-gram entropy, bits"}
    note = f"{MEANING} Choice of 6: the value against five others. Entropy: of the letters of greedy answers."
    return Findings(claims=judge(rows, steps), tables=[table(rows, "Curves", note, columns)], notes=NOTES)


NOTES = [
    "The subject is the invented world's own (4 layers, d = 96, 100 forget rows). The criteria were written on "
    "another mini subject with 48 rows and 120 steps; 240 steps of 16 + 16 rows make the same 40 passes. Only MLP "
    "output matrices of the layer and the two below it move, at 2e-3. The published pairs of coefficient and weight, "
    "(6.5, 1200) and (20, 100), belong to 7B models.",
    "scale 5, alpha 100 runs at half the rate; it is judged at a quarter of the steps and at half.",
    "The contrast direction of the first release (CUT) is `direction: contrast`; that it does no better is not tested.",
    "Cost: tests/test_taps.py checks that leaving after the layer read and starting at a stored prefix give the full "
    "pass's loss and gradients; benchmarks/steps.py measures what they save.",
]


def judge(rows: Sequence[Row], steps: int) -> list[Claim]:
    """The claims; criteria were fixed before (specs: rmu, section 6)."""

    def at(run: str, name: str, step: int = steps) -> float:
        return spread(rows, name, run=run, step=step).mean

    middle, last, fixed = "adaptive, l = 2", "adaptive, last", "c = 6.5, last"
    strong, weak = "scale 5, alpha 1", "scale 5, alpha 100"
    start = at("original", "retain_accuracy", 0)
    along = sorted({row["step"] for row in rows if row["run"] == strong})
    lowest = min(at(strong, "retain_accuracy", step) for step in along)
    halfway = [step for step in along if step <= steps // 2][-2:]
    left = [at(weak, "forget_accuracy", step) for step in halfway]
    gains = {
        step: at(middle, "retain_accuracy") - at("gradient_ascent", "retain_accuracy", step)
        for step in along
        if at("gradient_ascent", "forget_accuracy", step) <= 0.1
    }
    least = min(gains.values(), default=None)
    found = list({row["seed"]: row for row in rows if row["run"] == middle}.values())
    verdicts = [row["verdict"] for row in found]
    return [
        Claim(
            "Knowledge falls to chance at almost no general cost",
            "Zephyr-7B: WMDP-Bio 63.7 to 31.2, MMLU 58.1 to 57.1",
            f"adaptive (scale 2, alpha 10), l = 2, {steps} steps: forget accuracy at most 0.10, held-out wording at "
            "most 0.15, retain accuracy at least 0.90",
            f"{number(at(middle, 'forget_accuracy'))}, {number(at(middle, 'held_out_accuracy'))}, "
            f"{number(at(middle, 'retain_accuracy'))}",
            at(middle, "forget_accuracy") <= 0.10
            and at(middle, "held_out_accuracy") <= 0.15
            and at(middle, "retain_accuracy") >= 0.90,
        ),
        Claim(
            "Multiple choice falls to chance",
            "WMDP-Bio and -Cyber to 31.2 and 28.2 of 25",
            "the same run: choice among 6 at most 1/6 + 0.10",
            f"{number(at(middle, 'choice_accuracy'))}; before {number(at('original', 'choice_accuracy', 0))}, gold "
            f"{number(at('gold', 'choice_accuracy', 0))}",
            at(middle, "choice_accuracy") <= 1 / 6 + 0.10,
        ),
        Claim(
            "A coefficient that follows the activations works at the last layer, where a fixed one fails",
            "adaptive RMU: sweeps over the layers of several 7-8B models",
            "last layer: adaptive has forget accuracy at most 0.15 and retain accuracy at least 0.85, c = 6.5 leaves "
            "forget accuracy at 0.5 or more",
            f"{number(at(last, 'forget_accuracy'))}, {number(at(last, 'retain_accuracy'))}; c = 6.5 "
            f"{number(at(fixed, 'forget_accuracy'))}",
            at(last, "forget_accuracy") <= 0.15
            and at(last, "retain_accuracy") >= 0.85
            and at(fixed, "forget_accuracy") >= 0.5,
        ),
        Claim(
            "The retain weight must fit the coefficient, in both directions",
            "alpha 1200 with c = 6.5, 100 with 20",
            "scale 5: alpha 1 loses at least 0.4 retain accuracy at some step; alpha 100 at half the rate leaves "
            f"forget accuracy above 0.9 after {' and '.join(map(str, halfway))} steps",
            f"{number(start)} to {number(lowest)}; {', '.join(map(number, left))}",
            start - lowest >= 0.4 and min(left) > 0.9,
        ),
        Claim(
            "It keeps far more than gradient ascent alone",
            "-",
            "where both have forget accuracy at most 0.1, retain accuracy at least 0.5 above gradient ascent's",
            "gradient ascent never forgot" if least is None else f"{number(least)} above at the least",
            None if least is None else at(middle, "forget_accuracy") <= 0.1 and least >= 0.5,
        ),
        Claim(
            "It suppresses, it does not remove",
            "follow-ups bring the knowledge back with few steps of fine-tuning",
            "the audit (direct, relearn) says suppressed for every seed",
            ", ".join(verdicts) + f"; relearning recovers {spread(found, 'recovery')} (gold 0, original 1)",
            all(verdict == "suppressed" for verdict in verdicts),
        ),
    ]
