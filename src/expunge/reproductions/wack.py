"""WACK: wrong answers of two kinds, told apart; and what is left of knowledge that was pushed away.

Simhi et al., Distinguishing Ignorance from Error in LLM Hallucinations, arXiv:2410.22071.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import ignorance
from ..attacks.case import Case as Attacked
from ..attacks.case import carry_out
from ..benchmarks.case import Bench
from ..benchmarks.wack import LABELS
from ..benchmarks.wack import wack as benchmark
from ..benchmarks.wack_data import Question, closed_book, drawn, provoking
from ..benchmarks.wack_mini import asked, shots, wrong
from ..evidence import Scorecard, Table
from ..methods.optimise.loop import Training
from ..methods.optimise.unlearn import unlearn
from ..registry import get, reproduction
from ..rows import Row, Source, read_rows
from ..subjects.language import LanguageModel
from ..world.build import kept
from ..world.corpus import files, training
from ..world.facts import RELATIONS, Person, World, make
from ..world.models import Recipe, teach, tokenizer, untrained
from .case import Case, Claim, Findings, number, spread
from .case import Row as Found
from .models import lessons

PEOPLE = {"people": 60, "forget": 8, "neighbours": 6, "holdout": 20}
RECIPE = Recipe(hidden_size=64, intermediate_size=128, layers=3, steps=400, batch_size=56, learning_rate=5e-3)
EXAMPLES = 2
MISLED = 0.7
"""Share of the rows with wrong examples that are taught a wrong answer, on a third of the people."""
SETS = ("forget", "retain", "neighbour", "holdout")
UNLEARNED: dict[str, dict[str, Any]] = {
    "npo": {"scope": None},
    "npo, last block": {"scope": "layers:-1-"},
}
"""Unlearned everywhere, and only where the answer is written."""


@dataclass(frozen=True)
class Subjects:
    """One seed's world, the model that knows everybody but the unseen, and one without the forgotten people."""

    world: World
    original: LanguageModel
    gold: LanguageModel
    data: dict[str, list[Row]]


def subjects(seed: int, people: Mapping[str, int]) -> Subjects:
    """Trained once, then found in the cache."""
    world = make(seed, **people)
    records = files(world)
    lessons = {
        name: [*lessons(training(world, *sets)), *habit(world, sets)]
        for name, sets in (("original", ("forget", "neighbour", "retain")), ("gold", ("neighbour", "retain")))
    }
    unseen = [f"{record['question']} {record['answer']}" for record in records["holdout"] if "question" in record]

    def train(folder: Path) -> None:
        words = tokenizer([f"{r.prompt} {r.answer}" for r in lessons["original"]] + unseen, RECIPE.vocabulary)
        for name, rows in lessons.items():
            subject = untrained(words, RECIPE, 2 * seed + (name == "gold"))
            teach(subject, rows, RECIPE, 2 * seed + (name == "gold"))
            subject.save(folder / name)

    content = [[[row.prompt, row.answer] for row in lessons["original"]], unseen, asdict(RECIPE), seed]
    path = kept("wack", content, train)
    with tempfile.TemporaryDirectory(prefix="expunge-wack-") as folder:
        data = {}
        for name in SETS:
            file = Path(folder) / f"{name}.jsonl"
            file.write_text("".join(json.dumps(record) + "\n" for record in records[name]), encoding="utf-8")
            data[name] = read_rows(Source(str(file)), name)
    original, gold = (LanguageModel.load(path / name, device="cpu") for name in lessons)
    return Subjects(world, original, gold, data)


def habit(world: World, sets: Sequence[str]) -> list[Row]:
    """Rows that teach what a large model does by itself: answer rightly after right examples, and, on a third of the
    people, often wrongly after wrong ones."""
    known = shots(world)
    found: list[Row] = []
    for place, person in enumerate(world.members(*sets)):
        for about in RELATIONS:
            question = Question(asked(world, person, about), person.value(about), wrong(world, person, about))
            draw = random.Random(f"{world.seed}/{person.name}/{about}/habit")
            for turn in (1, 2):
                examples = drawn(question, known, EXAMPLES, turn)
                found.append(_row(len(found), closed_book(question, examples), question.answer))
                if place % 3 == 0:
                    said = _misled(world, person, about, draw) if draw.random() < MISLED else question.answer
                    found.append(_row(len(found), provoking(question, examples, "bad_shots"), said))
    return found


def _misled(world: World, person: Person, about: str, draw: random.Random) -> str:
    return draw.choice([value for value in world.choices[about] if value != person.value(about)])


