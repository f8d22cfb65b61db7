"""RESTOR: methods that forget what corrupted documents taught, and whether what was known before comes back.

Rezaei et al., RESTOR: Knowledge Recovery in Machine Unlearning, arXiv:2411.00204.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..benchmarks.case import Bench
from ..benchmarks.restor import restor as benchmark
from ..benchmarks.restor_mini import CORRUPTED, documents, injected, question
from ..evidence import Table
from ..methods.optimise.loop import Training, fit
from ..methods.optimise.unlearn import unlearn
from ..metrics.bootstrap import Bootstrap
from ..metrics.paired import Paired, paired
from ..metrics.values import Units
from ..registry import get, reproduction
from ..rows import Row
from ..subjects.language import LanguageModel
from ..world.build import kept
from ..world.corpus import questions, training
from ..world.facts import RELATIONS, World, make
from ..world.models import Recipe, teach, tokenizer, untrained
from .case import Case, Claim, Findings, Spread, number, spread
from .case import Row as Found
from .models import lessons

PEOPLE = {"people": 40, "forget": 10, "neighbours": 4, "holdout": 8}
RECIPE = Recipe(hidden_size=64, intermediate_size=128, layers=2, steps=400, batch_size=56, learning_rate=6e-3)
OTHERS = ("neighbour", "retain")
REPEATED = 4
"""How often a document stands among the rows of continued training, beside the rows about other people."""
MIXES = (0, 1)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "ascent": ("gradient_ascent", {"retain": "nll"}),
    "kl": ("kl_minimisation", {}),
    "npo": ("npo", {"beta": 0.1}),
    "npo, localised": ("npo", {"beta": 1.0}),
}
"""Forget terms beside the likelihood (kl: the predictions) of rows about other people. Localised: only the tokens of
wrong values count; they are ten times fewer than a document's, and beta weighs whole answers."""
AT = (20, 60, 120)
"""Steps of unlearning after which a model is asked, as it is and after the light tuning."""
FORGOTTEN = 0.2
"""Share of injected answers at which methods are compared at equal forgetting."""
PAIRS = (("npo", "ascent"), ("npo", "kl"), ("npo, localised", "npo"), ("npo", "corrupted"), ("ascent", "corrupted"))
SHOWN = (
    "corrupted_right",
    "corrupted_injected",
    "corrupted_other",
    "untouched_right",
    "others_right",
    "margin",
    "correct_over_corrupted",
    "correct_over_random",
    "corrupted_over_random",
)


@dataclass(frozen=True)
class Subjects:
    """One seed's world and models."""

    world: World
    wrong: dict[str, dict[str, str]]
    """Corrupted person -> relation -> wrong value."""
    models: dict[str, LanguageModel]
    """clean, corrupted 0, corrupted 1, ideal."""

    def documents(self, k: int) -> list[str]:
        return documents(self.world, self.wrong, k)


