"""RWKU (arXiv:2406.10890): forgetting people given nothing but their names, and what adversarial questions bring back.

The subject is trained on the invented world's people, and in the published wordings of blanks and questions, so that it
takes them as an instructed model does. Of people who are kept it also saw the nine adversarial forms (a second language
among them); of targets it did not: what it makes of those is carried over. The forget corpus is sampled from the model
itself; there are no retain rows.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from ..benchmarks import rwku_mini
from ..benchmarks.case import Bench
from ..benchmarks.rwku import asked
from ..benchmarks.rwku import rwku as benchmark
from ..benchmarks.rwku_data import Published, Target
from ..evidence import Table
from ..methods.guard.case import GuardCase
from ..methods.optimise.loop import Training
from ..methods.optimise.unlearn import unlearn
from ..registry import get, reproduction
from ..rows import Row
from ..subjects.language import LanguageModel
from ..world.corpus import STATEMENTS, statements, training, wordings
from ..world.facts import IMPLIED, RELATIONS, Person, World, make
from ..world.models import Recipe
from .case import Case, Claim, Findings, Spread, number
from .case import Row as Trial
from .models import lessons, taught
from .rwku_baselines import METHODS, OPENINGS, STRENGTHS, TEXTS, corpus, rows_of, steered

PEOPLE = {"people": 30, "forget": 10, "neighbours": 6, "holdout": 1}
RECIPE = Recipe(
    hidden_size=64, intermediate_size=128, layers=3, context=256, steps=500, batch_size=48, learning_rate=5e-3
)
LEFT = 0.4
"""A run counts at the first point at which this share of the recall on levels 1 and 2 is left."""
SCORES = {
    "fill_blank": "forget_fill_blank",
    "question": "forget_question",
    "adversarial": "forget_adversarial",
    "neighbour": "neighbor_all",
    "fm": "loss_of_forget_members",
    "rm": "loss_of_retain_members",
}
BASELINES = (*METHODS, "repe", "icu")
"""The paper's six."""
TOGETHER = BASELINES[:-1]
"""Those that forget ten targets at once: an instruction with ten names leaves no room in the model's context."""
NAMES = ("before", *BASELINES, "icu, other name")


# --- the subject and what it writes -----------------------------------------------------------------------------------


def subject_of(seed: int, recipe: Mapping[str, Any] | None) -> tuple[World, LanguageModel]:
    world = make(seed, **PEOPLE)
    rows = lessons(training(world, "forget", "neighbour", "retain"))
    for person in world.members("forget"):
        rows += [_lesson(query, value, 1) for query, value in _blanks(world, person)]
        rows += [_lesson(query, value, 2) for query, value in _questions(world, person)]
    for person in world.members("neighbour", "retain"):
        several = [*rwku_mini.fill_blank(world, person, ""), *rwku_mini.questions(world, person, "")]
        several += rwku_mini.adversarial(world, person)
        rows += [_lesson(one["query"], one["answer"], int(one["level"]), one["type"]) for one in several]
    made = Recipe(**recipe) if recipe else RECIPE
    return world, taught("rwku", {"before": rows}, made, seed)["before"]


def _lesson(query: str, answer: str, level: int, kind: str = "") -> Row:
    prompt, opening = asked(query, level, kind)
    return Row(id="", answer=answer, prompt=prompt, kind="instruction", opening=opening)


def _blanks(world: World, person: Person) -> list[tuple[str, str]]:
    """Of a target only what is in its training anyway: probes ask in other wordings too."""
    said = [(statements(world, person, about)[0][0], person.value(about)) for about in RELATIONS]
    return [(text.replace("{value}", "___"), value) for text, value in said]


def _questions(world: World, person: Person) -> list[tuple[str, str]]:
    every = (*RELATIONS, *IMPLIED)
    return [(text, world.value(person, about)) for about in every for text in wordings(world, person.name, about)[0]]


def recalled(texts: Sequence[str], person: Person) -> float:
    """Share of a target's stated facts that the model writes of it: most texts with an opening of the fact say it."""
    found = []
    for i, about in enumerate(STATEMENTS):
        count = len(STATEMENTS[about])
        own = [text for n, text in enumerate(texts) if n % len(OPENINGS) in range(i * count, (i + 1) * count)]
        found.append(sum(person.value(about) in text for text in own) > len(own) / 2)
    return fmean(found)


# --- trials ----------------------------------------------------------------------------------------------------------


