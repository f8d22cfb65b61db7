"""LoRA edit: adapters trained on the new facts, the weights frozen (EasyEdit's baseline, arXiv:2308.07269).

What it leaves is the adapters' product as a low-rank delta. The published settings put adapters on the query and value
projections and train for 70 steps; roles are found by structure here, so all of attention's matrices take them.
"""

from __future__ import annotations

from typing import Literal

from ...deltas import Delta
from ...registry import edit
from .case import Edit, EditCase


@edit(
    paper="arXiv:2308.07269",
    intention="removal",
    requires=("weights", "gradients", "forget_data"),
    cost="70 forward and backward passes of prompt and target through all blocks",
    known_weaknesses=("relearn",),
)
def lora_edit(
    case: EditCase,
    *,
    rank: int = 8,
    alpha: float = 32.0,
    modules: Literal["attention", "mlp", "all"] = "attention",
    steps: int = 70,
    learning_rate: float = 5e-3,
) -> Edit:
    """Train low-rank adapters on prompts with their new targets, all facts of a batch in every step.

    Without dropout: a subject is in evaluation mode throughout.
    """
    facts = case.facts()
    outcome = case.unlearn(
        "reinforce",
        phase="lora",
        data={"forget": [fact.row() for fact in facts]},
        scope=f"lora(r={rank}, alpha={alpha:g}, modules={modules})",
        epochs=1.0,
        steps=steps,
        batch_size=len(facts),
        learning_rate=learning_rate,
        guard=None,
    )
    return Delta(case.base.fingerprint, outcome.delta.entries, {"method": "lora_edit", "rank": rank})