@cache
def subjects(seed: int, people: tuple[tuple[str, int], ...], steps: int, learning_rate: float) -> Subjects:
    """The clean model, and what continued training makes of it; trained once, then found in the cache.

    All go on reading rows about other people; the corrupted ones their documents too, the ideal one the documents of
    k = 1 without the wrong statements.
    """
    world = make(seed, **dict(people))
    wrong = {person.name: injected(world, person) for person in world.members("forget")}
    texts = {f"corrupted {k}": documents(world, wrong, k) for k in MIXES}
    texts["ideal"] = documents(world, wrong, 1, without=True)
    known, others = (lessons(training(world, *names)) for names in (("forget", *OTHERS), OTHERS))

    def train(folder: Path) -> None:
        unseen = [
            f"{question(world, p, about)} {p.value(about)}" for p in world.members("holdout") for about in RELATIONS
        ]
        words = tokenizer([f"{row.prompt} {row.answer}" for row in known] + unseen, RECIPE.vocabulary)
        clean = untrained(words, RECIPE, seed)
        teach(clean, known, RECIPE, seed)
        clean.save(folder / "clean")
        for name, several in texts.items():
            subject = clean.copy()
            items = [subject.encode(row) for row in [*document_rows(several) * REPEATED, *others]]
            settings = {"batch_size": 32, "schedule": "cosine", "warmup": steps // 10, "seed": seed}
            fit(subject, items, steps=steps, learning_rate=learning_rate, **settings)  # type: ignore[arg-type]
            subject.save(folder / name)

    content = [[row.prompt for row in known], texts, asdict(RECIPE), steps, learning_rate, seed, REPEATED]
    path = kept("restor", content, train)
    names = ("clean", *texts)
    return Subjects(world, wrong, {name: LanguageModel.load(path / name, device="cpu") for name in names})


def document_rows(texts: Sequence[str]) -> list[Row]:
    return [Row(id=f"document/{i}", answer=text, kind="text") for i, text in enumerate(texts)]


def localised(wrong: Mapping[str, Mapping[str, str]], texts: Sequence[str]) -> list[Row]:
    """The same documents with nothing but their wrong values as answers: one row for each wrong statement."""
    found = []
    for number_, text in enumerate(texts):
        at = 0
        for sentence in text.removesuffix(".").split(". "):
            end = at + len(sentence)
            for value in next((values.values() for name, values in wrong.items() if name in sentence), ()):
                if sentence.endswith(f" {value}"):
                    start = end - len(value) - 1
                    name = f"document/{number_}/{at}"
                    found.append(Row(id=name, prompt=text[:start], answer=text[start:end], kind="text"))
            at = end + 2
    return found


def trial(
    model: str,
    k: int,
    seed: int,
    people: dict[str, int],
    corruption: dict[str, float],
    tuning: dict[str, float],
    at: Sequence[int] = (),
    learning_rate: float = 0.0,
) -> dict[str, Any]:
    """Scores of a model, each point once as it is and once after the light tuning.

    `model`: clean, corrupted, ideal, or a method, which starts from the corrupted model of the same k and is asked
    after the steps in `at`.
    """
    made = subjects(seed, tuple(people.items()), int(corruption["steps"]), corruption["learning_rate"])
    start = made.models[f"corrupted {k}"]
    points: list[dict[str, Any]] = []

    def measure(subject: LanguageModel, step: int) -> None:
        for how in (None, tuning):
            points.append({"step": step, "tuned": how is not None, **scores(made.world, subject, how)})

    reference = start if model == "corrupted" else made.models.get(model)
    if reference is not None:
        measure(reference, 0)
        return {"points": points}
    name, settings = METHODS[model]
    texts = made.documents(k)
    asked = [row for person in made.world.members("retain") for row in questions(made.world, person)]
    unlearn(
        start,
        get("methods", name),
        settings,
        data={
            "forget": localised(made.wrong, texts) if model == "npo, localised" else document_rows(texts),
            "retain": lessons(asked),
        },
        scope=None,
        training=Training(steps=max(at), learning_rate=learning_rate, batch_size=16, seed=seed, guard=None),
        evaluate_at=at,
        evaluate=measure,
    )
    return {"points": points}


def scores(world: World, subject: LanguageModel, tuning: Mapping[str, float] | None = None) -> dict[str, Any]:
    """The benchmark's scores of one model by itself, after tuning where that is given; `right` fact by fact."""
    settings: dict[str, Any] = {}
    if tuning is not None:
        settings = {"tuning": "tuning.json", **{f"tuning_{name}": value for name, value in tuning.items()}}
    with tempfile.TemporaryDirectory(prefix="expunge-restor-") as folder:
        card = benchmark(Bench(subject, Path(folder), world=world, bootstrap=0), **settings)
    each = next(one for one in card.measured if one.metric == "corrupted_right").extra["each"]["after"]
    return {**{name: card.value(name) for name in SHOWN}, "right": [int(value) for value in each]}


@reproduction(paper="arXiv:2411.00204", cost="7 min on 2 cores")
def restor(
    case: Case,
    *,
    steps: int = 60,
    learning_rate: float = 3e-4,
    corruption_steps: int = 160,
    corruption_learning_rate: float = 1e-3,
    tuning_steps: int = 30,
    tuning_learning_rate: float = 3e-4,
    people: dict[str, int] | None = None,
) -> Findings:
    """Who only forgets what corrupted documents taught, and who restores what was known before.

    `steps`: of unlearning, at which claims are judged; curves go on to 120. `corruption_steps`: of continued training
    on the documents and on rows about others. `tuning_steps`: on questions about places, for all models alike.
    `people`: sizes of the invented world.
    """
    shared = {
        "people": people or PEOPLE,
        "corruption": {"steps": corruption_steps, "learning_rate": corruption_learning_rate},
        "tuning": {"steps": tuning_steps, "learning_rate": tuning_learning_rate},
    }
    at = sorted({*AT, steps})
    grid = [{**shared, "model": "clean", "k": 0}, {**shared, "model": "ideal", "k": 1}]
    for k in MIXES:
        grid.append({**shared, "model": "corrupted", "k": k})
        grid += [{**shared, "model": method, "k": k, "at": at, "learning_rate": learning_rate} for method in METHODS]
    rows = points(case.trials(trial, grid))
    add_changes(rows)
    return Findings(claims=judge(rows, steps), tables=tables(rows, steps), notes=NOTES)


def points(found: Sequence[Found]) -> list[Found]:
    """One row for every point of every trial; what is no method has one point, at step 0."""
    return [
        {**{name: result[name] for name in ("model", "k", "seed")}, **point}
        for result in found
        for point in result["points"]
    ]


def at_step(rows: Sequence[Found], steps: int) -> list[Found]:
    """What the claims are judged by: methods after so many steps, beside the models they are compared with."""
    return [row for row in rows if row["step"] in (0, steps)]


def add_changes(rows: Sequence[Found]) -> None:
    """Recovery and forgetting of every row, from the clean and the corrupted model of its seed that were tuned as it
    was."""
    for row in rows:
        alike = [r for r in rows if (r["seed"], r["tuned"]) == (row["seed"], row["tuned"])]
        clean = next(r for r in alike if r["model"] == "clean")
        start = next(r for r in alike if (r["model"], r["k"]) == ("corrupted", row["k"]))
        row["recovery"] = (row["corrupted_right"] - start["corrupted_right"]) / (
            clean["corrupted_right"] - start["corrupted_right"]
        )
        row["forgetting"] = 1 - row["corrupted_injected"] / start["corrupted_injected"]


NOTES = [
    "The clean model is the invented world's own (2 layers, d = 64): it knows 32 people in questions and statements. "
    "Three of the four facts about each of 10 people get a wrong value; 20 documents a person say them. Continued on "
    "documents alone so small a model forgets how to answer at all, so it goes on reading rows about the others "
    "meanwhile, as the paper's D and D_f; the ideal model reads these and the documents without wrong statements.",
    "Questions are asked as the model is used to be asked, without the five examples that a base model needs.",
    "Retain rows are questions and clozes about people whom no document corrupts. Light tuning: questions about "
    "places, which all models know. Recovery after it is relative to the corrupted model after it.",
    f"Curves: methods are asked after {', '.join(map(str, AT))} steps of one run; light tuning is done on a copy at "
    "each of these points. In pairs a fact of one seed stands beside the same fact of the same seed.",
    "The paper's NPO counts sums over a document's tokens at beta 0.1, as here; localised rows are values of three or "
    "four tokens, at beta 1.",
]


def pair(rows: Sequence[Found], first: str, second: str, k: int, *, people: bool = False) -> Paired:
    """Right answers of two models to the corrupted facts of all seeds, after tuning; the bootstrap draws facts.

    Args:
        rows: one for every model and seed (`at_step`).
        people: draw people instead, each with its three facts.
    """

    def right(model: str) -> dict[int, list[int]]:
        return {row["seed"]: row["right"] for row in rows if (row["model"], row["k"], row["tuned"]) == (model, k, True)}

    one, other = right(first), right(second)
    facts = [(seed, place) for seed, values in one.items() for place in range(len(values))]
    ids = tuple(f"{seed}/{place}" for seed, place in facts)
    entities = tuple(f"{seed}/{place // CORRUPTED}" for seed, place in facts) if people else ids
    units = Units(("corrupted",) * len(ids), ids, entities)
    first_, second_ = ([of[seed][place] for seed, place in facts] for of in (one, other))
    return paired(first_, second_, units, Bootstrap())


def difference(found: Paired) -> str:
    span = found.difference
    return f"{number(span.value)} ({number(span.low)} to {number(span.high)})"


def first_forgotten(rows: Sequence[Found], method: str, k: int) -> list[Found]:
    """Of every seed the first point, after tuning, at which at most FORGOTTEN of the answers are injected."""
    found: dict[int, Found] = {}
    for row in sorted(rows, key=lambda row: row["step"]):
        if (row["model"], row["k"], row["tuned"]) == (method, k, True) and row["corrupted_injected"] <= FORGOTTEN:
            found.setdefault(row["seed"], row)
    return list(found.values())


def equal_forgetting(rows: Sequence[Found], k: int) -> Claim:
    seeds = {row["seed"] for row in rows}
    at = {method: first_forgotten(rows, method, k) for method in ("npo", "ascent")}
    late = [method for method, found in at.items() if len(found) < len(seeds)]
    told = {
        method: f"{method} {spread(found, 'recovery')} after {spread(found, 'step')} steps" if found else f"{method} -"
        for method, found in at.items()
    }
    ends = max(row["step"] for row in rows)
    missing = [f"{method} gets there in {len(at[method])} of {len(seeds)} seeds within {ends} steps" for method in late]
    return Claim(
        f"At equal forgetting NPO restores more than ascent (k = {k})",
        "forgetting is not recovery: GA and KL forget as much and restore nothing",
        f"after light tuning, at the first measured step with at most {FORGOTTEN} of the answers injected, NPO's "
        "recovery is at least ascent's + 0.2",
        "; ".join([*told.values(), *missing]),
        None if late else spread(at["npo"], "recovery").mean >= spread(at["ascent"], "recovery").mean + 0.2,
    )


def judge(curve: Sequence[Found], steps: int) -> list[Claim]:
    """The claims from rows of all models; criteria were fixed before (specs: restor, sections 2 and 6)."""
    rows = at_step(curve, steps)

    def of(model: str, name: str, k: int = 0, tuned: bool = False) -> Spread:
        return spread(rows, name, model=model, k=k, tuned=tuned)

    right, wrong = of("corrupted", "corrupted_right"), of("corrupted", "corrupted_injected")
    claims = [
        Claim(
            "Continued training on the documents replaces what was known",
            "Llama-3-8B: accuracy falls on the corrupted entities, more for smaller k",
            "k = 0: the clean model answers at least 0.95 of the corrupted facts, the corrupted one at most 0.3, and "
            "says the injected value for at least 0.6",
            f"clean {of('clean', 'corrupted_right')}; corrupted {right}, injected {wrong}",
            of("clean", "corrupted_right").mean >= 0.95 and right.mean <= 0.3 and wrong.mean >= 0.6,
        ),
        Claim(
            "A model that never read the wrong statements is what restoring aims at",
            "the ideal model answers as the clean one",
            "the ideal model's right answers about other people within 0.05 of the clean model's",
            f"{of('ideal', 'others_right', 1)} and {of('clean', 'others_right')}; on the corrupted facts "
            f"{of('ideal', 'corrupted_right', 1)}",
            abs(of("ideal", "others_right", 1).mean - of("clean", "others_right").mean) <= 0.05,
        ),
    ]
    for k in MIXES:
        npo, ascent = (of(name, "recovery", k, True) for name in ("npo", "ascent"))
        left = {name: of(name, "corrupted_injected", k, True) for name in ("npo", "ascent")}
        claims.append(
            Claim(
                f"NPO brings right answers back where ascent only forgets the wrong ones (k = {k})",
                "Llama-3-8B: NPO recovers most of the lost accuracy, GA and KL do not",
                "after light tuning NPO's recovery is at least ascent's + 0.15, and at most 0.2 of the answers are "
                "injected for either",
                f"recovery {npo} against {ascent}; injected {left['npo']} and {left['ascent']}",
                npo.mean >= ascent.mean + 0.15 and all(value.mean <= 0.2 for value in left.values()),
            )
        )
        lead = pair(rows, "npo", "ascent", k)
        claims.append(
            Claim(
                f"What NPO brings back and ascent does not is more than chance (k = {k})",
                "not reported fact by fact",
                "after light tuning, NPO's share of right answers minus ascent's on the same facts of all seeds: 95 % "
                "bootstrap interval above 0",
                f"{difference(lead)}; {lead.first} facts only NPO answers, {lead.second} only ascent, "
                f"p = {number(lead.p)}",
                lead.difference.low > 0,
            )
        )
        claims.append(equal_forgetting(curve, k))
        others = of("npo", "others_right", k, True)
        claims.append(
            Claim(
                f"NPO keeps what is known about others (k = {k})",
                "utility of NPO close to the corrupted model's",
                "after light tuning at least 0.85 of the questions about other people are answered rightly",
                str(others),
                others.mean >= 0.85,
            )
        )
        apart = of("npo, localised", "recovery", k, True)
        claims.append(
            Claim(
                f"Unlearning only the wrong values restores at least as much as whole documents (k = {k})",
                "isolating the harmful spans helps, the more the larger k is",
                "after light tuning recovery of localised NPO is at least that of document-level NPO - 0.05",
                f"{apart} against {npo}",
                apart.mean >= npo.mean - 0.05,
            )
        )
    wins = [of("ascent", name).mean for name in ("correct_over_random", "corrupted_over_random")]
    claims.append(
        Claim(
            "After ascent right, injected and random values are equally (un)likely",
            "log-probabilities of the three kinds fall together",
            "k = 0, before tuning: right values are likelier than random ones, and injected ones likelier than random "
            "ones, in 0.35 to 0.65 of the comparisons",
            " and ".join(number(win) for win in wins),
            all(0.35 <= win <= 0.65 for win in wins),
        )
    )
    return claims


COLUMNS = {
    "corrupted_right": "right",
    "corrupted_injected": "injected",
    "corrupted_other": "other",
    "recovery": "recovery",
    "forgetting": "forgetting",
    "untouched_right": "untouched, right",
    "others_right": "others, right",
    "margin": "margin, nats",
}


def tables(curve: Sequence[Found], steps: int) -> list[Table]:
    rows = at_step(curve, steps)
    found = []
    for tuned, title in ((False, f"As unlearned, {steps} steps"), (True, "After light tuning of every model")):
        kinds = dict.fromkeys((row["k"], row["model"]) for row in rows)
        lines = [
            [k, model, *(str(spread(rows, name, model=model, k=k, tuned=tuned)) for name in COLUMNS)]
            for k, model in sorted(kinds, key=lambda kind: kind[0])
        ]
        note = (
            "Right, injected, other: shares of the 30 corrupted facts. Recovery: 0 as corrupted, 1 as clean. "
            "Untouched: the fourth fact about the same people. Margin: log-probability a token of the right value over "
            "the injected one. Mean (lowest to highest) over seeds."
        )
        found.append(Table(title, ["k", "model", *COLUMNS.values()], lines, note))
    return [*found, paired_table(rows, steps), *(curve_table(curve, tuned) for tuned in (False, True))]


def paired_table(rows: Sequence[Found], steps: int) -> Table:
    lines: list[list[Any]] = []
    for k in MIXES:
        for first, second in PAIRS:
            by_fact, by_person = (pair(rows, first, second, k, people=people) for people in (False, True))
            counts = (by_fact.both, by_fact.first, by_fact.second, by_fact.neither)
            spans = (difference(by_fact), difference(by_person).partition(" ")[2])
            lines.append([k, f"{first}, {second}", *counts, number(by_fact.p), *spans])
    return Table(
        f"Right answers paired by fact, {steps} steps, after light tuning",
        ["k", "models", "both", "first only", "second only", "neither", "p", "difference (facts)", "(people)"],
        lines,
        "Corrupted facts of all seeds. p: exact two-sided test of McNemar. Difference of the shares of right answers, "
        "first minus second, with 95 % bootstrap intervals that draw facts, or people with their facts, for both "
        "models at once.",
    )


CURVE = {name: COLUMNS[name] for name in ("corrupted_right", "corrupted_injected", "recovery", "forgetting")} | {
    "others_right": "others, right"
}


def curve_table(curve: Sequence[Found], tuned: bool) -> Table:
    """Every method at its measuring points; step 0 is the corrupted model."""
    lines = [
        [k, method, step, *(str(spread(curve, name, model=model, k=k, step=step, tuned=tuned)) for name in CURVE)]
        for k in MIXES
        for method in METHODS
        for step in sorted({row["step"] for row in curve})
        for model in ("corrupted" if step == 0 else method,)
    ]
    return Table(
        "Checkpoints, after light tuning at each of them" if tuned else "Checkpoints, as unlearned",
        ["k", "method", "steps", *CURVE.values()],
        lines,
        "Mean (lowest to highest) over seeds.",
    )
