"""Rows: what is to be forgotten, kept or asked, read from the files people bring.

jsonl, json (a list, or columns), csv, parquet, a folder of such files, or a hub id. What a row is follows from its
fields: `text` (or a line of jsonl that is a plain string); `question` and `answer`; `prompt` and `completion`; or
`messages`, whose last assistant turn is the answer. Other names are mapped with `fields`. Every error names file, row
and field.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import math
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from .errors import RowError, suggest

Message = tuple[str, str]
"""(role, content)"""

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
KNOWN = {
    "id": ("id",),
    "text": ("text",),
    "question": ("question",),
    "answer": ("answer",),
    "prompt": ("prompt",),
    "completion": ("completion",),
    "messages": ("messages",),
    "entity": ("entity", "subject"),
    "value": ("value",),
    "aliases": ("aliases",),
    "paraphrased_questions": ("paraphrased_questions", "paraphrased_question"),
    "paraphrased_answer": ("paraphrased_answer",),
    "perturbed_answers": ("perturbed_answers", "perturbed_answer"),
    "relation": ("relation",),
    "task": ("task",),
}
"""Our names, and the column names that are taken for them without a mapping."""
LISTS = ("aliases", "paraphrased_questions", "perturbed_answers")
SHAPES: tuple[tuple[str, ...], ...] = (("messages",), ("question", "answer"), ("prompt", "completion"), ("text",))
KINDS = {"messages": "chat", "question": "qa", "prompt": "completion", "text": "text"}


@dataclass(frozen=True, slots=True)
class Row:
    """One thing a model can be asked or taught.

    `prompt` is the text before the answer ("" for running text); for chat rows `messages` holds the turns before the
    answer and `prompt` their last user turn.
    """

    id: str
    answer: str
    prompt: str = ""
    messages: tuple[Message, ...] = ()
    kind: str = "qa"
    """qa (question/answer, goes through the template), completion (prompt + answer as they are), chat, text; and
    instruction: a whole user turn, put into the model's chat template or, where it has none, left as it is."""
    preface: str = ""
    """Text before all that: at the beginning of the user's turn; without a chat template, of everything."""
    opening: str = ""
    """What the model is made to begin its reply with ("Answer:"): the end of what is asked."""
    entity: str = ""
    """Whom or what the row is about: the unit over which the verdict's intervals are drawn."""
    value: str = ""
    """The short string that counts as knowing it ("Tivin"); "" means the whole answer."""
    aliases: tuple[str, ...] = ()
    """Other strings that count as the value."""
    paraphrased_prompts: tuple[str, ...] = ()
    """Held-out wordings of the prompt, never trained on."""
    paraphrased_answer: str = ""
    perturbed_answers: tuple[str, ...] = ()
    """Wrong answers in the form of the right one."""
    relation: str = ""
    task: str = ""
    """qa, cloze, multi_hop, passage ...: the format, for the skill checks."""
    source: str = ""
    """file:row, for error messages."""

    noun: ClassVar[str] = "questions"
    """What several rows are called where a report speaks of them."""
    closed: ClassVar[bool] = False
    """The answer is one name of a closed list, said exactly or not at all."""

    def content(self) -> dict[str, Any]:
        """Everything that the row is, as plain JSON values; where it was read does not count."""
        return asdict(replace(self, source=""))

    def shown(self) -> dict[str, str]:
        """What a report shows of what is asked."""
        return {"question": self.prompt}


@dataclass(frozen=True)
class Source:
    """Where a row set comes from."""

    path: str
    """File, folder or hub id."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Our field name to the column's name."""
    config: str | None = None
    """Configuration of a hub data set, or of a folder that has its files where the hub has them."""
    split: str = "train"
    """Split of a hub data set, or of such a folder."""
    entity_every: int | None = None
    """Rows come in blocks of so many about one entity (TOFU: 20)."""
    where: Mapping[str, str | list[str]] = field(default_factory=dict)
    """Only rows whose columns have these values, or one of several."""
    unless: Mapping[str, str | list[str]] = field(default_factory=dict)
    """No rows whose columns all have these values."""


def asked_for(rows: Sequence[Any]) -> list[Any]:
    """Rows as an audit asks for them: of running text, which has no question, what follows its first half, or its
    value where it says one, given what stands before. A text of one word stays as it is, and so do other rows."""
    return [_begun(row) if isinstance(row, Row) and row.kind == "text" and not row.prompt else row for row in rows]


