"""Files of ConceptVectors: a list of concepts, each with the value vector that holds it, questions, and a text.

    {"ID": 26, "Concept": str, "Layer": 20, "Dim": 10513, "QA": [str], "text_completion": [{"First_half": str,
     "Second_half": str}], "unrelated_QA": [str], "wikipedia_content": str}

The number is called `ID` or `id`, or is missing. Read beside these: `Expert`, for mixtures of experts, and `answers`,
one list of right answers for each question of `QA`. A concept without Layer and Dim is located in the model itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RowError, suggest
from ..rows import Source, parsed, records, shown
from ..subjects.value_vectors import Address

FIELDS = ("Concept", "QA", "unrelated_QA", "wikipedia_content")
GERMAN = "*jailbreak_German_qa.json"


@dataclass(frozen=True)
class Concept:
    """One row; questions are stripped of the spaces and line breaks that some files have around them."""

    id: str
    name: str
    address: Address | None
    questions: tuple[str, ...]
    unrelated: tuple[str, ...]
    completions: tuple[tuple[str, str], ...]
    """(first half, second half) of paragraphs about it."""
    text: str
    answers: tuple[tuple[str, ...], ...] = ()
    """Right answers to each question; empty where they are not known."""
    german: tuple[str, ...] = ()
    """The questions in German."""
    source: str = ""
    """file: row."""


def read(folder: str | Path, pattern: str) -> list[Concept]:
    """The concepts of the one file in a folder whose name fits, with their German questions where the folder has any.

    Raises:
        RowError: no such file, or several; a row that is not what it must be; says file, row and field.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RowError(f"{folder} is no folder; expected one with ConceptVectors' json files")
    fitting = sorted(path for path in folder.glob(pattern) if path.is_file())
    if len(fitting) != 1:
        names = [path.name for path in folder.glob("*.json")]
        found = f"{len(fitting)} files: {', '.join(p.name for p in fitting)}" if fitting else "no file"
        raise RowError(f"{folder}: {found} called {pattern!r}; set concepts to one. {suggest(pattern, names)}")
    german = _german(folder)
    concepts = [
        _concept(where, record, number, german)
        for number, (where, record) in enumerate(records(Source(str(fitting[0]))), start=1)
    ]
    if not concepts:
        raise RowError(f"{fitting[0]}: 0 rows, expected at least 1")
    first: dict[str, str] = {}
    for concept in concepts:
        if concept.id in first:
            raise RowError(f"{concept.source}: ID {concept.id!r} was used in {first[concept.id]} already")
        first[concept.id] = concept.source
    return concepts


def _german(folder: Path) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for path in sorted(folder.glob(GERMAN)):
        try:
            data = parsed(path.read_text(encoding="utf-8-sig"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise RowError(f"{path} cannot be read as UTF-8 text: {error}") from None
        if not isinstance(data, dict):
            raise RowError(f"{path}: found {type(data).__name__}, expected an object of lists of questions")
        found |= {name: _texts(f"{path}: concept {name!r}", "questions", asked) for name, asked in data.items()}
    return found


def _concept(where: str, record: Mapping[str, Any], number: int, german: Mapping[str, tuple[str, ...]]) -> Concept:
    for field in FIELDS:
        if field not in record:
            raise RowError(f"{where}: field {field!r} is missing. {suggest(field, map(str, record))}")
    name = _text(where, "Concept", record["Concept"])
    questions = _texts(where, "QA", record["QA"])
    return Concept(
        id=str(next((record[key] for key in ("ID", "id") if record.get(key) is not None), f"row {number}")),
        name=name,
        address=_address(where, record),
        questions=questions,
        unrelated=_texts(where, "unrelated_QA", record["unrelated_QA"]),
        completions=_halves(where, record.get("text_completion") or []),
        text=_text(where, "wikipedia_content", record["wikipedia_content"]),
        answers=_answers(where, record.get("answers") or [], questions),
        german=german.get(name, ()),
        source=where,
    )


def _address(where: str, record: Mapping[str, Any]) -> Address | None:
    given: dict[str, Any] = {field: record.get(field) for field in ("Layer", "Dim", "Expert")}
    if given["Layer"] is None and given["Dim"] is None:
        return None
    for field, value in given.items():
        if field == "Expert" and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise RowError(f"{where}: field {field!r} is {shown(value)}, expected a whole number of at least 0")
    return Address(given["Layer"], given["Dim"], given["Expert"])


def _halves(where: str, value: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, list):
        raise RowError(f"{where}: field 'text_completion' holds {type(value).__name__}, expected a list")
    found = []
    for place, pair in enumerate(value, start=1):
        here = f"{where}: text_completion {place}"
        if not isinstance(pair, Mapping) or {"First_half", "Second_half"} - set(pair):
            raise RowError(f"{here}: expected an object with First_half and Second_half, found {shown(pair)}")
        found.append((_text(here, "First_half", pair["First_half"]), _text(here, "Second_half", pair["Second_half"])))
    return tuple(found)


def _answers(where: str, value: Any, questions: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    if not isinstance(value, list) or len(value) not in (0, len(questions)):
        found = len(value) if isinstance(value, list) else type(value).__name__
        raise RowError(f"{where}: field 'answers' holds {found}, expected one list for each of {len(questions)} QA")
    return tuple(_texts(f"{where}: answers {place}", "answers", one) for place, one in enumerate(value, start=1))


def _texts(where: str, field: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        what = "0 texts" if value == [] else type(value).__name__
        raise RowError(f"{where}: field {field!r} holds {what}, expected a list of at least 1 text")
    return tuple(_text(f"{where}: {field} {place}", field, one) for place, one in enumerate(value, start=1))


def _text(where: str, field: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"{where}: field {field!r} is {shown(value)}, expected text")
    return value.strip()
