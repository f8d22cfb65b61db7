"""How parts are found: a part's file has the part's name, so no list is written twice and nothing is imported early.

A part is one function whose typed keyword-only arguments are its parameters: the request file, the command line, the
docs and the validation are made from that signature. Packages add parts through the entry point groups
`expunge.methods`, `expunge.attacks`, `expunge.metrics`, `expunge.benchmarks` ...; a single file through `load_plugin`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import pkgutil
import sys
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from .cards import AttackCard, BenchmarkCard, Card, MergeCard, MethodCard, MetricCard, ReproductionCard, SubjectCard
from .errors import CardError, ParameterError, RequestError, UnknownNameError, suggest

ROOMS: dict[str, tuple[str, ...]] = {
    "methods": (
        "expunge.methods.optimise",
        "expunge.methods.edit",
        "expunge.methods.guard",
        "expunge.methods.exact",
    ),
    "merges": ("expunge.merges",),
    "attacks": ("expunge.attacks",),
    "metrics": ("expunge.metrics",),
    "benchmarks": ("expunge.benchmarks",),
    "subjects": ("expunge.subjects",),
    "reproductions": ("expunge.reproductions",),
}

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Part:
    """One registered function, its card and the model that validates its parameters."""

    room: str
    function: Callable[..., Any]
    card: Card
    parameters: type[pydantic.BaseModel]
    preset: Mapping[str, Any] = field(default_factory=dict)
    """Parameter values that this name stands for (`grad_diff` is `gradient_ascent` with retain = nll)."""
    prepare: Callable[[Any], None] | None = None
    """What a method works out once before training (`methods.optimise.unlearn.Preparation`)."""

    @property
    def name(self) -> str:
        return self.card.name

    def resolve(self, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Every parameter with its validated value.

        Raises:
            ParameterError: a parameter that does not exist, or a value of the wrong kind.
        """
        settings = {**self.preset, **(settings or {})}
        where = f"{self.card.kind} {self.name}"
        for name in settings:
            if name not in self.parameters.model_fields:
                raise ParameterError(
                    f"{where} has no parameter {name!r}. {suggest(name, self.parameters.model_fields)}"
                )
        try:
            return self.parameters(**settings).model_dump()
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0]) if first["loc"] else "?"
            raise ParameterError(f"{where}: parameter {name} = {first['input']!r}: {first['msg']}") from None

    @property
    def own(self) -> bool:
        """Whether the name is the part's own, and not another one for it."""
        return self.name == self.function.__name__

    @property
    def makes_edits(self) -> bool:
        """Whether it is a method that edits facts: an editor, or a guard that tells them."""
        return self.card.kind == "edit" or "edits" in getattr(self.card, "needs", ())

    @property
    def learns(self) -> bool:
        """Whether it is an editor that is trained on other facts first, which are given as demonstrations."""
        return "demonstrations" in getattr(self.card, "needs", ())

    def describe(self) -> list[dict[str, Any]]:
        """Name, type and default of every parameter."""
        hints = typing.get_type_hints(self.function, include_extras=True)
        return [
            {"name": name, "type": _type_name(hints.get(name, info.annotation)), "default": self.resolve()[name]}
            for name, info in self.parameters.model_fields.items()
        ]


_parts: dict[str, dict[str, Part]] = {room: {} for room in ROOMS}
_complete: set[str] = set()
plugins: list[Path] = []
"""Files that `load_plugin` has run; other processes must run them too."""


def _type_name(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return " | ".join(str(value) for value in typing.get_args(annotation))
    return getattr(annotation, "__name__", None) or str(annotation).replace("typing.", "")


def _parameter_model(function: Callable[..., Any], name: str) -> type[pydantic.BaseModel]:
    hints = typing.get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {}
    for parameter in list(inspect.signature(function).parameters.values())[1:]:
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            raise CardError(f"{name}: argument {parameter.name} must be keyword-only (put it after `*`)")
        if parameter.name not in hints:
            raise CardError(f"{name}: parameter {parameter.name} has no type annotation")
        if parameter.default is inspect.Parameter.empty:
            raise CardError(f"{name}: parameter {parameter.name} has no default")
        fields[parameter.name] = (hints[parameter.name], parameter.default)
    config = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())
    return pydantic.create_model(f"{name}_parameters", __config__=config, **fields)


def register(
    room: str,
    function: F,
    card: Card,
    aliases: Mapping[str, Mapping[str, Any]] | None = None,
    prepare: Callable[[Any], None] | None = None,
) -> F:
    """Enter a part under its card's name and under its aliases, each alias with parameter values of its own."""
    from dataclasses import replace

    parameters = _parameter_model(function, card.name)
    for name, preset in {card.name: {}, **(aliases or {})}.items():
        present = _parts[room].get(name)
        if present is not None and present.function.__module__ != function.__module__:
            raise CardError(f"{room}: {name!r} is registered by {present.function.__module__} already")
        _parts[room][name] = Part(room, function, replace(card, name=name), parameters, preset, prepare)
    return function


