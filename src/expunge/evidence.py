"""Evidence: all measurements of one request, as plain data that the verdict judges and the report shows."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .errors import TableError, suggest

SCHEMA_VERSION = 1
GROUPS = ("direct", "black_box", "latent", "tamper", "reintroduce")


@dataclass
class Item:
    """One forget query under one probe: how much of the knowledge came back, 1 all of it. Scores that count beyond a
    control (membership, features) may be below 0."""

    entity: str
    row: str
    recovered: float
    text: str = ""
    """What the model said, for the example rows; empty where nothing is said."""


@dataclass
class ProbeRun:
    """One attack on one model."""

    attack: str
    group: str
    items: list[Item]
    settings: dict[str, Any]
    budget: dict[str, float]
    """What was actually spent: queries, samples, steps, seconds."""
    curve: list[tuple[float, float]] = field(default_factory=list)
    """(budget, mean recovery), e.g. relearning steps against recovery."""
    curve_label: str = ""
    note: str = ""
    status: str = "scored"
    """scored, or skipped: <why>. A skipped probe is never a score of 0."""
    numbers: dict[str, float] = field(default_factory=dict)
    """Further figures by name."""
    kept: list[Item] = field(default_factory=list)
    """What was asked in the same way of what must be kept: no part of the score."""

    @property
    def score(self) -> float:
        return sum(item.recovered for item in self.items) / len(self.items) if self.items else math.nan


@dataclass
class Interval:
    """An estimate with its bootstrap interval."""

    low: float
    value: float
    high: float


@dataclass
class Judged:
    """One probe, judged: candidate between gold (0) and original (1)."""

    attack: str
    group: str
    before: float
    after: float
    gold: list[float]
    informative: bool
    why: str = ""
    """Why the probe is not informative."""
    recovery: Interval | None = None
    """Normalised recovery R, unclipped; None where it is not informative."""
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """before / after / gold mean curves, where the attack has one."""
    curve_label: str = ""
    caveat: str = ""


@dataclass
class Measured:
    """One metric on one row set for every model."""

    metric: str
    rows: str
    before: Interval | None
    after: Interval | None
    gold: Interval | None
    n: int
    direction: str
    ideal: str
    sentence: str
    version: int = 1
    flag: str = ""
    """Set where a value cannot be or is suspiciously good."""
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Table:
    """A table for people; cells are plain values."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""