def _begun(row: Row) -> Row:
    text = row.answer
    at = text.find(row.value) if row.value else -1
    if at < 0 or not text[:at].strip():
        cuts = [found.end() for found in re.finditer(r"\S\s+(?=\S)", text)]
        at = min(cuts, key=lambda cut: abs(cut - len(text) / 2), default=0)
    return replace(row, prompt=text[:at], answer=text[at:]) if at else row


def read_rows(source: Source, name: str) -> list[Row]:
    """All rows of a set, in order; nothing is dropped or cut.

    Args:
        name: of the set; rows without an id are called `name/1`, `name/2` ...

    Raises:
        RowError: the source cannot be read, or a row is not what it must be.
    """
    unknown = [ours for ours in source.fields if ours not in KNOWN]
    if unknown:
        raise RowError(f"{source.path}: fields: there is no field {unknown[0]!r} to map. {suggest(unknown[0], KNOWN)}")
    if source.entity_every is not None and source.entity_every < 1:
        raise RowError(f"{source.path}: entity_every is {source.entity_every}, expected at least 1")
    found: Iterable[Record] = records(source)
    if source.where or source.unless:
        if source.entity_every is not None:
            raise RowError(
                f"{source.path}: entity_every counts all rows of a file; it cannot stand beside where or unless"
            )
        found = picked(list(found), source, lambda one, key: one[1].get(source.fields.get(key, key)))
    return rows_of(found, name, source.path, source.fields, source.entity_every)


def picked(rows: list[Any], source: Source, value: Callable[[Any, str], Any]) -> list[Any]:
    """The rows that a source's `where` and `unless` leave; `value` gives what a row has in a column.

    Raises:
        RowError: one of the two matches nothing, or nothing is left.
    """
    for wanted, keep in ((source.where, True), (source.unless, False)):
        if wanted:
            rows = [row for row, hit in zip(rows, matching(rows, wanted, value, source.path)) if hit == keep]
    if not rows:
        raise RowError(f"{source.path}: where and unless leave 0 rows, expected at least 1")
    return rows


def matching(
    rows: Sequence[Any], wanted: Mapping[str, str | list[str]], value: Callable[[Any, str], Any], place: str
) -> list[bool]:
    """Which rows have all wanted values.

    Raises:
        RowError: none has; names the nearest value there is.
    """

    def text(row: Any, key: str) -> str:
        found = value(row, key)
        return "" if found is None else str(found)

    options = {key: [given] if isinstance(given, str) else given for key, given in wanted.items()}
    for key, given in options.items():
        there = {text(row, key) for row in rows} - {""}
        for one in given:
            if one not in there:
                raise RowError(f"{place}: no row has {key} = {one!r}. {suggest(one, there)}")
    hits = [all(text(row, key) in given for key, given in options.items()) for row in rows]
    if not any(hits):
        raise RowError(f"{place}: no row has {' and '.join(f'{k} = {v!r}' for k, v in wanted.items())} at once")
    return hits


def rows_of(
    found: Iterable[Record],
    name: str,
    where: str,
    fields: Mapping[str, str] | None = None,
    entity_every: int | None = None,
) -> list[Row]:
    """Rows of records that were read already; see `read_rows`.

    Args:
        where: what the records come from, for errors.
    """
    rows: list[Row] = []
    for place, record in found:
        row = _row(place, record, fields or {}, f"{name}/{len(rows) + 1}")
        if not row.entity:
            block = len(rows) // entity_every + 1 if entity_every else None
            row = replace(row, entity=f"{name}/block {block}" if block else row.id)
        rows.append(row)
    if not rows:
        raise RowError(f"{where}: 0 rows, expected at least 1")
    first: dict[str, str] = {}
    for row in rows:
        if row.id in first:
            raise RowError(f"{row.source}: id {row.id!r} was used in {first[row.id]} already; ids must be unique")
        first[row.id] = row.source
    return rows


def fingerprint(rows: Sequence[Row], salt: str) -> str:
    """A salted hash of what rows say, in any order; it gives away nothing about them."""
    content = sorted(json.dumps([r.prompt, r.answer, r.messages], ensure_ascii=False) for r in rows)
    return hashlib.sha256(json.dumps([salt, content], ensure_ascii=False).encode()).hexdigest()


# --- records ---------------------------------------------------------------------------------------------------------

Record = tuple[str, dict[str, Any]]
"""(where, columns)"""


