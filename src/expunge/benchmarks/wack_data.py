"""WACK's files, and the prompts that test knowledge and provoke errors.

    [[clean_prompt, golden_answer, wrong_answer, golden_tokens, wrong_tokens, prompt_under_setting, count, -1]]

`Static<Data>.json` holds the questions (count -1). What is built of them for one model lies in three files:
`Hallucinate...` (known, and answered wrongly under the setting), `NonHallucinate...` (known and right there) and
`General...` (count below 6), each ending in `<Data>WithThreshold1.0_<model>.json`, with `Alice` before the name of the
story setting. Read beside these: `shots.json`, [[clean_prompt, right answer, wrong answer]], and `entities.json`,
{clean_prompt: whom it is about}, whose questions never stand on both sides of a probe.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import RowError, suggest
from ..files import write_text
from ..rows import parsed, shown

Setting = Literal["bad_shots", "alice_bob"]

KINDS: tuple[tuple[str, str], ...] = (
    ("clean_prompt", "text"),
    ("golden_answer", "text"),
    ("wrong_answer", "text"),
    ("golden_tokens", "tokens"),
    ("wrong_tokens", "tokens"),
    ("prompt_under_setting", "text"),
    ("count", "number"),
    ("last", "number"),
)
GENERAL = (
    ("What colour is a ripe lemon", "yellow", "blue"),
    ("How many legs does a spider have", "eight", "five"),
    ("Which animal gives wool", "sheep", "crocodile"),
    ("What is frozen water called", "ice", "steam"),
    ("How many days does a week have", "seven", "nine"),
    ("Which month follows March", "April", "October"),
    ("What do bees make", "honey", "cheese"),
    ("On which continent does Egypt lie", "Africa", "Europe"),
    ("Which planet do people live on", "Earth", "Neptune"),
    ("What is twice three", "six", "ten"),
    ("Which instrument has black and white keys", "piano", "drum"),
    ("Where do fish live", "water", "trees"),
    ("What falls from clouds", "rain", "sand"),
    ("Which season is the coldest", "winter", "summer"),
    ("What shines by day", "the sun", "the moon"),
    ("How many hours does a day have", "twenty-four", "fifty"),
    ("What does a baker bake", "bread", "shoes"),
    ("Which sense needs ears", "hearing", "smell"),
    ("What is the opposite of hot", "cold", "loud"),
    ("Which metal do magnets attract", "iron", "gold"),
)
"""Trivial questions of our own, with right and wrong answers: twenty, as in the paper."""
STORY = (
    "Two students, Alice and Bob, sit a hard test of general knowledge. Half of the marks are enough to pass, and a "
    "guess earns more than an empty line. Alice reads the questions out; Bob, who knows less than she does, answers "
    "as well as he can.\n"
)
"""The second setting, in words of our own: a character who may be wrong."""


@dataclass(frozen=True)
class Shot:
    prompt: str
    right: str
    wrong: str


@dataclass(frozen=True)
class Question:
    """One row of a file."""

    prompt: str
    answer: str
    wrong: str
    entity: str = ""
    """Whom it is about; questions about nobody in particular stand for themselves."""
    count: int = -1
    source: str = ""


def read(folder: str | Path, pattern: str) -> list[Question]:
    """The rows of the one file that fits the pattern; each question once.

    Raises:
        RowError: no such file, or several; a row that is not what it must be; says file, row and field.
    """
    path = _fitting(Path(folder), pattern)
    rows = _list(path)
    entities = _entities(Path(folder) / "entities.json")
    found: dict[str, Question] = {}
    for number, row in enumerate(rows, start=1):
        where = f"{path}: row {number}"
        fields = _checked(where, row)
        prompt, answer = str(fields["clean_prompt"]), str(fields["golden_answer"]).strip()
        if not str(fields["prompt_under_setting"]).endswith(prompt):
            raise RowError(f"{where}: prompt_under_setting does not end with clean_prompt {shown(prompt)}")
        about = entities.get(prompt, "")
        question = Question(prompt, answer, str(fields["wrong_answer"]), about, int(fields["count"]), where)
        found.setdefault(prompt, question)
    if not found:
        raise RowError(f"{path}: 0 rows, expected at least 1")
    return list(found.values())


def shots(folder: str | Path) -> list[Shot]:
    """What examples are drawn from: the folder's own, or trivial questions."""
    path = Path(folder) / "shots.json"
    if not path.is_file():
        return [Shot(f"question: {question}?\nanswer:", right, wrong) for question, right, wrong in GENERAL]
    found = []
    for number, row in enumerate(_list(path), start=1):
        if not isinstance(row, list) or len(row) != 3 or not all(isinstance(v, str) and v.strip() for v in row):
            raise RowError(f"{path}: row {number}: found {shown(row)}, expected [prompt, right answer, wrong answer]")
        found.append(Shot(*row))
    return found


