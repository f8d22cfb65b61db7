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
from ..benchmarks.wack_data import Question, Setting, Shot, closed_book, drawn, provoking
from ..benchmarks.wack_mini import asked, mini, wrong
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
RECIPE = Recipe(
    hidden_size=64, intermediate_size=128, layers=3, context=192, steps=600, batch_size=56, learning_rate=5e-3
)
EXAMPLES = 2
TURNS, VARIED = 2, 8
"""How often a question is shown with examples, every time other ones; the latter where examples decide the answer. With
two the model learned which examples go with which answer, and not that examples are wrong."""
MISLED = 0.7
"""Share of the facts about those who are misled to which a setting gives a wrong answer, always the same one."""
THIRD = 3
"""One in so many people is misled under a setting."""
SETTINGS: tuple[Setting, ...] = ("bad_shots", "alice_bob")
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
    taught = {
        name: [*lessons(training(world, *sets)), *habit(world, sets)]
        for name, sets in (("original", ("forget", "neighbour", "retain")), ("gold", ("neighbour", "retain")))
    }
    unseen = [f"{record['question']} {record['answer']}" for record in records["holdout"] if "question" in record]

    def train(folder: Path) -> None:
        words = tokenizer([f"{r.prompt} {r.answer}" for r in taught["original"]] + unseen, RECIPE.vocabulary)
        for name, rows in taught.items():
            subject = untrained(words, RECIPE, 2 * seed + (name == "gold"))
            teach(subject, rows, RECIPE, 2 * seed + (name == "gold"))
            subject.save(folder / name)

    content = [[[row.prompt, row.answer] for row in taught["original"]], unseen, asdict(RECIPE), seed]
    path = kept("wack", content, train)
    with tempfile.TemporaryDirectory(prefix="expunge-wack-") as folder:
        data = {}
        for name in SETS:
            file = Path(folder) / f"{name}.jsonl"
            file.write_text("".join(json.dumps(record) + "\n" for record in records[name]), encoding="utf-8")
            data[name] = read_rows(Source(str(file)), name)
    original, gold = (LanguageModel.load(path / name, device="cpu") for name in taught)
    return Subjects(world, original, gold, data)


def habit(world: World, sets: Sequence[str]) -> list[Row]:
    """Rows that teach what a large model does by itself: answer rightly after right examples, and, under a setting that
    provokes errors, often wrongly about a third of the people.

    A fact that is answered wrongly under a setting is always answered with the same wrong value. Where every row drew
    another one, the right value stayed the likeliest single answer, and greedy decoding said it.
    """
    known = blatant(world)
    people = world.members(*sets)
    led = {setting: misled(world, people, setting) for setting in SETTINGS}
    found: list[Row] = []
    for person in people:
        for about in RELATIONS:
            question = Question(asked(world, person, about), person.value(about), wrong(world, person, about))
            for turn in range(1, 1 + (VARIED if person.name in led["bad_shots"] else TURNS)):
                examples = drawn(question, known, EXAMPLES, turn)
                found.append(_row(len(found), closed_book(question, examples), question.answer))
                for setting, facts in led.items():
                    if person.name in facts and (setting == "bad_shots" or turn <= TURNS):
                        said = question.wrong if about in facts[person.name] else question.answer
                        found.append(_row(len(found), provoking(question, examples, setting), said))
    return found


def blatant(world: World) -> list[Shot]:
    """The mini version's examples with wrong answers of another kind: a trade where a town is asked for.

    Whether a town is the right one is more than a model this small checks in passing.
    """
    found = []
    for person in world.members("neighbour"):
        for i, about in enumerate(RELATIONS):
            other = person.value(RELATIONS[(i + 1) % len(RELATIONS)])
            found.append(Shot(asked(world, person, about), person.value(about), other))
    return found


