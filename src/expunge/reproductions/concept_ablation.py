"""Needle (arXiv:2406.11614): noise on the value vectors that carry a concept takes it out, at little cost.

A concept is an answer that several people share (a trade, a city); its prompts are those of its holders, all other
facts are unrelated. The model is that of reproductions/told.py. One vector is not enough in so small a model.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from ..evidence import Table
from ..methods.edit.needle import ablate
from ..methods.optimise.loop import Training, fit
from ..methods.optimise.unlearn import unlearn
from ..registry import get, reproduction
from ..rows import Row
from ..subjects.concepts import distinctive, search
from ..subjects.language import LanguageModel
from ..subjects.traces import trace
from ..subjects.value_vectors import Address, value_matrices
from ..world.facts import World, make
from .case import Case, Claim, Findings, Spread
from .case import Row as Trial
from .measures import knowledge
from .told import stated, subject_of

RELATIONS = ("trade", "born_in")
COUNTS = (1, 5, 20)
MODES = ("zero", "noise")
WAYS = ("attribution", "projection", "random")
OTHERS = 80
"""Unrelated facts that are asked."""
BEST = 10
"""Best tokens of a vector that are compared; the vocabulary is small."""


def concepts(world: World, count: int) -> dict[str, tuple[list[Row], list[Row]]]:
    """The answers with most holders, as many of each relation, to (rows of the holders, other rows)."""
    draw = random.Random(f"concepts/{world.seed}")
    rows = stated(world)
    found: dict[str, tuple[list[Row], list[Row]]] = {}
    for number, about in enumerate(RELATIONS):
        holders: dict[str, list[Row]] = {}
        for row in stated(world, about):
            holders.setdefault(row.value, []).append(row)
        left = -(-(count - len(found)) // (len(RELATIONS) - number))
        for value in sorted(holders, key=lambda value: (-len(holders[value]), value))[:left]:
            others = [row for row in rows if row.value != value]
            found[value] = (holders[value], draw.sample(others, min(OTHERS, len(others))))
    return found


def vectors(subject: LanguageModel, own: Sequence[Row], others: Sequence[Row], way: str, seed: int) -> list[Address]:
    """The best vectors of a concept, found one way; random ones stand in the layers of those by attribution."""
    texts, rest = ([f"{row.prompt} {row.value}" for row in rows] for rows in (own, others))
    tokens = distinctive(subject, texts, rest)
    if way == "projection":
        return [one.address for one in search(subject, tokens, by="z").candidates[: max(COUNTS)]]
    asked, unrelated = ([subject.prompt_text(row) for row in rows] for rows in (own, others))
    best = [one.address for one in search(subject, tokens, prompts=asked, others=unrelated).candidates[: max(COUNTS)]]
    if way == "attribution":
        return best
    draw, width = (
        random.Random(f"random/{seed}/{own[0].value}"),
        {m.layer: m.count for m in value_matrices(subject.model)},
    )
    return [Address(one.layer, draw.randrange(width[one.layer])) for one in best]


def ablated(seed: int, count: int, draws: int, recipe: dict[str, Any] | None = None) -> dict[str, Any]:
    """Probability of each concept's answers and accuracy on others, by way, mode and number of vectors."""
    world = make(seed)
    base = subject_of(world, recipe)
    found = []
    for own, others in concepts(world, count).values():
        line: dict[str, Any] = {"base": [knowledge(base, own).probability, knowledge(base, others).accuracy]}
        for way in WAYS:
            best = vectors(base, own, others, way, seed)
            for mode in MODES:
                for size in COUNTS:
                    pairs = []
                    for draw in range(draws if mode == "noise" else 1):
                        after = ablate(base, best[:size], mode=mode, seed=100 * seed + draw).apply(base)  # type: ignore[arg-type]
                        pairs.append([knowledge(after, own).probability, knowledge(after, others).accuracy])
                    line[f"{way} {mode} {size}"] = [fmean(pair[i] for pair in pairs) for i in (0, 1)]
        found.append(line)
    return {"concepts": found}


