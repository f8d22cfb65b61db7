"""WACK: does a model answer wrongly because it does not know, or although it knows (arXiv:2410.22071)?

The data set is built for each model. Closed book, after right examples, every question is answered six times (five
samples and once greedily): six hits are knowledge, none is ignorance (HK-), what lies between is left out. Known
questions are asked again where a model is led to err, after wrong examples or in the story of two students: a wrong
answer there is an error despite knowledge (HK+).

    label = right or HK+ if six of six are hits, HK- if none is, else middle

A linear probe on the hidden states under that same setting then tells the three apart, on entities it never saw.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from ..attacks.probing import Classifier, balanced, by_layer, fit, spaced, transfer, unit
from ..evidence import Measured, Scorecard, Table
from ..metrics.matching import says
from ..registry import benchmark
from ..rows import Row, folder_of
from ..tables.passes import Generate, Hidden
from .case import Bench
from .wack_data import Question, Setting, Shot, closed_book, drawn, provoking, read, shots, write
from .wack_mini import NAME, mini

LABELS = ("right", "hk_plus", "hk_minus", "middle")
SAMPLES, TEMPERATURE = 5, 0.5
OUTPUTS = SAMPLES + 1
MARGIN = 3
"""Tokens beyond the longest answer; the paper's five cut long answers, which then count as errors."""
REFERENCE_TOKENS = 5
PROBED = ("right", "hk_plus", "hk_minus")
OTHER: dict[Setting, Setting] = {"bad_shots": "alice_bob", "alice_bob": "bad_shots"}
FEWEST = 4
"""Entities of each label that a probe needs."""


@benchmark(
    paper="arXiv:2410.22071",
    data="the folder Distinguishing_Ignorance_from_Error_in_LLM_Hallucinations/datasets of "
    "github.com/technion-cs-nlp/hallucination-mitigation",
)
def wack(
    bench: Bench,
    *,
    questions: str = "Static*.json",
    setting: Setting = "bad_shots",
    both: bool = False,
    examples: Annotated[int, Field(ge=0)] | None = None,
    limit: Annotated[int, Field(ge=0)] = 0,
    reference: bool = False,
    classifier: Classifier = "logistic",
    layers: Annotated[int, Field(ge=0)] = 8,
) -> Scorecard:
    """How many wrong answers are ignorance and how many are errors despite knowledge, and whether states tell which.

    The data set that is built of each model lies in `wack/ROLE` of the folder, in the published form.

    Args:
        questions: the file in the data folder, by name or pattern.
        setting: what leads to errors: wrong examples, or a story of students who guess.
        both: build the data set of the other setting too, and test the probe of each on the states of the other.
        examples: right ones before a question that tests knowledge, and wrong ones of bad_shots; 3 by default. On the
            mini version none and 1: the world's models never saw examples.
        limit: of that many questions, the first; 0 takes all.
        reference: judge as published: five new tokens, and an answer counts wherever its letters stand ("8" in "1898").
        classifier: of the probe: logistic (chosen within folds), or the paper's svm.
        layers: at most so many are tried, evenly spaced; 0 takes all.
    """
    folder = folder_of(bench.source(mini))
    asked = read(folder, questions)
    asked = asked[:limit] if limit else asked
    good, bad = (examples, max(examples, 1)) if examples is not None else (3, 3) if bench.data else (0, 1)
    settings = (setting, OTHER[setting]) if both else (setting,)
    plans = {name: _plan(asked, shots(folder), good, bad, name, bench.seed) for name in settings}
    plan = plans[setting]
    tokens = REFERENCE_TOKENS if reference else _longest(bench, plan.known) + MARGIN
    every = {
        name: {role: build(bench, role, asked, one, tokens, reference) for role in bench.models}
        for name, one in plans.items()
    }
    built = every[setting]
    tables = [_counts(built), _known(every)]
    if len(built) > 1:
        tables.append(_overlaps(built))
    probes, notes = _probes(bench, plan, built, classifier, layers)
    if both:
        tables.append(_settings_overlap(every))
        probes += _across(bench, plans, every, classifier, layers)
    for name, of in every.items():
        for role, found in of.items():
            rows = tuples(bench.models[role], asked, plans[name], found)
            write(bench.folder / "wack" / role, NAME, name, str(bench.models[role].name), rows)
    return bench.scorecard(
        _shares(bench, built, plan.known),
        headline=["hk_plus", "hk_minus"],
        tables=[*tables, *probes],
        notes=[*notes, *_notes(good, bad, setting, reference, built)],
        rows={"questions": len(asked)},
    )


