"""RWKU's published data: which people there are, and their probes, texts and utility slices.

Read from the hub (`jinzhuoran/RWKU`, one configuration per set), from the processed folder with one folder per target

    Target/<n>_<Name_with_underscores>/{intro, forget_level1, forget_level2, forget_level3, neighbor_level1,
        neighbor_level2, forget_mia, retain_mia, retain_mmlu, retain_bbh, truthful, triviaqa, fluency, passage,
        positive, negative, pair, reject}.json

or from a folder that holds these files for several targets (`All`, `Batch/1-10`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ParameterError, RowError, suggest
from ..rows import Record, Source, parsed, records, shown

TYPES = (
    "prefix injection",
    "affirmative suffix",
    "role play",
    "multiple choice",
    "reverse query",
    "synonym manipulation",
    "context hint",
    "incontext learning",
    "cross lingual",
)
"""What is done to a question of level 3, as the data spells it."""
SPELLINGS = {
    "role playing": "role play",
    "background hint": "context hint",
    "in context learning": "incontext learning",
}
"""How the paper spells them; `cross lingual (French)` is one type with the others."""


class Part(NamedTuple):
    """One set of the data."""

    file: str
    config: str
    fields: Mapping[str, str]
    """Required fields, and of what kind each is: text, texts, place, options."""
    split: str = "test"


_PROBE = {"query": "text", "answer": "text", "level": "level", "subject": "text"}
_TEXT = {"text": "text", "subject": "text"}
PARTS = {
    "targets": Part("intro", "forget_target", {"target": "text"}, "train"),
    "forget_level1": Part("forget_level1", "forget_level1", _PROBE),
    "forget_level2": Part("forget_level2", "forget_level2", _PROBE),
    "forget_level3": Part("forget_level3", "forget_level3", {**_PROBE, "type": "text"}),
    "neighbor_level1": Part("neighbor_level1", "neighbor_level1", _PROBE),
    "neighbor_level2": Part("neighbor_level2", "neighbor_level2", _PROBE),
    "mia_forget": Part("forget_mia", "mia_forget", _TEXT),
    "mia_retain": Part("retain_mia", "mia_retain", _TEXT),
    "general": Part(
        "retain_mmlu", "utility_general", {"question": "text", "choices": "texts", "answer": "place", "task": "text"}
    ),
    "reason": Part("retain_bbh", "utility_reason", {"question": "text", "answer": "text", "cot": "text"}),
    "truthfulness": Part(
        "truthful",
        "utility_truthfulness",
        {"question": "text", "mc1_targets": "options", "mc2_targets": "options"},
    ),
    "factuality": Part("triviaqa", "utility_factuality", {"question": "text", "answers": "texts"}),
    "fluency": Part("fluency", "utility_fluency", {"instruction": "text"}),
    "passage": Part("passage", "train_original_passage", _TEXT, "train"),
    "positive": Part("positive", "train_positive_llama3", _TEXT, "train"),
    "negative": Part("negative", "train_negative_llama3", _TEXT, "train"),
    "pair": Part("pair", "train_pair_llama3", {"prompt": "text", "response": "texts", "subject": "text"}, "train"),
    "reject": Part("reject", "train_refusal_llama3", {"instruction": "text", "output": "text"}, "train"),
}
_NUMBERED = re.compile(r"(\d+)_(.+)")


@dataclass(frozen=True)
class Target:
    """Somebody to be forgotten."""

    number: int
    """Place in the published order, from 1."""
    name: str
    intro: str = ""
    folder: Path | None = None
    """Where the target's own files are; None where files hold several targets."""


