"""KnowEdit's files: six data sets, each in a form of its own, found by base name under any folder.

    recent, zsre, counterfact   [{subject, prompt, target_new, portability {type: [{prompt, ground_truth}]}, locality}]
    bio                         [{text, labels, concept, locality}]
    convsent                    [{ent, pos [sentence], neg [sentence]}]
    sanitation                  train {K_F, K_R: [{question, ground_truth, target_new}]}, test {success, locality}

Read beside them where they are there: `corpus.jsonl`, rows that key statistics are taken of, and `prefixes.json`, a
list of texts that editors put before prompts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..edits import EditRow, edit_row
from ..errors import RowError, suggest
from ..rows import Row, Source, parsed, read_rows, shown

Dataset = Literal["recent", "zsre", "counterfact", "bio", "convsent", "sanitation"]
Split = Literal["test", "train"]
FILES: dict[str, dict[str, str]] = {
    "recent": {"test": "recent_test.json", "train": "recent_train.json"},
    "zsre": {"test": "ZsRE-test-all.json", "train": "zsre_mend_train_10000.json"},
    "counterfact": {"test": "test_cf.json", "train": "train_cf.json"},
    "bio": {"test": "wikibio-test-all.json", "train": "wikibio-train-all.json"},
    "convsent": {"test": "blender_test.json", "train": "blender_train.json"},
    "sanitation": {"test": "trivia_qa_test.json", "train": "trivia_qa_train.json"},
}
FACTUAL = ("recent", "zsre", "counterfact", "bio")
KINDS = {
    name.lower(): name
    for name in (
        *("Subject_Aliasing", "Reasoning", "Logical_Generalization"),
        *("Relation_Specificity", "Forgetfulness", "Neighborhood", "Distracting"),
    )
}
"""Sub-types by their names in lower case: files differ in it."""
PROBED = ("portability", "locality")


@dataclass(frozen=True)
class Opinion:
    """An entity, and sentences of two minds about it."""

    id: str
    entity: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]
    source: str = ""


@dataclass(frozen=True)
class Asked:
    """A question whose answer is to be withheld, or kept."""

    question: str
    answer: str
    target: str = ""
    subject: str = ""


@dataclass(frozen=True)
class Erasure:
    """One answer that is to be refused."""

    answer: str
    edits: tuple[EditRow, ...]
    """Questions that it is the answer of, to be edited."""
    refused: tuple[Asked, ...]
    """Others that it is the answer of, to be asked."""
    kept: tuple[Asked, ...]
    """Questions with other answers."""


@dataclass
class Found:
    """What was read, and what could not be used."""

    edits: list[EditRow] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def notes(self) -> list[str]:
        return [f"{count} {what}." for what, count in sorted(self.counts.items())]


def locate(folder: Path, dataset: str, split: str) -> Path:
    """The file of a data set under a folder.

    Raises:
        RowError: there is none, or several.
    """
    name = FILES[dataset][split]
    if not folder.is_dir():
        raise RowError(f"{folder} is no folder; expected one with KnowEdit's files")
    found = sorted(path for path in folder.rglob(name) if path.is_file())
    if len(found) != 1:
        there = [path.name for path in folder.rglob("*.json")]
        many = f"{len(found)} files are called {name}" if found else f"no file is called {name} ({dataset}, {split})"
        raise RowError(f"{folder}: {many}, expected one. {suggest(name, there)}")
    return found[0]


def factual(path: Path, aliases: Literal["any", "first"], limit: int = 0) -> Found:
    """Edits of one of the four factual data sets.

    Answers that are blank are left out, as published; what a row lacks besides is counted.

    Args:
        aliases: of several answers any counts, or (as published tables are made) the first alone.

    Raises:
        RowError: a row is not what it must be; names file, row and field.
    """
    found = Found()
    for number, record in enumerate(_list(path)[: limit or None], start=1):
        where = f"{path}: row {number}"
        if not isinstance(record, Mapping):
            raise RowError(f"{where}: found {shown(record)}, expected an object")
        record = dict(record)
        for part in PROBED:
            if record.get(part):
                record[part] = _probes(record[part], f"{where}: field {part!r}", aliases, found.counts)
        subject = next((record[name] for name in ("subject", "concept") if name in record), "")
        prompt = next((record[name] for name in ("prompt", "text", "src") if name in record), "")
        if isinstance(subject, str) and isinstance(prompt, str) and subject not in prompt and "{}" not in prompt:
            at = prompt.casefold().find(subject.casefold()) if len(prompt) == len(prompt.casefold()) else -1
            record["subject"] = prompt[at : at + len(subject)] if at >= 0 else ""
            if at < 0:
                found.counts["subjects do not stand in their prompts; such facts are looked up at the last token"] += 1
        if record.get("target_new") and record["target_new"] in [*_texts(record.get("ground_truth"))]:
            record["ground_truth"] = None
            found.counts["targets are what is true already"] += 1
        found.edits.append(edit_row(record, where, fallback=f"{path.stem}/{number}"))
    if not found.edits:
        raise RowError(f"{path}: 0 rows, expected at least 1")
    return found


def lessons(folder: Path, names: Sequence[str], limit: int) -> list[EditRow]:
    """Training rows of these data sets, as far as they are of facts and there; of all four where these have none.

    Raises:
        RowError: a row is not what it must be.
    """
    there = [name for name in FACTUAL if any(path.is_file() for path in folder.rglob(FILES[name]["train"]))]
    own = [name for name in there if name in names] or there
    return [edit for name in own for edit in factual(locate(folder, name, "train"), "any", limit).edits]


def _probes(value: Any, where: str, aliases: str, counts: Counter[str]) -> dict[str, list[dict[str, Any]]]:
    if not isinstance(value, Mapping):
        raise RowError(f"{where} holds {type(value).__name__}, expected sub-types with prompts")
    kept: dict[str, list[dict[str, Any]]] = {}
    for name, several in value.items():
        if not isinstance(several, list) or not all(isinstance(one, Mapping) for one in several):
            raise RowError(f"{where}: sub-type {name!r} holds {shown(several)}, expected a list of prompts")
        for one in several:
            answers = [text for text in _texts(one.get("ground_truth")) if text.strip()]
            if not answers:
                counts["prompts have no answer and are not asked"] += 1
                continue
            answers = answers[:1] if aliases == "first" else answers
            kept.setdefault(KINDS.get(str(name).lower(), str(name)), []).append({**one, "ground_truth": answers})
    return kept


def _texts(value: Any) -> Iterator[str]:
    """Texts of a text, a list of texts, or a list of lists of alternatives."""
    if isinstance(value, list):
        for one in value:
            yield from _texts(one)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield str(value)


def opinions(path: Path, limit: int = 0) -> list[Opinion]:
    """Entities with sentences of both sentiments.

    Raises:
        RowError: a row lacks a field, or there are fewer than two.
    """
    found = []
    for number, record in enumerate(_list(path)[: limit or None], start=1):
        where = f"{path}: row {number}"
        if not isinstance(record, Mapping):
            raise RowError(f"{where}: found {shown(record)}, expected an object")
        values: dict[str, Any] = {name: record.get(name) for name in ("ent", "pos", "neg")}
        if not isinstance(values["ent"], str) or not values["ent"].strip():
            raise RowError(f"{where}: field 'ent' is {shown(values['ent'])}, expected a name")
        for name in ("pos", "neg"):
            if not values[name] or not all(isinstance(text, str) and text.strip() for text in values[name]):
                raise RowError(f"{where}: field {name!r} is {shown(values[name])}, expected sentences")
        positive, negative = (tuple(values[name]) for name in ("pos", "neg"))
        found.append(Opinion(f"{path.stem}/{number}", values["ent"], positive, negative, where))
    if len(found) < 2:
        raise RowError(f"{path}: {len(found)} rows, expected at least 2: drawdown is measured on another entity")
    return found


def erasures(train: Path, test: Path, limit: int = 0) -> list[Erasure]:
    """One erasure for each answer that the training file wants refused.

    Args:
        limit: of so many questions of each kind, the first.

    Raises:
        RowError: a file lacks a list, a row a field, or nobody asks for an answer that is to be refused.
    """
    lists = {"K_F": train, "success": test, "locality": test}
    rows = {name: _asked(path, name) for name, path in lists.items()}
    found = []
    for value in dict.fromkeys(one.answer.casefold() for one in rows["K_F"]):
        forget, refused = ([one for one in rows[name] if one.answer.casefold() == value] for name in ("K_F", "success"))
        kept = [one for one in rows["locality"] if one.answer.casefold() != value]
        for name, several in (("success", refused), ("locality", kept)):
            if not several:
                raise RowError(f"{test}: field {name!r} has no question to ask where {forget[0].answer!r} is refused")
        edits = [
            EditRow(
                id=f"sanitation/{forget[0].answer}/{number}",
                prompt=one.question,
                target_new=one.target,
                subject=one.subject if one.subject in one.question else "",
                ground_truth=(one.answer,),
                source=str(train),
            )
            for number, one in enumerate(forget, start=1)
        ]
        cut = limit or None
        found.append(Erasure(forget[0].answer, tuple(edits[:cut]), tuple(refused[:cut]), tuple(kept[:cut])))
    return found


def _asked(path: Path, name: str) -> list[Asked]:
    content = _content(path)
    rows = content.get(name) if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows:
        raise RowError(f"{path}: field {name!r} is {shown(rows)}, expected a list of questions")
    found = []
    for number, row in enumerate(rows, start=1):
        values = {}
        for key in ("question", "ground_truth", "target_new"):
            value = row.get(key) if isinstance(row, Mapping) else None
            if not isinstance(value, str) or not value.strip():
                raise RowError(f"{path}: {name}, row {number}: field {key!r} is {shown(value)}, expected text")
            values[key] = value
        subject = str(row.get("subject") or "")
        found.append(Asked(values["question"], values["ground_truth"], values["target_new"], subject))
    return found


def texts_for_keys(folder: Path, path: str) -> list[Row]:
    """Texts for key statistics: those of `path`, else the folder's own; none where it has none."""
    own = folder / "corpus.jsonl"
    return read_rows(Source(path or str(own)), "corpus") if path or own.is_file() else []


def prefixes(folder: Path) -> list[str] | None:
    """The folder's texts that are put before prompts; None where it has none.

    Raises:
        RowError: the file holds something else.
    """
    path = folder / "prefixes.json"
    if not path.is_file():
        return None
    content = _content(path)
    if not isinstance(content, list) or not all(isinstance(text, str) for text in content):
        raise RowError(f"{path}: found {shown(content)}, expected a list of texts")
    return content


def _content(path: Path) -> Any:
    try:
        return parsed(path.read_text(encoding="utf-8-sig"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise RowError(f"{path} cannot be read as UTF-8 text: {error}") from None


def _list(path: Path) -> list[Any]:
    content = _content(path)
    if not isinstance(content, list):
        raise RowError(f"{path}: found {type(content).__name__}, expected a list of rows")
    return content


def dumped(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