# --- the data set -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What is asked, row by row beside the questions."""

    known: list[Row]
    """Closed book."""
    led: list[Row]
    """Under the setting."""


@dataclass(frozen=True)
class Built:
    """What one model made of the questions."""

    hits: np.ndarray
    """(rows,) of the six answers."""
    led: list[str]
    """The answer under the setting."""
    labels: np.ndarray
    """(rows,) places in `LABELS`."""

    @property
    def knows(self) -> np.ndarray:
        return self.hits == OUTPUTS


def label(hits: int, right: bool) -> int:
    """Place in `LABELS` of a question with so many hits among six, answered rightly under the setting or not."""
    if hits == OUTPUTS:
        return 0 if right else 1
    return 2 if hits == 0 else 3


def hit(answer: str, text: str, reference: bool) -> bool:
    """Whether an output says the answer: as whole words in its first line, or (reference) as letters anywhere."""
    if reference:
        return answer.strip().lower() in text.lower()
    return says(text.strip().partition("\n")[0], answer)


def build(bench: Bench, role: str, asked: Sequence[Question], plan: Plan, tokens: int, reference: bool) -> Built:
    """Ask one model everything, in one queue of prompts."""
    known, led = (
        tuple(((row.id, name), row, None) for row in rows) for name, rows in (("known", plan.known), ("led", plan.led))
    )
    sampled, greedy, provoked = bench.ask(
        role,
        [
            Generate(known, tokens, samples=SAMPLES, temperature=TEMPERATURE, seed=bench.seed),
            Generate(known, tokens),
            Generate(led, tokens),
        ],
    )
    hits = [
        sum(hit(question.answer, text, reference) for text in (*several, *once))
        for question, several, once in zip(asked, sampled.texts, greedy.texts)
    ]
    said = [texts[0] for texts in provoked.texts]
    labels = [label(n, hit(question.answer, text, reference)) for n, question, text in zip(hits, asked, said)]
    return Built(np.array(hits), said, np.array(labels))


def tuples(subject: Any, asked: Sequence[Question], plan: Plan, built: Built) -> dict[str, list[list[Any]]]:
    """The published rows of one model by file: what a wrong answer is, is what the model said under the setting."""
    found: dict[str, list[list[Any]]] = {"Hallucinate": [], "NonHallucinate": [], "General": []}
    for question, led, said, hits, place in zip(asked, plan.led, built.led, built.hits, built.labels):
        kind = {"right": "NonHallucinate", "hk_plus": "Hallucinate"}.get(LABELS[place], "General")
        wrong = said.strip().partition("\n")[0] if kind == "Hallucinate" else question.wrong
        ids = [
            subject.tokenizer(f" {text}", add_special_tokens=False)["input_ids"] for text in (question.answer, wrong)
        ]
        found[kind].append([question.prompt, question.answer, wrong, *ids, led.prompt, int(hits), -1])
    return found


def _plan(asked: Sequence[Question], known: Sequence[Shot], good: int, bad: int, setting: Setting, seed: int) -> Plan:
    rows: tuple[list[Row], list[Row]] = ([], [])
    for number, question in enumerate(asked):
        shown = drawn(question, known, max(good, bad), seed)
        prompts = (closed_book(question, shown[:good]), provoking(question, shown[:bad], setting))
        for several, prompt in zip(rows, prompts):
            row = Row(
                id=f"question/{number}",
                answer=question.answer,
                prompt=prompt,
                kind="completion",
                entity=question.entity or f"question/{number}",
                source=question.source,
            )
            several.append(row)
    return Plan(*rows)


