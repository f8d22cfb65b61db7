"""The request: what to forget, what to keep, on which model, how, and how well it must be proved.

A YAML or JSON file. `expunge schema` prints its schema; every mistake is one sentence that names file and field.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from . import registry
from .cards import SubjectCard
from .errors import RequestError, RowError, suggest
from .rows import SUFFIXES, GivenTwice, Row, Source, asked_for, read_rows, shown, unique
from .subjects.opening import kind_of

SETS = ("forget", "retain", "holdout", "neighbour", "general", "safety", "earlier")
ENTITIES = 8
"""With fewer forgotten entities no verdict can be given."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())


Place = Annotated[str, Field(min_length=1)]
"""A path or hub id."""
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class DataSource(_Strict):
    """Where a row set comes from."""

    path: Place = Field(description="File (jsonl, json, csv, parquet), folder, or hub id.")
    fields: dict[str, str] = Field({}, description="Our field name to the column's name, e.g. {question: q}.")
    config: str | None = Field(None, description="Configuration of a hub data set, or of a folder with its files.")
    split: str = Field("train", description="Split of a hub data set, or of such a folder.")
    entity_every: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Rows come in blocks of so many about one entity (TOFU: 20)."
    )
    where: dict[str, str | list[str]] = Field(
        {}, description="Only rows whose columns have these values, e.g. {label: deer}."
    )
    unless: dict[str, str | list[str]] = Field({}, description="No rows whose columns all have these values.")


class Data(_Strict):
    """The row sets."""

    forget: Place | DataSource = Field(description="What should be gone.")
    retain: Place | DataSource | None = Field(None, description="What must stay, of the same kind as forget.")
    holdout: Place | DataSource | None = Field(None, description="Same kind as forget, in no model's training.")
    neighbour: Place | DataSource | None = Field(None, description="Near the forgotten, but not about it.")
    general: Place | DataSource | None = Field(None, description="Anything else the model must keep knowing.")
    safety: Place | DataSource | None = Field(
        None, description="Prompts on which behaviour must stay: refusals, abstentions, system over user."
    )
    earlier: Place | DataSource | None = Field(
        None, description="What earlier requests removed from this model and must not come back."
    )


class RuleSettings(_Strict):
    """What follows from kept facts: rows give facts by entity, relation and value."""

    implies: Annotated[str, Field(min_length=1)] = Field(description="Relation that follows.")
    by: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] = Field(
        description="Relations in a row, each beginning where the one before ends: [born_in, lies_in]."
    )


class TemplateSettings(_Strict):
    """How question and answer become text; not used when the tokenizer brings a chat template."""

    prompt: str = Field("Question: {question}\nAnswer:", description="Must contain {question}.")
    separator: str = Field(" ", description="Between prompt and answer.")


class GuardSettings(_Strict):
    """The utility guard: stops a run whose loss on held-out retain rows leaves the band, and steps back."""

    band: Annotated[float, Field(gt=0)] = Field(1.0, description="Nats per answer token above the start.")
    patience: Annotated[int, Field(ge=1)] = Field(6, description="Checks outside the band before stopping.")
    every: Annotated[int, Field(ge=1)] = Field(10, description="Optimiser steps between checks.")
    rows: Annotated[int, Field(ge=1)] = Field(32, description="Retain rows held out, at most a fifth of them.")


class StopSettings(_Strict):
    """Stops a run once its forget rows come back no more than the holdout rows did before (language models)."""

    n: Annotated[int, Field(ge=1)] = Field(10, description="Tokens in a row that must come back (EL_n).")
    every: Annotated[int, Field(ge=1)] | None = Field(None, description="Steps between checks; an epoch by default.")
    likelihood: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Highest extraction likelihood EL_n; that of the holdout rows by default."
    )
    accuracy: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Highest memorisation accuracy; that of the holdout rows by default."
    )


