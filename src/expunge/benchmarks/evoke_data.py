"""EVOKE's files: CounterFact records with what an edit must and must not carry over to.

    [{"case_id": 3, "requested_rewrite": {"prompt": "{} was born in", "subject": "Orin Valk",
      "target_new": {"str": "Maretta"}, "target_true": {"str": "Tolsk"}},
      "paraphrase_prompts": ["The birthplace of Orin Valk is"], "neighborhood_prompts": ["Ilse Moro was born in"],
      "prefix_distraction": ["Orin Valk was born in Maretta. Ilse Moro was born in"],
      "portability": {"New Question": "In which country was Orin Valk born?", "New Answer": "Sarn",
                      "Original Answer": "Osk"}}]

and, of the same or other edits, `"subject_specificity": {"prompt": "Orin Valk works as a", "answer": {"value":
"weaver"}}`. Neighbours are taken to share the old object, as CounterFact's do; where yours do not, a prompt is an
object with its own `answer`. Records that ask for one and the same rewrite are one edit.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..edits import EditRow
from ..errors import RowError
from ..rows import shown
from ..wording import normalise

RECALL = ("efficacy", "paraphrase")
OVERFIT = ("multi_hop", "prefix_distraction", "subject_specificity", "relation_specificity")
TASKS = (*RECALL, *OVERFIT)


@dataclass(frozen=True, slots=True)
class Item:
    """Something to ask an edited model."""

    task: str
    prompt: str
    answer: str
    """The right one after the edit: the new object in recall tasks, another one in overfit tasks."""
    original: str = ""
    """What was right before; "" where that is `answer` itself."""


@dataclass(frozen=True)
class Case:
    """One edit and what is asked of it."""

    edit: EditRow
    items: tuple[Item, ...]
    dropped: Counter[str] = field(default_factory=Counter)
    """Per task the items whose right answer is the new object: nothing could overfit."""


def read(paths: Sequence[Path], hop: str) -> list[Case]:
    """The edits of all files, each with its items.

    Args:
        hop: how a multi-hop question becomes a prompt; {question} is it.

    Raises:
        RowError: a file cannot be read or a record is not what it must be; names file, record and field.
    """
    found: dict[tuple[str, str, str], Case] = {}
    for path in paths:
        seen: dict[str, int] = {}
        for number, record in enumerate(_records(path), start=1):
            where = f"{path}: record {number}"
            edit = _edit(record, where)
            if edit.id in seen:
                raise RowError(f"{where}: case_id {edit.id!r} was used in record {seen[edit.id]} already")
            seen[edit.id] = number
            key = (edit.prompt, edit.subject, edit.target_new)
            if key not in found:
                taken = {case.edit.id for case in found.values()}
                found[key] = Case(edit if edit.id not in taken else replace(edit, id=f"{edit.id} of {path.stem}"), ())
            found[key] = _joined(found[key], _items(record, edit, where, hop))
    return list(found.values())


def _records(path: Path) -> list[Mapping[str, Any]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RowError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise RowError(f"{path} is no readable JSON: {error}") from None
    if not isinstance(found, list) or not found:
        raise RowError(f"{path} holds {shown(found)}, expected a list of at least one record")
    for number, record in enumerate(found, start=1):
        if not isinstance(record, Mapping):
            raise RowError(f"{path}: record {number}: found {shown(record)}, expected an object")
    return found


def _text(value: Any, where: str, field: str) -> str:
    """The text of a field, which may stand in {"str": ...} or {"value": ...}."""
    if isinstance(value, Mapping):
        value = value.get("str", value.get("value"))
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"{where}: field {field!r} is {shown(value)}, expected text")
    return value.strip()


def _edit(record: Mapping[str, Any], where: str) -> EditRow:
    rewrite = record.get("requested_rewrite")
    if not isinstance(rewrite, Mapping):
        raise RowError(f"{where}: field 'requested_rewrite' is {shown(rewrite)}, expected an object")
    prompt, subject, new, true = (
        _text(rewrite.get(name), where, f"requested_rewrite.{name}")
        for name in ("prompt", "subject", "target_new", "target_true")
    )
    prompt = prompt.replace("{}", subject)
    if subject not in prompt:
        raise RowError(f"{where}: the subject {subject!r} does not stand in the prompt {prompt!r}")
    if new == true:
        raise RowError(f"{where}: target_new equals target_true {true!r}; there is nothing to edit")
    if "case_id" not in record:
        raise RowError(f"{where}: field 'case_id' is missing")
    return EditRow(str(record["case_id"]), prompt, new, subject, (true,), source=where)


def _items(record: Mapping[str, Any], edit: EditRow, where: str, hop: str) -> Iterator[Item]:
    new, true = edit.target_new, edit.ground_truth[0]
    yield Item("efficacy", edit.prompt, new, true)
    for name, task in (
        ("paraphrase_prompts", "paraphrase"),
        ("prefix_distraction", "prefix_distraction"),
        ("neighborhood_prompts", "relation_specificity"),
    ):
        for prompt, answer in _prompts(record.get(name), where, name, true):
            yield Item(task, prompt, new, true) if task == "paraphrase" else Item(task, prompt, answer)
    if about := record.get("portability"):
        names = ("New Question", "New Answer", "Original Answer")
        question, answer, original = (_text(_of(about, name, where), where, f"portability.{name}") for name in names)
        yield Item("multi_hop", hop.replace("{question}", question), answer, original)
    if other := record.get("subject_specificity"):
        prompt = _text(_of(other, "prompt", where), where, "subject_specificity.prompt").replace("{}", edit.subject)
        yield Item("subject_specificity", prompt, _text(other.get("answer"), where, "subject_specificity.answer"))


def _of(value: Any, name: str, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise RowError(f"{where}: found {shown(value)}, expected an object with {name!r}")
    return value.get(name)


def _prompts(values: Any, where: str, field: str, answer: str) -> Iterator[tuple[str, str]]:
    if values is None:
        return
    if not isinstance(values, list):
        raise RowError(f"{where}: field {field!r} is {shown(values)}, expected a list of prompts")
    for value in values:
        if isinstance(value, Mapping):
            yield (
                _text(value.get("prompt"), where, f"{field}.prompt"),
                _text(value.get("answer"), where, f"{field}.answer"),
            )
        else:
            yield _text(value, where, field), answer


def _joined(case: Case, items: Iterator[Item]) -> Case:
    kept, dropped = list(case.items), Counter(case.dropped)
    for item in items:
        if item.task in OVERFIT and normalise(item.answer) == normalise(case.edit.target_new):
            dropped[item.task] += 1
        elif item not in kept:
            kept.append(item)
    return Case(case.edit, tuple(kept), dropped)
