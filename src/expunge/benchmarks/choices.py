"""Multiple choice as lm-evaluation-harness scores it, and the same questions without letters.

Letters (the harness's WMDP and MMLU tasks): the question, its options A to D and "Answer:" are the prompt,

    s_X = log p(" X" | prompt), summed over the tokens of " X";  prediction = first argmax

where prompt and letter are tokenised together. Options share their prompt, so a question costs one forward pass. Under
a chat template the description is the system message and the letter follows the template without a space, as in the
harness.

Cloze: the question alone is asked in the model's own template and every option's text is scored, per byte (the
harness's `acc_bytes`). A model that lost only the format of lettered options keeps its cloze accuracy.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from ..errors import ParameterError, RowError, TableError, suggest
from ..rows import Row, Source, records, shown
from ..tables.passes import Score
from ..tables.scores import Scores

DESCRIPTION = "The following are multiple choice questions (with answers) about {topic}.\n\n"
LETTERS = string.ascii_uppercase


@dataclass(frozen=True)
class Question:
    """A question with options, one of which is right."""

    id: str
    question: str
    choices: tuple[str, ...]
    answer: int
    """Place of the right option."""
    topic: str = ""
    """What the description says the questions are about."""
    source: str = ""
    """file:row, for error messages."""
    rephrased: str = ""
    """The question in other words, where the data has it."""
    statement: str = ""
    """The beginning of a sentence that the right option completes, where the data has it."""

    @property
    def rotated(self) -> Question:
        """The same question with its options one place further on, the last one first."""
        count = len(self.choices)
        return replace(self, choices=(self.choices[-1], *self.choices[:-1]), answer=(self.answer + 1) % count)


def read(source: Source, name: str, *, topic: str = "", options: int | None = 4) -> list[Question]:
    """Questions in the form of `cais/wmdp` and `cais/mmlu`: question, choices, answer (a place, or its letter).

    Also read where present: `id`, `subject` (the topic, unless one is given), `rephrased_question`, `statement`.

    Args:
        name: of the set; questions without an id are called `name/1`, `name/2` ...
        options: how many every question must have; None takes any number of two or more.

    Raises:
        RowError: the source cannot be read, or a row is not such a question; names file, row and field.
    """
    found: list[Question] = []
    first: dict[str, str] = {}
    for where, record in records(source):
        for field in ("question", "choices", "answer"):
            if field not in record:
                raise RowError(f"{where}: field {field!r} is missing. {suggest(field, map(str, record))}")
        choices = _choices(where, record["choices"], options)
        made = Question(
            str(record.get("id") or f"{name}/{len(found) + 1}"),
            _text(where, "question", record["question"]),
            choices,
            _answer(where, record["answer"], len(choices)),
            topic or str(record.get("subject") or "").replace("_", " "),
            where,
            str(record.get("rephrased_question") or ""),
            str(record.get("statement") or "").rstrip(),
        )
        if made.id in first:
            raise RowError(f"{where}: id {made.id!r} was used in {first[made.id]} already; ids must be unique")
        first[made.id] = where
        found.append(made)
    if not found:
        raise RowError(f"{source.path}: 0 questions, expected at least 1")
    return found


def _text(where: str, field: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"{where}: field {field!r} holds {shown(value)}, expected text")
    return value


def _choices(where: str, value: Any, options: int | None) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise RowError(f"{where}: field 'choices' holds {type(value).__name__}, expected a list of texts")
    if len(value) != (options or len(value)) or not 2 <= len(value) <= len(LETTERS):
        raise RowError(f"{where}: field 'choices' has {len(value)} options, expected {options or '2 to 26'}")
    return tuple(_text(where, f"choices[{i}]", option) for i, option in enumerate(value))


def _answer(where: str, value: Any, count: int) -> int:
    if isinstance(value, str) and len(value) == 1 and value in LETTERS[:count]:
        return LETTERS.index(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count:
        return value
    raise RowError(
        f"{where}: field 'answer' holds {shown(value)}, expected a place from 0 to {count - 1} "
        f"or a letter from A to {LETTERS[count - 1]}"
    )


def twice(questions: Sequence[Question]) -> list[str]:
    """Ids of questions that offer the same text twice."""
    return [one.id for one in questions if len(set(one.choices)) < len(one.choices)]


# --- what is asked ---------------------------------------------------------------------------------------------------


def rendered(question: Question) -> str:
    """The question with its lettered options, up to "Answer:"."""
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices)]
    return "\n".join([question.question.strip(), *lines, "Answer:"])


def context(question: Question, shots: Sequence[Question] = ()) -> str:
    """Description, answered examples and the question: everything before the letter."""
    return description(question) + _examples(shots) + rendered(question)


def description(question: Question) -> str:
    return DESCRIPTION.format(topic=question.topic) if question.topic else ""


def _examples(shots: Sequence[Question]) -> str:
    return "".join(f"{rendered(shot)} {LETTERS[shot.answer]}\n\n" for shot in shots)


Shots = Mapping[str, Sequence[Question]]
"""By topic: examples that stand before its questions."""


def letters(
    questions: Sequence[Question], *, shots: Shots | None = None, chat: bool = False, prefix: str = ""
) -> Score:
    """The ask whose answer `marks` reads: every question's letters.

    Args:
        chat: through the model's chat template.
        prefix: text before everything else.
    """
    shots = shots or {}

    def items() -> Iterator[Any]:
        for one in questions:
            examples = shots.get(one.topic, ())
            space = "" if chat else " "
            right = space + LETTERS[one.answer]
            if chat:
                asked = prefix + _examples(examples) + rendered(one)
                system = (("system", description(one)),) if description(one) else ()
                row = Row(one.id, right, asked, (*system, ("user", asked)), kind="chat", source=one.source)
            else:
                row = Row(one.id, right, prefix + context(one, examples), kind="text", source=one.source)
            for letter in LETTERS[: len(one.choices)]:
                yield (one.id, letter), row, space + letter, None

    return Score(tuple(items()))


def cloze(questions: Sequence[Question], *, statements: bool = False, prefix: str = "") -> Score:
    """The ask whose answer `marks` reads: every option's text after the question alone.

    Args:
        statements: after the question's `statement` instead, as running text.

    Raises:
        ParameterError: a question has no statement.
    """

    def items() -> Iterator[Any]:
        for one in questions:
            if statements and not one.statement:
                raise ParameterError(f"{one.source or one.id} has no field 'statement' to complete")
            asked = prefix + (one.statement if statements else one.question.strip())
            space = " " if statements else ""
            right = space + one.choices[one.answer]
            row = Row(one.id, right, asked, kind="text" if statements else "qa", source=one.source)
            for letter, choice in zip(LETTERS, one.choices):
                yield (one.id, letter), row, space + choice, None

    return Score(tuple(items()))


def fitted(subject: Any, ask: Score) -> tuple[Score, list[str]]:
    """The ask with running text that is too long for the model cut at its beginning, where the harness cuts it too (a
    few tokens later); and the ids of the questions that lost something."""
    cut: dict[Row, Row] = {}
    for row in dict.fromkeys(row for _, row, _, _ in ask.items):
        short = row
        while row.kind == "text" and (over := len(subject.spans(short)[1]) - subject.context_length) > 0:
            # A cut word may fall into more pieces than it was, so this may take another turn.
            first = next(start for start, stop in subject.spans(short)[1][over:] if stop > start and start > 0)
            short = replace(short, prompt=short.prompt[first:])
        cut[row] = short
    items = tuple((key, cut[row], answer, prompt) for key, row, answer, prompt in ask.items)
    return Score(items), [row.id for row, short in cut.items() if short is not row]


def checked_chat(subject: Any, questions: Sequence[Question]) -> None:
    """
    Raises:
        ParameterError: the model has no chat template, or one that takes no system message.
    """
    if not getattr(subject.tokenizer, "chat_template", None):
        raise ParameterError(f"chat: {subject.name} has no chat template; leave the parameter out")
    _, row, _, _ = letters(questions[:1], chat=True).items[0]
    try:
        subject.prompt_text(row)
    except Exception as error:  # templates raise whatever their author chose
        raise ParameterError(f"chat: the template of {subject.name} cannot take the description: {error}") from None


# --- what became of it -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Marks:
    """What a model made of questions, in their order; k is the largest number of options."""

    questions: tuple[Question, ...]
    score: np.ndarray
    """(n, k) what predictions are the argmax of; -inf where a question has fewer options."""
    logprob: np.ndarray
    """(n, k) log-probability of each option's text, nats."""

    @cached_property
    def picked(self) -> np.ndarray:
        """(n,) place of the predicted option; the first of several equally likely ones."""
        return self.score.argmax(axis=1)

    @cached_property
    def right(self) -> np.ndarray:
        """(n,) 1.0 where the prediction is right."""
        return (self.picked == [one.answer for one in self.questions]).astype(np.float64)

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())

    @property
    def error(self) -> float:
        """Standard error of the accuracy, as the harness gives it: sd / sqrt(n) with n - 1 in the sd."""
        return standard_error(self.right)

    @property
    def mass(self) -> np.ndarray:
        """(n,) probability of all options together; next to nothing where a model does not answer in letters."""
        return np.exp(self.logprob).sum(axis=1)

    @property
    def distribution(self) -> np.ndarray:
        """(n, k) probabilities of the options among one another."""
        shifted = np.exp(self.logprob - self.logprob.max(axis=1, keepdims=True))
        return shifted / shifted.sum(axis=1, keepdims=True)

    @property
    def shares(self) -> np.ndarray:
        """(k,) how often each place is predicted."""
        return np.bincount(self.picked, minlength=self.score.shape[1]) / len(self.questions)

    def take(self, places: Sequence[int] | np.ndarray) -> Marks:
        """The marks of some questions."""
        return Marks(tuple(self.questions[i] for i in places), self.score[places], self.logprob[places])