class TrainingSettings(_Strict):
    """How an objective is optimised."""

    epochs: Annotated[float, Field(gt=0)] = Field(5.0, description="Passes over the forget rows.")
    steps: Annotated[int, Field(ge=0)] | None = Field(None, description="Optimiser steps, in place of epochs.")
    batch_size: Annotated[int, Field(ge=1)] = Field(16, description="Forget rows in a step, with as many retain rows.")
    learning_rate: Annotated[float, Field(gt=0)] = Field(1e-5, description="Of AdamW.")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="After the warm-up.")
    warmup: Annotated[int, Field(ge=0)] = Field(0, description="Steps of linear warm-up.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="Of AdamW.")
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(1.0, description="Gradient clipping; 0 is none.")
    seed: Seed = Field(0, description="Draws everything random of the run.")
    guard: GuardSettings | Literal[False] = Field(GuardSettings(), description="The utility guard, or false.")
    stop: StopSettings | None = Field(
        None, description="When the run has forgotten enough; its steps decide by default."
    )
    checkpoint_seconds: Annotated[float, Field(ge=0)] = Field(60.0, description="Between checkpoints of a run.")
    micro_tokens: Annotated[int, Field(ge=1)] = Field(16384, description="Tokens with activations held at once.")

    def made(self) -> Any:
        """The same as the loop's `Training`."""
        from .methods.optimise.loop import Guard, Training
        from .methods.optimise.stop import Stop

        values = self.model_dump()
        guard, stop = values.pop("guard"), values.pop("stop")
        return Training(**values, guard=Guard(**guard) if guard else None, stop=Stop(**stop) if stop else None)


Named = str | dict[str, dict[str, Any]]


class AuditSettings(_Strict):
    """How the result is attacked and measured."""

    attacks: list[Named] | None = Field(
        None, description="Names, or {name: settings}; the standard ones by default (see Attacks)."
    )
    metrics: list[Named] | None = Field(None, description="Names, or {name: settings}; all by default.")
    seed: Seed = Field(0, description="Of bootstrap, sampling and relearning.")
    bootstrap: Annotated[int, Field(ge=100)] = Field(1000, description="Resamples of entities.")
    max_new_tokens: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Length of answers; the longest known answer and a few tokens by default."
    )
    self_test: bool = Field(True, description="Try the instrument on models whose truth is known.")


class Common(_Strict):
    """What every request says of its model and method."""

    name: str = Field("", description="Of the run; the file's name by default.")
    model: Place = Field(description="The model: folder or hub id.")
    method: str | dict[str, Any] = Field(description="Name, or {name: ..., parameter: value ...}.")
    template: TemplateSettings | None = Field(None, description="How question and answer become text.")
    device: str | None = Field(None, description="cpu, cuda, cuda:1 ...; the best there is by default.")
    dtype: str | None = Field(None, description="float32, bfloat16 ...; the stored one by default.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")
    out: str | None = Field(None, description="Folder of the run; runs/<name> by default.")

    @property
    def method_name(self) -> str:
        return self.method if isinstance(self.method, str) else str(self.method.get("name", ""))

    @property
    def method_settings(self) -> dict[str, Any]:
        return {} if isinstance(self.method, str) else {k: v for k, v in self.method.items() if k != "name"}


class Request(Common):
    """What to forget, what to keep, on which model, how, and how well it must be proved."""

    reason: str = Field("", description="Why, for the record; do not name persons here.")
    subject: str | None = Field(
        None, description="Kind of model (`expunge list subjects`); what its configuration says by default."
    )
    gold: list[str] = Field([], description="Models trained without the forget rows, one per seed.")
    gold_kind: Literal["exact", "surrogate"] = Field("exact", description="Whether gold was really retrained.")
    data: Data = Field(description="The row sets.")
    fields: dict[str, str] = Field({}, description="Default field mapping of all row sets.")
    rules: list[RuleSettings] = Field(
        [], description="How relations compose; forgotten facts that follow from kept ones are listed."
    )
    method: str | dict[str, Any] = Field("npo", description="Name, or {name: ..., parameter: value ...}.")
    scope: str | dict[str, Any] | None = Field(
        None, description="Which weights may move; the method's own by default, mostly all."
    )
    training: TrainingSettings = Field(TrainingSettings(), description="How an objective is optimised.")
    audit: AuditSettings = Field(AuditSettings(), description="How the result is attacked and measured.")
    proof: Literal["quick", "standard", "thorough"] = Field("standard", description="Budget of the attacks.")
    access: Literal["weights", "api"] = Field("weights", description="What an attacker can reach.")


def schema() -> dict[str, Any]:
    """JSON schema of the request file."""
    return Request.model_json_schema()


