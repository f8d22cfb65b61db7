"""A world as a folder: data files, models, and a request that is ready to run.

    DIR/data/*.jsonl     forget, retain, neighbour, holdout, general, passages, train_original, train_gold
    DIR/models/          original, gold-0, gold-1 ...
    DIR/request.yaml

Built once in the user's cache (EXPUNGE_CACHE, ~/.cache/expunge by default) under the hash of everything it depends on,
then copied to DIR. A builder that is killed goes on with the models that are missing.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..errors import OutputError, ParameterError, TrainingError
from ..files import cache_folder, complete_folder, write_text
from ..tables.store import content_key
from .corpus import files
from .facts import RULES, World, make
from .models import Recipe, job

Progress = Callable[[int, int], None]
MARKER = "world.json"

PACKAGES = ("torch", "transformers", "tokenizers")
SOURCES = (
    "methods/optimise/loop.py",
    "methods/optimise/terms.py",
    "subjects/head.py",
    "subjects/language.py",
    "subjects/packed.py",
    "world/*.py",
)
"""What decides the weights beside the settings: another version of these trains the models anew."""

REQUEST = """\
# Forget {forget} people of the invented world (seed {seed}); try `expunge plan request.yaml` first.
name: world-{seed}
reason: Erasure request of invented people
model: models/original
gold: [{golds}]
data:
  forget: data/forget.jsonl
  retain: data/retain.jsonl
  neighbour: data/neighbour.jsonl
  holdout: data/holdout.jsonl
  general: data/general.jsonl
rules:
{rules}
method: npo
scope: all
training:
  epochs: {epochs}
  batch_size: 16
  learning_rate: {learning_rate}