def _longest(bench: Bench, rows: Sequence[Row]) -> int:
    return max(bench.subject.encode(row).scored for row in rows)


# --- what is made of it ----------------------------------------------------------------------------------------------


def _shares(bench: Bench, built: Mapping[str, Built], about: Sequence[Row]) -> list[Measured]:
    wanted = {
        "right": "known, and answered rightly under the setting",
        "hk_plus": "known, and answered wrongly under the setting (HK+)",
        "hk_minus": "not known at all (HK-)",
        "middle": "known at times",
    }
    return [
        bench.score(
            name,
            "questions",
            {role: (found.labels == place).astype(float) for role, found in built.items()},
            about,
            direction="closest_to_gold",
            ideal="gold's",
            sentence=f"How many questions are {wanted[name]}.",
        )
        for place, name in enumerate(LABELS)
    ]


def _counts(built: Mapping[str, Built]) -> Table:
    lines = []
    for role, found in built.items():
        counts = Counter(found.hits.tolist())
        lines.append([role, *(counts[n] for n in range(OUTPUTS + 1))])
    return Table("Hits among six answers", ["model", *map(str, range(OUTPUTS + 1))], lines, "Questions by their count.")


def _known(every: Mapping[Setting, Mapping[str, Built]]) -> Table:
    lines = []
    for setting, built in every.items():
        for role, found in built.items():
            known, errors = int(found.knows.sum()), int((found.labels == 1).sum())
            lines.append([role, setting, known, errors, errors / known if known else ""])
    return Table("Errors on known questions", ["model", "setting", "known", "HK+", "HK+ of known"], lines)


def _settings_overlap(every: Mapping[Setting, Mapping[str, Built]]) -> Table:
    one, other = every.values()
    lines = [[role, _jaccard(one[role].labels == 1, other[role].labels == 1)] for role in one]
    return Table("Overlap of HK+ between settings (Jaccard)", ["model", "HK+"], lines)


def _overlaps(built: Mapping[str, Built]) -> Table:
    """Jaccard overlap of the models' sets: what they know, and where they err though they know."""
    lines = [
        [f"{one}, {other}", _jaccard(a.knows, b.knows), _jaccard(a.labels == 1, b.labels == 1)]
        for i, (one, a) in enumerate(built.items())
        for other, b in list(built.items())[i + 1 :]
    ]
    return Table("Overlap between models (Jaccard)", ["models", "known", "HK+"], lines)


def _jaccard(a: np.ndarray, b: np.ndarray) -> float | str:
    either = int((a | b).sum())
    return float((a & b).sum() / either) if either else ""


@dataclass(frozen=True)
class Probed:
    """What a probe is trained on: rows of three labels under one setting."""

    features: np.ndarray
    labels: np.ndarray
    names: np.ndarray
    missing: list[str]
    """Labels with too few entities; nothing else is there then."""


def _probed(bench: Bench, role: str, plan: Plan, found: Built) -> Probed:
    wanted = [i for i, place in enumerate(found.labels) if LABELS[place] in PROBED]
    labels = found.labels[wanted]
    names = np.array([plan.led[i].entity for i in wanted])
    missing = [name for place, name in enumerate(PROBED) if len(set(names[labels == place])) < FEWEST]
    if missing:
        return Probed(np.zeros(0), labels, names, missing)
    # All classes under the same setting: a probe on other prompts would read the prompt.
    return Probed(unit(bench.ask(role, [Hidden(tuple((plan.led[i], None) for i in wanted))])[0]), labels, names, [])


