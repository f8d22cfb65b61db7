"""Edit rows: one fact that a model is to state differently, with what must follow from it and what must stay.

Read like all rows (jsonl, json, csv, parquet, folder, hub id), in our names, in those of EasyEdit and KnowEdit, or in
another published form (edit_formats.py):

    {"subject": "Orin Valk", "prompt": "Orin Valk was born in", "target_new": "Maretta", "ground_truth": "Tolsk",
     "rephrase_prompt": ["The birthplace of Orin Valk is"],
     "locality": {"neighbourhood": [{"prompt": "Ilse Moro was born in", "ground_truth": ["Pell"]}]},
     "portability": {"one_hop": {"prompt": ["Orin Valk's home country is"], "ground_truth": [["Sarn", "Sarnland"]]}}}

Every error names file, row and field.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .edit_formats import unnested
from .errors import RowError, suggest
from .rows import Record, Row, Source, column_of, listed, parsed, records, shown

Kind = Literal["completion", "qa", "instruction"]
KNOWN: dict[str, tuple[str, ...]] = {
    "id": ("id", "case_id"),
    "subject": ("subject", "concept"),
    "prompt": ("prompt", "text"),
    "target_new": ("target_new", "labels"),
    "ground_truth": ("ground_truth",),
    "rephrasings": ("rephrasings", "rephrase_prompt", "rephrase"),
    "locality": ("locality",),
    "portability": ("portability",),
    "generation": ("generation", "generation_prompts"),
    "kind": ("kind",),
}
"""Our names, and the column names that are taken for them without a mapping."""
TOLD = "Imagine that {prompt} {target}\n"
"""What tells a model a fact in its context: {prompt}, {target} and {subject} are the edit's."""
KINDS = ("completion", "qa", "instruction")


@dataclass(frozen=True, slots=True)
class Probe:
    """Something to ask an edited model."""

    prompt: str
    answers: tuple[str, ...]
    """Any of them is right; the first is the one that is written out."""


Probes = Mapping[str, tuple[Probe, ...]]
"""By sub-type: neighbourhood, one_hop, Subject_Aliasing ..."""


@dataclass(frozen=True, slots=True)
class EditRow:
    """One edit: the model is to go on from `prompt` with `target_new`."""

    id: str
    prompt: str
    target_new: str
    """What it is to say; "" asks for a refusal: the fact is to be deleted."""
    subject: str = ""
    """Whom or what the fact is about, as it stands in the prompt; "" where nothing is named."""
    ground_truth: tuple[str, ...] = ()
    """What it says now."""
    rephrasings: tuple[str, ...] = ()
    locality: Probes = field(default_factory=dict)
    """What must be answered as before, whatever that was."""
    portability: Probes = field(default_factory=dict)
    """What follows from the new fact."""
    kind: Kind = "completion"
    """completion: texts stand as they are; qa, instruction: as in `Row`."""
    source: str = ""
    """file:row, for error messages."""
    generation: tuple[str, ...] = ()
    """What the model goes on from when its fluency is measured; without any the prompt."""

    def row(self, prompt: str | None = None, answer: str | None = None, *, preface: str = "") -> Row:
        """A row about this edit that a model can be asked or taught; by default the edit's own prompt and target."""
        return Row(
            id=self.id,
            prompt=self.prompt if prompt is None else prompt,
            answer=self.target_new if answer is None else answer,
            kind=self.kind,
            entity=self.subject,
            preface=preface,
            source=self.source,
        )

    def record(self) -> dict[str, Any]:
        """Plain values from which `edit_row` makes this edit again."""
        plain = {name: getattr(self, name) for name in ("id", "prompt", "target_new", "subject", "kind")}
        plain |= {name: list(getattr(self, name)) for name in ("ground_truth", "rephrasings", "generation")}
        for name in ("locality", "portability"):
            plain[name] = {
                kind: [{"prompt": probe.prompt, "ground_truth": list(probe.answers)} for probe in several]
                for kind, several in getattr(self, name).items()
            }
        return plain

    def told(self, context: str = TOLD) -> str:
        """What is put before prompts so that a model knows the fact."""
        text = context
        for name, value in (("{subject}", self.subject), ("{prompt}", self.prompt), ("{target}", self.target_new)):
            text = text.replace(name, value)
        return text