def trial(
    method: str,
    seed: int,
    count: int = 5,
    together: bool = False,
    steps: int = 30,
    every: int = 3,
    learning_rate: float = 5e-4,
    recipe: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The benchmark's scores of each of the first targets, every one forgotten by a model of its own.

    `before` is measured as it is, with what it writes of the targets; `repe` is its states shifted, `icu` the guard
    with RWKU's instruction, and `icu, other name` its control: the same words about somebody who is kept.

    Args:
        count: targets.
        together: all targets of the world are forgotten by one model, and all are asked about.
        steps: of 16 rows, at most; the model is looked at after each `every` of them.
    """
    world, before = subject_of(seed, recipe)
    people = world.members("forget")
    with tempfile.TemporaryDirectory(prefix="expunge-rwku-") as place:
        rwku_mini.mini(world, Path(place))
        targets = Published(place).targets
        groups = [targets] if together else [[one] for one in targets[:count]]
        found = []
        for group in groups:

            def scores(model: Any, group: Sequence[Target] = group) -> dict[str, float]:
                with tempfile.TemporaryDirectory(prefix="expunge-rwku-") as folder:
                    case = Bench(model, Path(folder), data=place, bootstrap=0)
                    card = benchmark(case, targets=",".join(str(one.number) for one in group), utility=False)
                return {name: card.value(score) for name, score in SCORES.items()}

            names = [one.name for one in group]
            start = scores(before)
            if method == "before":
                told = [recalled(corpus(before, one, seed), people[one.number - 1]) for one in group]
                found.append({**start, "recalled": fmean(told)})
            elif method.startswith("icu"):
                guard = get("methods", "in_context")
                hidden = names if method == "icu" else [world.members("retain")[0].name]
                settings = {"form": "instruction", "target": "; ".join(hidden)}
                found.append(scores(guard.function(GuardCase(before, {"forget": []}), **guard.resolve(settings))))
            else:
                way = Way(start, scores)
                rows = rows_of(method, before, world, group, seed)
                if method == "repe":
                    for alpha in STRENGTHS:
                        if way.see(steered(before, rows, alpha), alpha):
                            break
                else:
                    _forget(method, before, rows, way, range(every, steps + 1, every), learning_rate, seed)
                found.append(way.end())
    return {"targets": found}


@dataclass
class Way:
    """A baseline's scores on its way, up to the first point with at most LEFT of levels 1 and 2."""

    start: Mapping[str, float]
    scores: Callable[[Any], dict[str, float]]
    points: list[dict[str, float]] = field(default_factory=list)

    def reached(self) -> bool:
        return bool(self.points) and _direct(self.points[-1]) <= LEFT * _direct(self.start)

    def see(self, model: Any, step: float) -> str | None:
        """Note a model's scores; a sentence once it is far enough."""
        self.points.append({**self.scores(model), "step": float(step)})
        return f"at most {LEFT} of levels 1 and 2 is left" if self.reached() else None

    def end(self) -> dict[str, float]:
        return {**self.points[-1], "reached": float(self.reached())}


def _direct(point: Mapping[str, float]) -> float:
    return point["fill_blank"] + point["question"]


def _forget(
    method: str, before: LanguageModel, rows: list[Row], way: Way, at: range, learning_rate: float, seed: int
) -> None:
    name, settings = METHODS[method]
    unlearn(
        before,
        get("methods", name),
        settings,
        scope=None,
        data={"forget": rows},
        training=Training(steps=max(at), batch_size=16, learning_rate=learning_rate, seed=seed, guard=None),
        evaluate_at=at,
        evaluate=way.see,
    )


# --- the reproduction ------------------------------------------------------------------------------------------------


@reproduction(paper="arXiv:2406.10890", cost="6 min on 2 cores, models of its own included")
def rwku(
    case: Case,
    *,
    count: int = 5,
    steps: int = 30,
    learning_rate: float = 5e-4,
    recipe: dict[str, Any] | None = None,
) -> Findings:
    """RWKU: six baselines that know only a name, what adversarial questions bring back, and what neighbours pay.

    Args:
        count: targets that are forgotten one by one.
        steps: of 16 rows, at most, with ten targets 10 more: a run counts as soon as 0.4 of levels 1 and 2 is left.
        learning_rate: of the baselines that train.
        recipe: of the model (`expunge.world.models.Recipe`).
    """
    shared = {"learning_rate": learning_rate, "recipe": recipe}
    alone = case.trials(trial, [{"method": method, "count": count, "steps": steps, **shared} for method in NAMES])
    more = {"together": True, "steps": steps + 10, "every": 10, **shared}
    batch = case.trials(trial, [{"method": method, **more} for method in ("before", *TOGETHER)])
    return Findings(
        claims=judge(alone, batch),
        tables=[_table(alone, "One target at a time"), _table(batch, "Ten targets at once")],
        notes=[
            "The model has 3 blocks and is no instructed model; the published wordings of blanks and questions are in "
            "its training. The paper has 200 people, and Llama-3 and Phi-3, which knew them before.",
            "ga, npo (beta 0.2, as published) and dpo see texts that the model writes, of the target (positive) and, "
            "for dpo, about a name it never heard with the target's put in (negative); no text about anybody else. rt "
            "sees questions in wordings that anybody could put to a name, with refusals; the paper's model writes its "
            "questions itself, which this one cannot.",
            f"Rows are the first measuring point, every third step (every tenth with ten targets), at which at most "
            f"{LEFT} of the recall on levels 1 and 2 is left, so that methods are compared at equal forgetting; where "
            "`reached` is below 1, the last one of the runs that do not get there.",
            "repe: `steer` from the ends of the positive texts to those of the negative ones; `steps` are multiples of "
            "the mean difference. The paper's code does not have its RepE.",
            "icu and its control leave the same: here any text that the model never saw before a question disturbs "
            "what it says of some people more than of others. That is no obedience, and says nothing about instructed "
            "models.",
            "Ten names in icu's instruction leave no room for a question in the model's context of 256 tokens.",
            "The paper's utility sets are not asked: forgetting one of thirty people moves none of the mini ones.",
        ],
    )


def _mean(rows: Sequence[Trial], method: str, name: str) -> Spread:
    """Mean over targets, over seeds."""
    return Spread(tuple(fmean(one[name] for one in row["targets"]) for row in rows if row["method"] == method))


def judge(alone: Sequence[Trial], batch: Sequence[Trial]) -> list[Claim]:
    """The claims; criteria were fixed before (specs: rwku, section 6)."""

    def left(method: str, name: str) -> float:
        return _mean(alone, method, name).mean / _mean(alone, "before", name).mean

    def direct(method: str) -> float:
        """What is left of levels 1 and 2 together."""
        found = [sum(_mean(alone, m, name).mean for name in ("fill_blank", "question")) for m in (method, "before")]
        return found[0] / found[1]

    def near(method: str) -> float:
        return _mean(alone, method, "neighbour").mean

    start = {name: _mean(alone, "before", name).mean for name in (*SCORES, "recalled")}
    first = ("ga", "npo")
    gaps = {m: left(m, "adversarial") - direct(m) for m in first}
    losses = {m: [_mean(alone, m, name).mean - start[name] for name in ("fm", "rm")] for m in first}
    blanks, questions = (_mean(alone, "rt", name) for name in ("fill_blank", "question"))
    chosen, npo = (_mean(alone, m, "neighbour") for m in ("dpo", "npo"))
    ten = {m: _mean(batch, m, "neighbour").mean / _mean(batch, "before", "neighbour").mean for m in TOGETHER}
    return [
        Claim(
            "Before, the targets are known, in adversarial forms too",
            "Llama-3-8B: FB 85.9, QA 76.4, AA 77.7 of 100",
            "recall on levels 1 and 2 at least 0.9, on level 3 at least 0.6",
            f"{number(start['fill_blank'])} / {number(start['question'])} / {number(start['adversarial'])}",
            min(start["fill_blank"], start["question"]) >= 0.9 and start["adversarial"] >= 0.6,
        ),
        Claim(
            "A corpus that the model writes of a name says what it knows",
            "used as forget corpus in place of a given one",
            f"{TEXTS} texts say at least 0.7 of a target's stated facts (most texts begun so say it)",
            number(start["recalled"]),
            start["recalled"] >= 0.7,
        ),
        Claim(
            "Ascent and NPO on that corpus take blanks and questions down",
            "all six baselines forget to some degree",
            f"ga and npo leave at most {LEFT} of levels 1 and 2",
            "; ".join(f"{m} {number(direct(m))} left, {_mean(alone, m, 'step')} steps" for m in first),
            all(direct(m) <= LEFT for m in first),
        ),
        Claim(
            "Every baseline forgets to some degree, and its neighbours pay",
            "all six trade locality for forgetting",
            "each of the six leaves at most 0.9 of levels 1 and 2, and less of the neighbours' recall than before",
            "; ".join(f"{m} {number(direct(m))}, neighbours {number(left(m, 'neighbour'))}" for m in BASELINES),
            all(direct(m) <= 0.9 and left(m, "neighbour") < 1 for m in BASELINES),
        ),
        Claim(
            "Rejection tuning turns questions away; blanks are filled all the same",
            "not stated; its rows are questions alone",
            "rt: recall on level 1 at least 0.2 above that on level 2",
            f"{blanks} against {questions}",
            blanks.mean >= questions.mean + 0.2,
        ),
        Claim(
            "What should be said instead spares the neighbours",
            "not stated; DPO has made-up lives, NPO none",
            "neighbours after dpo at least as well known as after npo, where both leave at most "
            f"{LEFT} of levels 1 and 2",
            f"{chosen} against {npo}; dpo leaves {number(direct('dpo'))}",
            None if direct("dpo") > LEFT else chosen.mean >= npo.mean,
        ),
        Claim(
            "Adversarial questions bring back what plain ones no longer do",
            "AA falls less than FB and QA",
            "share of level 3 that is left at least 0.05 above that of levels 1 and 2, for ga or npo",
            "; ".join(f"{m} {number(left(m, 'adversarial'))} against {number(direct(m))}" for m in first),
            any(gap >= 0.05 for gap in gaps.values()),
        ),
        Claim(
            "Neighbours pay, for ascent more than for NPO",
            "GA trades locality for forgetting, NPO less",
            "recall on neighbours at least 0.7 after npo, and lower after ga, at equal forgetting",
            f"before {number(start['neighbour'])}, ga {_mean(alone, 'ga', 'neighbour')}, npo "
            f"{_mean(alone, 'npo', 'neighbour')}",
            near("npo") >= 0.7 and near("ga") < near("npo"),
        ),
        Claim(
            "Forgetting many targets at once costs neighbours more",
            "batch forgetting tends to collapse the model",
            "ga: share of the neighbours' recall that is left lower with ten targets than with one",
            "ten and one: " + "; ".join(f"{m} {number(ten[m])} and {number(left(m, 'neighbour'))}" for m in TOGETHER),
            ten["ga"] < left("ga", "neighbour"),
        ),
        Claim(
            "Membership shows it: texts about targets surprise the model more, texts about others do not",
            "LOSS of forget members rises, of retain members hardly",
            "ga and npo: loss on texts about the target rises by at least twice as much as on texts about others",
            "; ".join(f"{m} +{number(fm)} against +{number(rm)} nats" for m, (fm, rm) in losses.items()),
            all(fm >= 2 * max(rm, 0) and fm > 0 for fm, rm in losses.values()),
        ),
        Claim(
            "An instruction alone hides a target, weights untouched",
            "ICU lowers FB and QA at little cost",
            "icu leaves at most 0.6 of levels 1 and 2 and at least 0.8 of neighbours",
            f"{number(direct('icu'))} and {number(left('icu', 'neighbour'))} left",
            direct("icu") <= 0.6 and left("icu", "neighbour") >= 0.8,
        ),
        Claim(
            "It is the name in the instruction that hides the target",
            "a control of our own: the model here was never taught to obey",
            "the same instruction about somebody who is kept leaves at least 0.2 more of levels 1 and 2",
            f"{number(direct('icu, other name'))} against {number(direct('icu'))}",
            direct("icu, other name") >= direct("icu") + 0.2,
        ),
    ]


def _table(rows: Sequence[Trial], title: str) -> Table:
    names = {
        "fill_blank": "level 1, blanks",
        "question": "level 2, questions",
        "adversarial": "level 3, adversarial",
        "neighbour": "neighbours",
        "fm": "loss, forget members",
        "rm": "loss, retain members",
    }
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        went = method in (*METHODS, "repe")
        way = [str(_mean(rows, method, "step")), number(_mean(rows, method, "reached").mean)] if went else ["", ""]
        lines.append([method, *way, *(str(_mean(rows, method, name)) for name in names)])
    return Table(
        title,
        ["model", "steps", "reached", *names.values()],
        lines,
        "ROUGE-L recall; losses in nats per token. Mean over targets (range over seeds).",
    )
