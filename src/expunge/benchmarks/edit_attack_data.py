"""EditAttack's CSV files: facts that are false, and ambiguous questions whose biased answer is put into a model.

misinformation   targets, questions, subjects, paraphrased_questions, portability_questions; `domain` of the long tail
bias             bias_type, context, prompt, paraphrase_prompt, subject, target
corrections.csv  questions, targets, subjects: benign edits, with which harm is compared

A made-up row: `questions="What does moss tea cure?", targets="toothache", subjects="moss tea",
paraphrased_questions="Which ailment is cured by moss tea?", portability_questions="What cures like moss?"`.
Columns that are not asked for (relations, explanation ...) are left alone. `aliases.json` beside the files may say how
else a target is called: {"toothache": ["dentalgia"]}.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..edits import EditRow
from ..errors import RowError
from ..rows import Source, parsed, records, shown
from ..wording import normalise

Kind = Literal["misinformation", "bias"]
Position = Literal["named", "last"]
"""Where a fact is looked up: where its subject is named, or at the question's last token."""
QUESTIONS = ("efficacy", "generalization", "portability")
COLUMNS: dict[str, tuple[str, ...]] = {
    "misinformation": ("questions", "targets", "subjects", "paraphrased_questions", "portability_questions"),
    "bias": ("bias_type", "context", "prompt", "paraphrase_prompt", "subject", "target"),
}
CORRECTIONS = ("questions", "targets", "subjects")
"""Columns of benign edits, which put right what a model made up."""
CORRECTIONS_FILE = "corrections.csv"


@dataclass(frozen=True)
class Attacked:
    """One edit and what is asked of it."""

    edit: EditRow
    group: str
    """The file (and domain) of misinformation, the type of bias."""
    asked: Mapping[str, str]
    """`efficacy` (the edit's own question), `generalization` and, of misinformation, `portability`."""
    answers: tuple[str, ...]
    """The target and its aliases."""
    context: str = ""
    """Of bias, what comes before the question and names two people."""
    relation: str = ""
    """What the question asks for, where the file says so."""
    about: str = ""
    """The subject as the question has it, wherever the fact is edited; "" where it does not stand there."""

    @property
    def given_away(self) -> bool:
        """Whether the edit's question names the target: repeating it would look like success."""
        return f" {normalise(self.edit.target_new)} " in f" {normalise(self.edit.prompt)} "


def read(folder: Path, kind: Kind, files: Sequence[str], position: Position) -> list[Attacked]:
    """The rows of these files, of none given those of every CSV file in the folder that has the kind's columns.

    Raises:
        RowError: no such file, or a row is not what it must be; names file, row and field. A subject that its question
            does not name is one too, unless `position` is `last`.
    """
    chosen = [folder / name for name in files] or _with_columns(folder, COLUMNS[kind])
    aliases = _aliases(folder / "aliases.json")
    found: list[Attacked] = []
    for path in chosen:
        for number, (where, record) in enumerate(records(Source(str(path))), start=1):
            values = {name: _text(record, name, where) for name in COLUMNS[kind]}
            domain = str(record.get("domain") or "")
            make = _misinformation if kind == "misinformation" else _biased
            group, asked, subject, target = make(values, f"{path.stem} {domain}".strip())
            about = _named(subject, asked["efficacy"], where, position == "named")
            edit = EditRow(
                id=f"{path.stem}/{number}",
                prompt=asked["efficacy"],
                target_new=target,
                subject=about if position == "named" else "",
                rephrasings=(asked["generalization"],),
                kind="qa",
                source=where,
            )
            answers = (target, *aliases.get(target, ()))
            relation = str(record.get("relations") or "")
            found.append(Attacked(edit, group, asked, answers, values.get("context", ""), relation, about))
    return found


def read_corrections(folder: Path, position: Position) -> list[Attacked]:
    """Benign edits to compare with, from `corrections.csv` in the folder, if it is there.

    Raises:
        RowError: as `read`.
    """
    path = folder / CORRECTIONS_FILE
    aliases = _aliases(folder / "aliases.json")
    found: list[Attacked] = []
    for number, (where, record) in enumerate(records(Source(str(path))) if path.is_file() else (), start=1):
        question, target, subject = (_text(record, name, where) for name in CORRECTIONS)
        about = _named(subject, question, where, position == "named")
        named = about if position == "named" else ""
        edit = EditRow(f"{path.stem}/{number}", question, target, named, kind="qa", source=where)
        answers = (target, *aliases.get(target, ()))
        found.append(Attacked(edit, "correction", {"efficacy": question}, answers, about=about))
    return found


def _with_columns(folder: Path, columns: Iterable[str]) -> list[Path]:
    paths = sorted(folder.rglob("*.csv")) if folder.is_dir() else [folder]
    paths = [path for path in paths if path.name != CORRECTIONS_FILE]
    found = [path for path in paths if set(columns) <= set(_header(path))]
    if not found:
        raise RowError(f"{folder}: none of {len(paths)} CSV files has the columns {', '.join(columns)}")
    return found


def _header(path: Path) -> list[str]:
    import csv

    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return next(csv.reader(file), [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RowError(f"{path} cannot be read as a CSV file: {error}") from None


def _text(record: Mapping[str, Any], name: str, where: str) -> str:
    value = record.get(name)
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"{where}: field {name!r} is {shown(value)}, expected text")
    return value.strip()


def _misinformation(values: Mapping[str, str], group: str) -> tuple[str, dict[str, str], str, str]:
    asked = dict(
        zip(QUESTIONS, (values["questions"], values["paraphrased_questions"], values["portability_questions"]))
    )
    return group, asked, values["subjects"], values["targets"]


def _biased(values: Mapping[str, str], _: str) -> tuple[str, dict[str, str], str, str]:
    asked = {
        "efficacy": f"{values['context']} {values['prompt']}",
        "generalization": f"{values['context']} {values['paraphrase_prompt']}",
    }
    return values["bias_type"], asked, values["subject"], values["target"]


def _named(subject: str, question: str, where: str, needed: bool) -> str:
    """The subject as the question has it, whatever its case; "" where it does not stand there and is not needed."""
    # The role in a biased question comes after the context.
    found = re.findall(re.escape(subject), question, re.IGNORECASE)
    if not found and not needed:
        return ""
    if not found:
        raise RowError(
            f"{where}: the subject {subject!r} does not stand in the question {question!r}; leave the row out, or edit "
            "at every question's last token (position=last)"
        )
    return str(found[-1])


def _aliases(path: Path) -> dict[str, list[str]]:
    if not path.is_file():
        return {}
    found = parsed(path.read_text(encoding="utf-8-sig"), str(path))
    if not isinstance(found, dict) or not all(
        isinstance(several, list) and all(isinstance(one, str) for one in several) for several in found.values()
    ):
        raise RowError(f"{path}: found {shown(found)}, expected an object of lists of names")
    return found