def standard_error(values: np.ndarray) -> float:
    """sd(ddof=1) / sqrt(n); 0 for a single value."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def marks(questions: Sequence[Question], table: Scores, *, per_byte: bool = False) -> Marks:
    """Read the answer of `letters`, or with `per_byte` of `cloze`.

    What closes an answer (end of turn) does not count.

    Raises:
        TableError: the model computes no usable numbers.
    """
    if np.isnan(table.logprob).any():
        row, letter = table.keys[int(np.searchsorted(table.offsets, np.isnan(table.logprob).argmax(), "right")) - 1]
        raise TableError(f"row {row!r}, option {letter}: the log-probability is not a number; the model is broken")
    width = max(len(one.choices) for one in questions)
    counted = np.where(table.end, 0.0, table.logprob.astype(np.float64))
    sums = np.add.reduceat(counted, table.offsets[:-1])
    logprob = np.full((len(questions), width), -np.inf)
    sizes = np.ones((len(questions), width))
    at = 0
    for i, one in enumerate(questions):
        count = len(one.choices)
        logprob[i, :count] = sums[at : at + count]
        if per_byte:
            sizes[i, :count] = [len(choice.encode()) for choice in one.choices]
        at += count
    return Marks(tuple(questions), logprob / sizes, logprob)
