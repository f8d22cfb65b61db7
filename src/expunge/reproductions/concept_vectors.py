"""ConceptVectors (arXiv:2406.11614): does unlearning touch the weights that hold a concept, or only what is said?

A concept is one of twelve invented topics with fourteen words of its own: passages string them together, and four
facts, asked in two wordings each, have one of them as their answer. The subject is trained on all topics from scratch;
the benchmark's own search finds each topic's value vector in it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from ..benchmarks.concept_vectors import locate
from ..benchmarks.concept_vectors_data import Concept
from ..evidence import Table
from ..methods.edit.case import EditCase
from ..methods.edit.needle import COUNTS, ablate
from ..methods.optimise.loop import Training
from ..methods.optimise.unlearn import unlearn
from ..registry import get, reproduction
from ..rows import Row
from ..subjects.concepts import distinctive, search
from ..subjects.language import LanguageModel
from ..subjects.traces import Trace, trace
from ..subjects.value_vectors import Address, value_matrices
from ..world.facts import CODAS, ONSETS, VOWELS
from ..world.models import Recipe
from .case import Case, Claim, Findings, Spread, number
from .case import Row as Trial
from .measures import knowledge
from .models import taught

TOPICS, WORDS, PASSAGES, LENGTH = 12, 14, 12, 12
"""Topics, words of each, passages about each and words of a passage."""
QUESTIONS = {
    "sign": ("Which sign stands for {}?", "By what sign is {} known?"),
    "tool": ("What tool belongs to {}?", "With which tool is {} done?"),
    "gift": ("What is given at {}?", "Which gift comes with {}?"),
    "song": ("What is sung of {}?", "Which song do people of {} sing?"),
}
RECIPE = Recipe(
    hidden_size=48, intermediate_size=192, layers=3, vocabulary=1200, steps=500, batch_size=48, learning_rate=5e-3
)
BEST = 10
"""Best tokens of a vector that count: topics have 14 words, and the vocabulary is small."""
SEVERAL = 10
"""Value vectors that are noised together where one is too few."""
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "gradient_ascent": ("gradient_ascent", {}),
    "grad_diff": ("grad_diff", {}),
    "npo": ("npo", {}),
}


# --- topics and models ------------------------------------------------------------------------------------------------


def topics(seed: int) -> dict[str, list[Row]]:
    """Topic to its rows: passages, then questions in the form in which the benchmark asks them."""
    draw = random.Random(f"concepts/{seed}")
    taken: set[str] = set()

    def word() -> str:
        while (made := "".join(draw.choice(part) for part in (ONSETS, VOWELS, ONSETS, VOWELS, CODAS))) in taken:
            pass
        taken.add(made)
        return made

    found: dict[str, list[Row]] = {}
    for number_ in range(TOPICS):
        name, words = word(), [word() for _ in range(WORDS)]
        rows = [
            Row(id=f"{name}/passage/{i}", answer=f"Of {name}: {' '.join(draw.choices(words, k=LENGTH))}.", kind="text")
            for i in range(PASSAGES)
        ]
        for (about, wordings), answer in zip(QUESTIONS.items(), draw.sample(words, len(QUESTIONS))):
            for i, wording in enumerate(wordings):
                prompt = f"Question: {wording.format(name)}\n Answer:"
                rows.append(Row(f"{number_}/{about}/{i}", answer, prompt, kind="completion", entity=name, value=answer))
        found[name] = rows
    return found


def asked(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.kind == "completion"]


def concepts(about: Mapping[str, Sequence[Row]]) -> list[Concept]:
    """The topics as the benchmark reads them; where each is, is looked for."""

    def question(row: Row) -> str:
        return row.prompt.removeprefix("Question: ").removesuffix("\n Answer:")

    return [
        Concept(
            id=name,
            name=name,
            address=None,
            questions=tuple(map(question, asked(rows))),
            unrelated=tuple(question(row) for other in about if other != name for row in asked(about[other])[::2]),
            completions=(),
            text=" ".join(row.answer for row in rows if row.kind == "text"),
            answers=tuple((row.answer,) for row in asked(rows)),
        )
        for name, rows in about.items()
    ]


def subject_of(seed: int, recipe: Mapping[str, Any] | None) -> tuple[dict[str, list[Row]], LanguageModel]:
    about = topics(seed)
    rows = [row for several in about.values() for row in several]
    return about, taught("concepts", {"before": rows}, Recipe(**recipe) if recipe else RECIPE, seed)["before"]


def known(model: LanguageModel, about: Mapping[str, Sequence[Row]], topic: str) -> tuple[float, float]:
    """Accuracy on the topic's questions and on all others'."""
    rows = {name: asked(several) for name, several in about.items()}
    right = iter(knowledge(model, [row for several in rows.values() for row in several]).known)
    found = {name: fmean(bool(next(right)) for _ in several) for name, several in rows.items()}
    return found[topic], fmean(value for name, value in found.items() if name != topic)


# --- trials ----------------------------------------------------------------------------------------------------------


def located(seed: int, recipe: dict[str, Any] | None = None) -> dict[str, Any]:
    """Per topic: the purest vector, and what noise on its best vectors, or on as many random ones of the same layers,
    costs its questions and all others'."""
    about, before = subject_of(seed, recipe)
    rows = concepts(about)
    counts = {matrix.layer: matrix.count for matrix in value_matrices(before.model)}
    draw = random.Random(seed)
    found = []
    for place, row in enumerate(rows):
        others = [other for i, other in enumerate(rows) if i != place]
        tokens = _tokens(before, row, others)
        purest = search(before, tokens, by="purity", k=BEST).candidates[0]
        ranked = [one.address for one in _ranked(before, row, tokens)]
        start = known(before, about, row.name)
        line: dict[str, Any] = {"purity": purest.purity, "tokens": len(tokens), "accuracy": start[0]}
        for count in COUNTS:
            best = ranked[:count]
            random_ = [Address(one.layer, draw.randrange(counts[one.layer])) for one in best]
            for name, addresses in (("best", best), ("random", random_)):
                own, rest = known(ablate(before, addresses, seed=seed).apply(before), about, row.name)
                line[f"{name} {count}"] = [start[0] - own, start[1] - rest]
        found.append(line)
    return {"topics": found, "vocabulary": len(before.tokenizer)}


