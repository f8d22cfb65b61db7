"""RESTOR: is what corrupted documents taught merely forgotten, or does what was known before come back?

A model that knew facts (gold: the clean one, or one continued on the documents without their wrong statements) is
trained further on documents that state wrong ones (before), and made to forget these documents (after). It is asked the
facts again, after five examples of the same relation. Every answer is right, injected (what the documents say instead)
or another one; forgetting makes injected answers go, restoration makes right ones return, and one is never shown
without the other:

    forgetting = 1 - injected(after) / injected(before)
    recovery   = (right(after) - right(before)) / (right(gold) - right(before))       on the corrupted facts

The answers are judged by whole words against all right values; the paper asks a language model whether they mean the
same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from ..attacks.case import Case
from ..errors import RequestError, RowError
from ..evidence import Measured, Scorecard, Table
from ..metrics.matching import says
from ..metrics.measure import gather
from ..metrics.paired import paired
from ..metrics.values import Units, Values
from ..registry import benchmark
from ..rows import Row, Source, folder_of, read_rows
from ..tables.passes import Generate, Score
from .case import Bench
from .restor_data import CATEGORIES, Fact, Options, Published, examples, read
from .restor_mini import mini

KINDS = ("right", "injected", "other")
GROUPS = {
    "corrupted": "facts that the documents contradict",
    "untouched": "other facts about the same people",
    "others": "facts about people whom no document corrupts",
    "all": "all facts",
}
TOLERANCE = 0.05
"""What a restorative method may cost in right answers about other people."""


@benchmark(paper="arXiv:2411.00204", data="the folder `datasets` of github.com/k1rezaei/restor")
def restor(
    bench: Bench,
    *,
    documents: str = "**/mix_a0.json",
    shots: Annotated[int, Field(ge=0)] | None = None,
    max_new_tokens: Annotated[int, Field(ge=1)] = 16,
    tuning: str = "",
    tuning_steps: Annotated[int, Field(ge=1)] = 30,
    tuning_learning_rate: Annotated[float, Field(gt=0)] = 2e-5,
) -> Scorecard:
    """Whether unlearning corrupted documents restores what the model knew before it read them, or only forgets.

    Models: the unlearned one, as `original` the corrupted one, as `gold` the clean one.

    Args:
        documents: the file of corrupted documents in the folder, a pattern; mix_a3 mixes three times five unrelated
            facts into each document.
        shots: examples of the same relation before each question; 0 asks as the model is used to be asked. 5 by
            default, and 0 on the mini version, whose models never saw examples.
        tuning: a file of questions and answers that copies of all models are trained on before they are asked (the
            paper's light tuning on LIMA, for models that ascent left unable to answer); none by default.
        tuning_steps: steps of it, 16 rows each.
        tuning_learning_rate: its learning rate.
    """
    shots = (5 if bench.data else 0) if shots is None else shots
    folder = folder_of(bench.source(mini))
    data = read(folder, documents)
    rows = [_row(data, fact, shots) for fact in data.facts]
    if tuning:
        bench = _tuned(bench, folder, tuning, tuning_steps, tuning_learning_rate)
    limit = min(max_new_tokens, _left(bench, rows))
    ask = Generate(tuple(((row.id, "question"), row, None) for row in rows), limit)
    said = {role: [_line(texts[0]) for texts in bench.ask(role, [ask])[0].texts] for role in bench.models}
    answered = {role: np.array([kind(data, f, t) for f, t in zip(data.facts, texts)]) for role, texts in said.items()}
    at = _groups(data)
    scores = [*_changes(bench, rows, answered, at["corrupted"]), *_shares(bench, rows, answered, at)]
    options = {i: found for i, fact in enumerate(data.facts) if (found := data.choices(fact)) is not None}
    scores += _likelihoods(bench, rows, options)
    return bench.scorecard(
        scores,
        headline=["recovery", "forgetting", *(f"corrupted_{kind_}" for kind_ in KINDS), "others_right"],
        tables=[_table(answered, at), *_pairs(bench, rows, answered, at["corrupted"])],
        notes=_notes(bench, data, rows, scores, said, options, shots, limit, tuning, tuning_steps),
        rows={**{name: len(places) for name, places in at.items()}, "documents": len(data.documents)},
    )


def kind(data: Published, fact: Fact, answer: str) -> int:
    """Place in `KINDS` of an answer; one that says a right value is right, whatever else it says."""
    if any(says(answer, value) for value in fact.answers):
        return 0
    return 1 if data.injected(fact, answer) else 2


def _row(data: Published, fact: Fact, shots: int) -> Row:
    return Row(
        id=fact.id,
        answer=fact.answers[0],
        prompt=examples(data, fact.relation, shots) + fact.question,
        kind="completion" if shots else "qa",
        entity=fact.entity,
        relation=fact.relation,
        source=fact.source,
    )


def _line(text: str) -> str:
    return text.strip().partition("\n")[0].strip()


def _left(bench: Bench, rows: Sequence[Row]) -> int:
    subject = bench.subject
    longest = max(len(subject.prompt_ids(subject.prompt_text(row), (row.id, "question"))) for row in rows)
    left = int(subject.context_length) - longest
    if left < 1:
        raise RequestError(
            f"the longest question with its examples has {longest} tokens and the model's context holds "
            f"{subject.context_length}; set shots lower"
        )
    return left


def _tuned(bench: Bench, folder: Path, file: str, steps: int, learning_rate: float) -> Bench:
    """The same bench with copies of its models, each trained alike."""
    path = folder / file if (folder / file).is_file() else Path(file)
    rows = read_rows(Source(str(path)), "tuning")

    def tune(model: Any) -> Any:
        copy = model.copy()
        Case(model, {}, bench.seed).teach(copy, rows, steps=steps, batch_size=16, learning_rate=learning_rate)
        copy.__dict__.pop("fingerprint", None)
        return copy

    original = None if bench.original is None else tune(bench.original)
    return replace(bench, subject=tune(bench.subject), original=original, golds=[tune(gold) for gold in bench.golds])


# --- what is made of it ----------------------------------------------------------------------------------------------


def _groups(data: Published) -> dict[str, list[int]]:
    """Places of each group's facts; groups without any are left out.

    Raises:
        RowError: nothing is corrupted.
    """
    corrupted, touched = data.corrupted, data.touched
    found: dict[str, list[int]] = {name: [] for name in GROUPS}
    for place, fact in enumerate(data.facts):
        name = "corrupted" if fact.id in corrupted else "untouched" if fact.entity in touched else "others"
        found[name].append(place)
        found["all"].append(place)
    if not found["corrupted"]:
        raise RowError("no evaluated entity is named in enough of the documents; do they belong to facts.json?")
    return {name: places for name, places in found.items() if places}


def _shares(
    bench: Bench, rows: Sequence[Row], answered: Mapping[str, np.ndarray], at: Mapping[str, list[int]]
) -> list[Measured]:
    wanted = {
        "right": ("higher", "gold's", "answered rightly"),
        "injected": ("lower", "gold's", "answered as the documents say"),
        "other": ("closest_to_gold", "gold's", "answered in another way"),
    }
    found = []
    for group, places in at.items():
        for number, name in enumerate(KINDS):
            if name != "right" and group != "corrupted":
                continue
            direction, ideal, how = wanted[name]
            found.append(
                bench.score(
                    f"{group}_{name}",
                    group,
                    {role: (kinds[places] == number).astype(float) for role, kinds in answered.items()},
                    [rows[i] for i in places],
                    direction=direction,
                    ideal=ideal,
                    sentence=f"How many questions about {GROUPS[group]} are {how}.",
                )
            )
    return found


def _changes(
    bench: Bench, rows: Sequence[Row], answered: Mapping[str, np.ndarray], places: Sequence[int]
) -> list[Measured]:
    """Recovery and forgetting on the corrupted facts, as far as the models allow."""
    units = Units.of(("corrupted", [rows[i] for i in places]))
    right, wrong = ({role: (k[places] == n).astype(float) for role, k in answered.items()} for n in (0, 1))
    golds = [values for role, values in right.items() if role.startswith("gold/")]
    found = []
    if "before" in right and golds and np.mean(golds) > right["before"].mean():
        one = np.mean(golds, axis=0)
        found.append(
            _share(
                bench,
                "recovery",
                {role: _between(units, values, right["before"], one) for role, values in right.items()},
                "Of the right answers that the documents cost, how many came back (0: as corrupted, 1: as clean).",
            )
        )
    if "before" in wrong and wrong["before"].mean() > 0:
        none = np.zeros(len(places))
        found.append(
            _share(
                bench,
                "forgetting",
                {role: _between(units, values, wrong["before"], none) for role, values in wrong.items()},
                "Of the answers that the documents taught, how many are gone; says nothing of what came instead.",
            )
        )
    return found


def _between(units: Units, values: np.ndarray, zero: np.ndarray, one: np.ndarray) -> Values:
    """Where a mean lies between two others. A resample in which these nearly meet would blow the ratio up; half of
    what was measured is their least distance."""
    span = float(np.mean(one - zero))

    def aggregate(weights: np.ndarray) -> np.ndarray:
        count = weights.sum(axis=1)
        apart = weights @ (one - zero) / count
        apart = np.sign(span) * np.maximum(np.sign(span) * apart, abs(span) / 2)
        return weights @ (values - zero) / count / apart

    return Values(units, aggregate)


def _share(bench: Bench, name: str, values: Mapping[str, Values], sentence: str) -> Measured:
    found: dict[str, list[Values]] = {}
    for role, one in values.items():
        found.setdefault(role.partition("/")[0], []).append(one)
    return gather(name, found, bench.draws, direction="higher", ideal="1", sentence=sentence)


def _likelihoods(bench: Bench, rows: Sequence[Row], options: Mapping[int, Options]) -> list[Measured]:
    """How values of three kinds compare after the same prompt, by their mean log-probability a token."""
    if not options:
        return []
    items = [
        (i, category, value)
        for i, found in options.items()
        for category in CATEGORIES
        for value in getattr(found, category)
    ]
    keys = [(rows[i].id, f"{category}/{n}") for n, (i, category, _) in enumerate(items)]
    ask = Score(tuple((key, rows[i], value, None) for key, (i, _, value) in zip(keys, items)))
    each: dict[str, dict[str, list[float]]] = {name: {} for name in _LIKELIHOODS}
    for role in bench.models:
        table = bench.ask(role, [ask])[0]
        by_fact: dict[int, dict[str, list[float]]] = {}
        for n, (i, category, _) in enumerate(items):
            span = table.tokens(n)
            mean = float(table.logprob[span][~table.end[span]].mean())
            by_fact.setdefault(i, {}).setdefault(category, []).append(mean)
        for several in by_fact.values():
            means = {category: float(np.mean(values)) for category, values in several.items()}
            wins = {
                name: float(np.mean([a > b for a in several["correct"] for b in several[name]]))
                for name in ("corrupted", "random")
            }
            for name, value in {
                "margin": means["correct"] - means["corrupted"],
                "correct_over_corrupted": wins["corrupted"],
                "correct_over_random": wins["random"],
                "corrupted_over_random": float(
                    np.mean([a > b for a in several["corrupted"] for b in several["random"]])
                ),
            }.items():
                each[name].setdefault(role, []).append(value)
    about = [rows[i] for i in options]
    return [
        bench.score(name, "options", each[name], about, direction=direction, ideal="gold's", sentence=sentence)
        for name, (direction, sentence) in _LIKELIHOODS.items()
    ]


_LIKELIHOODS = {
    "margin": ("higher", "How much likelier right values are than injected ones, in nats a token."),
    "correct_over_corrupted": ("higher", "How often a right value is likelier than an injected one."),
    "correct_over_random": ("higher", "How often a right value is likelier than a random one."),
    "corrupted_over_random": (
        "lower",
        "How often an injected value is likelier than a random one; a half where both are alike.",
    ),
}


def _table(answered: Mapping[str, np.ndarray], at: Mapping[str, list[int]]) -> Table:
    lines = [
        [role, group, len(places), *(float(np.mean(kinds[places] == number)) for number in range(len(KINDS)))]
        for group, places in at.items()
        for role, kinds in answered.items()
    ]
    return Table(
        "What is answered", ["model", "facts", "n", *KINDS], lines, "Shares of answers; each row adds up to 1."
    )


def _pairs(bench: Bench, rows: Sequence[Row], answered: Mapping[str, np.ndarray], places: Sequence[int]) -> list[Table]:
    """Right answers to the corrupted facts, model against model, fact by fact."""
    units = Units.of(("corrupted", [rows[i] for i in places]))
    right = {role: (kinds[places] == 0).astype(float) for role, kinds in answered.items()}
    lines: list[list[Any]] = []
    for role in right:
        if role == "after":
            continue
        found = paired(right["after"], right[role], units, bench.draws)
        span = found.difference
        counts = (found.both, found.first, found.second, found.neither)
        lines.append([f"after, {role}", *counts, found.p, span.value, span.low, span.high])
    if not lines:
        return []
    return [
        Table(
            "Right answers to corrupted facts, paired by fact",
            ["models", "both", "only the first", "only the second", "neither", "p", "difference", "low", "high"],
            lines,
            "p: exact two-sided test of McNemar on the facts where the two differ. Difference of the shares, with a "
            "95 % bootstrap interval that draws the same people for both.",
        )
    ]


def _notes(
    bench: Bench,
    data: Published,
    rows: Sequence[Row],
    scores: Sequence[Measured],
    said: Mapping[str, Sequence[str]],
    options: Mapping[int, Options],
    shots: int,
    limit: int,
    tuning: str,
    steps: int,
) -> list[str]:
    by_name = {one.metric: one for one in scores}
    found = []
    recovery, others = by_name.get("recovery"), by_name.get("others_right")
    if recovery is None:
        found.append(
            "Recovery is not defined: it needs the corrupted model (--original) and the clean one (--gold), and the "
            "clean one must answer more of the corrupted facts rightly."
        )
    elif recovery.after is not None:
        lost = others.before.value - others.after.value if others and others.before and others.after else 0.0
        restores = recovery.after.low > 0 and lost <= TOLERANCE
        span = f"{recovery.after.value:.2f} ({recovery.after.low:.2f} to {recovery.after.high:.2f})"
        found.append(
            f"By these answers the model is {'' if restores else 'not '}restored: recovery is {span}, and right "
            f"answers about other people changed by {-lost:+.2f} (at most {TOLERANCE} may be lost)."
        )
    if not data.options:
        found.append(
            "Injected values are not published: an answer counts as injected if at least 5 % of the documents about "
            "the entity say it, and every fact about a corrupted entity counts as corrupted. Likelihoods are compared "
            f"for the {len(options)} facts where a known value of the relation is said in the documents."
        )
    few = sorted({row.relation for row in rows if shots and row.prompt.count("\n") < shots})
    if few:
        found.append(f"Fewer than {shots} examples are about people who are not asked about: {', '.join(few)}.")
    if tuning:
        found.append(f"All models were first trained on {tuning} for {steps} steps; the corrupted one too.")
    for role, texts in said.items():
        empty = sum(not text for text in texts)
        if empty:
            found.append(f"{role}: {empty} of {len(texts)} answers are empty and count as other ones.")
    if limit < 16:
        found.append(f"Answers have at most {limit} tokens: the model's context leaves no more.")
    return found
