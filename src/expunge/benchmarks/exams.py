"""What a model can do beside what it should forget: exams of a few abilities, each one ask and a mark for every row.

A benchmark that publishes utility questions makes exams of them; a folder of files is a set of exams (`read`); `mini`
writes such a folder about the invented world, for where lm-evaluation-harness and its data are not at hand.
"""

from __future__ import annotations

import json
import random
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RowError
from ..evidence import Measured
from ..metrics.texts import text_entropy
from ..rows import SUFFIXES, Row, Source, records, shown
from ..tables.generations import Generations
from ..tables.passes import Ask, Generate, Score
from ..tables.scores import Scores
from ..world import corpus
from ..world.facts import World
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


def fluency(rows: Sequence[Row], *, max_new_tokens: int, ability: str = "fluency") -> Exam:
    """Weighted 2- and 3-gram entropy of what is written, in bits: low where a model repeats itself."""
    return written(
        ability,
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


# --- exams in files --------------------------------------------------------------------------------------------------


def read(folder: str | Path, *, limit: int = 0, seed: int = 0, max_new_tokens: int = 30) -> list[Exam]:
    """An exam for every `<ability>.jsonl` (or .json, .csv, .parquet) of a folder.

    Multiple choice where rows have `choices` (with `question` and `answer`, a place or letter, and perhaps a
    `statement` that the right choice completes); written answers where they have `answers` or `answer`, marked by F1
    and, as `<ability>_exact`, by exact match; fluency where they have an `instruction`. `entity` is the unit of
    intervals, where a row has one.

    Args:
        limit: rows of an exam; where there are more, the seed draws; 0 takes all.

    Raises:
        RowError: no folder, no files, a row that is none of these or not what the file's first row is.
    """
    folder = Path(folder)
    paths = sorted(path for path in folder.glob("*") if path.suffix in SUFFIXES) if folder.is_dir() else []
    if not paths:
        raise RowError(f"{folder} holds no exams; expected a folder with files such as factuality.jsonl")
    return [exam for path in paths for exam in _exams(path, limit, seed, max_new_tokens)]


def _exams(path: Path, limit: int, seed: int, max_new_tokens: int) -> list[Exam]:
    ability = path.stem

    def drawn(several: list[Any]) -> list[Any]:
        return random.Random(seed).sample(several, limit) if limit and len(several) > limit else several

    rows = list(records(Source(str(path))))
    first = rows[0][1] if rows else {}
    if "choices" in first:
        return [_offer(ability, drawn(choices.read(Source(str(path)), ability, options=None)))]
    kind = next((name for name in ("instruction", "question") if name in first), None)
    if kind is None:
        raise RowError(
            f"{path}: found {'the fields ' + ', '.join(map(str, first)) if rows else '0 rows'}; expected question with "
            "choices or answers, or instruction"
        )
    numbered = drawn(list(enumerate(rows, start=1)))
    made = [
        Row(
            f"{ability}/{number}",
            "",
            _field(where, record, kind),
            kind="qa" if kind == "question" else "instruction",
            entity=str(record.get("entity") or ""),
            source=where,
        )
        for number, (where, record) in numbered
    ]
    if kind == "instruction":
        return [fluency(made, max_new_tokens=2 * max_new_tokens, ability=ability)]
    wanted = [_answers(where, record) for _, (where, record) in numbered]
    return [
        written(
            ability,
            made,
            lambda i, text: f1(text, wanted[i]),
            f"Words in common with the right answer to {ability} questions (F1).",
            max_new_tokens=max_new_tokens,
        ),
        written(
            f"{ability}_exact",
            made,
            lambda i, text: exact_match(text, wanted[i]),
            f"Share of {ability} questions that are answered exactly.",
            max_new_tokens=max_new_tokens,
        ),
    ]


def _offer(ability: str, questions: Sequence[choices.Question]) -> Exam:
    """Multiple choice without letters, so that a model needs no format for it: the likeliest option, byte by byte."""

    def grade(table: Scores) -> Marks:
        return choices.marks(questions, table, per_byte=True).right.tolist()

    return Exam(
        ability,
        [Row(one.id, one.choices[one.answer], source=one.source) for one in questions],
        choices.cloze(questions, statements=all(one.statement for one in questions)),
        grade,
        f"Share of {ability} questions whose right option the model finds likeliest, byte by byte.",
    )


def _field(where: str, record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"{where}: field {name!r} holds {shown(value)}, expected text")
    return value


def _answers(where: str, record: Mapping[str, Any]) -> list[str]:
    value = record.get("answers", record.get("answer"))
    several = value if isinstance(value, list | tuple) else [value]
    if not several or not all(isinstance(one, str) and one.strip() for one in several):
        raise RowError(f"{where}: field 'answers' holds {shown(value)}, expected a text or a list of texts")
    return list(several)


# --- the invented world ----------------------------------------------------------------------------------------------


def mini(world: World, folder: Path) -> None:
    """Five abilities on what every model of the world was taught: places, and people whom nobody wants forgotten.

    `general` (places) and `truthfulness` (statements in wordings never trained on) are multiple choice, `reason` takes
    two steps, `factuality` asks in other words, `fluency` is what follows the beginnings of sentences.
    """
    people = [record for person in world.members("retain") for record in corpus.questions(world, person)]
    stated = [record for record in people if record["task"] == "qa"]
    begun = [record for record in people if record["task"] == "cloze"]
    files: dict[str, list[dict[str, Any]]] = {
        "general": [_offered(record, record["question"]) for record in corpus.general(world)],
        "reason": [_asked(record, record["question"]) for record in people if record["task"] == "multi_hop"],
        "truthfulness": [
            _offered(record, said, end=".") | {"statement": said}
            for record in begun
            for said in record["paraphrased_questions"][:1]
        ],
        "factuality": [_asked(record, record["paraphrased_questions"][0]) for record in stated],
        "fluency": [{"instruction": record["prompt"], "entity": record["entity"]} for record in begun],
    }
    for name, lines in files.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def _asked(record: corpus.Record, question: str) -> dict[str, Any]:
    return {"question": question, "answers": [record["answer"]], "entity": record["entity"]}


def _offered(record: corpus.Record, question: str, end: str = "") -> dict[str, Any]:
    """The right answer among the wrong ones, at a place that follows from the question."""
    options = [record["value"] + end, *record["perturbed_answers"]]
    order = random.Random(question).sample(range(len(options)), len(options))
    return {
        "question": question,
        "choices": [options[i] for i in order],
        "answer": order.index(0),
        "entity": record["entity"],
    }
