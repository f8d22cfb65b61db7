"""Knowledge editors side by side: where a fact is rewritten, what the covariance is for, what memories give and take.

Wang et al., EasyEdit: an easy-to-use knowledge editing framework for large language models, arXiv:2308.07269.
"""

from __future__ import annotations

from typing import Any

from ..evidence import Table
from ..registry import reproduction
from ..subjects.language import weights_fingerprint
from .case import Case, Claim, Findings, Row, number, spread
from .editing import alone, made, measured, subject, undone

FACTS = 16
BATCH = 10
MEMIT = "memit, {} at once, weight {:g}"
SEQUENCE = "rome, {} in a row"
COLUMNS = {
    "success": "success",
    "tokens": "tokens (published protocol)",
    "rephrase": "paraphrase",
    "one_hop": "one hop",
    "subject": "rest of the subject",
    "neighbours": "same fact of others",
    "kept": "unchanged beside",
}


def trial(
    editor: str,
    settings: dict[str, Any],
    mode: str,
    count: int,
    seed: int,
    people: int = 100,
    recipe: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Edits of one seed's facts, what they did, and whether they left the base as it was. `none` edits nothing."""
    case = subject(seed, people, recipe)
    edits = case.edits(count)
    if editor == "none":
        return {**measured(case.model, case.model, edits), "restored": 1.0}
    before = weights_fingerprint(case.model.model)
    several = made(case, editor, settings, edits, mode, seed)  # type: ignore[arg-type]
    found = alone(case, several)
    restored = undone(case, several) and weights_fingerprint(case.model.model) == before
    return {**found, "restored": float(restored)}


@reproduction(paper="arXiv:2308.07269", cost="4 min on one core, and 2 once for the models of the worlds")
def easyedit(
    case: Case,
    *,
    facts: int = FACTS,
    batch: int = BATCH,
    weights: tuple[float, ...] = (30.0, 100.0, 300.0),
    people: int = 100,
    recipe: dict[str, Any] | None = None,
) -> Findings:
    """Where ROME works and what its covariance saves; what memories and contexts give and take; MEMIT against ROME.

    `weights`: of MEMIT's covariance, chosen on the first seed. `people` and `recipe`: size of the world of
    editing and of its model (`expunge.world.models.Recipe`).
    """
    depth = 4
    runs: dict[str, tuple[str, dict[str, Any], str, int]] = {"no edit": ("none", {}, "one", facts)}
    runs |= {f"rome, layer {i}": ("rome", {"layer": i}, "one", facts) for i in range(depth)}
    runs |= {
        "rome, layer 0, C = I": ("rome", {"layer": 0, "covariance": False}, "one", facts),
        "ft_m, layer 0": ("ft_m", {"layer": 0, "learning_rate": 5e-3}, "one", facts),
        "ft_l, layer 0": ("ft_l", {"layer": 0, "learning_rate": 5e-3}, "one", facts),
        "lora_edit": ("lora_edit", {"steps": 20}, "one", facts),
        "ultraedit": ("ultraedit", {"learning_rate": 3e-3}, "one", facts),
        "mend": ("mend", {"steps": 200, "batch": 4, "c_edit": 1.0}, "one", facts),
        "grace, layer 2": ("grace", {"layer": 2}, "one", facts),
        "wise, layer 2": ("wise", {"layer": 2, "steps": 40}, "one", facts),
        "steer, layer 2": ("steer", {"layer": 2}, "one", facts),
        "ike, k = 0": ("ike", {}, "one", facts),
        "serac": ("serac", {}, "one", facts),
        SEQUENCE.format(batch): ("rome", {"layer": 0}, "sequence", batch),
    }
    for weight in weights:
        runs[MEMIT.format(batch, weight)] = ("memit", {"layers": [0, 1], "weight": weight}, "batch", batch)
    grid = [
        {"editor": editor, "settings": settings, "mode": mode, "count": count, "people": people, "recipe": recipe}
        for editor, settings, mode, count in runs.values()
    ]
    found = case.trials(trial, grid)
    names = [name for name in runs for _ in case.seeds]
    rows = [{**row, "run": name} for name, row in zip(names, found)]
    chosen = _weight(rows, weights, batch, case.seeds[0])
    shown = [[name, *(str(spread(rows, column, run=name)) for column in COLUMNS)] for name in runs]
    return Findings(
        claims=judge(rows, depth, batch, chosen),
        tables=[Table("Edits", ["editor", *COLUMNS.values()], shown, "Mean over seeds (least to most).")],
        notes=NOTES,
    )


def _weight(rows: list[Row], weights: tuple[float, ...], batch: int, seed: int) -> float:
    """Of those within 0.1 of sequential ROME's success on one seed, the one that spares most; else the most
    successful."""

    def value(name: str, column: str) -> float:
        return spread(rows, column, run=name, seed=seed).mean

    least = value(SEQUENCE.format(batch), "success") - 0.1
    good = [w for w in weights if value(MEMIT.format(batch, w), "success") >= least]
    if good:
        return max(good, key=lambda w: value(MEMIT.format(batch, w), "neighbours"))
    return max(weights, key=lambda w: value(MEMIT.format(batch, w), "success"))


def judge(rows: list[Row], depth: int, batch: int, weight: float) -> list[Claim]:
    def mean(name: str, column: str) -> float:
        return spread(rows, column, run=name).mean

    layers = [f"rome, layer {i}" for i in range(depth)]
    best = max(layers, key=lambda name: mean(name, "success"))
    last, plain = layers[-1], "rome, layer 0, C = I"
    saved = mean("rome, layer 0", "neighbours") - mean(plain, "neighbours")
    grace, ike = "grace, layer 2", "ike, k = 0"
    lost = 1 - mean(grace, "kept")
    restored = all(row["restored"] == 1 for row in rows)
    memit, sequence = MEMIT.format(batch, weight), SEQUENCE.format(batch)
    nearer = mean(memit, "neighbours") - mean(sequence, "neighbours")
    reads = mean(ike, "success")
    return [
        Claim(
            "The layer matters: ROME rewrites facts where the subject's last token looks them up.",
            "ZsRE, Llama-2-7B: reliability 92, generalisation 87 at layer 5 of 32.",
            "At the best layer success >= 0.6 and paraphrase >= 0.5, at the last layer success <= 0.1.",
            f"{best}: success {number(mean(best, 'success'))}, paraphrase {number(mean(best, 'rephrase'))}; last "
            "layer: "
            f"success {number(mean(last, 'success'))}",
            mean(best, "success") >= 0.6 and mean(best, "rephrase") >= 0.5 and mean(last, "success") <= 0.1,
        ),
        Claim(
            "The covariance is what keeps neighbours intact.",
            "On for GPT models in the published settings, off for Llama.",
            "The same fact of others: with C at least 0.15 above C = I.",
            f"{number(mean('rome, layer 0', 'neighbours'))} with C, {number(mean(plain, 'neighbours'))} with C = I",
            saved >= 0.15,
        ),
        Claim(
            "A codebook (GRACE) gives exact edits and exact rollback, and no generalisation.",
            "GRACE is not in the table; its own paper reports edit retention near 1.",
            "Success >= 0.9, paraphrase <= 0.2, at most 0.01 of what is beside changed, base bit for bit as before.",
            f"success {number(mean(grace, 'success'))}, paraphrase {number(mean(grace, 'rephrase'))}, changed beside "
            f"{number(lost)}; bases {'restored' if restored else 'not restored'}",
            mean(grace, "success") >= 0.9 and mean(grace, "rephrase") <= 0.2 and lost <= 0.01 and restored,
        ),
        Claim(
            "In-context editing states every new fact and bends what is asked about others.",
            "IKE: 100 / 100 / locality 69.",
            "Success >= 0.9, the same fact of others at least 0.4 below ROME's.",
            f"success {number(reads)}, others {number(mean(ike, 'neighbours'))} against ROME's "
            f"{number(mean(best, 'neighbours'))}",
            reads >= 0.9 and mean(best, "neighbours") - mean(ike, "neighbours") >= 0.4,
        ),
        Claim(
            "Many facts in one batch (MEMIT) do less harm than one after another (ROME).",
            "MEMIT 93 / 86 / locality 99, ROME 92 / 87 / 100, one edit at a time.",
            f"{batch} facts, weight chosen on the first seed: success within 0.1 of ROME's or above, the same "
            "fact of others "
            "at least 0.08 higher.",
            f"weight {weight:g}: success {number(mean(memit, 'success'))} against "
            f"{number(mean(sequence, 'success'))}, others "
            f"{number(mean(memit, 'neighbours'))} against {number(mean(sequence, 'neighbours'))}",
            mean(memit, "success") >= mean(sequence, "success") - 0.1 and nearer >= 0.08,
        ),
    ]


NOTES = [
    "Facts of the world of editing (`reproductions/crossed.py`): 100 people, whose first and last names are shared by "
    "five each, 4 blocks, d = 96, f = 256; asked in a wording the model was taught, the paraphrase in one it was not. "
    "In four blocks the prompt's last token can gather both names by itself: where it does, no edit where the subject "
    "ends reaches the fact.",
    "ROME with its published 25 steps, rate 0.5 and clamp 4 behind five facts of people whom no edit is about; key "
    "statistics over what the model was taught. One hop: the country of another place of birth.",
    "MEND and SERAC are trained on the facts of a sixth of the people, who are asked about nowhere. MEND's weight of "
    "the edit, its steps and UltraEdit's rate were chosen on models of the invented world: the published ones are for "
    "models of billions of weights. Steering moves a manner of answering, not a fact.",
    "Criteria are those of a prototype on another small model; settings were not changed to meet them.",
    "Success counts an answer whose every token is the model's first choice; the published protocol counts tokens.",
    "After a fact that it is told the model learned to repeat it, and never to be asked about anybody else: that `ike` "
    "bends what is asked about others is learned.",
    "Whether fine-tuning is the weakest, as the table has it, cannot be told here: in small models it is "
    "as good as ROME.",
]