def _probes(
    bench: Bench,
    plan: Plan,
    built: Mapping[str, Built],
    classifier: Classifier,
    layers: int,
) -> tuple[list[Table], list[str]]:
    """Three-way probes on states at the end of the prompt under the setting, of every model by itself."""
    lines, by, notes = [], [], []
    for role, found in built.items():
        rows = _probed(bench, role, plan, found)
        if rows.missing:
            missing = " or ".join(rows.missing)
            notes.append(f"{role}: no probe, because questions about fewer than {FEWEST} entities are {missing}.")
            continue
        features, labels, names = rows.features, rows.labels, rows.names
        tried = spaced(features.shape[1], layers)
        probe = fit(features, labels, names, layers=tried, classifier=classifier, seed=bench.seed)
        shuffled = np.random.default_rng(bench.seed).permutation(labels)
        control = fit(features, shuffled, names, layers=tried, classifier=classifier, seed=bench.seed)
        counts = [int((labels == place).sum()) for place in range(3)]
        accuracies = _accuracies(labels, probe.held_out)
        lines.append([role, *counts, probe.layer, accuracies[0], control.accuracy, *accuracies[1:]])
        at = by_layer(features, labels, names, layers=tried, classifier=classifier, seed=bench.seed)
        by += [[role, layer, accuracy] for layer, accuracy in at.items()]
    if not lines:
        return [], notes
    columns = ["model", *PROBED, "layer", "accuracy", "shuffled labels", "right/HK+", "right/HK-", "HK+/HK-"]
    note = "Balanced accuracy on unseen entities; chance is 0.333, of pairs 0.5. The layer is chosen within folds."
    return [
        Table("Probe of three labels", columns, lines, note),
        Table("Probe by layer", ["model", "layer", "accuracy"], by, "Layer 0 is the input of the first block."),
    ], notes


def _across(
    bench: Bench,
    plans: Mapping[Setting, Plan],
    every: Mapping[Setting, Mapping[str, Built]],
    classifier: Classifier,
    layers: int,
) -> list[Table]:
    """Probes trained under one setting and tested under the other, on entities they never saw."""
    lines: list[list[Any]] = []
    for role in bench.models:
        rows = {name: _probed(bench, role, plans[name], every[name][role]) for name in plans}
        if any(one.missing for one in rows.values()):
            continue
        for name in rows:
            trained, tested = rows[name], rows[OTHER[name]]
            tried = spaced(trained.features.shape[1], layers)
            said = transfer(
                trained.features,
                trained.labels,
                trained.names,
                tested.features,
                tested.names,
                layers=tried,
                classifier=classifier,
                seed=bench.seed,
            )
            lines.append([role, name, OTHER[name], *_accuracies(tested.labels, said)])
    if not lines:
        return []
    columns = ["model", "trained on", "tested on", "accuracy", "right/HK+", "right/HK-", "HK+/HK-"]
    note = "Balanced accuracy on entities that training had not; labels are those of the setting tested on."
    return [Table("Probe across settings", columns, lines, note)]


def _accuracies(labels: np.ndarray, scores: np.ndarray) -> list[float]:
    """Of three labels, and of each two of them."""
    pairs = [
        balanced(labels[both], np.where(*_pair(scores[both], a, b)))
        for a, b in ((0, 1), (0, 2), (1, 2))
        for both in [np.isin(labels, (a, b))]
    ]
    return [balanced(labels, scores.argmax(axis=1)), *pairs]


def _pair(scores: np.ndarray, a: int, b: int) -> tuple[np.ndarray, int, int]:
    return scores[:, a] >= scores[:, b], a, b


def _notes(good: int, bad: int, setting: Setting, reference: bool, built: Mapping[str, Built]) -> list[str]:
    found = [
        f"Knowledge: {OUTPUTS} hits of {OUTPUTS} after {good} right examples; setting {setting}"
        + (f" with {bad} wrong ones." if setting == "bad_shots" else ", one right example and a story of our own.")
    ]
    if reference:
        found.append(
            "Answers are judged as published: letters anywhere in five new tokens. Samples are plain, not beams."
        )
    for role, one in built.items():
        middle = int((one.labels == 3).sum())
        found.append(f"{role}: {middle} of {len(one.labels)} questions are known at times and count as neither.")
    return found
