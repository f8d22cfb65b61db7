"""An ensemble whose training is laid out for deletion, as a folder.

    ensemble.json     the design: method, settings, orders, the base's fingerprint
    rows.jsonl        which row went where, with a hash of what it says; rows that were deleted are no longer there
    stages/S/0-2-1/   what shard S was taught after slices 0, 2, 1: tensors.safetensors, stage.json
    events.jsonl      every training and every deletion
    work/             state of a stage in training

The folder is the truth: a stage that is there has seen none of the deleted rows, an order is live as far as its stages
are there. Deleting rows enters the event, then removes every stage that has seen their slices; whoever opens a folder
whose deletion was cut short completes it first. Training makes the stages that are missing, of the rows that are left:
so it resumes, and so it retrains. A stage's randomness depends on the seed, the shard and the slices before it alone,
and its rows come in a fixed sequence, so that what is left after a deletion is, bit for bit, what training without the
rows gives.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ...environment import versions
from ...errors import EnsembleError, MismatchError, ParameterError, RowError, nearest
from ...files import complete_folder, save_tensors, write_text
from ...tables.store import content_key
from .averaged import averaged
from .layout import Cell, cells
from .orders import Order, prefixes
from .stage import Settings, Stages, State

FORMAT = 1
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Design:
    """What an ensemble is, decided before anything is trained."""

    method: str
    shards: int
    orders: list[list[Order]]
    """Per shard."""
    shuffle: bool
    min_shards: int
    """With fewer that answer the ensemble says that it needs training."""
    stage: Settings
    chosen: dict[str, Any]
    """The method's parameters, as resolved."""


@dataclass(frozen=True)
class ExactCase:
    """What a method that owns training gets."""

    subject: Any
    """The frozen backbone: it must have learnt none of the rows."""
    rows: Sequence[Any]
    folder: Path
    data: Mapping[str, Any] = field(default_factory=dict)
    """Where base and rows were read, for later commands."""
    progress: Progress | None = None


@dataclass(frozen=True)
class Deletion:
    """What a deletion did."""

    row_ids: tuple[str, ...]
    already: tuple[str, ...]
    """Rows that were deleted before; nothing was to be done for them."""
    hit: tuple[Cell, ...]
    served: dict[int, tuple[int, int]]
    """Shards that were hit: stages served before and after."""
    stages: int
    """Stages whose files were removed."""
    bytes: int
    rows_lost: int
    """Rows that are kept and whose shard does not answer from them any more: what a deletion costs beside its own."""
    twins: tuple[str, ...]
    """Rows that say the same as a deleted one and stay."""
    needs_training: bool
    """Fewer shards answer than `min_shards`."""
    ledger_seconds: float
    """Deciding what goes."""
    seconds: float
    """Everything, files included."""