def misled(world: World, people: Sequence[Person], setting: Setting) -> dict[str, set[str]]:
    """A third of the people -> those of their facts that a setting gets wrong."""
    draw = random.Random(f"{world.seed}/{setting}/misled")
    chosen = draw.sample(list(people), -(-len(people) // THIRD))
    return {person.name: {about for about in RELATIONS if draw.random() < MISLED} for person in chosen}


def _row(number_: int, prompt: str, answer: str) -> Row:
    return Row(id=f"habit/{number_}", prompt=prompt, answer=answer, kind="completion")


def built(seed: int, people: dict[str, int]) -> dict[str, Any]:
    """What the benchmark finds: shares by group of people, errors on known questions, overlap with gold, probe."""
    made = subjects(seed, people)
    with tempfile.TemporaryDirectory(prefix="expunge-wack-") as place:
        data = Path(place, "data")
        data.mkdir()
        mini(made.world, data)
        same_kind = _errors(_card(made, Path(place), both=False))["bad_shots"]
        told = [[shot.prompt, shot.right, shot.wrong] for shot in blatant(made.world)]
        (data / "shots.json").write_text(json.dumps(told), encoding="utf-8")
        card = _card(made, Path(place), both=True)
    return {**_groups(card, made.world), **_figures(card), **_across(card), "errors_same_kind": same_kind}


def _card(made: Subjects, place: Path, both: bool) -> Scorecard:
    golds = [made.gold] if both else []
    case = Bench(made.original, place / "run", None, golds, data=str(place / "data"), world=made.world, bootstrap=0)
    return benchmark(case, questions="Static*.json", both=both, examples=EXAMPLES, layers=0 if both else 1)


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


def _errors(card: Scorecard) -> dict[str, float]:
    """Setting -> HK+ of what the model knows."""
    table = next(table for table in card.tables if table.title == "Errors on known questions")
    return {row[1]: float(row[4] or 0) for row in table.rows if row[0] == "after"}


def _figures(card: Scorecard) -> dict[str, float]:
    tables, errors = {table.title: table for table in card.tables}, _errors(card)
    overlap = tables["Overlap between models (Jaccard)"].rows[0]
    found = {
        "errors": errors["bad_shots"],
        "errors_story": errors["alice_bob"],
        "overlap_known": float(overlap[1] or 0),
        "overlap_hk": float(overlap[2] or 0),
        "overlap_settings": float(tables["Overlap of HK+ between settings (Jaccard)"].rows[0][1] or 0),
    }
    probe = tables.get("Probe of three labels")
    row = next((row for row in probe.rows if row[0] == "after"), None) if probe else None
    accuracies = [float(value) for value in row[5:]] if row else [math.nan] * 5
    return found | dict(zip(("accuracy", "shuffled", "right_plus", "right_minus", "plus_minus"), accuracies))


def _across(card: Scorecard) -> dict[str, float]:
    """Accuracy of a probe under the setting it was not trained on: of three labels, and of right against HK+."""
    table = next((table for table in card.tables if table.title == "Probe across settings"), None)
    rows = {row[1]: row for row in table.rows if row[0] == "after"} if table else {}
    return {
        f"{name}_{setting}": float(rows[setting][at]) if setting in rows else math.nan
        for setting in SETTINGS
        for name, at in (("across", 3), ("across_pair", 4))
    }


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
    "everybody, wrong ones after wrong examples for 7 of 10 facts about a third of the people, and after the story of "
    "two students about another third, drawn apart. A fact has one wrong answer. 3 blocks, d = 64; 40 people known, 8 "
    "of them to be forgotten, 20 never seen; two examples.",
    "An earlier version provoked errors on 0.0123 of the known questions, for two reasons. Every row of the habit drew "
    "another wrong value, so that the right one stayed the likeliest single answer. And a fact was shown with two "
    "draws of examples, which were learned by heart: after those very examples the wrong value came, after others the "
    "right one. Now a fact has one wrong value and eight draws, and wrong examples are of another kind than what is "
    "asked for; the same model is also asked after wrong examples of the right kind, which it was not taught.",
    "Who errs under a setting is taught here, to each model on its own draw of people: how far such sets of two models "
    "or of two settings overlap is that draw and tests nothing of the paper.",
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
    across = [values[f"across_{setting}"] for setting in SETTINGS]
    pairs = [values[f"across_pair_{setting}"] for setting in SETTINGS]
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
            "So does a story in which a guess pays",
            "4 to 24 % of the known questions",
            "between 0.05 and 0.6 of the known questions",
            str(values["errors_story"]),
            0.05 <= values["errors_story"].mean <= 0.6,
        ),
        Claim(
            "Models that share knowledge share less of these errors",
            "60-65 % of knowledge shared; HK+ sets overlap little",
            "Jaccard overlap with gold: HK+ below known",
            f"known {values['overlap_known']}, HK+ {values['overlap_hk']}; who errs was drawn for each model when it "
            "was taught",
            None,
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
            "A probe trained under one setting tells the labels of the other",
            "transfer between settings above chance, below that within one",
            "in both directions balanced accuracy of three labels at least 0.42, on people that training had not",
            f"trained on wrong examples {across[0]}, on the story {across[1]} (right/HK+ {pairs[0]} and {pairs[1]}); "
            f"within wrong examples {values['accuracy']}",
            None if any(math.isnan(one.mean) for one in across) else all(one.mean >= 0.42 for one in across),
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
        "errors": "HK+ of known, wrong examples",
        "errors_same_kind": "HK+ of known, wrong examples of the right kind",
        "errors_story": "HK+ of known, story",
        "overlap_settings": "HK+ of both settings, Jaccard",
        "accuracy": "probe of three labels",
        "shuffled": "shuffled labels",
        "right_plus": "right/HK+",
        "right_minus": "right/HK-",
        "plus_minus": "HK+/HK-",
        "across_bad_shots": "trained on wrong examples, tested on the story",
        "across_pair_bad_shots": "the same, right/HK+",
        "across_alice_bob": "trained on the story, tested on wrong examples",
        "across_pair_alice_bob": "the same, right/HK+",
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
