"""Continual forgetting: which classes each task of a sequence takes away, with which rows, and what is reported of it.

The data is a folder with the pictures `train` and `test`, in class folders, and `tasks.json`: either

    {"order_seed": 1337, "first": 80, "per_task": 20, "tasks": 4}

or the classes themselves, `{"forget": [["3", "7"], ["1"]]}`; both with `data_ratio` (share of each class's training
rows that may be used), `few_shot` (so many of each class instead) and `missing_classes` (so many kept classes have no
training rows, and are asked about all the same). In the first form the classes, in the order of their names in the
file's `classes` or else of the alphabet, are shuffled by the seed; the first task forgets those from place `first` on,
the next one the `per_task` before them.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pydantic

from ..errors import RowError, suggest
from ..pictures import Picture, read_pictures, write_folder
from ..rows import Source


class TaskFile(pydantic.BaseModel):
    """What tasks.json may hold."""

    model_config = pydantic.ConfigDict(extra="forbid")
    order_seed: int = 1337
    first: int | None = pydantic.Field(default=None, ge=1)
    per_task: int | None = pydantic.Field(default=None, ge=1)
    tasks: int | None = pydantic.Field(default=None, ge=1)
    forget: list[list[str]] | None = None
    classes: list[str] | None = None
    data_ratio: float = pydantic.Field(default=0.1, gt=0, le=1)
    few_shot: int | None = pydantic.Field(default=None, ge=1)
    missing_classes: int = pydantic.Field(default=0, ge=0)


@dataclass(frozen=True)
class Task:
    """One request of a sequence; classes by name."""

    forget: tuple[str, ...]
    retain: tuple[str, ...]
    """Everything that no task has taken away, this one included."""
    old: tuple[str, ...]
    """What earlier tasks have."""
    missing: tuple[str, ...] = ()
    """Kept classes without training rows."""


@dataclass(frozen=True)
class Continual:
    """Rows and tasks of one sequence."""

    rows: Mapping[str, list[Picture]]
    """`train` (the few that may be used) and `test`."""
    tasks: list[Task]
    notes: list[str] = field(default_factory=list)

    def request(self, task: Task) -> dict[str, list[Picture]]:
        """Forget and retain rows of a task."""
        seen = set(task.retain) - set(task.missing)
        return {
            "forget": [row for row in self.rows["train"] if row.answer in task.forget],
            "retain": [row for row in self.rows["train"] if row.answer in seen],
        }


def read(folder: str | Path) -> Continual:
    """
    Raises:
        RowError: no such folder, rows or tasks; a task file that is not understood, or does not fit the classes.
    """
    path = Path(folder) / "tasks.json"
    try:
        file = TaskFile.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RowError(f"{path} cannot be read: {error}") from None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise RowError(f"{path}: {where}: {first['msg']}, found {first['input']!r}") from None
    rows = {name: read_pictures(Source(str(folder), split=name), name) for name in ("train", "test")}
    return prepare(rows, file, str(path))


def prepare(rows: Mapping[str, list[Picture]], file: TaskFile, where: str = "tasks") -> Continual:
    """The tasks, and of every class the training rows that may be used: drawn once, by the order's seed."""
    found = {row.answer for row in rows["train"]} | {row.answer for row in rows["test"]}
    classes = file.classes or sorted(found)
    for name in set(classes) ^ found:
        what = "no picture shows" if name not in found else "does not name"
        raise RowError(f"{where}: classes: {what} {name!r}. {suggest(name, sorted(found))}")
    for name in sorted(found - {row.answer for row in rows["test"]}):
        raise RowError(f"{where}: test: 0 pictures of class {name!r}; expected at least 1 of every class")
    tasks = splits(file, classes, where)
    rng = random.Random(file.order_seed)
    used = []
    for name in classes:
        own = [row for row in rows["train"] if row.answer == name]
        count = file.few_shot or max(1, round(file.data_ratio * len(own)))
        if count > len(own):
            raise RowError(f"{where}: few_shot is {count}, but class {name!r} has {len(own)} training rows")
        used += rng.sample(own, count)
    gone: set[str] = set()
    notes = []
    for number, task in enumerate(tasks, start=1):
        if again := sorted(gone & set(task.forget)):
            notes.append(f"Task {number} asks for {', '.join(again)}, which an earlier one has taken away already.")
        gone |= set(task.forget)
    return Continual({"train": used, "test": rows["test"]}, tasks, notes)


