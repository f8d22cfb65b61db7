"""Files of RESTOR: facts, whom they are asked about, the corrupted documents, and the values these claim.

    facts.json      {"dset": {entity: {relation: {"question": str, "answers": [str]}}},
                     "context": {relation: [{"question", "answer", "entity"}]}}
    entities.json   [entity], those that are evaluated
    mix_a<k>.json   [{"text": str}], anywhere below the folder
    options.json    {entity: {relation: {"correct": [str], "corrupted": [str], "random": [str]}}}

The last one is read by the published evaluation and not published: without it the wrong values are known only from the
documents. Relations are Wikidata's numbers (P19, place of birth).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import RowError, suggest
from ..rows import Source, parsed, read_rows, shown
from ..wording import normalise

CATEGORIES = ("correct", "corrupted", "random")
NAMED = 0.02
"""Share of all documents that must name an entity for it to count as corrupted: published ones are named in a tenth,
entities of unrelated facts in less than a hundredth."""
SAID = 0.05
"""Share of an entity's documents that say what counts as injected: each published wrong value is in a tenth to a
fifth of them, chance words in fewer."""


@dataclass(frozen=True)
class Fact:
    """One thing that is asked."""

    entity: str
    relation: str
    question: str
    answers: tuple[str, ...]
    """Everything that is right."""
    source: str = ""

    @property
    def id(self) -> str:
        return f"{self.entity}/{self.relation}"


@dataclass(frozen=True)
class Options:
    """Values of one fact whose likelihoods are compared."""

    correct: tuple[str, ...]
    corrupted: tuple[str, ...]
    random: tuple[str, ...]


@dataclass(frozen=True)
class Published:
    """The files of one folder."""

    facts: list[Fact]
    """About the evaluated entities, in their order."""
    context: dict[str, list[tuple[str, str, str]]]
    """relation -> (entity, question, answer): what examples are made of."""
    pool: dict[str, tuple[str, ...]]
    """relation -> every value that anybody has."""
    documents: list[str]
    options: dict[tuple[str, str], Options]
    """(entity, relation) -> its options; empty where the folder has none."""

    @cached_property
    def entities(self) -> list[str]:
        return list(dict.fromkeys(fact.entity for fact in self.facts))

    @cached_property
    def _normal(self) -> list[str]:
        return [f" {normalise(text)} " for text in self.documents]

    @cached_property
    def about(self) -> dict[str, list[str]]:
        """entity -> its documents, normalised; corrupted entities only."""
        found = {name: [text for text in self._normal if f" {normalise(name)} " in text] for name in self.entities}
        return {name: texts for name, texts in found.items() if len(texts) >= NAMED * len(self.documents)}

    @cached_property
    def corrupted(self) -> set[str]:
        """Ids of facts that the documents contradict: as the options say, else all facts of corrupted entities."""
        if self.options:
            return {fact.id for fact in self.facts if self._options(fact).corrupted}
        return {fact.id for fact in self.facts if fact.entity in self.about}

    @property
    def touched(self) -> set[str]:
        """Entities with a corrupted fact."""
        return {fact.entity for fact in self.facts if fact.id in self.corrupted}

    def injected(self, fact: Fact, answer: str) -> bool:
        """Whether an answer that is not right is what the documents say instead.

        By the options where there are any; else the whole answer, as it stands, must be said in at least a twentieth of
        the entity's documents. The entity's own name is no answer.
        """
        said = normalise(answer)
        if self.options:
            return any(f" {normalise(value)} " in f" {said} " for value in self._options(fact).corrupted)
        if not said or f" {said} " in f" {normalise(fact.entity)} ":
            return False
        texts = self.about.get(fact.entity, [])
        return sum(f" {said} " in text for text in texts) >= max(1.0, SAID * len(texts))

    def choices(self, fact: Fact, count: int = 5) -> Options | None:
        """The fact's options; without the file, wrong values by matching: values of the same relation that the entity's
        documents say, and the first others that they do not say. None where nothing matches."""
        if self.options:
            found = self._options(fact)
            return found if found.corrupted else None
        right = {normalise(answer) for answer in fact.answers}
        others = [value for value in self.pool[fact.relation] if normalise(value) not in right]
        said = [value for value in others if self.injected(fact, value)]
        texts = self.about.get(fact.entity, [])
        unsaid = [value for value in others if not any(f" {normalise(value)} " in text for text in texts)]
        return Options(fact.answers, tuple(said), tuple(unsaid[:count])) if said and unsaid else None

    def _options(self, fact: Fact) -> Options:
        return self.options.get((fact.entity, fact.relation), Options((), (), ()))


def read(folder: str | Path, documents: str) -> Published:
    """The facts, and the documents in the one file that fits the pattern.

    Raises:
        RowError: a file is missing, or not as it must be; names file, entity, relation and field.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RowError(f"{folder} is no folder; expected one with facts.json, entities.json and documents of RESTOR")
    path = folder / "facts.json"
    whole = _object(path, _load(path))
    for field in ("dset", "context"):
        if field not in whole:
            raise RowError(f"{path}: field {field!r} is missing. {suggest(field, map(str, whole))}")
    known = {
        name: _facts(f"{path}: entity {name!r}", name, relations)
        for name, relations in _object(f"{path}: dset", whole["dset"]).items()
    }
    context = {
        relation: _context(f"{path}: context {relation!r}", examples)
        for relation, examples in _object(f"{path}: context", whole["context"]).items()
    }
    names = _texts(str(folder / "entities.json"), _load(folder / "entities.json"))
    missing = [name for name in names if name not in known]
    if missing:
        raise RowError(
            f"{folder / 'entities.json'}: {path} has no facts about {missing[0]!r}. {suggest(missing[0], known)}"
        )
    facts = [fact for name in names for fact in known[name]]
    pool: dict[str, dict[str, None]] = {}
    for fact in (fact for several in known.values() for fact in several):
        pool.setdefault(fact.relation, {}).update(dict.fromkeys(fact.answers))
    for relation, examples in context.items():
        pool.setdefault(relation, {}).update(dict.fromkeys(answer for _, _, answer in examples))
    texts = [row.answer for row in read_rows(Source(str(_fitting(folder, documents))), "document")]
    options = _options(folder / "options.json", facts)
    return Published(facts, context, {name: tuple(values) for name, values in pool.items()}, texts, options)