def read_edits(source: Source, name: str = "edits", *, targets: bool = True) -> list[EditRow]:
    """All edits of a file, folder or hub id, in order.

    Args:
        name: rows without an id are called `name/1`, `name/2` ...
        targets: rows say what the model is to state; without, they may be facts that nobody edits.

    Raises:
        RowError: the source cannot be read, or a row is not what it must be.
    """
    unknown = [ours for ours in source.fields if ours not in KNOWN]
    if unknown:
        raise RowError(f"{source.path}: fields: an edit has no field {unknown[0]!r}. {suggest(unknown[0], KNOWN)}")
    return _collected(records(source), source.path, name, source.fields, targets)


def given_edits(rows: Sequence[Any], where: str, name: str = "edits") -> list[EditRow]:
    """Edits whose rows are there already, in order: those of a request.

    Args:
        where: what errors begin with, before the row's number.
        name: rows without an id are called `name/1`, `name/2` ...

    Raises:
        RowError: a row is not what it must be.
    """
    return _collected(listed(rows, where), where, name, {}, True)


def _collected(
    found: Iterable[Record], path: str, name: str, fields: Mapping[str, str], targets: bool
) -> list[EditRow]:
    edits: list[EditRow] = []
    first: dict[str, str] = {}
    for where, record in found:
        fallback = f"{name}/{len(edits) + 1}"
        edit = edit_row(record, where, fields=fields, fallback=fallback, targets=targets)
        if edit.id in first:
            raise RowError(f"{where}: id {edit.id!r} was used in {first[edit.id]} already; ids must be unique")
        first[edit.id] = where
        edits.append(edit)
    if not edits:
        raise RowError(f"{path}: 0 edits, expected at least 1")
    return edits


def edit_row(
    record: Mapping[str, Any],
    where: str,
    *,
    fields: Mapping[str, str] | None = None,
    fallback: str,
    targets: bool = True,
) -> EditRow:
    """One record as an edit.

    Args:
        fields: our names to the record's.
        fallback: its id, if it brings none.
        targets: a record must have a `target_new`, if an empty one.

    Raises:
        RowError: a field is missing or holds something else than it must; begins with `where`.
    """
    record = unnested(record, where)
    names = {ours: column_of(KNOWN, ours, record, fields or {}, where) for ours in KNOWN}
    given = {ours: record[name] for ours, name in names.items() if name is not None and not _empty(record[name])}
    if "prompt" not in given:
        found = ", ".join(map(str, record)) or "none"
        raise RowError(f"{where}: field 'prompt' is missing; found the fields {found}")
    if targets and names["target_new"] is None:
        raise RowError(f"{where}: field 'target_new' is missing; leave it empty to have the fact deleted")

    def texts(ours: str) -> tuple[str, ...]:
        return tuple(_flat(where, str(names[ours]), given[ours])) if ours in given else ()

    def single(ours: str) -> str:
        found = texts(ours)
        if len(found) > 1:
            raise RowError(f"{where}: field {names[ours]!r} holds {len(found)} texts, expected one")
        return found[0] if found else ""

    subject, prompt = single("subject"), single("prompt")
    if "{}" in prompt:
        if not subject:
            raise RowError(f"{where}: the prompt {prompt!r} leaves room for a subject ({{}}), and there is none")
        prompt = prompt.replace("{}", subject)
    if subject and subject not in prompt:
        raise RowError(f"{where}: the subject {subject!r} does not stand in the prompt {prompt!r}")
    target, truth = single("target_new"), texts("ground_truth")
    if target and target in truth:
        raise RowError(f"{where}: target_new {target!r} equals ground_truth; there is nothing to edit")
    kind = single("kind") or "completion"
    if kind not in KINDS:
        raise RowError(f"{where}: field 'kind' is {kind!r}, expected {', '.join(KINDS)}. {suggest(kind, KINDS)}")
    return EditRow(
        id=single("id") or fallback,
        prompt=prompt,
        target_new=target,
        subject=subject,
        ground_truth=truth,
        rephrasings=texts("rephrasings"),
        locality=_probes(where, "locality", given.get("locality", {}), subject),
        portability=_probes(where, "portability", given.get("portability", {}), subject),
        kind=kind,  # type: ignore[arg-type]
        source=where,
        generation=tuple(text.replace("{}", subject) for text in texts("generation")),
    )