@dataclass(frozen=True)
class Trained:
    """What training did."""

    stages: int
    row_passes: int
    """Rows read, in all epochs of all stages."""
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Ensemble:
    """A folder, as it was when it was opened."""

    folder: Path
    design: Design
    about: dict[str, Any]
    """Base, data, versions."""
    rows: dict[str, tuple[Cell, str]]
    """Row to its cell and the hash of what it says; without the deleted ones."""
    deletions: tuple[dict[str, Any], ...]
    stages: dict[int, frozenset[Order]]
    """Shard to the prefixes that are there."""

    # --- reading ------------------------------------------------------------------------------------------------------

    @staticmethod
    def load(folder: str | Path) -> Ensemble:
        """Open a folder; a deletion that was cut short is completed.

        Raises:
            EnsembleError: it is no ensemble, or damaged.
        """
        folder = Path(folder)
        try:
            about = json.loads((folder / "ensemble.json").read_text(encoding="utf-8"))
            if about["format"] != FORMAT:
                raise EnsembleError(f"{folder} has ensemble format {about['format']}, this version reads {FORMAT}")
            design = _design(about.pop("design"))
            events = _lines(folder / "events.jsonl")
            rows = {r["row_id"]: ((r["shard"], r["slice"]), r["sha256"]) for r in _lines(folder / "rows.jsonl")}
            stages: dict[int, set[Order]] = {shard: set() for shard in range(design.shards)}
            for path in sorted((folder / "stages").glob("[!.]*/[!.]*/stage.json")):
                prefix = tuple(int(part) for part in path.parent.name.split("-"))
                stages[int(path.parent.parent.name)].add(prefix)
        except FileNotFoundError as error:
            raise EnsembleError(
                f"{folder} is no ensemble: it has no {Path(error.filename).name}; `expunge exact train` makes one"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EnsembleError(f"{folder} is not a readable ensemble: {error}") from None
        deletions = tuple(event for event in events if event["event"] == "deleted")
        opened = Ensemble(folder, design, about, rows, deletions, {s: frozenset(p) for s, p in stages.items()})
        return opened._completed()

    def _completed(self) -> Ensemble:
        """Without what deletions that are entered should have removed: rows, and stages older than them."""
        gone = {row for event in self.deletions for row in event["row_ids"]} & self.rows.keys()
        if not gone:
            return self
        stale = []
        for shard, there in self.stages.items():
            for prefix in there:
                done = int(self._about(shard, prefix)["deletions"])
                hit = {s for event in self.deletions[done:] for k, s in event["hit"] if k == shard}
                stale += [(shard, prefix)] if hit & set(prefix) else []
        return self._without(gone, stale)

    @property
    def slices(self) -> int:
        return self.design.stage.slices

    @cached_property
    def sizes(self) -> list[list[int]]:
        """Rows that are left, per shard and slice."""
        found = [[0] * self.slices for _ in range(self.design.shards)]
        for (shard, slice_), _ in self.rows.values():
            found[shard][slice_] += 1
        return found

    def orders(self, shard: int) -> list[Order]:
        """The shard's orders, without slices that have no row left."""
        return [tuple(s for s in order if self.sizes[shard][s]) for order in self.design.orders[shard]]

    def alive(self, shard: int) -> list[int]:
        """Stages of each order that are there from its beginning on."""
        there = self.stages[shard]
        return [next((n for n in range(len(o)) if o[: n + 1] not in there), len(o)) for o in self.orders(shard)]

    def served(self, shard: int) -> Order:
        """The prefix that answers: the longest live one, of equals that of the first order; empty where none is."""
        lengths = self.alive(shard)
        best = max(range(len(lengths)), key=lambda i: (lengths[i], -i))
        return self.orders(shard)[best][: lengths[best]]

    @property
    def answering(self) -> list[int]:
        """Shards that have a live order."""
        return [shard for shard in range(self.design.shards) if self.served(shard)]

    @property
    def needs_training(self) -> bool:
        return len(self.answering) < self.design.min_shards

    @property
    def share_usable(self) -> float:
        """Mean over shards of the stages served, as a share of all slices."""
        return sum(len(self.served(s)) for s in range(self.design.shards)) / (self.design.shards * self.slices)

    def _place(self, shard: int, prefix: Order) -> Path:
        return self.folder / "stages" / str(shard) / "-".join(map(str, prefix))

    def _about(self, shard: int, prefix: Order) -> dict[str, Any]:
        path = self._place(shard, prefix) / "stage.json"
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise EnsembleError(f"{path} is not readable: {error}") from None

    def state(self, shard: int, prefix: Order) -> State:
        """What a chain was taught: its stages' tensors, later ones over earlier ones.

        Raises:
            EnsembleError: a stage's file is damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        found: State = {}
        for length in range(1, len(prefix) + 1):
            place = self._place(shard, prefix[:length]) / "tensors.safetensors"
            try:
                if _sha256(place) != self._about(shard, prefix[:length])["sha256"]:
                    raise EnsembleError(f"{place} is damaged: its sha256 is not the one in stage.json")
                found |= load_file(place)
            except (OSError, SafetensorError) as error:
                raise EnsembleError(f"{place} cannot be read: {error}") from None
        return found

    # --- deleting -----------------------------------------------------------------------------------------------------

    def delete(self, row_ids: Iterable[str]) -> tuple[Ensemble, Deletion]:
        """Rows that are to be gone, with everything that has seen them. No model is loaded.

        Raises:
            RowError: a row that was never there; nothing is deleted then.
        """
        with _alone(self.folder):
            # As the folder is now, whatever happened since it was opened.
            return Ensemble.load(self.folder)._delete(tuple(dict.fromkeys(row_ids)))

    def check(self, row_ids: Sequence[str]) -> None:
        """
        Raises:
            RowError: a row that was never there.
        """
        before = {row for event in self.deletions for row in event["row_ids"]}
        unknown = [row for row in row_ids if row not in self.rows and row not in before]
        if unknown:
            more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
            near = nearest(unknown[0], self.rows)
            raise RowError(
                f"{self.folder} has no row {unknown[0]!r}{more}; nothing was deleted. "
                + (
                    f"Did you mean {' or '.join(near)}?"
                    if near
                    else f"Its rows are called like {next(iter(self.rows), '-')!r}."
                )
            )

    def _delete(self, asked: tuple[str, ...]) -> tuple[Ensemble, Deletion]:
        began = time.perf_counter()
        self.check(asked)
        gone = {row for row in asked if row in self.rows}
        hit = sorted({self.rows[row][0] for row in gone})
        stale = [
            (shard, prefix)
            for shard in sorted({shard for shard, _ in hit})
            for prefix in sorted(self.stages[shard])
            if any((shard, s) in hit for s in prefix)
        ]
        already = [row for row in asked if row not in gone]
        decided = time.perf_counter() - began
        event = {
            "event": "deleted",
            "time": _now(),
            "row_ids": sorted(gone),
            "hit": [list(cell) for cell in hit],
            "already": already,
        }
        size = sum(file.stat().st_size for cell in stale for file in self._place(*cell).glob("*"))
        _append(self.folder / "events.jsonl", event)
        left = replace(self, deletions=(*self.deletions, event))._without(gone, stale)
        spent = time.perf_counter() - began
        changed = {shard: (self.served(shard), left.served(shard)) for shard, _ in hit}
        unlearnt = {(k, s) for k, (now, then) in changed.items() for s in set(now) - set(then)}
        said = {self.rows[row][1] for row in gone}
        return left, Deletion(
            row_ids=tuple(sorted(gone)),
            already=tuple(already),
            hit=tuple(hit),
            served={shard: (len(now), len(then)) for shard, (now, then) in changed.items()},
            stages=len(stale),
            bytes=size,
            rows_lost=sum(left.sizes[k][s] for k, s in unlearnt),
            twins=tuple(row for row, (_, print_) in left.rows.items() if print_ in said),
            needs_training=left.needs_training,
            ledger_seconds=decided,
            seconds=spent,
        )

    def _without(self, gone: set[str], stale: Sequence[tuple[int, Order]]) -> Ensemble:
        """The folder without these stages and rows. Stages go first: a row's name outlives its influence."""
        for shard, prefix in stale:
            place = self._place(shard, prefix)
            (place / "stage.json").unlink(missing_ok=True)
            shutil.rmtree(place, ignore_errors=True)
        for unfinished in (self.folder / "work", *(self.folder / "stages").glob("*/.*")):
            shutil.rmtree(unfinished, ignore_errors=True)
        removed = set(stale)
        stages = {s: frozenset(p for p in there if (s, p) not in removed) for s, there in self.stages.items()}
        rows = {row: value for row, value in self.rows.items() if row not in gone}
        left = Ensemble(self.folder, self.design, self.about, rows, self.deletions, stages)
        left._write_rows()
        return left

    def _write_rows(self) -> None:
        lines = [
            json.dumps({"row_id": row, "shard": cell[0], "slice": cell[1], "sha256": print_}, ensure_ascii=False)
            for row, (cell, print_) in self.rows.items()
        ]
        write_text(self.folder / "rows.jsonl", "".join(f"{line}\n" for line in lines))

    # --- training -----------------------------------------------------------------------------------------------------

    def train(
        self,
        base: Any,
        rows: Sequence[Any],
        *,
        shards: Iterable[int] | None = None,
        progress: Progress | None = None,
    ) -> tuple[Ensemble, Trained]:
        """Train the stages that are missing, on the rows that are left: at first all of them, after deletions those
        that were dropped.

        Args:
            shards: only these; all by default.

        Raises:
            MismatchError: another base, or rows that are missing or say something else than at first.
        """
        chosen = self._shards(shards)
        known, stages = self._known(rows), self.over(base)
        missing = [
            (shard, prefix)
            for shard in chosen
            for prefix in prefixes(self.orders(shard))
            if prefix not in self.stages[shard]
        ]
        began, passes, tokens = time.monotonic(), 0, 0
        encoded: dict[str, Any] = {}
        members = self._members()
        with _alone(self.folder):
            for number, (shard, prefix) in enumerate(missing):
                mine = [row for s in prefix for row in members[shard, s]]
                for row in mine:
                    if row not in encoded:
                        encoded[row] = stages.subject.encode(known[row])
                tell = progress and _phase(progress, f"shard {shard}, slices {'-'.join(map(str, prefix))}")
                about = self._teach(stages, shard, prefix, [encoded[row] for row in mine], self.folder, tell)
                passes += round(self.design.stage.epochs * len(mine))
                tokens += about["tokens"]
                if progress:
                    progress("stages", number + 1, len(missing))
            seconds = time.monotonic() - began
            if missing:
                event = {"event": "trained", "time": _now(), "stages": len(missing), "row_passes": passes}
                _append(self.folder / "events.jsonl", {**event, "seconds": round(seconds, 3)})
            shutil.rmtree(self.folder / "work", ignore_errors=True)
        return Ensemble.load(self.folder), Trained(len(missing), passes, tokens, seconds)

    def _teach(
        self, stages: Stages, shard: int, prefix: Order, encoded: Sequence[Any], into: Path, progress: Any
    ) -> dict[str, Any]:
        """Train one stage on top of the one before it, and write it to its place under `into`."""
        seed = int(content_key("stage", self.design.stage.seed, shard, prefix)[:12], 16)
        name = "-".join(map(str, prefix))
        elsewhere = replace(self, folder=into)
        tensors, about = stages.teach(
            len(prefix) - 1,
            elsewhere.state(shard, prefix[:-1]),
            encoded,
            seed=seed,
            checkpoint=into / "work" / f"{shard}-{name}",
            key=content_key(shard, prefix, [row.ids for row in encoded]),
            progress=progress,
        )
        with complete_folder(elsewhere._place(shard, prefix)) as partial:
            save_tensors({n: t.contiguous() for n, t in tensors.items()}, partial / "tensors.safetensors")
            about |= {
                "rows": len(encoded),
                "deletions": len(self.deletions),
                "sha256": _sha256(partial / "tensors.safetensors"),
            }
            (partial / "stage.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
        return about

    def verify(
        self, base: Any, rows: Sequence[Any], *, shards: Iterable[int] | None = None, progress: Progress | None = None
    ) -> dict[int, bool]:
        """Train the chains that answer anew, on the rows that are left, and compare every bit.

        Holds on one kind of machine with one version of torch: elsewhere sums are rounded in another order.

        Returns:
            Per shard whether its chain is the same.
        """
        import tempfile

        chosen = [shard for shard in self._shards(shards) if self.served(shard)]
        known, stages = self._known(rows), self.over(base)
        members = self._members()
        found = {}
        with tempfile.TemporaryDirectory(prefix="expunge-verify-") as place:
            for number, shard in enumerate(chosen):
                prefix = self.served(shard)
                for length in range(1, len(prefix) + 1):
                    mine = [row for s in prefix[:length] for row in members[shard, s]]
                    encoded = [stages.subject.encode(known[row]) for row in mine]
                    tell = progress and _phase(progress, f"shard {shard}, stage {length} of {len(prefix)}")
                    self._teach(stages, shard, prefix[:length], encoded, Path(place), tell)
                anew, kept = replace(self, folder=Path(place)).state(shard, prefix), self.state(shard, prefix)
                found[shard] = anew.keys() == kept.keys() and all(torch.equal(kept[n], t) for n, t in anew.items())
                if progress:
                    progress("shards", number + 1, len(chosen))
        return found

    def _members(self) -> dict[Cell, list[str]]:
        """Rows of every cell, in the sequence of the ledger."""
        found: dict[Cell, list[str]] = {(k, s): [] for k in range(self.design.shards) for s in range(self.slices)}
        for row, (cell, _) in self.rows.items():
            found[cell].append(row)
        return found

    def _shards(self, asked: Iterable[int] | None) -> list[int]:
        chosen = list(range(self.design.shards)) if asked is None else list(asked)
        for shard in chosen:
            if not 0 <= shard < self.design.shards:
                raise ParameterError(f"{self.folder} has shards 0-{self.design.shards - 1}, there is no shard {shard}")
        return chosen

    def over(self, base: Any) -> Stages:
        """What trains and puts together chains over the base that this ensemble belongs to.

        Raises:
            MismatchError: another base.
        """
        if base.fingerprint != self.about["base"]["fingerprint"]:
            raise MismatchError(
                f"{self.folder} was trained over a base with fingerprint {self.about['base']['fingerprint'][:12]}, "
                f"{base.name} has {base.fingerprint[:12]}; give the model it was trained over"
            )
        return Stages(base, self.design.stage)

    def _known(self, rows: Sequence[Any]) -> dict[str, Any]:
        """Rows by their name, each checked to say what it said when it was first given."""
        given = {row.id: row for row in rows}
        deleted = {row for event in self.deletions for row in event["row_ids"]}
        new = next((row for row in given if row not in self.rows and row not in deleted), None)
        if new is not None:
            raise MismatchError(f"{self.folder} was laid out without the row {new!r}; new rows need a new ensemble")
        for row, (_, print_) in self.rows.items():
            if row not in given:
                raise MismatchError(f"{self.folder} knows the row {row!r}, which the data does not have")
            if row_print(given[row]) != print_:
                where = given[row].source or f"row {row!r}"
                raise MismatchError(f"{where}: says something else than when {self.folder} was laid out; ids must stay")
        return given

    # --- answering ----------------------------------------------------------------------------------------------------

    def member(self, base: Any, shard: int) -> Any:
        """The model of one shard, as a plain subject over the base's own tensors.

        Raises:
            EnsembleError: the shard has no live order.
        """
        self._shards([shard])
        prefix = self.served(shard)
        if not prefix:
            raise EnsembleError(f"{self.folder}: shard {shard} has no live order left; it needs training")
        stages = self.over(base)
        return stages.delta(self.state(shard, prefix)).apply(stages.subject)

    def subject(self, base: Any) -> Any:
        """All shards that answer, as one subject: the mean of their logits.

        Raises:
            EnsembleError: none is left.
        """
        if not self.answering:
            raise EnsembleError(f"{self.folder}: no shard has a live order left; it needs training")
        return averaged([self.member(base, shard) for shard in self.answering])


def fit(
    case: ExactCase,
    method: str,
    settings: Mapping[str, Any],
    orders: list[list[Order]],
    *,
    layer_wise: bool,
    adapters: bool = True,
) -> Ensemble:
    """Lay an ensemble out and train what is missing of it.

    Args:
        settings: the method's parameters; those of stages have the names they have in `Settings`.
    """
    stage = Settings(
        layer_wise=layer_wise,
        adapters=adapters,
        **{name: value for name, value in settings.items() if name in Settings.__dataclass_fields__},
    )
    design = Design(
        method, settings["shards"], orders, settings["shuffle"], settings["min_shards"], stage, dict(settings)
    )
    laid, _ = lay_out(case, design).train(case.subject, case.rows, progress=case.progress)
    return laid


def lay_out(case: ExactCase, design: Design) -> Ensemble:
    """A new folder without any stage, or the one that was begun there by the same design.

    Raises:
        RowError: an id that is used twice, fewer rows than cells.
        EnsembleError: the folder holds another ensemble or something else.
    """
    folder = Path(case.folder)
    stages = Stages(case.subject, design.stage)
    about = {
        "base": {"fingerprint": case.subject.fingerprint, "modality": case.subject.modality},
        "blocks": stages.groups,
        "data": dict(case.data),
        "versions": versions(),
    }
    if (folder / "ensemble.json").is_file():
        begun = Ensemble.load(folder)
        for what, same in (
            ("design", _plain(begun.design) == _plain(design)),
            ("base", begun.about["base"] == about["base"]),
        ):
            if not same:
                raise EnsembleError(f"{folder} holds an ensemble with another {what}; choose another folder")
        return begun
    if folder.is_dir() and any(folder.iterdir()):
        raise EnsembleError(f"{folder} is not empty and holds no ensemble; choose another folder")
    first: dict[str, str] = {}
    for row in case.rows:
        if row.id in first:
            raise RowError(f"{row.source or 'rows'}: id {row.id!r} was used in {first[row.id]} already")
        first[row.id] = row.source or "an earlier row"
    where = cells(len(case.rows), design.shards, design.stage.slices, seed=design.stage.seed, shuffle=design.shuffle)
    for row in case.rows:  # what does not fit the model is found before anything is trained
        stages.subject.encode(row)
    rows = {row.id: (cell, row_print(row)) for row, cell in zip(case.rows, where)}
    return write(folder, design, about, rows)


def write(folder: Path, design: Design, about: Mapping[str, Any], rows: Mapping[str, tuple[Cell, str]]) -> Ensemble:
    """A folder without any stage.

    Args:
        rows: each with its cell and the hash of what it says.
    """
    none: dict[int, frozenset[Order]] = {shard: frozenset() for shard in range(design.shards)}
    said = {"format": FORMAT, "design": _plain(design), **about}
    with complete_folder(folder) as partial:
        Ensemble(partial, design, dict(about), dict(rows), (), none)._write_rows()
        (partial / "events.jsonl").write_text("", encoding="utf-8")
        write_text(partial / "ensemble.json", json.dumps(said, indent=1, ensure_ascii=False) + "\n")
    return Ensemble.load(folder)


def row_print(row: Any) -> str:
    """sha256 of what a row says, wherever it comes from."""
    if hasattr(row, "pixels"):
        content = [hashlib.sha256(row.pixels().tobytes()).hexdigest(), row.answer]
    else:
        content = [row.kind, row.prompt, row.answer, row.messages]
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()


def _plain(design: Design) -> dict[str, Any]:
    return dict(json.loads(json.dumps(asdict(design))))


def _design(values: dict[str, Any]) -> Design:
    stage = values.pop("stage")
    many = [[tuple(order) for order in shard] for shard in values.pop("orders")]
    return Design(**values, orders=many, stage=Settings(**{**stage, "classes": tuple(stage["classes"])}))


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def _append(path: Path, event: Mapping[str, Any]) -> None:
    write_text(path, path.read_text(encoding="utf-8") + json.dumps(event, ensure_ascii=False) + "\n")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """The folder, for one process at a time; the lock goes with it."""
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise EnsembleError(f"another process is changing {folder}; wait for it") from None
        yield


def _phase(progress: Progress, name: str) -> Callable[[int, int], None]:
    return lambda done, total: progress(name, done, total)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