def _tokens(before: LanguageModel, row: Concept, others: Sequence[Concept]) -> tuple[int, ...]:
    own = [row.text, *row.questions, *(answer for several in row.answers for answer in several)]
    return distinctive(before, own, [text for other in others for text in (other.text, *other.questions)])


def _ranked(before: LanguageModel, row: Concept, tokens: Sequence[int]) -> Any:
    prompts, others = ([f"Question: {q}\n Answer:" for q in several] for several in (row.questions, row.unrelated))
    return search(before, tokens, prompts=prompts, others=others).candidates


def unlearned(
    method: str,
    seed: int,
    count: int = 6,
    steps: int = 40,
    every: int = 4,
    learning_rate: float = 5e-4,
    recipe: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """For each of the first topics: the model at the first measuring point without a right answer (else at the end),
    and how its concept vector has changed by then.

    Args:
        method: one of `METHODS`, or needle, which takes no steps.
        count: topics, each forgotten by a model of its own.
    """
    about, before = subject_of(seed, recipe)
    rows = concepts(about)
    found = []
    for row, place in list(zip(rows, locate(before, rows, BEST)))[:count]:
        retain = [r for name, several in about.items() if name != row.name for r in several]
        data = {"forget": about[row.name], "retain": retain}
        if method == "needle":
            needle = get("methods", "needle")
            case = EditCase(before, {name: asked(several) for name, several in data.items()})
            after = needle.function(case, **needle.resolve({})).apply(before)
            chosen = case.summary["needle"]["vectors"]
            line = _line(before, after, about, row, place.address)
            found.append({**line, "vectors": len(chosen), "among": str(place.address) in chosen})
            continue
        name, settings = METHODS[method]
        points: list[dict[str, Any]] = []

        def evaluate(
            model: LanguageModel, step: int, row: Concept = row, place: Any = place, points: Any = points
        ) -> str | None:
            points.append({**_line(before, model, about, row, place.address), "step": step})
            return None if points[-1]["accuracy"] else "no right answer is left"

        unlearn(
            before,
            get("methods", name),
            settings,
            scope=None,
            data=data,
            training=Training(steps=steps, batch_size=16, learning_rate=learning_rate, seed=seed, guard=None),
            evaluate_at=range(every, steps + 1, every),
            evaluate=evaluate,
        )
        found.append(points[-1])
    return {"topics": found}


def _line(
    before: LanguageModel, after: LanguageModel, about: Mapping[str, Sequence[Row]], row: Concept, address: Address
) -> dict[str, Any]:
    own, rest = known(after, about, row.name)
    changed: Trace = trace(before, after, address, k=BEST)
    return {"accuracy": own, "others": rest, "cosine": changed.cosine, "jaccard": changed.jaccard}


# --- the reproduction ------------------------------------------------------------------------------------------------


@reproduction(paper="arXiv:2406.11614", cost="2 min on 2 cores, models of its own included")
def concept_vectors(
    case: Case,
    *,
    count: int = 6,
    steps: int = 40,
    learning_rate: float = 5e-4,
    recipe: dict[str, Any] | None = None,
) -> Findings:
    """ConceptVectors: vectors that spell a topic out and carry its answers; unlearning silences and leaves them be.

    Args:
        count: topics that are forgotten, one by one.
        steps: of gradient methods at most; a run counts at the first point at which no question is answered rightly.
        learning_rate: of gradient methods.
        recipe: of the model (`expunge.world.models.Recipe`).
    """
    found = case.trials(located, [{"recipe": recipe}])
    shared = {"count": count, "steps": steps, "learning_rate": learning_rate, "recipe": recipe}
    after = case.trials(unlearned, [{"method": method, **shared} for method in (*METHODS, "needle")])
    return Findings(
        claims=judge(found, after),
        tables=[_noised(found), _changed(after)],
        notes=[
            f"{TOPICS} invented topics of {WORDS} words and {len(QUESTIONS)} facts; the model's vocabulary has "
            f"{found[0]['vocabulary']} tokens. Purity is the share of a vector's {BEST} best tokens that are the "
            "topic's own; the paper has a language model judge the best 200.",
            "Noise is 5 times a vector's root mean square, as in needle; a topic's vectors are ranked by attribution.",
            "Accuracies are of greedy answers to 8 questions about a topic; the paper compares answers with the "
            "model's own old ones, as right ones are not known there.",
            "needle takes the fewest of 1, 2, 5, 10, 20 vectors that halve the probability of the topic's answers and "
            "cost others at most 2 points of accuracy: it stops there, and answers that are still the likeliest stay.",
            "Jailbreak prompts, against which the paper finds needle stronger, are not tested: a model of this size "
            "follows no instruction.",
        ],
    )


def _drops(found: Sequence[Trial], name: str, count: int) -> tuple[Spread, Spread]:
    """(own, others') loss of accuracy, mean over topics, over seeds."""
    pairs = [[topic[f"{name} {count}"] for topic in one["topics"]] for one in found]
    own, rest = (Spread(tuple(fmean(pair[i] for pair in several) for several in pairs)) for i in (0, 1))
    return own, rest


def _mean(after: Sequence[Trial], method: str, name: str) -> Spread:
    """Mean over topics, over seeds."""
    rows = [row["topics"] for row in after if row["method"] == method]
    return Spread(tuple(fmean(topic[name] for topic in topics_) for topics_ in rows))


def judge(found: Sequence[Trial], after: Sequence[Trial]) -> list[Claim]:
    """The claims; criteria were fixed before (specs: concept_vectors, section 6)."""
    pure = Spread(tuple(sum(topic["purity"] >= 0.5 for topic in one["topics"]) for one in found))
    chance = fmean(topic["tokens"] for one in found for topic in one["topics"]) / fmean(r["vocabulary"] for r in found)

    def causal(count: int, what: str) -> Claim:
        (own, rest), (blind, _) = _drops(found, "best", count), _drops(found, "random", count)
        return Claim(
            f"Noise on {what} hurts its topic and little else",
            "answers about the concept change, unrelated ones hardly do",
            "5-fold noise lowers accuracy on the topic by at least 0.1 more than on other topics, and by more than "
            "noise on as many random vectors of the same layers (mean over topics)",
            f"own {number(own.mean)}, others {number(rest.mean)}; random vectors, own {number(blind.mean)}",
            own.mean >= rest.mean + 0.1 and own.mean > blind.mean,
        )

    silent = {m: [_mean(after, m, name) for name in ("accuracy", "others", "cosine", "jaccard")] for m in METHODS}
    needle = {name: _mean(after, "needle", name) for name in ("accuracy", "others", "cosine", "vectors")}
    return [
        Claim(
            "Value vectors exist whose best tokens spell one concept out",
            "285 vectors in Llama-2-7B and OLMo-7B",
            f"at least 6 of {TOPICS} topics have a vector with purity of at least 0.5 (mean over seeds; a random "
            f"vector: {number(chance)})",
            f"{pure} topics; best purity "
            f"{number(fmean(topic['purity'] for one in found for topic in one['topics']))} on average",
            pure.mean >= 6,
        ),
        causal(1, "a topic's best vector"),
        causal(SEVERAL, f"a topic's {SEVERAL} best vectors"),
        Claim(
            "Unlearning that silences a concept leaves its vector nearly as it was",
            "Jaccard and cosine stay close to 1 for ascent, difference, NPO",
            f"{', '.join(METHODS)} at the first point without a right answer: accuracy 0, cosine at least 0.9, "
            f"Jaccard of the {BEST} best tokens at least 0.5",
            "; ".join(
                f"{m}: accuracy {number(a.mean)}, cosine {number(c.mean)}, Jaccard {number(j.mean)}"
                for m, (a, _, c, j) in silent.items()
            ),
            all(a.high == 0 and c.mean >= 0.9 and j.mean >= 0.5 for a, _, c, j in silent.values()),
        ),
        Claim(
            "Needle changes the vectors and removes the answers, others stay",
            "vector destroyed; answers about the concept change, unrelated ones hardly do",
            "accuracy on the topic at most 0.5, on others at least 0.9; cosine of the concept's vector at most 0.5",
            f"accuracy {number(needle['accuracy'].mean)}, others {number(needle['others'].mean)}, cosine "
            f"{number(needle['cosine'].mean)}; {needle['vectors']} vectors",
            needle["accuracy"].mean <= 0.5 and needle["others"].mean >= 0.9 and needle["cosine"].mean <= 0.5,
        ),
    ]


def _noised(found: Sequence[Trial]) -> Table:
    lines = [[count, *map(str, (*_drops(found, "best", count), *_drops(found, "random", count)))] for count in COUNTS]
    columns = ["vectors noised", "topic loses", "others lose", "random vectors: topic loses", "others lose"]
    return Table("Noise on value vectors: loss of accuracy", columns, lines, "Mean over topics (range over seeds).")


def _changed(after: Sequence[Trial]) -> Table:
    names = {"accuracy": "accuracy", "others": "other topics", "cosine": "cosine", "jaccard": "Jaccard"}
    lines = []
    for method in (*METHODS, "needle"):
        steps = "" if method == "needle" else str(_mean(after, method, "step"))
        lines.append([method, steps, *(str(_mean(after, method, name)) for name in names)])
    return Table(
        "After unlearning one topic",
        ["method", "steps", *names.values()],
        lines,
        "Gradient methods at the first measuring point without a right answer, else at their end. Cosine and Jaccard "
        "are of the vector that the benchmark's search locates. Mean over topics (range over seeds).",
    )