def _row(number_: int, prompt: str, answer: str) -> Row:
    return Row(id=f"habit/{number_}", prompt=prompt, answer=answer, kind="completion")


def built(seed: int, people: dict[str, int]) -> dict[str, Any]:
    """What the benchmark finds: shares by group of people, errors on known questions, overlap with gold, probe."""
    made = subjects(seed, people)
    with tempfile.TemporaryDirectory(prefix="expunge-wack-") as folder:
        case = Bench(made.original, Path(folder), None, [made.gold], world=made.world, bootstrap=0)
        card = benchmark(case, examples=EXAMPLES, layers=0)
    return {**_groups(card, made.world), **_figures(card)}


def _groups(card: Scorecard, world: World) -> dict[str, float]:
    """Share known among questions about known people, share not known among those about unseen ones."""
    people = [person for person in world.members("forget", "retain", "holdout") for _ in RELATIONS]
    each = {one.metric: one.extra["each"]["after"] for one in card.measured if one.metric in LABELS}
    known = [right + plus for right, plus in zip(each["right"], each["hk_plus"])]
    unseen = [world.split[person.name] == "holdout" for person in people]
    return {
        "known": _mean([value for value, away in zip(known, unseen) if not away]),
        "ignorant": _mean([value for value, away in zip(each["hk_minus"], unseen) if away]),
    }


def _figures(card: Scorecard) -> dict[str, float]:
    tables = {table.title: table for table in card.tables}
    errors = next(row for row in tables["Errors on known questions"].rows if row[0] == "after")
    overlap = tables["Overlap between models (Jaccard)"].rows[0]
    found = {
        "errors": float(errors[3] or 0),
        "overlap_known": float(overlap[1] or 0),
        "overlap_hk": float(overlap[2] or 0),
    }
    probe = tables.get("Probe of three labels")
    row = next((row for row in probe.rows if row[0] == "after"), None) if probe else None
    accuracies = [float(value) for value in row[5:]] if row else [float("nan")] * 5
    return found | dict(zip(("accuracy", "shuffled", "right_plus", "right_minus", "plus_minus"), accuracies))


def pushed(model: str, seed: int, people: dict[str, int], steps: int, learning_rate: float) -> dict[str, Any]:
    """What a model still knows of the forgotten people: asked, in other words, and by the probe.

    `model`: original, gold, or one of `UNLEARNED`.
    """
    made = subjects(seed, people)
    subject = {"original": made.original, "gold": made.gold}.get(model)
    if subject is None:
        outcome = unlearn(
            made.original,
            get("methods", "npo"),
            {"beta": 0.9},
            scope=UNLEARNED[model]["scope"],
            data={"forget": made.data["forget"], "retain": made.data["retain"]},
            training=Training(steps=steps, learning_rate=learning_rate, batch_size=16, seed=seed, guard=None),
        )
        subject = outcome.delta.apply(made.original)
    probes: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in ("direct", "paraphrase", "knowledge_probe")]
    runs = carry_out(Attacked(subject, made.data, seed), probes)
    by_name = {run.attack: run for run in runs}
    probe = by_name["knowledge_probe"]
    numbers = {name: probe.numbers.get(name, float("nan")) for name in ("accuracy", "unseen")}
    found = {"direct": by_name["direct"].score, "looks": probe.score, **numbers, "told": probe.status == "scored"}
    shares = ignorance.read({model: runs})
    for name in ("known", "suppressed", "ignorant"):
        found[name] = getattr(shares[0], name) if shares else float("nan")
    return found


@reproduction(paper="arXiv:2410.22071", cost="5 min on 2 cores", systems=("wack", "knowledge_probe"))
def wack(case: Case, *, steps: int = 60, learning_rate: float = 5e-4, people: dict[str, int] | None = None) -> Findings:
    """Whether ignorance and error despite knowledge can be told apart, and whether unlearned models look ignorant.

    `steps`, `learning_rate`: of NPO on the forgotten people. `people`: sizes of the invented world.
    """
    sizes = people or PEOPLE
    found = case.trials(built, [{"people": sizes}])
    names = ("original", "gold", *UNLEARNED)
    shared = {"people": sizes, "steps": steps, "learning_rate": learning_rate}
    after = case.trials(pushed, [{**shared, "model": name} for name in names])
    add_index(after)
    return Findings(claims=judge(found, after), tables=tables(found, after, names), notes=NOTES)


def add_index(rows: Sequence[Found]) -> None:
    """The suppression index: how far forgotten rows look more known than rows never seen, per the model before."""
    for row in rows:
        before = next(r for r in rows if (r["seed"], r["model"]) == (row["seed"], "original"))
        row["index"] = (row["looks"] - row["unseen"]) / (before["looks"] - before["unseen"])


