"""Benchmarks from the outside: models and data are found, the benchmark runs, its scorecard is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import registry
from .environment import environment
from .errors import RequestError
from .evidence import Scorecard

if TYPE_CHECKING:
    from .world.facts import World

Progress = Callable[[str, int, int], None]


def bench(
    name: str,
    model: Any,
    *,
    original: Any = None,
    gold: Sequence[Any] = (),
    data: str = "",
    settings: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    world: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    seed: int = 0,
    bootstrap: int = 1000,
    progress: Progress | None = None,
) -> Scorecard:
    """Run a benchmark; see `expunge.bench`. What models said is kept, so that a killed command goes on.

    Args:
        world: folder of the world that the mini version is about; by default the one the model lies in, else seed 0.

    Raises:
        UnknownNameError, ParameterError: no such benchmark or setting.
        SubjectError, RowError, MismatchError: models or data that cannot be used.
    """
    from .audit import comparable
    from .benchmarks.case import Bench
    from .subjects.opening import open_subject

    part = registry.get("benchmarks", name)
    chosen = part.resolve(settings)
    if world is None and isinstance(model, str | Path):
        world = _around(Path(model))
    about = None if world is None else read_world(world)

    def load(source: Any) -> Any:
        if isinstance(source, str | Path):
            return open_subject(source, device=device, dtype=dtype)
        return source

    if isinstance(model, str | Path) and (Path(model) / "delta" / "delta.json").is_file():
        subject, before, around = _of_run(Path(model))
        original = before if original is None else load(original)
        about = about or around
    else:
        subject, original = load(model), load(original)
    golds = [load(one) for one in gold]
    comparable(subject, [one for one in (original, *golds) if one is not None])
    folder = Path(out or Path("runs") / "bench" / name)
    case = Bench(
        subject,
        folder,
        original,
        golds,
        data,
        about,
        shared=folder.parent / ".expunge-tables",
        seed=seed,
        bootstrap=bootstrap,
        progress=progress,
    )
    found = part.function(case, **chosen)
    card = replace(
        found,
        benchmark=part.name,
        paper=part.card.paper,
        summary=part.card.summary,
        version=part.card.version,  # type: ignore[union-attr]
        settings=chosen,
        environment=environment(str(subject.device), str(subject.dtype)),
    )
    from .report import scorecard

    scorecard.write(card, folder)
    return card


def _of_run(folder: Path) -> tuple[Any, Any, World | None]:
    """(the changed model, the model before, the world the latter lies in) of a run's folder."""
    from .deltas import Delta
    from .methods.edit.operations import changed
    from .request import load, read_data
    from .run import load_subject

    request = load(folder / "request.json")
    before = load_subject(request)
    world = _around(Path(request.model))
    after = changed(Delta.load(folder / "delta"), before, read_data(request))
    return after, before, None if world is None else read_world(world)


def _around(model: Path) -> Path | None:
    """The world a model folder lies in."""
    folder = model.absolute().parent.parent
    return folder if (folder / "world.json").is_file() else None


def read_world(folder: str | Path) -> World:
    """The world that `expunge world build` wrote into a folder.

    Raises:
        RequestError: it holds none.
    """
    from .world.facts import make

    path = Path(folder) / "world.json"
    try:
        marker = json.loads(path.read_text(encoding="utf-8"))
        sizes = {name: int(marker[name]) for name in ("people", "forget", "neighbours", "holdout")}
        return make(int(marker["seed"]), **sizes)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RequestError(f"{folder} holds no world ({path}: {error}); `expunge world build` makes one") from None