@dataclass
class Scorecard:
    """What a benchmark found."""

    models: list[dict[str, str]]
    """{role, name, fingerprint}"""
    measured: list[Measured]
    headline: list[str]
    """Scores to show first, by name."""
    tables: list[Table]
    notes: list[str]
    rows: dict[str, int]
    data: str
    cost: dict[str, Any]
    benchmark: str = ""
    paper: str = ""
    summary: str = ""
    version: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    def value(self, name: str, role: str = "after") -> float:
        """The value of one score on one model.

        Raises:
            TableError: there is no such score.
        """
        for one in self.measured:
            if one.metric == name and getattr(one, role) is not None:
                return float(getattr(one, role).value)
        known = [one.metric for one in self.measured if getattr(one, role) is not None]
        raise TableError(f"{self.benchmark} has no score {name!r} of {role}. {suggest(name, known)}")

    def save(self, path: Path) -> None:
        from .files import write_text

        write_text(path, json.dumps(_finite(asdict(self)), indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    @staticmethod
    def load(path: Path) -> Scorecard:
        from .errors import OutputError

        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            data["measured"] = [_measured(one) for one in data["measured"]]
            data["tables"] = [Table(**one) for one in data["tables"]]
            return Scorecard(**data)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{path} is not a readable scorecard: {error}") from None


@dataclass
class SideEffect:
    """Something that should not have changed."""

    name: str
    before: float
    after: float
    gold: float | None
    tolerance: float
    flag: str
    """The flag it raises, e.g. damaged."""
    raised: bool
    n: int
    sentence: str
    low: float | None = None
    high: float | None = None


@dataclass
class Routing:
    """Whether the tokens of a row set still take the same experts (mixtures of experts only)."""

    rows: str
    overlap: Interval
    """Share of the experts a token took before that it still takes; mean over tokens and blocks."""
    blocks: dict[str, float]
    """The same, block by block."""
    moved: dict[str, list[float]]
    """Where single experts were let move: block to the share of tokens that take one of them, [before, after]."""
    n: int
    """Rows looked at."""
    of: int
    """Rows there are."""
    tokens: int


@dataclass
class Knowing:
    """What lies behind one model's answers to the forget questions: shares that add up to 1."""

    role: str
    n: int
    known: float
    """Answered, asked directly."""
    suppressed: float
    """Not answered, but known by a paraphrase or by the hidden states."""
    ignorant: float
    accuracy: float
    """Balanced accuracy of the probe on people it never saw."""


@dataclass
class SelfTest:
    """The instrument tried on models whose truth is known."""

    passed: bool
    cases: list[dict[str, Any]]
    """{model, expected, verdict, ok, by}"""
    auc: dict[str, float]
    """Per probe: how well it separates models that know from models that do not."""
    note: str = ""


@dataclass
class Verdict:
    verdict: str
    """not_forgotten, suppressed, removed_under_tested_attacks, no_recovery_found, inconclusive."""
    because: str
    by: list[str]
    flags: list[str]
    groups: dict[str, Interval | None]
    thresholds: dict[str, float]


@dataclass
class Evidence:
    """Everything a report shows. `save` writes evidence.json."""

    request: dict[str, Any]
    """name, reason, proof, counts of rows and entities per set, salted fingerprints."""
    method: dict[str, Any]
    """name, card, resolved settings, scope, training summary, stopped_by_guard."""
    models: list[dict[str, Any]]
    """role (before, after, gold), name, fingerprint."""
    probes: list[Judged]
    runs: dict[str, list[ProbeRun]]
    """role (before, after, gold/0 ...) -> probe runs."""
    metrics: list[Measured]
    side_effects: list[SideEffect]
    self_test: SelfTest | None
    verdict: Verdict
    limits: list[str]
    examples: list[dict[str, Any]]
    """{row, entity, question, answer, before, after, gold, set}"""
    cost: dict[str, Any]
    """seconds, tokens, flops, flop_per_second, machine_share, peak_memory_bytes ..., per phase."""
    environment: dict[str, Any]
    warnings: list[str] = field(default_factory=list)
    routing: list[Routing] = field(default_factory=list)
    """Empty for dense models."""
    implied: dict[str, list[str]] = field(default_factory=dict)
    """Forget rows whose fact follows from kept ones, with the rows it follows from."""
    knowing: list[Knowing] = field(default_factory=list)
    """Empty where no probe tells known from unseen rows."""
    schema: int = SCHEMA_VERSION

    def save(self, path: Path) -> None:
        from .files import write_text

        write_text(path, json.dumps(_finite(asdict(self)), indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    @staticmethod
    def load(path: Path) -> Evidence:
        from .errors import OutputError

        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise OutputError(f"{path} does not exist; {path.parent} is no folder of a run that has ended") from None
        except (OSError, ValueError) as error:
            raise OutputError(f"{path} is not a readable evidence file: {error}") from None
        if data.get("schema") != SCHEMA_VERSION:
            raise OutputError(f"{path} has evidence schema {data.get('schema')}, this version reads {SCHEMA_VERSION}")

        data["probes"] = [Judged(**{**probe, "recovery": _interval(probe["recovery"])}) for probe in data["probes"]]
        data["runs"] = {
            role: [
                ProbeRun(
                    **{**run, **{name: [Item(**item) for item in run.get(name, [])] for name in ("items", "kept")}}
                )
                for run in runs
            ]
            for role, runs in data["runs"].items()
        }
        data["metrics"] = [_measured(one) for one in data["metrics"]]
        data["side_effects"] = [SideEffect(**effect) for effect in data["side_effects"]]
        data["routing"] = [Routing(**{**r, "overlap": _interval(r["overlap"])}) for r in data.get("routing", [])]
        data["knowing"] = [Knowing(**one) for one in data.get("knowing", [])]
        data["self_test"] = SelfTest(**data["self_test"]) if data["self_test"] else None
        verdict = data["verdict"]
        verdict["groups"] = {group: _interval(value) for group, value in verdict["groups"].items()}
        data["verdict"] = Verdict(**verdict)
        return Evidence(**data)


def _interval(value: dict[str, float | None] | None) -> Interval | None:
    return None if value is None else Interval(**{k: _number(v) for k, v in value.items()})


def _measured(saved: dict[str, Any]) -> Measured:
    return Measured(**{**saved, **{role: _interval(saved[role]) for role in ("before", "after", "gold")}})


def _finite(value: Any) -> Any:
    """JSON has no infinities: they and NaN become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _number(value: float | None) -> float:
    return math.nan if value is None else value