def contrasted(
    seed: int, count: int, steps: int, learning_rate: float, recipe: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What noise on five vectors and gradient ascent do to the first of them, at the probability that noise leaves.

    And how far a few steps on half of the concept's rows bring the other half back.

    Args:
        steps: of ascent at most.
    """
    world = make(seed)
    base = subject_of(world, recipe)
    found = []
    for own, others in concepts(world, count).values():
        best = vectors(base, own, others, "attribution", seed)
        noised = ablate(base, best[:5], seed=100 * seed).apply(base)
        target = knowledge(noised, own).probability

        def look(model: LanguageModel, _: int, own: Any = own, target: float = target) -> str | None:
            return "as low as after noise" if knowledge(model, own).probability <= target else None

        outcome = unlearn(
            base,
            get("methods", "gradient_ascent"),
            {},
            scope=None,
            data={"forget": list(own), "retain": list(others)},
            training=Training(steps=steps, batch_size=8, learning_rate=learning_rate, seed=seed, guard=None),
            evaluate_at=range(1, steps + 1),
            evaluate=look,
        )
        ascended = outcome.delta.apply(base)
        line: dict[str, Any] = {"target": target, "reached": outcome.summary["stopped"] is not None}
        for name, after in (("noise", noised), ("ascent", ascended)):
            changed = trace(base, after, best[0], k=BEST)
            line[name] = {
                "probability": knowledge(after, own).probability,
                "others": knowledge(after, others).accuracy,
                "jaccard": changed.jaccard,
                "cosine": changed.cosine,
                "relearned": relearned(after, own, seed),
            }
        found.append(line)
    return {"concepts": found}


def relearned(model: LanguageModel, own: Sequence[Row], seed: int) -> float:
    """Probability of the second half of the rows after ten steps on the first."""
    half = max(1, len(own) // 2)
    copy = model.copy()
    items = [copy.encode(row) for row in own[:half]]
    fit(copy, items, steps=10, batch_size=8, learning_rate=1e-3, seed=seed)
    return knowledge(copy, own[half:] or own).probability


@reproduction(paper="arXiv:2406.11614", cost="3 min on 2 cores, models of its own included")
def concept_ablation(
    case: Case,
    *,
    count: int = 6,
    draws: int = 3,
    steps: int = 30,
    learning_rate: float = 3e-4,
    recipe: dict[str, Any] | None = None,
) -> Findings:
    """Needle: noise on vectors chosen for a concept takes it out, on random ones it does not; ascent leaves them be.

    Args:
        count: concepts.
        draws: of noise, which are averaged.
        steps: of gradient ascent at most; it ends where the concept is as improbable as under noise.
        learning_rate: of gradient ascent.
        recipe: of the model (`expunge.world.models.Recipe`).
    """
    shared = {"count": count, "recipe": recipe}
    rows = case.trials(ablated, [{**shared, "draws": draws}])
    pairs = case.trials(contrasted, [{**shared, "steps": steps, "learning_rate": learning_rate}])
    return Findings(
        claims=judge(rows, pairs),
        tables=[ablations(rows), contrasts(pairs)],
        notes=[
            f"{count} concepts a seed; 4 layers with 192 value vectors each, of which 20 vectors are 2.6 %. Noise is 5 "
            f"times a vector's root mean square, averaged over {draws} draws.",
            "Probability: mean over a concept's prompts of the answer's probability; accuracy: share of other facts of "
            "whose answer every token is the likeliest. The paper compares written answers with old ones by BLEU and "
            "ROUGE-L; the benchmark concept_vectors measures these.",
            f"Jaccard is of the {BEST} best tokens of the first vector; the paper's 200 are of 32 000.",
            "Jailbreak prompts are not tested: a model of this size follows no instruction. Relearning: ten steps on "
            "half of the concept's rows, probability of the other half.",
        ],
    )


def _of(rows: Sequence[Trial], name: str) -> tuple[Spread, Spread]:
    """(probability, accuracy on others), mean over concepts, over seeds."""
    means = [[fmean(one[name][i] for one in row["concepts"]) for row in rows] for i in (0, 1)]
    return Spread(tuple(means[0])), Spread(tuple(means[1]))


def _part(pairs: Sequence[Trial], way: str, name: str) -> Spread:
    return Spread(tuple(fmean(one[way][name] for one in row["concepts"]) for row in pairs))


def judge(rows: Sequence[Trial], pairs: Sequence[Trial]) -> list[Claim]:
    """The claims; criteria were fixed before (specs: concept_ablation, section 6)."""
    known, kept = _of(rows, "base")
    own, rest = _of(rows, "attribution noise 5")
    blind, _ = _of(rows, "random noise 5")
    spelt, _ = _of(rows, "projection noise 5")
    noise, ascent = (
        {name: _part(pairs, way, name) for name in ("jaccard", "probability")} for way in ("noise", "ascent")
    )
    reached = sum(one["reached"] for row in pairs for one in row["concepts"])
    total = sum(len(row["concepts"]) for row in pairs)
    return [
        Claim(
            "Noise on the vectors chosen for a concept removes it at little cost",
            "answers about the concept change, unrelated ones hardly do (one vector, 7B models)",
            "5 vectors by attribution: the concept's probability at most 0.65 of what it was, other facts lose at most "
            "0.05 of accuracy",
            f"probability {own} of {known}; others {rest} of {kept}",
            own.mean <= 0.65 * known.mean and rest.mean >= kept.mean - 0.05,
        ),
        Claim(
            "Noise on random vectors does not",
            "noise on random vectors leaves answers as they are",
            "5 random vectors of the same layers keep at least 0.85 of the probability",
            f"{blind} of {known}",
            blind.mean >= 0.85 * known.mean,
        ),
        Claim(
            "Vectors that a model answers from are found better by attribution than by what they spell",
            "not all vectors that project to a concept are causal: candidates were validated",
            "5 vectors by attribution take at least 0.15 more of the probability than 5 by projection",
            f"{own} left against {spelt}",
            spelt.mean - own.mean >= 0.15,
        ),
        Claim(
            "Noise destroys the vector; gradient ascent to the same effect leaves it as it was",
            "Jaccard of best tokens near 1 after ascent, difference, NPO and DPO",
            "Jaccard at most 0.2 after noise, at least 0.8 after ascent that leaves the concept no more probable",
            f"{noise['jaccard']} after noise (probability {noise['probability']}), {ascent['jaccard']} after ascent "
            f"(probability {ascent['probability']}, reached for {reached} of {total} concepts)",
            noise["jaccard"].mean <= 0.2 and ascent["jaccard"].mean >= 0.8,
        ),
    ]


def ablations(rows: Sequence[Trial]) -> Table:
    known, kept = _of(rows, "base")
    lines = [["none", "", "", str(known), str(kept)]]
    for way in WAYS:
        for mode in MODES:
            for size in COUNTS:
                lines.append([way, mode, str(size), *map(str, _of(rows, f"{way} {mode} {size}"))])
    columns = ["vectors by", "mode", "how many", "probability of the concept", "accuracy on others"]
    return Table("Ablating a concept's value vectors", columns, lines, "Mean over concepts (range over seeds).")


def contrasts(pairs: Sequence[Trial]) -> Table:
    names = {
        "probability": "probability",
        "others": "others",
        "jaccard": "Jaccard",
        "cosine": "cosine",
        "relearned": "after relearning",
    }
    lines = [[way, *(str(_part(pairs, way, name)) for name in names)] for way in ("noise", "ascent")]
    return Table(
        "The first vector after noise on five, and after gradient ascent",
        ["after", *names.values()],
        lines,
        "Mean over concepts (range over seeds).",
    )