def records(source: Source) -> Iterator[Record]:
    """Every row as its file has it, for data whose rows are more than a `Row`.

    Raises:
        RowError: the source cannot be read.
    """
    path = Path(source.path)
    if os.path.isfile(path):  # false where the name is too long, too
        yield from _file(path)
    elif os.path.isdir(path):
        yield from _folder(path, source.config, source.split)
    elif path.suffix in SUFFIXES or path.is_absolute() or source.path.startswith((".", "~")):
        near = [p.name for p in path.parent.glob("*") if p.suffix in SUFFIXES] if path.parent.is_dir() else []
        hint = f" {suggest(path.name, near)}" if near else ""
        raise RowError(f"data file {source.path} does not exist.{hint}")
    else:
        yield from _hub(source)


def _folder(path: Path, config: str | None, split: str) -> Iterator[Record]:
    if config is not None:
        for file in _published(path, config, split):
            yield from _file(file)
        return
    if (path / "dataset_dict.json").is_file():  # several splits saved together
        if not (path / split).is_dir():
            splits = [p.name for p in path.iterdir() if p.is_dir()]
            raise RowError(f"{path}: the saved data set has no split {split!r}. {suggest(split, splits)}")
        path = path / split
    if (path / "dataset_info.json").is_file():
        yield from _saved(path)
        return
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in SUFFIXES)
    if not files:
        raise RowError(f"folder {path} has no data files; expected {', '.join(SUFFIXES)}")
    for file in files:
        yield from _file(file)


def _published(path: Path, config: str, split: str) -> list[Path]:
    """The files of one split, laid out as hub data sets are: CONFIG/SPLIT.jsonl, or in numbered parts.

    Raises:
        RowError: there are none, or it is there in more than one format.
    """
    folder = path / config
    if not folder.is_dir():
        found = [p.name for p in path.iterdir() if p.is_dir()]
        raise RowError(f"{path} has no folder {config!r} (configuration). {suggest(config, found)}")
    part = re.compile(r"(.+?)(-\d{5}-of-(\d{5}))?")
    splits: dict[str, dict[str, list[Path]]] = {}
    whole: dict[str, int] = {}
    for file in sorted(folder.iterdir()):
        named = part.fullmatch(file.stem)
        if named and file.suffix.lower() in SUFFIXES:
            form = file.suffix.lower() + (" in parts" if named[2] else "")
            splits.setdefault(named[1], {}).setdefault(form, []).append(file)
            whole[named[1] + form] = int(named[3] or 1)
    if split not in splits:
        raise RowError(f"{folder} has no split {split!r}. {suggest(split, splits)}")
    if len(splits[split]) > 1:
        raise RowError(f"{folder} has the split {split!r} as {' and as '.join(splits[split])}; keep one of them")
    ((form, files),) = splits[split].items()
    if len(files) != whole[split + form]:
        raise RowError(f"{folder}: split {split!r} has {len(files)} of its {whole[split + form]} parts")
    return files


def listed(rows: Iterable[Any], where: str | Path) -> Iterator[Record]:
    """Rows that are there already, such as those of a request.

    Raises:
        RowError: one has no named fields; says `where` and the row's number.
    """
    for number, record in enumerate(rows, start=1):
        yield _mapping(f"{where}: row {number}", record)


def _file(path: Path) -> Iterator[Record]:
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise RowError(f"{path}: {path.suffix or 'no suffix'} is not a data format; expected {', '.join(SUFFIXES)}")
    try:
        yield from reader(path)
    except UnicodeDecodeError as error:
        raise RowError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise RowError(f"{path} cannot be read: {error.strerror or error}") from None


def _jsonl(path: Path) -> Iterator[Record]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            record = parsed(line, where)
            yield _mapping(where, {"text": record} if isinstance(record, str) else record)


class GivenTwice(ValueError):
    """A field of one object has two values."""


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object from its fields, for `json`, which would let the last of two values win silently."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise GivenTwice(f"{name!r} is given twice")
        found[name] = value
    return found