"""


@dataclass(frozen=True)
class WorldFolder:
    """Where the parts of a built world are."""

    path: Path
    world: World

    @property
    def request(self) -> Path:
        return self.path / "request.yaml"

    @property
    def original(self) -> Path:
        return self.path / "models" / "original"

    @property
    def golds(self) -> list[Path]:
        return sorted((self.path / "models").glob("gold-*"))

    def data(self, name: str) -> Path:
        return self.path / "data" / f"{name}.jsonl"


def kept(kind: str, content: Any, train: Callable[[Path], None]) -> Path:
    """The folder that `train` writes its models to, in the cache under the hash of `content` and of the training code.

    They are trained once: processes that ask for the same models wait for the first of them.
    """
    folder = cache_folder() / kind / content_key(content, [version(name) for name in PACKAGES], _sources())
    with _lock(folder):
        if not (folder / "models").is_dir():
            with complete_folder(folder / "models") as partial:
                train(partial)
    return folder / "models"


def build(
    folder: str | Path,
    *,
    seed: int = 0,
    people: int = 56,
    forget: int = 10,
    neighbours: int = 8,
    holdout: int = 10,
    gold_seeds: int = 3,
    recipe: Recipe | None = None,
    progress: Progress | None = None,
) -> WorldFolder:
    """Write the world to a folder, training its models first if no cached ones fit.

    A request.yaml that was edited stays as it is.

    Args:
        people: how many there are in all; of them `forget` are to be forgotten, `neighbours` taught them, and `holdout`
            are in no model's training.
        gold_seeds: models trained without the forgotten people, each with another seed.
        progress: (done, total) optimiser steps of all models.

    Raises:
        ParameterError: there is no world of these sizes.
        OutputError: the folder or the cache cannot be written, or the folder holds something else.
        TrainingError: a model could not be trained.
    """
    if gold_seeds < 1:
        raise ParameterError(f"gold_seeds is {gold_seeds}, expected at least 1")
    folder = Path(folder)
    before = _marker(folder)
    recipe = recipe or Recipe()
    world = make(seed, people=people, forget=forget, neighbours=neighbours, holdout=holdout)
    settings = {"seed": seed, "people": people, "forget": forget, "neighbours": neighbours, "holdout": holdout}
    written = files(world)
    key = content_key(settings, asdict(recipe), written, [version(name) for name in PACKAGES], _sources())
    cache = cache_folder() / "world" / key
    seeds = {"original": seed * 100, **{f"gold-{i}": seed * 100 + 1 + i for i in range(gold_seeds)}}
    golds = ", ".join(f"models/gold-{i}" for i in range(gold_seeds))
    rules = "\n".join(f"  - {{implies: {rule.implies}, by: [{', '.join(rule.by)}]}}" for rule in RULES)
    request = REQUEST.format(forget=forget, seed=seed, golds=golds, rules=rules, epochs=12, learning_rate="3.0e-4")
    try:
        with _lock(cache):
            for name, rows in written.items():
                write_text(cache / "data" / f"{name}.jsonl", _jsonl(rows))
            texts = [text for rows in written.values() for row in rows for text in _strings(row)]
            write_text(cache / "texts.json", json.dumps(texts, ensure_ascii=False))
            _train(cache, seeds, recipe, progress)
        # First of all, so that a folder left half written is known as a world.
        marker = {"key": key, **settings, "recipe": asdict(recipe), "request": before.get("request", "")}
        _mark(folder, marker)
        for name, rows in written.items():
            write_text(folder / "data" / f"{name}.jsonl", _jsonl(rows))
        for old in (folder / "models").glob("gold-*"):
            if old.name not in seeds:
                shutil.rmtree(old)
        for name in seeds:
            with complete_folder(folder / "models" / name) as partial:
                shutil.copytree(cache / "models" / name, partial, dirs_exist_ok=True)
        if _ours(folder / "request.yaml", str(marker["request"]), request):
            write_text(folder / "request.yaml", request)
            _mark(folder, {**marker, "request": _digest(request.encode())})
    except OSError as error:
        raise OutputError(f"cannot write {error.filename or folder}: {error.strerror or error}") from None
    return WorldFolder(folder, world)


def _marker(folder: Path) -> dict[str, object]:
    """What an earlier build noted in this folder."""
    if not folder.exists():
        return {}
    if not folder.is_dir():
        raise OutputError(f"{folder} is a file, expected a folder; choose another --out")
    try:
        found = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if any(folder.iterdir()):
            raise OutputError(f"{folder} is not empty and holds no world; choose another --out") from None
        return {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise OutputError(f"{folder / MARKER} is damaged; remove {folder} or choose another --out")
    return found


def _mark(folder: Path, content: dict[str, object]) -> None:
    write_text(folder / MARKER, json.dumps(content, indent=1) + "\n")


def _ours(path: Path, noted: str, new: str) -> bool:
    """Whether the file may be written: it is absent, or what an earlier build wrote, or what this one would write."""
    return not path.exists() or _digest(path.read_bytes()) in (noted, _digest(new.encode()))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _sources() -> list[str]:
    package = Path(__file__).parents[1]
    return [_digest(path.read_bytes()) for pattern in SOURCES for path in sorted(package.glob(pattern))]


def _jsonl(rows: list[dict[str, object]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in ("id", "task", "relation"):
                yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One builder at a time; the lock goes with its process."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _train(cache: Path, seeds: dict[str, int], recipe: Recipe, progress: Progress | None) -> None:
    """Train the models that are missing, shared out among as many processes as there are cores."""
    missing = [name for name in seeds if not (cache / "models" / name / "config.json").is_file()]
    cores = max(1, os.cpu_count() or 1)
    done = dict.fromkeys(missing, 0)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    running: dict[str, subprocess.Popen[str]] = {}
    try:
        for names in (missing[core::cores] for core in range(min(cores, len(missing)))):
            jobs = []
            for name in names:
                rows = cache / "data" / ("train_original.jsonl" if name == "original" else "train_gold.jsonl")
                jobs.append(job(rows, cache / "texts.json", recipe, seeds[name], cache / "models" / name))
            running[", ".join(names)] = subprocess.Popen(
                [sys.executable, "-m", "expunge.world.models", *jobs],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        while running:
            for group, process in list(running.items()):
                assert process.stdout is not None
                assert process.stderr is not None
                line = process.stdout.readline()
                if line:
                    name, steps = json.loads(line)
                    done[name] = int(steps)
                    if progress:
                        progress(sum(done.values()), recipe.steps * len(missing))
                    continue
                if process.wait() != 0:
                    reason = (process.stderr.read().strip().splitlines() or ["no message"])[-1]
                    raise TrainingError(f"training the world's models ({group}) failed: {reason}")
                del running[group]
    finally:
        for process in running.values():
            process.kill()
            process.wait()