def _summary(function: Callable[..., Any]) -> str:
    return " ".join((inspect.getdoc(function) or "").split("\n\n")[0].split())


def _method(kind: str, defaults: dict[str, Any]) -> Callable[..., Callable[[F], F]]:
    def decorator(
        *,
        paper: str,
        modality: str | tuple[str, ...] = "language",
        aliases: Mapping[str, Any] | None = None,
        prepare: Callable[[Any], None] | None = None,
        **card: Any,
    ) -> Callable[[F], F]:
        def enter(function: F) -> F:
            entries = {**defaults, **card}
            modalities = (modality,) if isinstance(modality, str) else tuple(modality)
            try:
                made = MethodCard(
                    name=function.__name__,
                    kind=kind,  # type: ignore[arg-type]
                    paper=paper,
                    summary=_summary(function),
                    modality=modalities,
                    **entries,
                )
            except TypeError as error:
                raise CardError(f"card of method {function.__name__}: {error}") from None
            return register("methods", function, made, aliases, prepare)

        return enter

    return decorator


optimise = _method("optimise", {"survey_class": "parameter_optimisation", "level": "weights"})
edit = _method("edit", {"survey_class": "parameter_optimisation", "level": "weights"})
guard = _method("guard", {"survey_class": "in_context", "level": "decoding", "intention": "suppression"})
exact = _method(
    "exact",
    {
        "survey_class": "retraining",
        "level": "training_layout",
        "intention": "removal",
        "guarantee": "exact_by_construction",
    },
)


def _plain(room: str, card_type: type[Any]) -> Callable[..., Callable[[F], F]]:
    def decorator(*, aliases: Mapping[str, Any] | None = None, **card: Any) -> Callable[[F], F]:
        def enter(function: F) -> F:
            try:
                made = card_type(name=function.__name__, summary=_summary(function), **card)
            except TypeError as error:
                raise CardError(f"card of {function.__name__}: {error}") from None
            return register(room, function, made, aliases)

        return enter

    return decorator


merge = _plain("merges", MergeCard)
attack = _plain("attacks", AttackCard)
metric = _plain("metrics", MetricCard)
benchmark = _plain("benchmarks", BenchmarkCard)
subject = _plain("subjects", SubjectCard)
reproduction = _plain("reproductions", ReproductionCard)


def _import_all(room: str) -> None:
    if room in _complete:
        return
    for package_name in ROOMS[room]:
        package = importlib.import_module(package_name)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package_name}.{module.name}")
    for point in importlib.metadata.entry_points(group=f"expunge.{room}"):
        point.load()
    _complete.add(room)


def get(room: str, name: str) -> Part:
    """The part of that name; only its own file is imported.

    Raises:
        UnknownNameError: with the nearest valid names.
    """
    if name not in _parts[room]:
        for package in ROOMS[room]:
            if name.isidentifier() and importlib.util.find_spec(f"{package}.{name}") is not None:
                importlib.import_module(f"{package}.{name}")
                break
    if name not in _parts[room]:
        _import_all(room)
    if name not in _parts[room]:
        raise UnknownNameError(
            f"no {room.removesuffix('s')} is called {name!r}. {suggest(name, _parts[room])} "
            f"`expunge list {room}` shows all."
        )
    return _parts[room][name]


def parts(room: str) -> list[Part]:
    """Every part of a room, by name."""
    if room not in ROOMS:
        raise UnknownNameError(f"there is no room {room!r}. {suggest(room, ROOMS)}")
    _import_all(room)
    return [_parts[room][name] for name in sorted(_parts[room])]


def serving(room: str, modality: str) -> list[Part]:
    """Every part of a room that serves a kind of subject, by name."""
    return [part for part in parts(room) if modality in part.card.modality]


def check_serves(part: Part, subject: Any) -> None:
    """
    Raises:
        RequestError: the part is for subjects of other kinds.
    """
    if subject.modality not in part.card.modality:
        kinds = " and ".join(part.card.modality)
        raise RequestError(f"{part.name} is for {kinds} models, {subject.name} is of modality {subject.modality}")


def load_plugin(path: str | Path) -> None:
    """Import a Python file of the user's, whose decorated functions become parts. It runs with the user's rights."""
    path = Path(path)
    if not path.is_file():
        raise UnknownNameError(f"plug-in file {path} does not exist")
    spec = importlib.util.spec_from_file_location(f"expunge_plugin_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    plugins.append(path.absolute())