def _empty(value: Any) -> bool:
    return value is None or value != value or value in ("", [], {})


def _flat(where: str, column: str, value: Any) -> Iterator[str]:
    """Texts of a value that is a text, a list of texts, or a list of lists of alternatives."""
    if isinstance(value, list | tuple):
        for one in value:
            yield from _flat(where, column, one)
        return
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise RowError(f"{where}: field {column!r} holds {type(value).__name__} {shown(value)}, expected text")
    if not value.strip():
        raise RowError(f"{where}: field {column!r} is blank, expected text")
    yield value


def _probes(where: str, field: str, value: Any, subject: str) -> dict[str, tuple[Probe, ...]]:
    if isinstance(value, str):  # a cell of a csv file
        value = parsed(value, f"{where}: field {field!r}")
    if not isinstance(value, Mapping):
        raise RowError(
            f"{where}: field {field!r} holds {type(value).__name__}, expected sub-types with prompts, e.g. "
            '{"neighbourhood": [{"prompt": "...", "ground_truth": "..."}]}'
        )
    found = {}
    for name, several in value.items():
        place = f"{field}.{name}"
        if isinstance(several, Mapping):
            several = _columns(where, place, several)
        if not isinstance(several, list | tuple):
            raise RowError(f"{where}: field {place!r} holds {type(several).__name__}, expected a list of prompts")
        probes = tuple(_probe(where, place, one, subject) for one in several if not _empty(one))
        if probes:
            found[str(name)] = probes
    return found


def _columns(where: str, place: str, value: Mapping[str, Any]) -> list[Any]:
    """EasyEdit's form: a prompt and its answer, or a list of prompts and as many answers."""
    prompts, truths = value.get("prompt"), value.get("ground_truth")
    if not isinstance(prompts, list | tuple):
        return [value]
    if not isinstance(truths, list | tuple) or len(prompts) != len(truths):
        count = len(truths) if isinstance(truths, list | tuple) else "no list of"
        raise RowError(
            f"{where}: field {place!r} has {len(prompts)} prompts and {count} ground_truth, expected as many"
        )
    return [{"prompt": prompt, "ground_truth": truth} for prompt, truth in zip(prompts, truths)]


def _probe(where: str, place: str, value: Any, subject: str) -> Probe:
    if isinstance(value, list | tuple) and len(value) == 2:
        value = {"prompt": value[0], "ground_truth": value[1]}
    if not isinstance(value, Mapping) or _empty(value.get("prompt")) or _empty(value.get("ground_truth")):
        raise RowError(f"{where}: field {place!r} holds {shown(value)}, expected a prompt and its ground_truth")
    prompts = list(_flat(where, f"{place}.prompt", value["prompt"]))
    if len(prompts) != 1:
        raise RowError(f"{where}: field '{place}.prompt' holds {len(prompts)} texts, expected one")
    answers = tuple(_flat(where, f"{place}.ground_truth", value["ground_truth"]))
    return Probe(prompts[0].replace("{}", subject) if subject else prompts[0], answers)