def splits(file: TaskFile, classes: Sequence[str], where: str = "tasks") -> list[Task]:
    """What each task forgets, keeps and finds forgotten.

    Raises:
        RowError: neither form, or tasks that leave no class or do not fit the number of classes.
    """
    sizes = (file.first, file.per_task, file.tasks)
    if (file.forget is None) == (None in sizes) or (file.forget is not None and sizes != (None, None, None)):
        raise RowError(f"{where}: expected either `forget`, or all of `first`, `per_task` and `tasks`")
    if file.forget is not None:
        asked = file.forget
    else:
        first, each, count = (size or 0 for size in sizes)
        if first + each != len(classes) or first - (count - 1) * each < 1:
            raise RowError(
                f"{where}: first is {first}, per_task {each} and tasks {count}; expected first + per_task to be the "
                f"{len(classes)} classes, and at least one class to be left by the last task"
            )
        order = list(classes)
        random.Random(file.order_seed).shuffle(order)
        asked = [order[first - i * each : first - (i - 1) * each] for i in range(count)]
        classes = order
    made = []
    gone: list[str] = []
    for number, forget in enumerate(asked, start=1):
        for name in forget:
            if name not in classes:
                raise RowError(f"{where}: task {number}: there is no class {name!r}. {suggest(name, classes)}")
        old = tuple(name for name in gone if name not in forget)
        gone += [name for name in forget if name not in gone]
        retain = tuple(name for name in classes if name not in gone)
        if not forget or len(retain) <= file.missing_classes:
            raise RowError(
                f"{where}: task {number} forgets {len(forget)} classes and leaves {len(retain)}, of which "
                f"{file.missing_classes} without rows; expected at least one to forget and one to train on"
            )
        made.append(Task(tuple(forget), retain, old, retain[: file.missing_classes]))
    return made


def write(rows: Mapping[str, list[Picture]], file: TaskFile, folder: Path) -> None:
    """The data as `read` takes it."""
    for name in ("train", "test"):
        write_folder(rows[name], folder / name)
    (folder / "tasks.json").write_text(file.model_dump_json(exclude_none=True, indent=1), encoding="utf-8")


# --- what is reported ------------------------------------------------------------------------------------------------


def h_mean(retain: Any, drop: Any) -> Any:
    """2 retain drop / (retain + drop), of numbers or arrays; 0 where both are, or where nothing was lost."""
    drop = np.maximum(drop, 0.0)
    total = np.asarray(retain + drop)
    return np.where(total > 0, 2 * retain * drop / np.where(total > 0, total, 1.0), 0.0)


def figures(task: Task, labels: Sequence[str], before: np.ndarray, after: np.ndarray) -> dict[str, float | None]:
    """Shares of test rows that get their class, before and after a task; None where there are no such classes.

    Args:
        labels: (rows,) true classes.
        before, after: (rows,) 1 where the model says it.
    """

    def accuracy(hits: np.ndarray, classes: Sequence[str]) -> float | None:
        chosen = np.isin(np.asarray(labels), list(classes))
        return float(hits[chosen].mean()) if chosen.any() else None

    start, forget, retain = accuracy(before, task.forget), accuracy(after, task.forget), accuracy(after, task.retain)
    assert start is not None
    assert forget is not None
    assert retain is not None
    return {
        "before": start,
        "forget": forget,
        "retain": retain,
        "old": accuracy(after, task.old),
        "missing": accuracy(after, task.missing),
        "h": float(h_mean(retain, start - forget)),
    }
