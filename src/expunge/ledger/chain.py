"""An append-only table in SQLite in which every entry carries the hash of the one before.

What is written: hashes, counts, names of methods, settings, verdicts. Rows, paths, reasons and names of persons never
are; row sets, and settings that are running text, appear as hashes salted with a secret of this ledger.

`verify` finds entries that were changed, removed, reordered or inserted, and a tail that was cut (the head is recorded
too). Whoever can write the file can also make a new, consistent one from the start: against that only a copy of the
head hash kept elsewhere helps (`expunge ledger verify` prints it).
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import LedgerError, suggest

EVENTS = (
    "request_received",
    "started",
    "resumed",
    "interrupted",
    "finished",
    "failed",
    "guard_added",
    "guard_withdrawn",
)
FIELDS = (
    "request",  # hash of the request
    "run",  # key of the run
    "kind",  # change, audit, delete or serve
    "rows",  # counts by set
    "entities",
    "fingerprints",  # salted hashes by set
    "model",  # fingerprint before
    "result",  # fingerprint after
    "delta",
    "gold",  # fingerprints
    "method",
    "settings",
    "scope",
    "training",
    "proof",
    "seed",
    "verdict",
    "flags",
    "error",  # code only
    "versions",
    "evidence",  # hash of evidence.json
)
"""What an entry may hold. Anything else is refused, so that no personal data gets in by accident."""
START = "0" * 64

TABLES = """
CREATE TABLE IF NOT EXISTS entry (
    number INTEGER PRIMARY KEY, time TEXT NOT NULL, event TEXT NOT NULL, body TEXT NOT NULL,
    previous TEXT NOT NULL, hash TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS head (one INTEGER PRIMARY KEY CHECK (one = 1), number INTEGER, hash TEXT, salt TEXT);
CREATE TRIGGER IF NOT EXISTS no_update BEFORE UPDATE ON entry BEGIN SELECT RAISE(ABORT, 'append only'); END;
CREATE TRIGGER IF NOT EXISTS no_delete BEFORE DELETE ON entry BEGIN SELECT RAISE(ABORT, 'append only'); END;
"""


@dataclass(frozen=True)
class Entry:
    """One event."""

    number: int
    time: str
    event: str
    body: dict[str, Any]
    previous: str
    hash: str


def default_path() -> Path:
    """EXPUNGE_LEDGER, or ~/.local/share/expunge/ledger.sqlite."""
    return Path(os.environ.get("EXPUNGE_LEDGER") or Path.home() / ".local" / "share" / "expunge" / "ledger.sqlite")


class Ledger:
    """A ledger file; it is made when the first entry is written."""

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = Path(path) if path is not None else default_path()

    @contextmanager
    def _open(self, *, create: bool = False) -> Iterator[sqlite3.Connection]:
        if not create and not self.path.is_file():
            raise LedgerError(f"there is no ledger at {self.path}; it is made by the first run")
        connection = None
        try:
            if create:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self.path, timeout=30, isolation_level=None)
            if create:
                connection.executescript(TABLES)
            yield connection
        except (sqlite3.Error, OSError) as error:
            raise LedgerError(f"ledger {self.path} cannot be used: {error}") from None
        finally:
            if connection is not None:
                connection.close()

    def append(self, event: str, **fields: Any) -> Entry:
        """Write one entry; concurrent writers wait for one another.

        Raises:
            LedgerError: an unknown event or field, a value that JSON cannot hold, or the file cannot be written.
        """
        if event not in EVENTS:
            raise LedgerError(f"there is no event {event!r}. {suggest(event, EVENTS)}")
        for name in fields:
            if name not in FIELDS:
                raise LedgerError(f"the ledger takes no field {name!r}, so that nothing personal gets in")
        with self._open(create=True) as connection:
            connection.execute("BEGIN IMMEDIATE")
            number, previous, salt = self._head(connection)
            body = _written(
                {**fields, "settings": _veiled(fields["settings"], salt)} if "settings" in fields else fields
            )
            time = datetime.now(UTC).isoformat(timespec="seconds")
            hash_ = _hash(number + 1, time, event, body, previous)
            connection.execute(
                "INSERT INTO entry VALUES (?, ?, ?, ?, ?, ?)", (number + 1, time, event, body, previous, hash_)
            )
            connection.execute("UPDATE head SET number = ?, hash = ?", (number + 1, hash_))
            connection.execute("COMMIT")
        return Entry(number + 1, time, event, json.loads(body), previous, hash_)

    @staticmethod
    def _head(connection: sqlite3.Connection) -> tuple[int, str, str]:
        found = connection.execute("SELECT number, hash, salt FROM head").fetchone()
        if found is None:
            found = (0, START, secrets.token_hex(16))
            connection.execute("INSERT INTO head VALUES (1, ?, ?, ?)", found)
        return found  # type: ignore[no-any-return]

    @property
    def salt(self) -> str:
        """The secret that row fingerprints of this ledger are made with."""
        with self._open(create=True) as connection:
            connection.execute("BEGIN IMMEDIATE")
            salt = self._head(connection)[2]
            connection.execute("COMMIT")
        return salt

    def list(self) -> list[Entry]:
        """All entries, oldest first."""
        with self._open() as connection:
            return _entries(_moment(connection)[0])

    def show(self, number: int) -> Entry:
        """One entry."""
        entries = self.list()
        found = [entry for entry in entries if entry.number == number]
        if not found:
            raise LedgerError(f"the ledger has no entry {number}; it has {len(entries)}")
        return found[0]

    def verify(self) -> tuple[bool, str]:
        """Whether the chain is whole, and a sentence: the head hash, or the first broken entry."""
        with self._open() as connection:
            return _verified(*_moment(connection))

    def export(self) -> str:
        """All entries as JSON lines, the head hash last."""
        with self._open() as connection:
            rows, head = _moment(connection)
        ok, message = _verified(rows, head)
        entries = [json.dumps(asdict(entry), ensure_ascii=False) for entry in _entries(rows)]
        return "\n".join([*entries, json.dumps({"verified": ok, "message": message})]) + "\n"


Cells = tuple[int, str, str, str, str, str]
"""number, time, event, body, previous, hash"""


def _moment(connection: sqlite3.Connection) -> tuple[list[Cells], tuple[int, str]]:
    """All entries and the head record as they stood at one moment, whoever writes meanwhile."""
    connection.execute("BEGIN")
    rows = connection.execute("SELECT number, time, event, body, previous, hash FROM entry ORDER BY number").fetchall()
    head = connection.execute("SELECT number, hash FROM head").fetchone() or (0, START)
    connection.execute("COMMIT")
    return rows, head


def _verified(rows: list[Cells], head: tuple[int, str]) -> tuple[bool, str]:
    previous = START
    for place, (number, time, event, body, before, hash_) in enumerate(rows, start=1):
        if number != place:
            return False, f"entry {place} is missing"
        if before != previous:
            return False, f"entry {number} does not follow entry {number - 1}: the chain is broken there"
        if _hash(number, time, event, body, before) != hash_:
            return False, f"entry {number} was changed after it was written"
        previous = hash_
    if len(rows) != head[0]:
        return False, f"the ledger ends at entry {len(rows)}, its head record says {head[0]}: the tail was cut"
    if previous != head[1]:
        return False, f"entry {len(rows)} is not the one that the head record names: entries were rewritten"
    return True, f"{len(rows)} entries, whole; head {previous}"


def _entries(rows: list[Cells]) -> list[Entry]:
    return [Entry(n, t, e, _body(n, b), p, h) for n, t, e, b, p, h in rows]


def _veiled(value: Any, salt: str) -> Any:
    """Settings with running text replaced by its salted hash: a refusal sentence, say, may name a person."""
    if isinstance(value, dict):
        return {name: _veiled(below, salt) for name, below in value.items()}
    if isinstance(value, list | tuple):
        return [_veiled(below, salt) for below in value]
    if isinstance(value, str) and any(character.isspace() for character in value):
        return "text " + hashlib.sha256((salt + value).encode("utf-8", "surrogatepass")).hexdigest()
    return value


def _written(fields: dict[str, Any]) -> str:
    """Canonical JSON."""
    for name, value in fields.items():
        try:
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise LedgerError(f"the ledger cannot hold {name}: {error}") from None
    return json.dumps(fields, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _hash(number: int, time: str, event: str, body: str, previous: str) -> str:
    # default=repr: a tampered cell may hold bytes, and then the hash has to differ rather than fail
    content = json.dumps([number, time, event, body, previous], ensure_ascii=False, separators=(",", ":"), default=repr)
    return hashlib.sha256(content.encode()).hexdigest()


def _body(number: int, text: Any) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except (TypeError, ValueError):
        raise LedgerError(f"entry {number} was changed after it was written: its body is not readable") from None
