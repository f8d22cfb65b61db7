"""GRACE: a codebook beside one MLP matrix (arXiv:2211.11031). No weight changes; an edit is an entry that can go again.

key     the activation that goes into the matrix at the prompt's last token
value   what is to come out there for the model to say the target: Adam on -log p(target), from what comes out now
radius  how near another token's activation must be to get the value: `eps`, and GRACE's rule where edits come near each
        other (subjects/memory.py)

A value is trained for every edit, also where an earlier one with the same target takes it in: so either can be undone.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Literal

import torch

from ...deltas import Delta
from ...errors import ParameterError, RequestError
from ...registry import edit
from ...subjects.memory import EXACT
from ...subjects.tails import edited_matrix, look
from .case import Edit, EditCase
from .traced import Layer, layer_of
from .values import Settings, keys, located, optimised

QUANTILE = 0.05
MOST = 2000
"""Prompts that distances are taken of."""


@edit(
    paper="arXiv:2211.11031",
    intention="suppression",
    level="activations",
    requires=("weights", "gradients", "forget_data"),
    keeps=("an activation and a value for every edited prompt",),
    sequential="free",
    cost="50 forward and backward passes of prompt and target; then a distance to every key for every token",
    known_weaknesses=("paraphrase", "relearn", "direct"),
)
def grace(
    case: EditCase,
    *,
    layer: Layer = 0.84,
    eps: float | Literal["auto"] = "auto",
    steps: int = 50,
    learning_rate: float = 1.0,
) -> Edit:
    """Answer edited prompts from a codebook at one MLP's output matrix (Hartvigsen et al. 2023).

    `eps` is the radius of a new key; auto: half the 5 % quantile of the distances from the corpus's prompts to the
    nearest other one, because the published 1.0 would take different people for one in some models.
    """
    if eps != "auto" and eps < 0:
        raise ParameterError(f"grace: eps is {eps}, expected at least 0 or auto")
    at = layer_of(case, layer)
    matrix = edited_matrix(case.subject, at)
    reach = _radius(case, at) if eps == "auto" else float(eps)
    asked = replace(case, edits=[replace(one, subject="") for one in case.facts()])  # looked up at the last token
    facts = located(asked, 0)
    found = optimised(case.subject, facts, at, Settings(steps, learning_rate, kl=0, decay=0, clamp=1e9))
    _, there = keys(case.subject, facts, [at])
    labels = [int.from_bytes(hashlib.sha256(f.edit.target_new.encode()).digest()[:7]) for f in facts]
    entry = {
        "keys": there.keys[at].cpu(),
        "values": (there.values[at] + found.delta).cpu(),
        "labels": torch.tensor(labels),
        "reach": torch.full((len(facts),), reach),
    }
    case.summary["grace"] = {"layer": at, "matrix": matrix.name, "facts": len(facts), "radius": reach, **found.log}
    return Delta(case.base.fingerprint, {matrix.name: entry}, {"method": "grace", "layer": at})


def _radius(case: EditCase, layer: int) -> float:
    name = f"radius at layer {layer}"
    if name not in case.memory:
        rows = list(case.corpus) or case.data.get("general") or case.data.get("retain") or []
        prompts = list(dict.fromkeys(case.base.prompt_text(row) for row in rows if row.prompt))[:MOST]
        if len(prompts) < 2:
            raise RequestError(
                f"grace: eps = auto measures how far prompts lie apart, and the corpus has {len(prompts)} with a "
                "prompt; give a corpus of questions, or a number as eps"
            )
        texts = [case.base.prompt_ids(prompt, (str(i), "corpus")) for i, prompt in enumerate(prompts)]
        parts = [
            look(case.base, group, [len(text) - 1 for text in group], [layer]).keys[layer]
            for group in (texts[i : i + 128] for i in range(0, len(texts), 128))
        ]
        at = torch.cat(parts)
        apart = torch.cdist(at, at, compute_mode=EXACT).fill_diagonal_(float("inf")).min(1).values
        case.memory[name] = float(apart.quantile(QUANTILE)) / 2
    return float(case.memory[name])