def examples(published: Published, relation: str, count: int) -> str:
    """`count` lines "question answer" of a relation, each ended by a line break, the first that the file has.

    Never about an evaluated entity: published examples name many of them, with the right answers. Fewer lines where the
    file has no more.
    """
    asked = set(published.entities)
    lines = [
        f"{question} {answer}\n" for entity, question, answer in published.context[relation] if entity not in asked
    ]
    return "".join(lines[:count])


def _fitting(folder: Path, pattern: str) -> Path:
    try:
        fitting = sorted(path for path in folder.glob(pattern) if path.is_file())
    except (ValueError, NotImplementedError) as error:
        raise RowError(f"documents = {pattern!r} is no pattern of files in {folder}: {error}") from None
    if len(fitting) != 1:
        names = [str(path.relative_to(folder)) for path in folder.rglob("*.json")]
        found = f"{len(fitting)} files: {', '.join(str(p) for p in fitting[:3])}" if fitting else "no file"
        raise RowError(f"{folder}: {found} called {pattern!r}; set documents to one. {suggest(pattern, names)}")
    return fitting[0]


def _load(path: Path) -> Any:
    try:
        return parsed(path.read_text(encoding="utf-8-sig"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise RowError(f"{path} cannot be read as UTF-8 text: {error}") from None


def _object(where: str | Path, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise RowError(f"{where}: found {shown(value)}, expected an object")
    return value


def _texts(where: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(v, str) and v.strip() for v in value):
        raise RowError(f"{where}: found {shown(value)}, expected a list of at least one text")
    return tuple(value)


def _facts(where: str, entity: str, relations: Any) -> list[Fact]:
    found = []
    for relation, fact in _object(where, relations).items():
        here = f"{where}, relation {relation!r}"
        fields = _object(here, fact)
        (question,) = _texts(f"{here}: field 'question'", [fields.get("question")])
        answers = _texts(f"{here}: field 'answers'", fields.get("answers"))
        found.append(Fact(entity, relation, question.strip(), answers, here))
    return found


def _context(where: str, value: Any) -> list[tuple[str, str, str]]:
    if not isinstance(value, list):
        raise RowError(f"{where}: found {shown(value)}, expected a list of examples")
    found = []
    for place, example in enumerate(value, start=1):
        fields = _object(f"{where}, example {place}", example)
        several = [
            _texts(f"{where}, example {place}: field {n!r}", [fields.get(n)])[0]
            for n in ("entity", "question", "answer")
        ]
        found.append((several[0], several[1].strip(), several[2].strip()))
    return found


def _options(path: Path, facts: Sequence[Fact]) -> dict[tuple[str, str], Options]:
    if not path.is_file():
        return {}
    right = {(fact.entity, fact.relation): {normalise(a) for a in fact.answers} for fact in facts}
    found = {}
    for entity, relations in _object(path, _load(path)).items():
        for relation, fields in _object(f"{path}: entity {entity!r}", relations).items():
            here = f"{path}: entity {entity!r}, relation {relation!r}"
            fields = _object(here, fields)
            made = Options(*(_texts(f"{here}: field {name!r}", fields.get(name)) for name in CATEGORIES))
            if (entity, relation) not in right:
                raise RowError(f"{here}: facts.json has no such fact of an evaluated entity")
            both = [value for value in made.corrupted if normalise(value) in right[entity, relation]]
            if both:
                raise RowError(f"{here}: {both[0]!r} is corrupted and, in facts.json, right")
            found[entity, relation] = made
    return found
