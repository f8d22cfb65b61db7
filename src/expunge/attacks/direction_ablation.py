"""Taking out the direction along which a model tells whom it will not answer about."""

from typing import Literal

import torch

from ..evidence import Item
from ..metrics.matching import says
from ..registry import attack
from ..subjects.protocol import innermost
from ..subjects.soft import take_out
from ..tables.passes import Hidden
from .case import BROKEN, RETAIN_ROWS, Attack, Case, Found, judged, mean
from .known import asked_of, unused


@attack(
    group="latent",
    access="weights",
    paper="arXiv:2409.18025",
    caveat="Taking out a direction hurts small models; where retained knowledge falls too, it shows nothing.",
)
def direction_ablation(
    case: Case, *, layers: int = 3, direction: Literal["refusal", "random"] = "refusal", new_names: int = 4
) -> Attack:
    """Project r = mean h(unknown) - mean h(known) out of every block's output and ask the forget questions again.

    Known are retained questions, unknown the same questions about names nobody has; forget rows play no part. r is
    taken at the end of the prompt, after each of the `layers` blocks where the two lie furthest apart on questions that
    were not used for r. Of these the block counts after which the model answers most of the unknown with some value
    that rows have, among those at which retained knowledge falls by at most 0.3. `random` takes out random directions:
    the control.
    """
    facts = [row for row in case.rows.get("retain", []) if row.kind != "text" and row.entity][: 2 * RETAIN_ROWS]
    names = unused({row.entity for row in facts}, new_names, case.seed)
    pairs = [(row, other) for i, row in enumerate(facts) if names and (other := asked_of(row, names[i % len(names)]))]
    if len(pairs) < 4:
        return Found(status="skipped: a direction needs at least 4 retained questions that name their entity")
    known, unknown = [row for row, _ in pairs], [other for _, other in pairs]
    states = (yield Hidden(tuple((row, None) for row in (*known, *unknown))))[:, 1:]
    before = mean(judged(known, (yield case.questions(known))))
    apart = states[len(pairs) :] - states[: len(pairs)]  # (pairs, blocks, d)
    fitted, rest = apart[::2].mean(0), apart[1::2]
    along = torch.einsum("pld,ld->pl", rest, fitted / fitted.norm(dim=-1, keepdim=True).clamp_min(1e-12))
    separation = along.mean(0) / along.std(0).clamp_min(1e-12)
    chosen = sorted(separation.topk(min(layers, len(separation))).indices.tolist())
    draw = torch.Generator().manual_seed(case.seed)
    values = {row.value or row.answer for row in facts}
    tried: list[tuple[float, list[Item]]] = []
    curve, notes = [], []
    for layer in chosen:
        copy = case.subject.copy()
        random = torch.randn(states.shape[-1], generator=draw)
        take_out(innermost(copy), random if direction == "random" else fitted[layer])
        asks = [case.questions(rows) for rows in (case.forget, known, unknown)]
        forget, kept, strangers = case.ask(copy, *asks)
        items, after = judged(case.forget, forget), mean(judged(known, kept))
        answers = sum(any(says(texts[0], value) for value in values) for texts in strangers.texts) / len(unknown)
        curve.append((float(layer), mean(items)))
        notes.append(f"{layer}: retain {after:.2f}, unknown answered {answers:.2f}")
        if before - after <= BROKEN:
            tried.append((answers, items))
    budget = {"queries": len(chosen) * (len(case.forget) + 2 * len(pairs)), "samples": 1, "directions": len(chosen)}
    note = f"retain before {before:.2f}; after block {'; '.join(notes)}"
    if not tried:
        status = f"uninformative: retained knowledge falls with every direction ({note})"
        return Found(items, budget, curve, "block of the direction", note, status)
    return Found(max(tried, key=lambda one: one[0])[1], budget, curve, "block of the direction", note)