@dataclass
class Published:
    """The data at one place; nothing is read before it is asked for."""

    source: str
    """Folder, or hub id."""
    _by_subject: dict[str, dict[str, list[Record]]] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def targets(self) -> list[Target]:
        """Everybody, in the published order: by number, not by the folders' names as text.

        Raises:
            RowError: the place holds no such data.
        """
        path = Path(self.source)
        if not path.exists() and not path.is_absolute() and not self.source.startswith("."):
            return _numbered(self._records("targets"))
        if not path.is_dir():
            raise RowError(f"{path} is no folder; expected one in RWKU's published layout, or the hub id")
        inside = path / "Target" if (path / "Target").is_dir() else path
        folders = {f: m for f in inside.iterdir() if f.is_dir() and (m := _NUMBERED.fullmatch(f.name))}
        if folders:
            found = [_of_folder(folder, int(m[1]), m[2]) for folder, m in folders.items()]
            found.sort(key=lambda target: target.number)
            for one, next_ in pairwise(found):
                if one.number == next_.number:
                    raise RowError(f"{inside}: {one.name} and {next_.name} are both target {one.number}")
            return found
        if (path / "forget_level1.json").is_file():
            if named := _NUMBERED.fullmatch(path.name):
                return [_of_folder(path, int(named[1]), named[2])]
            if (path / "intro.json").is_file():
                return _numbered(self._records("targets"))
            subjects = dict.fromkeys(str(record["subject"]) for _, record in self._records("forget_level1"))
            return [Target(number, name) for number, name in enumerate(subjects, start=1)]
        raise RowError(
            f"{path} holds no RWKU data; expected a folder Target with folders such as 1_Stephen_King, one of these, "
            "or a folder with forget_level1.json and the like"
        )

    def select(self, asked: str) -> list[Target]:
        """Some of the targets.

        Args:
            asked: `all`, a number, a range (`1-10`), a name, or several of these with commas.

        Raises:
            ParameterError: there is no such target.
        """
        everybody = self.targets
        if asked.strip() == "all":
            return everybody
        by_name = {target.name.casefold(): target for target in everybody}
        by_number = {target.number: target for target in everybody}
        if asked.strip().casefold() in by_name:  # a name may hold a comma
            return [by_name[asked.strip().casefold()]]
        found: dict[int, Target] = {}
        for piece in (piece.strip() for piece in asked.split(",")):
            if piece.casefold() in by_name:
                chosen = [by_name[piece.casefold()]]
            elif span := re.fullmatch(r"(\d+)(?:\s*-\s*(\d+))?", piece):
                first, last = int(span[1]), int(span[2] or span[1])
                missing = [n for n in range(first, last + 1) if n not in by_number]
                if missing or first > last:
                    numbers = f"{min(by_number)} to {max(by_number)}"
                    raise ParameterError(f"targets: there is no target {piece!r}; {self.source} has {numbers}")
                chosen = [by_number[n] for n in range(first, last + 1)]
            else:
                names = [target.name for target in everybody]
                raise ParameterError(
                    f"targets: {piece!r} is no number, range or name of {self.source}. {suggest(piece, names)}"
                )
            found |= {target.number: target for target in chosen}
        return [found[number] for number in sorted(found)]

    def read(self, part: str, targets: Sequence[Target]) -> list[tuple[Target, str, dict[str, Any]]]:
        """(target, file and row, columns) of every row about these targets, checked; fields we do not know are kept.

        Raises:
            RowError: no such file, a field missing or of another kind, a level or type that cannot be; names file,
                row and field.
        """
        found = []
        for target in targets:
            for where, record in self._about(part, target):
                for name, kind in PARTS[part].fields.items():
                    if name not in record:
                        raise RowError(f"{where}: field {name!r} is missing. {suggest(name, map(str, record))}")
                    _CHECKS[kind](where, name, record[name], part)
                found.append((target, where, record))
        return found

    def _about(self, part: str, target: Target) -> Iterator[Record]:
        if target.folder is not None:
            yield from self._records(part, target.folder)
            return
        if part not in self._by_subject:
            grouped: dict[str, list[Record]] = {}
            for where, record in self._records(part):
                grouped.setdefault(str(record.get("subject")), []).append((where, record))
            self._by_subject[part] = grouped
        yield from self._by_subject[part].get(target.name, [])

    def _records(self, part: str, folder: Path | None = None) -> Iterator[Record]:
        file, config, _, split = PARTS[part]
        place = folder or Path(self.source)
        if not place.is_dir():
            yield from records(Source(self.source, config=config, split=split))
            return
        path = place / f"{file}.json"
        if not path.is_file():
            names = [f.name for f in place.glob("*.json")]
            raise RowError(
                f"{place} has no {path.name}, which RWKU's {config} is read from. {suggest(path.name, names)}"
            )
        yield from records(Source(str(path)))


def _numbered(found: Iterator[Record]) -> list[Target]:
    targets = []
    for number, (where, record) in enumerate(found, start=1):
        _text(where, "target", record.get("target"), "")
        targets.append(Target(number, record["target"], str(record.get("intro") or "")))
    return targets


def _of_folder(folder: Path, number: int, name: str) -> Target:
    """The published `intro.json` of a target is an object by itself, or a list of one."""
    path = folder / "intro.json"
    intro = ""
    if path.is_file():
        content = parsed(path.read_text(encoding="utf-8-sig"), str(path))
        one = content[0] if isinstance(content, list) and len(content) == 1 else content
        if not isinstance(one, dict):
            raise RowError(f"{path}: expected an object with target and intro, found {type(content).__name__}")
        _text(str(path), "target", one.get("target"), "")
        name, intro = one["target"], str(one.get("intro") or "")
    return Target(number, name.replace("_", " "), intro, folder)


def attack_type(where: str, value: str) -> str:
    """One of `TYPES`, however it is spelt: capitals, hyphens, the paper's names, a language in brackets.

    Raises:
        RowError: it is none of the nine.
    """
    plain = re.sub(r"[\s_-]+", " ", re.sub(r"\(.*\)", "", value)).strip().casefold()
    plain = SPELLINGS.get(plain, plain)
    if plain not in TYPES:
        raise RowError(f"{where}: field 'type' is {value!r}, which is none of RWKU's nine. {suggest(plain, TYPES)}")
    return plain


# --- checks ----------------------------------------------------------------------------------------------------------


def _text(where: str, name: str, value: Any, _: str) -> None:
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise RowError(f"{where}: field {name!r} holds {shown(value)}, expected text")


def _texts(where: str, name: str, value: Any, _: str) -> None:
    if not isinstance(value, list | tuple) or not value or not all(isinstance(v, str) and v.strip() for v in value):
        raise RowError(f"{where}: field {name!r} holds {shown(value)}, expected a list of texts")


def _place(where: str, name: str, value: Any, _: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise RowError(f"{where}: field {name!r} holds {shown(value)}, expected the place of the right choice, from 0")


def _level(where: str, name: str, value: Any, part: str) -> None:
    if str(value) != part[-1]:
        raise RowError(f"{where}: field {name!r} is {shown(value)}, expected {part[-1]!r} in {part}")


def _options(where: str, name: str, value: Any, _: str) -> None:
    choices, labels = (value.get(key) if isinstance(value, Mapping) else None for key in ("choices", "labels"))
    if not isinstance(choices, list | tuple) or not isinstance(labels, list | tuple) or len(choices) != len(labels):
        raise RowError(f"{where}: field {name!r} holds {shown(value)}, expected choices and as many labels")
    _texts(where, f"{name}.choices", choices, "")
    if sorted(set(labels)) != [0, 1]:
        raise RowError(f"{where}: field {name!r} has the labels {shown(labels)}, expected some 1 (true) and some 0")


_CHECKS = {"text": _text, "texts": _texts, "place": _place, "level": _level, "options": _options}
