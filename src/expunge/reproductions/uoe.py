"""Is one expert enough? A mixture is to forget through the expert that forget rows use most, and to keep the rest.

Zhuang et al., SEUF: Is unlearning one expert enough for mixture-of-experts LLMs?, arXiv:2411.18797 (first called UOE).

Everything is compared at equal forgetting: at the first check at which the model knows no more of the forget rows than
guessing does. Otherwise utilities would tell who trained longer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .. import routing
from ..methods.optimise.loop import Training
from ..methods.optimise.unlearn import unlearn
from ..registry import get, reproduction
from ..subjects.language import LanguageModel
from .case import Case, Findings
from .measures import knowledge
from .mixture import Sizes, mixture
from .uoe_findings import elsewhere, forgetting, judge, routes

BATCH = 24
"""Forget rows of a step, with as many retain rows beside them where the objective reads those."""
WHOLE, PARTS = (1e-4, 3e-4), (1e-3, 3e-3)
"""Learning rates: of runs that move all experts, and of runs that move one or a few."""
ALONE: dict[str, Any] = {"objective": {"gradient_ascent": {"retain": "none"}}}
LAST: dict[str, Any] = {"layer": -1}

VARIANTS: dict[str, dict[str, Any]] = {
    "all parameters": {"method": "gradient_ascent", "scope": "all", "rates": WHOLE},
    "all routers": {"method": "gradient_ascent", "scope": "role:router", "rates": PARTS},
    "all experts": {"method": "gradient_ascent", "scope": "role:experts", "rates": WHOLE},
    "top expert": {"method": "uoe", "settings": ALONE, "rates": PARTS},
    "top expert, anchor 0": {"method": "uoe", "settings": {**ALONE, "anchor_weight": 0.0}, "rates": PARTS},
    "top expert, anchor 100": {"method": "uoe", "settings": {**ALONE, "anchor_weight": 100.0}, "rates": PARTS},
    "top 3 of the layer": {"method": "uoe", "settings": {**ALONE, "per": "layer", "experts": 3}, "rates": PARTS},
    "top 1 of each layer": {"method": "uoe", "settings": {**ALONE, "per": "every_layer"}, "rates": PARTS},
    "lowest expert": {"method": "uoe", "settings": {**ALONE, "rank": -1}, "rates": PARTS},
    "grad_diff, all parameters": {"method": "grad_diff", "scope": "all", "rates": WHOLE},
    "grad_diff, top expert": {"method": "uoe", "settings": {"objective": "grad_diff"}, "rates": PARTS},
    "npo, all parameters": {"method": "npo", "scope": "all", "rates": WHOLE},
    "npo, top expert": {"method": "uoe", "settings": {"objective": "npo"}, "rates": PARTS},
    "rmu, all experts": {"method": "rmu", "settings": LAST, "scope": "role:experts", "rates": PARTS},
    "rmu, top expert": {"method": "uoe", "settings": {"objective": {"rmu": LAST}}, "rates": PARTS},
}
"""Gradient ascent without retain rows unless the name begins with another objective."""
WORLDS: dict[str, dict[str, Any]] = {
    "words in common": {"shared": True},
    "24 small experts": {"experts": 24, "intermediate": 32},
}
ELSEWHERE = ("all parameters", "all experts", "top expert")
"""Variants that run in those worlds too: what is found should not hang on one corpus and one model."""


def trial(
    seed: int,
    method: str,
    settings: dict[str, Any],
    scope: str | None,
    learning_rate: float,
    steps: int,
    every: int,
    threshold: float,
    sizes: dict[str, Any],
) -> dict[str, Any]:
    """Unlearn until the forget domain is forgotten, and measure the model of that moment.

    Returns:
        `reached` (step of the first check at or below the threshold, None if there was none), and of the model then,
        or at the end: accuracies, losses, how many tokens still take the experts they took.
    """
    made = mixture(seed, Sizes(**sizes))
    curve: list[tuple[int, float]] = []

    def check(model: LanguageModel, step: int) -> str | None:
        curve.append((step, knowledge(model, made.data["forget"]).accuracy))
        return "forgotten" if curve[-1][1] <= threshold else None

    outcome = unlearn(
        made.subject,
        get("methods", method),
        settings,
        scope=scope,
        data=made.data,
        training=Training(steps=steps, batch_size=BATCH, learning_rate=learning_rate, seed=seed, guard=None),
        evaluate_at=range(0, steps + 1, every),
        evaluate=check,
    )
    model = outcome.delta.apply(made.subject)
    prepared = outcome.summary.get("prepared", {})
    return {
        "reached": curve[-1][0] if outcome.summary["stopped"] else None,
        "curve": curve,
        **{f"start_{name}": value for name, value in _known(made.subject, made.data).items()},
        **_known(model, made.data),
        **_routed(made.subject, model, made.data, outcome.summary),
        "trainable": outcome.summary["scope"]["trainable"],
        "experts": [[one["block"], one["expert"]] for one in prepared.get("experts", [])],
        "affinity": [one["affinity"] for one in prepared.get("experts", [])],
        "affinity_highest": prepared.get("affinity_highest"),
        "affinity_mean": prepared.get("affinity_mean"),
    }


def _known(model: LanguageModel, data: Mapping[str, Sequence[Any]]) -> dict[str, float]:
    found = {name: knowledge(model, rows) for name, rows in data.items()}
    return {
        **{f"{name}_accuracy": one.accuracy for name, one in found.items()},
        **{f"{name}_nll": one.mean_nll for name, one in found.items()},
    }


def _routed(
    before: LanguageModel, after: LanguageModel, data: dict[str, list[Any]], summary: dict[str, Any]
) -> dict[str, Any]:
    """Overlap with the start, mean over blocks and block by block; share of tokens at the experts taken, before and
    after (mean over the blocks they are in)."""
    found: dict[str, Any] = {}
    for one in routing.measure(before, after, data, method=summary)[0]:
        found[f"{one.rows}_overlap"] = one.overlap.value
        found[f"{one.rows}_blocks"] = list(one.blocks.values())
        for i, when in enumerate(("before", "after")):
            if one.moved:
                found[f"{one.rows}_taken_{when}"] = sum(both[i] for both in one.moved.values()) / len(one.moved)
    return found


@reproduction(paper="arXiv:2411.18797", cost="5 min on 2 cores")
def uoe(
    case: Case, *, steps: int = 240, every: int = 5, threshold: float = 0.1, sizes: dict[str, Any] | None = None
) -> Findings:
    """Is one expert enough to make a mixture of experts forget, and does utility last longer? UOE/SEUF on four domains.

    Forgotten is a domain of which at most `threshold` is known, looked up every `every` steps. `sizes`: of the corpus
    and the model, fields of expunge.reproductions.mixture.Sizes.
    """
    given = sizes or {}
    asked = [("", name) for name in VARIANTS] + [(world, name) for world in WORLDS for name in ELSEWHERE]
    runs = [
        (
            {"world": world, "variant": name},
            {
                "method": VARIANTS[name]["method"],
                "settings": VARIANTS[name].get("settings", {}),
                "scope": VARIANTS[name].get("scope"),
                "learning_rate": rate,
                "steps": steps,
                "every": every,
                "threshold": threshold,
                "sizes": {**given, **WORLDS.get(world, {})},
            },
        )
        for world, name in asked
        for rate in VARIANTS[name]["rates"]
    ]
    found = case.trials(trial, [settings for _, settings in runs])
    labels = [label for label, _ in runs for _ in case.seeds]
    rows = [{**row, **label} for label, row in zip(labels, found)]
    here = [row for row in rows if not row["world"]]
    return Findings(
        judge(here, Sizes(**given), steps, threshold),
        [forgetting(here, threshold), routes(here), elsewhere([row for row in rows if row["world"]])],
        NOTES,
    )


NOTES = [
    "Criteria with margins of 0.2 and 0.05 on top-1, top-3 and one expert per layer are the spec's; those on drift, "
    "parts, the lowest expert, anchor weights and the three objectives are our own. They were written into code after "
    "seed 0 of most runs had been seen; the two further worlds were added, and the steps raised from 160 to 240, "
    "because of what it showed.",
    "Every run has two rates and is judged at the one that keeps more. AdamW without weight decay, 24 forget rows in a "
    "step (and as many retain rows where the objective reads them), gradient norm clipped at 1, constant rate. Retain "
    "rows are rows the model was trained on. NPO's beta is 0.1, RMU reads the last block.",
    "The paper's order of methods does not appear here: one expert keeps less than all parameters do, on all three "
    "worlds. The second table shows why: the expert that most forget tokens take also serves a fifth of the "
    "retain tokens, and its router, moved by forget rows alone, sends it more of both. To forget, the expert has to be "
    "wrecked, and then about half of the retain tokens pass through it. Published mixtures have 60 experts in each of "
    "two dozen blocks, each with far more to spare; 24 experts in three blocks do not bring the order back.",
    "A vocabulary of its own gives the forget domain rows of its own in embedding and head, which helps runs that move "
    "them. That does not decide: `all experts` moves neither, and with words in common the order is the same.",
    "Several experts of one layer forget sooner than one, so that each is damaged less. The lowest expert makes the "
    "model forget as well: with its router free the anchor brings the forget tokens to it.",
    "With the anchor fewer tokens keep their experts, as it reroutes them itself; without it more retain accuracy is "
    "left.",
    "RMU keeps nearly all either way; one expert just does not get there in these steps.",
    "The run that the criteria were made from had one seed, and the paper's order. Here seeds differ by as much as "
    "methods do: see the ranges.",
]