def load(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Request:
    """Read a request file; paths in it are relative to it.

    Args:
        overrides: other values for fields by dotted name, e.g. {"training.epochs": 3}.

    Raises:
        RequestError: the file is missing or malformed; the sentence names field, what was found and what is expected.
    """
    path = Path(path)
    values = parse(path)
    for name, value in (overrides or {}).items():
        at = values
        *parents, last = name.split(".")
        for parent in parents:
            below = at.setdefault(parent, {})
            if not isinstance(below, dict):
                raise RequestError(f"{path}: cannot set {name}: {parent} is {below!r}, not a mapping")
            at = below
        at[last] = value
    try:
        request = Request.model_validate(values)
    except pydantic.ValidationError as error:
        raise RequestError(f"{path}: {sentence(error, Request)}") from None
    if request.template and "{question}" not in request.template.prompt:
        raise RequestError(
            f"{path}: template.prompt is {request.template.prompt!r}, expected it to contain {{question}}"
        )
    if isinstance(request.method, dict) and not isinstance(request.method.get("name"), str):
        raise RequestError(f"{path}: method is a mapping without a name; expected {{name: npo, beta: 0.1}}")
    name = request.name or path.stem
    if not re.fullmatch(r"[\w.-]{1,80}", name) or not name.strip("."):
        raise RequestError(f"{path}: name is {shown(name)}; expected letters, digits, '.', '_' and '-', at most 80")
    try:
        json.dumps(request.model_dump(), ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:  # a date, a set or NaN in free settings, half a surrogate pair
        raise RequestError(f"{path}: holds something other than text, numbers, lists and mappings: {error}") from None
    return _absolute(request.model_copy(update={"name": name}), path.parent)


def parse(path: Path) -> dict[str, Any]:
    """Fields of a YAML or JSON file.

    Raises:
        RequestError: it is missing, malformed or no mapping.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise GivenTwice(
                    f"line {key.start_mark.line + 1}: a list or mapping stands where a field name is expected"
                )
            if key.value in seen:
                raise GivenTwice(f"line {key.start_mark.line + 1}: {key.value!r} is given twice")
            seen.add(key.value)
        return loader.construct_mapping(node, deep=True)  # type: ignore[no-any-return]

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    if path.is_dir():
        raise RequestError(f"{path} is a folder, expected a request file (YAML or JSON)")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = [p.name for p in path.parent.glob("*") if p.suffix in (".yaml", ".yml", ".json")]
        hint = f" {suggest(path.name, near)}" if near and path.parent.is_dir() else ""
        raise RequestError(f"request file {path} does not exist.{hint}") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror or error}") from None
    try:
        values = json.loads(text, object_pairs_hook=unique) if path.suffix == ".json" else yaml.load(text, Loader)
    except json.JSONDecodeError as error:
        raise RequestError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from None
    except GivenTwice as error:
        raise RequestError(f"{path}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}" if mark else ""
        raise RequestError(f"{path}{place}: not YAML: {getattr(error, 'problem', None) or error}") from None
    except (ValueError, RecursionError) as error:  # a 13th month, a number of thousands of digits or brackets
        raise RequestError(f"{path}: cannot be read: {error}") from None
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        raise RequestError(f"{path}: found {found}, expected fields such as model: and data:")
    return values


def sentence(error: pydantic.ValidationError, request: type[BaseModel]) -> str:
    """The first mistake in a request in our words: field, found, expected."""
    found = error.errors()
    first = max(found, key=lambda e: len(e["loc"])) if found[0]["type"] in ("string_type",) else found[0]
    parts = _parts(first)
    field = ".".join(parts)
    if first["type"] == "extra_forbidden":
        model: Any = request
        for part in parts[:-1]:
            model = _model_of(model, part) or model
        return f"there is no field {field!r}. {suggest(parts[-1], model.model_fields)}"
    if first["type"] == "missing":
        return f"field {field} is missing"
    # One of several kinds would do: say all of them.
    said = dict.fromkeys(_said(one) for one in found if _parts(one) == parts)
    return f"field {field} is {shown(first['input'])}: input should be {' or '.join(said)}"


def _parts(error: Any) -> list[str]:
    """Where the mistake is; without pydantic's names for the alternatives of a field."""
    parts = [str(part) for part in error["loc"] if part not in ("DataSource", "GuardSettings")]
    kinds = ("str", "constrained-str")
    return [p for p in parts if p not in kinds and not p.startswith(("dict[", "literal[", "list[", "function-"))]


def _said(error: Any) -> str:
    text = re.sub(r" or instance of \w+", "", error["msg"]).replace("dictionary", "mapping")
    text = text.replace("String should have", "text with")
    return text.removeprefix("Input should be ").removeprefix("Keys should be ")


def _model_of(model: Any, field: str) -> Any:
    info = model.model_fields.get(field)
    options = [] if info is None else [info.annotation, *getattr(info.annotation, "__args__", ())]
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


def place(text: str, folder: Path) -> str:
    """A path beside the request file where there is such; everything else may be a hub id or an error later."""
    path = (folder / os.path.expanduser(text)).absolute()
    looks_local = text.startswith((".", "/", "~")) or Path(text).suffix != ""
    return str(path) if os.path.exists(path) or (looks_local and not _hub_like(text)) else text


def _absolute(request: Request, folder: Path) -> Request:
    sets = {}
    for name in SETS:
        source = getattr(request.data, name)
        if isinstance(source, str):
            source = DataSource(path=source)
        if source is not None:
            sets[name] = source.model_copy(
                update={"path": place(source.path, folder), "fields": {**request.fields, **source.fields}}
            )
    out = request.out and str((folder / os.path.expanduser(request.out)).absolute())
    return request.model_copy(
        update={
            "model": place(request.model, folder),
            "gold": [place(path, folder) for path in request.gold],
            "data": request.data.model_copy(update=sets),
            "out": out,
        }
    )


def _hub_like(text: str) -> bool:
    return bool(re.fullmatch(r"[\w-]+/[\w.-]+", text)) and Path(text).suffix not in SUFFIXES


def check(request: Request) -> None:
    """Resolve method, attacks and metrics through the registry.

    Raises:
        UnknownNameError, ParameterError: no such part or parameter.
    """
    registry.get("methods", request.method_name).resolve(request.method_settings)
    for room, asked in (("attacks", request.audit.attacks), ("metrics", request.audit.metrics)):
        for name, settings in named(asked) or []:
            registry.get(room, name).resolve(settings)


def named(asked: list[Named] | None) -> list[tuple[str, dict[str, Any]]] | None:
    """Names with their settings; None where everything is asked for."""
    if asked is None:
        return None
    found: list[tuple[str, dict[str, Any]]] = []
    for one in asked:
        if isinstance(one, str):
            found.append((one, {}))
        elif len(one) == 1:
            found.append(next(iter(one.items())))
        else:
            raise RequestError(f"audit: {one!r} is not understood; expected a name, or one name with its settings")
    return found


TEXTS = (".jsonl", ".json", ".csv", ".txt")
"""Files that hold no pictures."""


def _reader(request: Request) -> Callable[[Source, str], list[Any]]:
    """What reads the rows of the model's kind."""
    from .pictures import read_pictures

    readers: dict[str, Callable[[Source, str], list[Any]]] = {"language": read_rows, "image": read_pictures}
    sources = [source for name in SETS if (source := getattr(request.data, name)) is not None]
    files = [Path(source if isinstance(source, str) else source.path) for source in sources]
    texts = all(file.suffix in TEXTS for file in files)
    # A name on the hub is looked up only where its rows could be pictures.
    kind = request.subject or ("language" if texts and not Path(request.model).exists() else kind_of(request.model))
    card = registry.get("subjects", kind).card
    assert isinstance(card, SubjectCard)
    return readers[card.modality[0]]


def read_data(request: Request) -> dict[str, list[Row]]:
    """All row sets, checked against one another.

    Raises:
        RowError, RequestError: a file or row that cannot be used; sets that contradict one another.
    """
    data: dict[str, list[Row]] = {}
    read = _reader(request)
    for name in SETS:
        source = getattr(request.data, name)
        if source is not None:
            if isinstance(source, str):
                source = DataSource(path=source, fields=request.fields)
            data[name] = read(Source(**source.model_dump()), name)
    ids: dict[str, Row] = {}
    said: dict[tuple[Any, ...], tuple[str, Row]] = {}
    for name, rows in data.items():
        for row in rows:
            if row.id in ids:
                raise RowError(
                    f"{row.source}: id {row.id!r} was used in {ids[row.id].source} already; ids must be unique"
                )
            ids[row.id] = row
            for text in row.perturbed_answers:
                if text.strip() == row.answer.strip():
                    raise RowError(f"{row.source}: perturbed answer {text!r} equals the answer, it must be wrong")
            key = (row.prompt.strip(), row.messages, row.answer.strip())
            other, twin = said.setdefault(key, (name, row))
            if other != name and "holdout" in (other, name):
                held, seen = (twin, row) if other == "holdout" else (row, twin)
                raise RequestError(f"holdout row {held.source} also stands in {seen.source}; no model may have seen it")
            if name == "earlier" and other not in ("forget", "earlier"):
                raise RequestError(
                    f"{row.source} was removed by an earlier request, and {twin.source} says the same and is to be kept"
                )
            if other != name and other == "forget" and name != "earlier":  # it is read first
                raise RequestError(
                    f"{row.source} is to be kept and {twin.source} to be forgotten, but they say the same; "
                    "take the row out of one of them"
                )
    return data


def warnings(data: Mapping[str, list[Row]]) -> list[str]:
    """What the report must say about the rows beforehand."""
    found = []
    entities = {row.entity for row in data["forget"]}
    if len(entities) < ENTITIES:
        found.append(
            f"The forget rows name {len(entities)} entities; below {ENTITIES} chance is too large for a verdict."
        )
    if all(row.entity == row.id for row in data["forget"]):
        own = "" if all(row.closed for row in data["forget"]) else " or entity_every"
        found.append(
            "The forget rows name no entity, so every row counts as one; rows about one person are not independent, "
            f"and the intervals are then too narrow. Give an entity field{own}."
        )
    if "retain" not in data:
        found.append("There are no retain rows: what was hurt cannot be told.")
    if texts := sum(one is not row for one, row in zip(asked_for(data["forget"]), data["forget"])):
        found.append(
            f"{texts} forget rows are running text, which asks nothing: the audit gives their beginnings and asks for "
            "the rest."
        )
    return found
