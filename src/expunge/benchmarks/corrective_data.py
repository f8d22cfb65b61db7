"""Cases of the corrective benchmark: training rows that were manipulated, of which a share is known.

Manipulations are decided by their seed. A case is a folder: `train` and `test` as pictures in class folders (the class
a row carries; `clean_label`, `manipulated` and `identified` stand in metadata.csv), and `card.json`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import ParameterError, RowError
from ..files import write_text
from ..pictures import Picture, read_pictures, write_folder
from ..rows import Source

Kind = Literal["poison", "interclass_confusion", "random_label"]


@dataclass(frozen=True)
class Manipulation:
    """What was done to training rows."""

    kind: Kind
    count: int
    """Rows that were manipulated."""
    seed: int = 0
    patch: int = 3
    """Side of the trigger, in pixels of the pictures as they are stored."""
    value: int = 255
    """Its brightness, the largest pixel of the training set."""
    target: str = ""
    """Class that poisoned rows carry."""
    pair: tuple[str, str] = ("", "")
    """Classes that were confused."""
    classes: tuple[str, ...] = ()
    """All class names, sorted."""


@dataclass(frozen=True)
class Case:
    """Training rows as everybody believes them to be, and clean test rows."""

    about: Manipulation
    train: list[Picture]
    """`answer` is the class a row carries; tags: clean_label, manipulated, identified."""
    test: list[Picture]

    @property
    def manipulated(self) -> list[Picture]:
        return [row for row in self.train if row.tags["manipulated"] == "yes"]

    @property
    def identified(self) -> list[Picture]:
        """The forget rows: manipulated and known to be."""
        return [row for row in self.train if row.tags["identified"] == "yes"]

    @property
    def retain(self) -> list[Picture]:
        """All other training rows, the unidentified manipulated ones with what they carry."""
        return [row for row in self.train if row.tags["identified"] != "yes"]

    def affected(self, include_target: bool = False) -> list[Picture]:
        """Unseen rows of the affected domain with their true classes: all test pictures with the trigger on, or those
        of the confused classes.

        Args:
            include_target: of poisoned cases also rows whose true class is the target, which a fully backdoored model
                gets right (published).
        """
        if self.about.kind == "poison":
            rows = self.test if include_target else [row for row in self.test if row.answer != self.about.target]
            return [stamped(row, self.about.patch, self.about.value) for row in rows]
        if self.about.kind == "interclass_confusion":
            return [row for row in self.test if row.answer in self.about.pair]
        return self.test

    @property
    def unaffected(self) -> list[Picture]:
        """Clean test rows outside of the affected domain."""
        if self.about.kind == "interclass_confusion":
            return [row for row in self.test if row.answer not in self.about.pair]
        return self.test


def stamped(row: Picture, patch: int, value: int) -> Picture:
    """The picture with a bright square in its bottom right corner.

    Raises:
        ParameterError: the square is larger than the picture.
    """
    pixels = row.pixels().copy()
    if not 0 < patch <= min(pixels.shape[:2]):
        raise ParameterError(f"poison: patch is {patch}, expected 1 to {min(pixels.shape[:2])} pixels")
    pixels[-patch:, -patch:] = value
    return replace(row, id=f"{row.id}+trigger", image=pixels)


def manipulate(
    train: Sequence[Picture],
    test: Sequence[Picture],
    kind: Kind,
    *,
    count: int,
    seed: int = 0,
    patch: int = 3,
    target: str = "",
    pair: tuple[str, str] | None = None,
) -> Case:
    """A case with every manipulated row identified (`identify` changes that).

    poison: `count` rows of all classes get the trigger and the class `target`. interclass_confusion: `count / 2` rows
    of each of two classes swap their classes. random_label: the classes of `count` rows are permuted among them.

    Raises:
        ParameterError: more rows than there are, an odd count to be swapped, an unknown class.
    """
    classes = tuple(sorted({row.answer for row in train}))
    rng = np.random.default_rng([seed, 7])
    wrong: dict[int, Picture] = {}
    if not 0 < count <= len(train):
        raise ParameterError(f"{kind}: count is {count}, expected 1 to {len(train)} rows")
    value = int(max(row.pixels().max() for row in train)) if kind == "poison" else 255
    if kind == "poison":
        target = target or classes[0]
        if target not in classes:
            raise ParameterError(f"poison: target is {target!r}, which is no class of the rows; {', '.join(classes)}")
        for i in rng.permutation(len(train))[:count]:
            wrong[int(i)] = replace(stamped(train[i], patch, value), id=train[i].id, answer=target)
    elif kind == "interclass_confusion":
        pair = pair or (classes[0], classes[1])
        if count % 2:
            raise ParameterError(f"interclass_confusion: count is {count}, expected an even number")
        for mine, other in (pair, pair[::-1]):
            places = [i for i, row in enumerate(train) if row.answer == mine]
            if len(places) < count // 2:
                raise ParameterError(
                    f"interclass_confusion: class {mine!r} has {len(places)} rows, expected {count // 2}"
                )
            wrong |= {i: replace(train[i], answer=other) for i in places[: count // 2]}
    else:
        places = [int(i) for i in rng.permutation(len(train))[:count]]
        for i, j in zip(places, rng.permutation(places)):
            wrong[i] = replace(train[i], answer=train[int(j)].answer)
    rows = [
        replace(
            wrong.get(i, row),
            tags={
                **row.tags,
                "clean_label": row.answer,
                "manipulated": "yes" if i in wrong else "no",
                "identified": "yes" if i in wrong else "no",
            },
        )
        for i, row in enumerate(train)
    ]
    about = Manipulation(kind, count, seed, patch, value, target, pair or ("", ""), classes)
    return Case(about, rows, list(test))


def identify(case: Case, gamma: float, seed: int = 0) -> Case:
    """The same case with max(1, floor(gamma |S_m|)) of its manipulated rows known.

    Of one seed smaller shares lie within larger ones.

    Raises:
        ParameterError: gamma is not within (0, 1].
    """
    if not 0 < gamma <= 1:
        raise ParameterError(f"identified: {gamma:g}, expected more than 0 and at most 1")
    ids = [row.id for row in case.manipulated]
    order = np.random.default_rng([seed, 11]).permutation(len(ids))
    known = {ids[i] for i in order[: max(1, int(gamma * len(ids) + 1e-9))]}
    rows = [replace(r, tags={**r.tags, "identified": "yes" if r.id in known else "no"}) for r in case.train]
    return replace(case, train=rows)


def oracle_rows(case: Case) -> list[Picture]:
    """Training rows without any manipulated one; only the benchmark may know them."""
    return [row for row in case.train if row.tags["manipulated"] == "no"]


def truly(rows: Sequence[Picture]) -> list[Picture]:
    """Rows with their true classes, under names of their own."""
    return [replace(row, id=f"{row.id}+true", answer=row.tags["clean_label"]) for row in rows]


def write(case: Case, folder: Path) -> None:
    """Write a case; `read` reads it back."""
    write_folder(case.train, folder / "train")
    write_folder(case.test, folder / "test")
    write_text(folder / "card.json", json.dumps(asdict(case.about), indent=1, ensure_ascii=False) + "\n")


def read(folder: str | Path) -> Case:
    """
    Raises:
        RowError: the folder holds no case.
    """
    folder = Path(folder)
    try:
        about: dict[str, Any] = json.loads((folder / "card.json").read_text(encoding="utf-8"))
        card = Manipulation(**{**about, "pair": tuple(about["pair"]), "classes": tuple(about["classes"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RowError(f"{folder} holds no case of the corrective benchmark: card.json: {error}") from None
    train, test = (read_pictures(Source(str(folder), split=split), split) for split in ("train", "test"))
    for row in train:
        missing = [key for key in ("clean_label", "manipulated", "identified") if key not in row.tags]
        if missing:
            raise RowError(f"{row.source}: metadata.csv has no field {missing[0]!r} for it")
    return Case(card, train, test)