def parsed(text: str, where: str) -> Any:
    """JSON as Python values.

    Raises:
        RowError: it is none; begins with `where`.
    """
    try:
        return json.loads(text, object_pairs_hook=unique)
    except GivenTwice as error:
        raise RowError(f"{where}: {error}") from None
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise RowError(f"{where}: not JSON: {error.msg} at {place}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise RowError(f"{where}: JSON that cannot be used: {error}") from None


def _mapping(where: str, record: Any) -> Record:
    if not isinstance(record, dict):
        raise RowError(f"{where}: found {type(record).__name__}, expected an object with named fields")
    return where, record


def _json(path: Path) -> Iterator[Record]:
    text = path.read_text(encoding="utf-8-sig")
    if _is_lines(text):
        yield from _jsonl(path)
        return
    data = parsed(text, str(path))
    if isinstance(data, dict):
        lists = {name: values for name, values in data.items() if isinstance(values, list)}
        if len(lists) != len(data) or not data:
            raise RowError(f"{path}: found an object, expected a list of rows or an object of columns")
        lengths = {len(values) for values in lists.values()}
        if len(lengths) != 1:
            found = ", ".join(f"{name} {len(values)}" for name, values in lists.items())
            raise RowError(f"{path}: columns have different lengths ({found})")
        data = [dict(zip(lists, values)) for values in zip(*lists.values())]
    if not isinstance(data, list):
        raise RowError(f"{path}: found {type(data).__name__}, expected a list of rows or an object of columns")
    yield from listed(data, path)


def _is_lines(text: str) -> bool:
    """Whether a .json file holds one object a line (as the hub's often do) rather than one value."""
    first, _, rest = text.strip().partition("\n")
    if not (first.startswith("{") and rest):
        return False
    try:
        json.loads(first)
    except ValueError:
        return False
    return True


def _csv(path: Path) -> Iterator[Record]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        csv.field_size_limit(1 << 27)
        try:
            reader = csv.DictReader(file, strict=True)
            header = list(reader.fieldnames or ())
            twice = [name for name in header if header.count(name) > 1]
            if twice:
                raise RowError(f"{path}: the header names {twice[0]!r} twice; every column needs its own name")
            for number, record in enumerate(reader, start=1):
                where = f"{path}: row {number}"
                if None in record:
                    raise RowError(f"{where}: has more cells than the header names; quote cells that contain commas")
                yield where, record
        except csv.Error as error:
            raise RowError(f"{path}: line {reader.line_num}: not CSV: {error}") from None


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise RowError(f"{path}: not a readable parquet file: {str(error).splitlines()[0]}") from None
    for number, record in enumerate(table.to_pylist(), start=1):
        yield f"{path}: row {number}", record


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise RowError("reading hub data sets needs the extra: pip install 'expunge[hub]'") from None
    return datasets


def _saved(path: Path) -> Iterator[Record]:
    try:
        data = _datasets().load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise RowError(f"{path}: not a readable saved data set: {str(error).splitlines()[0]}") from None
    yield from listed(data, path)


def _hub(source: Source) -> Iterator[Record]:
    datasets = _datasets()
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.CRITICAL)  # it tells every retry; one sentence is enough
    try:
        data = datasets.load_dataset(source.path, source.config, split=source.split)
    except Exception as error:  # the library raises many kinds for unknown names, splits and no connection
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RowError(f"{source.path}: no such file or folder, and as a hub data set: {reason}") from None
    finally:
        log.setLevel(level)
    for number, record in enumerate(data, start=1):
        yield f"{source.path}: row {number}", record


def folder_of(source: str) -> Path:
    """The folder of a data set that is more than rows: itself, or that of a hub data set's json files, downloaded once.

    Raises:
        RowError: no such folder or hub id.
    """
    path = Path(source)
    if path.exists() or path.is_absolute() or source.startswith(".") or source.count("/") > 1:
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, repo_type="dataset", allow_patterns=["*.json", "*.jsonl"]))
    except Exception as error:  # the library raises many kinds for unknown names and no connection
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RowError(f"{source}: no such folder, and as a hub data set: {reason}") from None


# --- rows ------------------------------------------------------------------------------------------------------------


