"""What a model can do beside what it should forget: exams of a few abilities, each one ask and a mark for every row.

A benchmark that publishes utility questions makes exams of them; `world_exams` makes them of the invented world, where
lm-evaluation-harness and its data are not at hand.
"""

from __future__ import annotations

import random
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..evidence import Measured
from ..metrics.ngram_entropy import text_entropy
from ..rows import Row
from ..tables.generations import Generations
from ..tables.passes import Ask, Generate, Score
from ..tables.scores import Scores
from ..world import corpus
from ..world.facts import IMPLIED, RELATIONS, World
from . import choices
from .case import Bench

Marks = Sequence[float]
"""One number per row."""


@dataclass(frozen=True)
class Exam:
    """One ability."""

    ability: str
    rows: Sequence[Row]
    ask: Ask
    grade: Callable[[Any], Marks]
    """The ask's answer -> (rows,)"""
    sentence: str


def take(bench: Bench, exams: Sequence[Exam]) -> list[Measured]:
    """`utility_<ability>` of every model: the mean mark, with intervals over entities."""
    marked: dict[str, dict[str, Marks]] = {}
    for role in bench.models:
        answers = bench.ask(role, [exam.ask for exam in exams])
        for exam, answer in zip(exams, answers):
            marked.setdefault(exam.ability, {})[role] = exam.grade(answer)
    return [
        bench.score(
            f"utility_{exam.ability}",
            exam.ability,
            marked[exam.ability],
            exam.rows,
            direction="higher",
            ideal="the value before",
            sentence=exam.sentence,
        )
        for exam in exams
    ]


# --- kinds of exam ---------------------------------------------------------------------------------------------------


def choice(
    ability: str, rows: Sequence[Row], options: Sequence[Sequence[str]], right: Sequence[int], sentence: str
) -> Exam:
    """Multiple choice: 1 where the right option has the highest summed log-probability; what closes it counts not."""
    items = tuple(
        ((row.id, f"option {i}"), row, text, None) for row, texts in zip(rows, options) for i, text in enumerate(texts)
    )
    wanted = list(right)

    def grade(table: Scores) -> Marks:
        return (_marks(rows, options, table).picked == wanted).astype(float).tolist()

    return Exam(ability, rows, Score(items), grade, sentence)


def _marks(rows: Sequence[Row], options: Sequence[Sequence[str]], table: Scores) -> choices.Marks:
    asked = [choices.Question(row.id, row.prompt, tuple(texts), 0) for row, texts in zip(rows, options)]
    return choices.marks(asked, table)


def shares(
    ability: str, rows: Sequence[Row], options: Sequence[Sequence[str]], labels: Sequence[Sequence[int]], sentence: str
) -> Exam:
    """Multiple choice with several right options (label 1): their share of the probability of all."""
    best = choice(ability, rows, options, [list(several).index(1) for several in labels], sentence)

    def grade(table: Scores) -> Marks:
        found = _marks(rows, options, table).distribution
        return [float(found[i, : len(several)] @ np.array(several)) for i, several in enumerate(labels)]

    return replace(best, grade=grade)


def written(
    ability: str,
    rows: Sequence[Row],
    mark: Callable[[int, str], float],
    sentence: str,
    *,
    max_new_tokens: int,
) -> Exam:
    """Greedy answers.

    Args:
        mark: (place of the row, output) -> its mark.
    """

    def grade(answers: Generations) -> Marks:
        return [mark(i, texts[0]) for i, texts in enumerate(answers.texts)]

    prompts = tuple(((row.id, ability), row, None) for row in rows)
    return Exam(ability, rows, Generate(prompts, max_new_tokens), grade, sentence)


def fluency(rows: Sequence[Row], *, max_new_tokens: int) -> Exam:
    """Weighted 2- and 3-gram entropy of what is written, in bits: low where a model repeats itself."""
    return written(
        "fluency",
        rows,
        lambda _, text: text_entropy(text),
        "How varied what the model writes is, in bits; a broken model repeats itself.",
        max_new_tokens=max_new_tokens,
    )


# --- marks of written answers ----------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    """Lower case, without punctuation and articles (SQuAD, TriviaQA)."""
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def exact_match(text: str, answers: Sequence[str]) -> float:
    """1 where the output has the same words as one of the answers."""
    return float(any(words(text) == words(answer) for answer in answers))


def f1(text: str, answers: Sequence[str]) -> float:
    """The best F1 of the output's words against those of one of the answers."""

    def one(answer: str) -> float:
        wanted, said = Counter(words(answer)), Counter(words(text))
        if not wanted or not said:
            return float(wanted == said)
        return 2 * (wanted & said).total() / (wanted.total() + said.total())

    return max(map(one, answers))


# --- the invented world ----------------------------------------------------------------------------------------------


def world_exams(world: World, *, limit: int = 40, seed: int = 0, max_new_tokens: int = 16) -> list[Exam]:
    """Five abilities on what every model of the world was taught: places, and people whom nobody wants forgotten.

    Args:
        limit: rows of an exam; where there are more, the seed draws.
    """

    def drawn(rows: list[Row]) -> list[Row]:
        return random.Random(seed).sample(rows, limit) if len(rows) > limit else rows

    people = [_row(record) for person in world.members("retain") for record in corpus.questions(world, person)]
    places = drawn([_row(record) for record in corpus.general(world)])
    chains = drawn([row for row in people if row.relation in IMPLIED])
    stated = drawn([row for row in people if row.task == "qa" and row.relation in RELATIONS])
    begun = drawn([row for row in people if row.task == "cloze"])

    def options(rows: Sequence[Row]) -> list[tuple[str, ...]]:
        return [(row.answer, *row.perturbed_answers) for row in rows]

    reworded = [replace(row, prompt=row.paraphrased_prompts[0]) for row in stated]
    sentences = [replace(row, prompt=row.paraphrased_prompts[0]) for row in begun]
    texts = [Row(f"{row.id}/text", "", row.prompt, kind="completion", entity=row.entity) for row in begun]
    return [
        choice(
            "general",
            places,
            options(places),
            [0] * len(places),
            "Share of questions about places whose right answer the model finds likeliest among six.",
        ),
        written(
            "reason",
            chains,
            lambda i, text: exact_match(text, [chains[i].answer]),
            "Share of questions that take two steps which are answered exactly.",
            max_new_tokens=max_new_tokens,
        ),
        choice(
            "truthfulness",
            sentences,
            options(sentences),
            [0] * len(sentences),
            "Share of sentences, in wordings never trained on, whose true end the model finds likeliest among six.",
        ),
        written(
            "factuality",
            reworded,
            lambda i, text: f1(text, [reworded[i].answer]),
            "Words in common with the right answer when retained facts are asked in other words (F1).",
            max_new_tokens=max_new_tokens,
        ),
        fluency(texts, max_new_tokens=2 * max_new_tokens),
    ]


def _row(record: corpus.Record) -> Row:
    closed = "question" not in record
    return Row(
        id=record["id"],
        prompt=record["prompt" if closed else "question"],
        answer=record["completion" if closed else "answer"],
        kind="completion" if closed else "qa",
        entity=record["entity"],
        perturbed_answers=tuple(record["perturbed_answers"]),
        paraphrased_prompts=tuple(record["paraphrased_questions"]),
        relation=record["relation"],
        task=record["task"],
    )
