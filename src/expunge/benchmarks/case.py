"""What a benchmark gets and what it gives back.

A benchmark is one function: it reads published data, asks the models, and returns a `Scorecard`.

    @benchmark(paper="arXiv:2401.06121", data="locuslab/TOFU")
    def tofu(bench: Bench, *, split: str = "forget10") -> Scorecard:
        rows = read(bench.source(mini), split)
        return bench.scorecard(bench.measure(rows, METRICS), headline=["model_utility", "forget_quality"])

Every benchmark has a mini version in the very same published format, made from the invented world, so that
`expunge bench NAME MODEL` runs offline; `--data` takes a folder with the published files, or a hub id.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..evidence import Measured, Scorecard, Table
from ..files import complete_folder
from ..metrics.bootstrap import Bootstrap
from ..metrics.measure import Asked, gather, measure_all, more_tables
from ..metrics.values import Units, Values, mean_of
from ..rows import Row
from ..tables.passes import Ask, Store, ask_all, longest_answer, run
from ..tables.store import content_key
from ..tables.view import View
from ..world.facts import World

Progress = Callable[[str, int, int], None]
Mini = Callable[[World, Path], None]
"""Writes a benchmark's mini version, in its published format, into a folder."""


@dataclass
class Bench:
    """Models to be measured and the place where what they said is kept."""

    subject: Any
    """The model under test: a LanguageModel, a guard around one, or an ImageClassifier."""
    folder: Path
    original: Any = None
    """The model before unlearning."""
    golds: Sequence[Any] = ()
    """Models that never saw the forget rows, one per seed."""
    data: str = ""
    """Folder with the published files, or a hub id; empty: the mini version."""
    world: World | None = None
    """What the mini version is about."""
    shared: Path | None = None
    """A second folder of tables that other runs use too."""
    seed: int = 0
    bootstrap: int = 1000
    progress: Progress | None = None
    spent: dict[str, dict[str, float]] = field(default_factory=dict)

    @cached_property
    def models(self) -> dict[str, Any]:
        """`before`, `after`, `gold/0` ...: every model by its role."""
        before = {"before": self.original} if self.original is not None else {}
        return {**before, "after": self.subject, **{f"gold/{i}": gold for i, gold in enumerate(self.golds)}}

    @cached_property
    def store(self) -> Store:
        return Store(self.folder / "tables", self.shared)

    def source(self, mini: Mini) -> str:
        """Where the data is: what the user named, else the mini version, written once into the folder."""
        if self.data:
            return self.data
        from ..world.facts import make

        world = self.world or make(0)
        name = content_key(mini.__module__, world.seed, sorted(world.split.items()))
        path = self.folder / "data" / name
        if not path.is_dir():
            with complete_folder(path) as partial:
                mini(world, partial)
        return str(path)

    def ask(self, role: str, asks: Sequence[Ask]) -> list[Any]:
        """Answers of one model, kept in the folder."""
        began = time.monotonic()
        answers = run(self.models[role], asks, self.store, self._phase(f"ask: {role}"))
        self._spend(role, began)
        return answers

    def views(
        self,
        data: Mapping[str, list[Row]],
        max_new_tokens: int | None = None,
        *,
        written: Collection[str] | None = None,
        metrics: Sequence[Asked] = (),
    ) -> dict[str, View]:
        """All models' tables on row sets, by role: every candidate answer scored, every question answered greedily.

        Args:
            max_new_tokens: length of answers; by default the longest known one and a few tokens; 0 writes none.
            written: row sets whose questions are answered; None for all.
            metrics: that will be measured, for tables that only some of them read.
        """
        more = more_tables(metrics, self.subject.modality)
        data = {name: rows for name, rows in data.items() if rows}
        limit = longest_answer(self.subject, data) if max_new_tokens is None else max_new_tokens
        found = {}
        for role, model in self.models.items():
            began = time.monotonic()
            progress = self._phase(f"ask: {role}")
            found[role] = ask_all(
                model,
                data,
                limit,
                self.store,
                written=written,
                more=more,
                host=self.original,
                golds={name: gold for name, gold in self.models.items() if name.startswith("gold/")},
                seed=self.seed,
                name=role,
                progress=progress,
            )
            self._spend(role, began)
        return found

    def measure(self, views: Mapping[str, View], metrics: Sequence[Asked]) -> tuple[list[Measured], list[str]]:
        """Registered metrics on all models: what was measured, and a sentence for what could not be."""
        golds = [views[f"gold/{i}"] for i in range(len(self.golds))]
        return measure_all(
            views.get("before"), views["after"], golds, metrics=metrics, seed=self.seed, bootstrap=self.bootstrap
        )

    @cached_property
    def draws(self) -> Bootstrap:
        return Bootstrap(self.bootstrap, self.seed)

    def score(
        self,
        name: str,
        rows: str,
        each: Mapping[str, Sequence[float] | np.ndarray],
        about: Sequence[Any],
        *,
        direction: str,
        ideal: str,
        sentence: str,
        version: int = 1,
    ) -> Measured:
        """A benchmark's own score: the mean of one number per row, with intervals over entities.

        Args:
            rows: what the rows are called.
            each: by role, (rows,) numbers.
            about: the rows, of any kind that has an id and an entity.
        """
        units = Units.of((rows, about))
        found: dict[str, list[Values]] = {}
        for role in self.models:
            if role in each:
                values = np.asarray(each[role], dtype=np.float64)
                found.setdefault(role.partition("/")[0], []).append(Values(units, mean_of(values), values))
        return gather(name, found, self.draws, direction=direction, ideal=ideal, sentence=sentence, version=version)

    def scorecard(
        self,
        measured: Sequence[Measured],
        *,
        headline: Sequence[str] = (),
        tables: Sequence[Table] = (),
        notes: Sequence[str] = (),
        rows: Mapping[str, int] | None = None,
    ) -> Scorecard:
        """The result; the command adds name, settings and environment.

        Args:
            headline: scores to show first, by name.
            rows: how many rows each set has.
        """
        models = [
            {"role": role.partition("/")[0], "name": model.name, "fingerprint": model.fingerprint}
            for role, model in self.models.items()
        ]
        return Scorecard(
            models=models,
            measured=list(measured),
            headline=list(headline),
            tables=list(tables),
            notes=list(notes),
            rows=dict(rows or {}),
            data=self.data or f"mini version, world seed {self.world.seed if self.world else 0}",
            cost=dict(self.spent),
        )

    def _phase(self, name: str) -> Callable[[int, int], None] | None:
        progress = self.progress
        return None if progress is None else lambda done, total: progress(name, done, total)

    def _spend(self, role: str, began: float) -> None:
        entry = self.spent.setdefault(f"ask: {role}", {"seconds": 0.0})
        entry["seconds"] = round(entry["seconds"] + time.monotonic() - began, 3)