def drawn(question: Question, known: Sequence[Shot], count: int, seed: int) -> list[Shot]:
    """The examples of one question, the same for the right and the wrong variant, never the question itself."""
    others = [shot for shot in known if shot.prompt != question.prompt]
    return random.Random(f"{seed}/{question.prompt}").sample(others, min(count, len(others)))


def closed_book(question: Question, shown_: Sequence[Shot]) -> str:
    """The prompt that tests knowledge: examples answered rightly, then the question."""
    return "".join(f"{shot.prompt} {shot.right}\n" for shot in shown_) + question.prompt


def provoking(question: Question, shown_: Sequence[Shot], setting: Setting) -> str:
    """The prompt under a setting: the same examples answered wrongly, or the story and one right example."""
    if setting == "alice_bob":
        return STORY + closed_book(question, shown_[:1])
    return "".join(f"{shot.prompt} {shot.wrong}\n" for shot in shown_) + question.prompt


def write(
    folder: Path,
    name: str,
    setting: Setting,
    model: str,
    rows: Mapping[str, Sequence[Sequence[Any]]],
) -> dict[str, Path]:
    """The three files of one model in the published form; `rows` by Hallucinate, NonHallucinate and General."""
    lead = "Alice" if setting == "alice_bob" else ""
    safe = model.strip("/").replace("/", "_")
    paths = {kind: folder / f"{lead}{kind}{name}WithThreshold1.0_{safe}.json" for kind in rows}
    for kind, several in rows.items():
        write_text(paths[kind], json.dumps([list(row) for row in several], ensure_ascii=False) + "\n")
    return paths


def _fitting(folder: Path, pattern: str) -> Path:
    if not folder.is_dir():
        raise RowError(f"{folder} is no folder; expected one with WACK's json files")
    fitting = sorted(path for path in folder.glob(pattern) if path.is_file())
    if len(fitting) != 1:
        found = f"{len(fitting)} files: {', '.join(p.name for p in fitting[:3])}" if fitting else "no file"
        hint = suggest(pattern, [path.name for path in folder.glob("*.json")])
        raise RowError(f"{folder}: {found} called {pattern!r}; set questions to one. {hint}")
    return fitting[0]


def _list(path: Path) -> list[Any]:
    try:
        content = parsed(path.read_text(encoding="utf-8-sig"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise RowError(f"{path} cannot be read as UTF-8 text: {error}") from None
    if not isinstance(content, list):
        raise RowError(f"{path}: found {type(content).__name__}, expected a list of rows")
    return content


def _entities(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    content = parsed(path.read_text(encoding="utf-8-sig"), str(path))
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content.values()):
        raise RowError(f"{path}: expected an object {{clean_prompt: whom it is about}}")
    return content


def _checked(where: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, list) or len(row) != len(KINDS):
        found = f"a list of {len(row)}" if isinstance(row, list) else type(row).__name__
        raise RowError(f"{where}: found {found}, expected a list of {len(KINDS)}: {', '.join(n for n, _ in KINDS)}")
    for value, (name, kind) in zip(row, KINDS):
        right = {
            "text": isinstance(value, str) and (bool(value.strip()) or name == "wrong_answer"),
            "tokens": isinstance(value, list) and all(isinstance(token, int) for token in value),
            "number": isinstance(value, int) and not isinstance(value, bool),
        }[kind]
        if not right:
            expected = {"text": "text", "tokens": "a list of token numbers", "number": "a whole number"}[kind]
            raise RowError(f"{where}: field {name!r} is {shown(value)}, expected {expected}")
    return dict(zip((name for name, _ in KINDS), row))