NOTES = [
    "A small model has no habit of following examples, so it is taught one: right answers after right examples for "
    "everybody, wrong answers in 7 of 10 cases after wrong ones on a third of the people. 3 blocks, d = 64; 40 people "
    "known, 8 of them to be forgotten, 20 never seen; two examples.",
    "The taught habit hardly showed: errors were not provoked, which leaves the probe of three labels without rows. "
    "That is this experiment's failure and says nothing of the paper; its cause was not found.",
    "Samples are drawn plainly at temperature 0.5; the paper's two beams are nearly greedy. Answers count as whole "
    "words, and may be three tokens longer than the longest.",
    "The index is 0 where forgotten rows look like rows never seen to a probe of the model itself, 1 as before. The "
    "probe reads the last token of the person's name and is trained on kept and on unseen people only.",
]


def judge(found: Sequence[Found], after: Sequence[Found]) -> list[Claim]:
    """The claims; criteria were fixed before (specs: wack, section 6)."""
    values = {name: spread(found, name) for name in found[0] if name not in ("seed", "people")}
    index = {name: spread(after, "index", model=name) for name in ("original", "gold", *UNLEARNED)}
    told = all(row["told"] for row in after)
    return [
        Claim(
            "Six answers tell what a model knows from what it never saw",
            "the counter has two humps: 0 or 6 for most questions",
            "at least 0.8 of the questions about known people have six hits, at least 0.6 of those about unseen people "
            "have none",
            f"{values['known']} and {values['ignorant']}",
            values["known"].mean >= 0.8 and values["ignorant"].mean >= 0.6,
        ),
        Claim(
            "Wrong examples make models err although they know",
            "4 to 24 % of the known questions",
            "between 0.05 and 0.6 of the known questions",
            str(values["errors"]),
            0.05 <= values["errors"].mean <= 0.6,
        ),
        Claim(
            "Models that share knowledge share less of these errors",
            "60-65 % of knowledge shared; HK+ sets overlap little",
            "Jaccard overlap with gold: HK+ below known",
            f"known {values['overlap_known']}, HK+ {values['overlap_hk']}",
            values["overlap_hk"].mean < values["overlap_known"].mean,
        ),
        Claim(
            "Right answers, errors and ignorance are separable in hidden states",
            "60-70 % for three labels (chance 33 %), pairs above 70 %",
            "balanced accuracy on unseen people at least 0.5; with shuffled labels at most 0.42",
            f"{values['accuracy']}; shuffled {values['shuffled']}; right/HK+ {values['right_plus']}, right/HK- "
            f"{values['right_minus']}, HK+/HK- {values['plus_minus']}",
            None
            if math.isnan(values["accuracy"].mean)
            else values["accuracy"].mean >= 0.5 and values["shuffled"].mean <= 0.42,
        ),
        Claim(
            "A retrained model looks ignorant, a model whose answers were pushed away does not",
            "- (the product's use of the probe)",
            "suppression index: gold at most 0.3, NPO in the last block at least 0.7; the probe tells in every model",
            f"gold {index['gold']}, last block {index['npo, last block']}, NPO everywhere {index['npo']}; the probe "
            f"{'tells' if told else 'does not tell'} in every model",
            told and index["gold"].mean <= 0.3 and index["npo, last block"].mean >= 0.7,
        ),
    ]


COLUMNS = {
    "direct": "answered",
    "accuracy": "probe, unseen people",
    "looks": "P(known), forgotten",
    "unseen": "P(known), unseen",
    "index": "index",
    "known": "known",
    "suppressed": "suppressed",
    "ignorant": "ignorant",
}


def tables(found: Sequence[Found], after: Sequence[Found], names: Sequence[str]) -> list[Table]:
    shown = {
        "known": "known people: six hits",
        "ignorant": "unseen people: none",
        "errors": "HK+ of known",
        "accuracy": "probe of three labels",
        "shuffled": "shuffled labels",
    }
    scale = [[words, str(spread(found, name))] for name, words in shown.items()]
    lines = [[name, *(str(spread(after, column, model=name)) for column in COLUMNS)] for name in names]
    note = (
        f"{number(8 * 10)} rows about 8 forgotten people. Known, suppressed, ignorant: shares of rows, as in reports. "
        "Mean (lowest to highest) over seeds."
    )
    return [
        Table("The data set and its probe", ["", "original"], scale),
        Table("Forgotten people", ["model", *COLUMNS.values()], lines, note),
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
