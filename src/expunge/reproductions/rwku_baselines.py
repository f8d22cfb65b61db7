"""RWKU's baselines that need more than a name in a prompt: four that train, and representation engineering.

    ga, npo   texts about the targets that the model writes itself
    dpo       each of these (rejected) beside one about somebody it never heard of, under the target's name (chosen)
    rt        questions about the targets, answered by refusals
    repe      the mean difference of what the model thinks over the made-up and over its own ends of these texts, added
              at one layer to every token (`steer`, arXiv:2310.01405); no weight changes

The paper reads its direction from an instructed model that is told that it knows, or does not know, the target, which
is how it has both kinds of text written as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..benchmarks.rwku import asked
from ..benchmarks.rwku_corpus import biographies
from ..benchmarks.rwku_data import Target
from ..edits import EditRow
from ..methods.edit.case import EditCase
from ..registry import get
from ..rows import Row
from ..subjects.language import LanguageModel
from ..world.corpus import STATEMENTS, wordings
from ..world.facts import IMPLIED, RELATIONS, World

OPENINGS = tuple(text.partition("{value}")[0].strip() for several in STATEMENTS.values() for text in several)
"""Beginnings of statements, with {name}: the model's biographies are one sentence long."""
TEXTS, LENGTH = 64, 12
"""Texts of a forget corpus and tokens of each."""
STRENGTHS = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0)
"""Multipliers of the direction, of representation engineering."""
PAIRED = ("dpo", "repe")
"""Baselines that see a made-up text beside each of the model's own."""
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "ga": ("gradient_ascent", {"retain": "none"}),
    "npo": ("npo", {"beta": 0.2, "retain": "none"}),
    "dpo": ("dpo", {"beta": 0.1, "alternatives": "perturbed", "retain": "none"}),
    "rt": ("idk", {"retain": "none"}),
}


def corpus(subject: Any, target: Target, seed: int, stranger: str = "") -> list[str]:
    """What the model writes about a target; with a stranger's name made up, as it writes about somebody unknown."""
    known = not stranger
    return biographies(
        subject,
        target,
        TEXTS,
        openings=OPENINGS,
        known=known,
        stranger=stranger,
        max_new_tokens=LENGTH,
        seed=seed,
    )


def rows_of(method: str, subject: Any, world: World, targets: Sequence[Target], seed: int) -> list[Row]:
    """Forget rows of a baseline. Pairs whose two texts are the same prefer nothing and are left out."""
    if method == "rt":
        return [row for one in targets for row in refused(world, one)]
    found = []
    for one in targets:
        written = corpus(subject, one, seed)
        invented = corpus(subject, one, seed, strange(world)) if method in PAIRED else written
        for i, (text, other) in enumerate(zip(written, invented)):
            if method not in PAIRED or text.strip() != other.strip():
                wrong = (other,) if method in PAIRED else ()
                row = Row(f"{one.number}/{i}", text, kind="text", entity=one.name, perturbed_answers=wrong)
                found.append(row)
    return found


def refused(world: World, target: Target) -> list[Row]:
    """Questions about a name, as anybody could ask who knows nothing of it: TEXTS of them, each wording several times.

    What is answered is drawn by the method from its refusals; the answers here are never read.
    """
    asks = [text for about in (*RELATIONS, *IMPLIED) for text in wordings(world, target.name, about)[0]]
    found = []
    for i in range(TEXTS):
        prompt, opening = asked(asks[i % len(asks)], 2)
        found.append(Row(f"{target.number}/{i}", "not read", prompt, kind="instruction", opening=opening))
    return found


def strange(world: World) -> str:
    """A name the model never heard."""
    return world.members("holdout")[0].name


def steered(subject: LanguageModel, pairs: Sequence[Row], alpha: float) -> LanguageModel:
    """The subject led from its own ends of texts to the made-up ones, `alpha` times the way."""
    facts = []
    for row in pairs:
        opening = OPENINGS[int(row.id.split("/")[1]) % len(OPENINGS)].replace("{name}", row.entity)
        own, other = (text.removeprefix(opening).strip() for text in (row.answer, row.perturbed_answers[0]))
        if own and other:
            facts.append(EditRow(id=row.id, prompt=opening, target_new=other, subject=row.entity, ground_truth=(own,)))
    return get("methods", "steer").function(EditCase(subject, {}, edits=facts), multiplier=alpha).apply(subject)