def _row(where: str, record: dict[str, Any], fields: Mapping[str, str], fallback: str) -> Row:
    columns = {ours: column_of(KNOWN, ours, record, fields, where) for ours in KNOWN}
    given = {ours: record[column] for ours, column in columns.items() if column is not None}
    given = {ours: value for ours, value in given.items() if not _missing(value)}
    shape = next((s for s in SHAPES if set(s) <= set(given)), None)
    if shape is None:
        half = next((s for s in SHAPES if s[0] in given), None) or next(
            (s for s in SHAPES if any(columns[ours] is not None for ours in s)), None
        )
        if half:
            ours = next(ours for ours in half if ours not in given)
            column = columns[ours]
            expected = "a list of turns" if ours == "messages" else "text"
            raise RowError(
                f"{where}: field {column or ours!r} is {'empty' if column else 'missing'}, expected {expected}"
            )
        names = [str(name) for name in record]
        found = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") or "none"
        raise RowError(
            f"{where}: found the fields {found}; expected question and answer, prompt and completion, messages, or "
            f"text. Map other names with fields, e.g. fields: {{question: {next(iter(record), 'q')}}}"
        )
    texts = {
        ours: _text(where, str(columns[ours]), value)
        for ours, value in given.items()
        if ours not in LISTS and ours != "messages"
    }
    lists = {ours: _list(where, str(columns[ours]), given[ours]) for ours in LISTS if ours in given}
    messages: tuple[Message, ...] = ()
    if shape == ("messages",):
        messages, prompt, answer = _chat(where, given["messages"])
    elif shape == ("text",):
        prompt, answer = "", texts["text"]
    else:
        prompt, answer = texts[shape[0]], texts[shape[1]]
    return Row(
        id=texts.get("id", fallback),
        answer=answer,
        prompt=prompt,
        messages=messages,
        kind=KINDS[shape[0]],
        entity=texts.get("entity", ""),
        value=texts.get("value", ""),
        aliases=lists.get("aliases", ()),
        paraphrased_prompts=lists.get("paraphrased_questions", ()),
        paraphrased_answer=texts.get("paraphrased_answer", ""),
        perturbed_answers=lists.get("perturbed_answers", ()),
        relation=texts.get("relation", ""),
        task=texts.get("task", ""),
        source=where,
    )


def column_of(
    known: Mapping[str, Sequence[str]], ours: str, record: Mapping[str, Any], fields: Mapping[str, str], where: str
) -> str | None:
    """The record's name for a field of ours: the mapped one, else the first of the known ones that it has.

    Raises:
        RowError: a mapped name that the record does not have.
    """
    if ours in fields:
        if fields[ours] not in record:
            raise RowError(
                f"{where}: fields maps {ours} to {fields[ours]!r}, which the row does not have. "
                f"{suggest(fields[ours], map(str, record))}"
            )
        return fields[ours]
    return next((name for name in known[ours] if name in record), None)


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value)) or value == "" or value == []


def _text(where: str, column: str, value: Any) -> str:
    # Numbers are taken as they are written (a year, an age); true/false and structures are mistakes.
    if isinstance(value, int | float) and not isinstance(value, bool) and value not in (math.inf, -math.inf):
        value = str(value)
    if not isinstance(value, str):
        raise RowError(f"{where}: field {column!r} holds {type(value).__name__} {shown(value)}, expected text")
    if not value.strip():
        raise RowError(f"{where}: field {column!r} is blank, expected text")
    if "\x00" in value:
        raise RowError(f"{where}: field {column!r} contains a zero byte, expected text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError(f"{where}: field {column!r} contains half a surrogate pair, expected Unicode text") from None
    return value


def shown(value: Any) -> str:
    """A value in a sentence: its beginning, where it is long."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 80
    return short.repr(value)


def _list(where: str, column: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parsed(value, f"{where}: field {column!r} begins like a JSON list")
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(_text(where, column, item) for item in values)


def _chat(where: str, value: Any) -> tuple[tuple[Message, ...], str, str]:
    """(turns before the answer, last user turn, answer)"""
    if isinstance(value, str):
        value = parsed(value, f"{where}: field 'messages'")
    if not isinstance(value, list):
        raise RowError(f"{where}: field 'messages' holds {type(value).__name__}, expected a list of turns")
    turns: list[Message] = []
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("role"), str):
            raise RowError(f"{where}: messages, turn {number}: expected an object with role and content")
        turns.append((turn["role"], _text(f"{where}: messages, turn {number}", "content", turn.get("content"))))
    last = max((i for i, (role, _) in enumerate(turns) if role == "assistant"), default=None)
    if last is None:
        raise RowError(f"{where}: messages: no turn of the assistant, so there is no answer")
    if last != len(turns) - 1:
        raise RowError(f"{where}: messages: the last turn is by {turns[-1][0]!r}, expected the assistant's answer")
    before = tuple(turns[:last])
    if not before or before[-1][0] != "user":
        raise RowError(f"{where}: messages: the turn before the answer must be the user's")
    return before, before[-1][1], turns[last][1]
