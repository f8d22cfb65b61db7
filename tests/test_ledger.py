"""The ledger: append-only, chained, safe under several writers and kill -9, and it tells when it was tampered with."""

import hashlib
import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from expunge.errors import LedgerError
from expunge.ledger import Ledger


@pytest.fixture
def ledger(tmp_path):
    made = Ledger(tmp_path / "ledger.sqlite")
    for event in ("request_received", "started", "interrupted", "resumed", "finished"):
        made.append(event, run="r1", method="npo", rows={"forget": 3})
    return made


def tamper(ledger, *statements):
    connection = sqlite3.connect(ledger.path)
    connection.executescript("DROP TRIGGER no_update; DROP TRIGGER no_delete;")
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()
    return ledger.verify()


def test_entries_are_chained(ledger):
    entries = ledger.list()
    assert [entry.number for entry in entries] == [1, 2, 3, 4, 5]
    assert all(second.previous == first.hash for first, second in itertools.pairwise(entries))
    ok, message = ledger.verify()
    assert ok
    assert entries[-1].hash in message
    assert ledger.show(2).event == "started"
    assert entries[-1].hash in ledger.export()


def test_the_table_takes_no_update_and_no_delete(ledger):
    connection = sqlite3.connect(ledger.path)
    for statement in ("UPDATE entry SET event = 'x'", "DELETE FROM entry WHERE number = 2"):
        with pytest.raises(sqlite3.IntegrityError, match="append only"):
            connection.execute(statement)


@pytest.mark.parametrize(
    ("statements", "message"),
    [
        (["""UPDATE entry SET body = '{"method":"idk"}' WHERE number = 3"""], "entry 3 was changed"),
        (["UPDATE entry SET time = '2020' WHERE number = 4"], "entry 4 was changed"),
        (["DELETE FROM entry WHERE number = 2"], "entry 2 is missing"),
        (["DELETE FROM entry WHERE number = 5"], "the tail was cut"),
        (["DELETE FROM entry WHERE number = 5", "UPDATE entry SET hash = 'x' WHERE number = 4"], "entry 4 was changed"),
        (
            [
                "UPDATE entry SET number = 9 WHERE number = 2",
                "UPDATE entry SET number = 2 WHERE number = 3",
                "UPDATE entry SET number = 3 WHERE number = 9",
            ],
            "entry 2 does not follow entry 1",
        ),
        (
            ["INSERT INTO entry SELECT 6, time, event, body, hash, 'new' FROM entry WHERE number = 5"],
            "entry 6 was changed",
        ),
        (
            [
                *(f"UPDATE entry SET number = {n + 1} WHERE number = {n}" for n in (5, 4, 3)),
                "INSERT INTO entry SELECT 3, time, event, body, hash, 'new' FROM entry WHERE number = 2",
            ],
            "entry 3 was changed",
        ),
        (["UPDATE entry SET body = 'not json' WHERE number = 3"], "entry 3 was changed"),
        (["UPDATE entry SET body = x'00ff' WHERE number = 3"], "entry 3 was changed"),
        (["UPDATE entry SET event = 'finished' WHERE number = 1"], "entry 1 was changed"),
        (["DELETE FROM entry"], "ends at entry 0, its head record says 5"),
        (["DELETE FROM head"], "ends at entry 5, its head record says 0"),
        (["UPDATE head SET hash = 'x'"], "entry 5 is not the one that the head record names"),
    ],
)
def test_tampering_is_found_and_named(ledger, statements, message):
    ok, found = tamper(ledger, *statements)
    assert not ok
    assert message in found


def test_a_body_that_is_no_longer_readable_is_named(ledger):
    tamper(ledger, "UPDATE entry SET body = 'not json' WHERE number = 3")
    with pytest.raises(LedgerError, match="entry 3 was changed"):
        ledger.list()


def test_a_chain_rewritten_from_an_entry_on_does_not_fit_the_head(ledger):
    entries = ledger.list()
    other = Ledger(ledger.path.with_name("forged.sqlite"))
    for entry in entries:
        other.append(entry.event, **{**entry.body, "method": "idk"})
    rows = [(e.hash, e.previous, json.dumps(e.body, sort_keys=True, separators=(",", ":"))) for e in other.list()]
    times = [e.time for e in other.list()]
    ok, found = tamper(
        ledger,
        *(
            f"UPDATE entry SET hash = '{h}', previous = '{p}', body = '{b}', time = '{t}' WHERE number = {n}"
            for n, ((h, p, b), t) in enumerate(zip(rows, times), start=1)
        ),
    )
    assert not ok
    assert "entry 5 is not the one that the head record names" in found


def test_an_export_can_be_verified_by_anybody(ledger):
    *entries, last = map(json.loads, ledger.export().splitlines())
    previous = "0" * 64
    for number, entry in enumerate(entries, start=1):
        body = json.dumps(entry["body"], sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        content = [number, entry["time"], entry["event"], body, previous]
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        assert entry["previous"] == previous
        assert entry["hash"] == hashlib.sha256(text.encode()).hexdigest()
        previous = entry["hash"]
    assert last == {"verified": True, "message": f"5 entries, whole; head {previous}"}


def test_only_what_is_on_the_list_gets_in(ledger):
    with pytest.raises(LedgerError, match="takes no field 'name'"):
        ledger.append("started", name="Ilva Morrow")
    with pytest.raises(LedgerError, match=r"no event 'startd'\. Did you mean started"):
        ledger.append("startd")
    assert len(ledger.list()) == 5


@pytest.mark.parametrize("value", [object(), float("nan"), {"a": float("inf")}, "half \ud800", {(1, 2): 3}])
def test_what_json_cannot_hold_is_refused(ledger, value):
    with pytest.raises(LedgerError, match="the ledger cannot hold scope: "):
        ledger.append("started", scope=value)
    assert len(ledger.list()) == 5
    assert ledger.verify()[0]


def test_running_text_in_settings_is_hashed_with_the_salt(ledger):
    settings = {"beta": 0.1, "retain": "kl", "refusal": "Ask Ilva Morrow.", "list": ["Ilva Morrow"]}
    body = ledger.append("started", method="npo", settings=settings).body
    assert body == ledger.show(6).body
    assert (body["settings"]["beta"], body["settings"]["retain"]) == (0.1, "kl")
    hashed = "text " + hashlib.sha256(f"{ledger.salt}Ask Ilva Morrow.".encode()).hexdigest()
    assert body["settings"]["refusal"] == hashed
    assert "Ilva" not in ledger.export()
    assert b"Ilva" not in ledger.path.read_bytes()


def test_the_salt_is_the_ledgers_own_and_stays(tmp_path):
    first, second = Ledger(tmp_path / "a.sqlite"), Ledger(tmp_path / "b.sqlite")
    assert first.salt == Ledger(tmp_path / "a.sqlite").salt != second.salt
    first.append("started")
    assert first.verify()[0]


def test_ledgers_that_cannot_be_used_say_so(tmp_path):
    with pytest.raises(LedgerError, match="there is no ledger at"):
        Ledger(tmp_path / "none.sqlite").list()
    (tmp_path / "bad.sqlite").write_text("this is not a database, it only looks like one " * 50)
    with pytest.raises(LedgerError, match="cannot be used"):
        Ledger(tmp_path / "bad.sqlite").append("started")
    with pytest.raises(LedgerError, match="there is no ledger"):
        Ledger(tmp_path).verify()
    with pytest.raises(LedgerError, match="cannot be used"):
        Ledger(tmp_path).append("started")
    (tmp_path / "empty.sqlite").touch()
    with pytest.raises(LedgerError, match="cannot be used"):
        Ledger(tmp_path / "empty.sqlite").verify()
    (tmp_path / "file").write_text("x")
    with pytest.raises(LedgerError, match="cannot be used"):
        Ledger(tmp_path / "file" / "ledger.sqlite").append("started")


def test_a_ledger_with_a_damaged_page_says_so(ledger):
    raw = bytearray(ledger.path.read_bytes())
    raw[100:] = b"\xff" * (len(raw) - 100)
    ledger.path.write_bytes(raw)
    with pytest.raises(LedgerError, match="cannot be used"):
        ledger.verify()
    with pytest.raises(LedgerError, match="cannot be used"):
        ledger.append("started")


def test_a_read_only_ledger_is_read_but_not_written(ledger, monkeypatch):
    real = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda p, **k: real(f"file:{p}?mode=ro", uri=True, **k))
    assert ledger.verify()[0]
    assert len(ledger.list()) == 5
    with pytest.raises(LedgerError, match=r"ledger .*sqlite cannot be used: attempt to write a readonly database"):
        ledger.append("started")
    monkeypatch.undo()
    assert len(ledger.list()) == 5


WRITER = """
import sys
from expunge.ledger import Ledger
for i in range({n}):
    Ledger(sys.argv[1]).append("started", run=str(i))
"""


def test_several_writers_keep_one_chain(tmp_path):
    path = tmp_path / "ledger.sqlite"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER.format(n=25), str(path)]) for _ in range(4)]
    assert [writer.wait(timeout=120) for writer in writers] == [0] * 4
    assert len(Ledger(path).list()) == 100
    assert Ledger(path).verify()[0]


def test_a_ledger_is_whole_at_every_moment_of_a_writer(tmp_path):
    path = tmp_path / "ledger.sqlite"
    Ledger(path).append("started")
    writer = subprocess.Popen([sys.executable, "-c", WRITER.format(n=10**6), str(path)])
    try:
        while len(Ledger(path).list()) < 3:
            assert writer.poll() is None
        for _ in range(40):
            ok, message = Ledger(path).verify()
            assert ok, message
            *_, entry, last = map(json.loads, Ledger(path).export().splitlines())
            assert last["message"] == f"{entry['number']} entries, whole; head {entry['hash']}"
    finally:
        writer.kill()
        writer.wait()


def test_a_killed_writer_leaves_a_whole_chain(tmp_path):
    path = tmp_path / "ledger.sqlite"
    Ledger(path).append("started")
    for wait in (0.3, 0.4, 0.5):
        writer = subprocess.Popen([sys.executable, "-c", WRITER.format(n=10**6), str(path)])
        time.sleep(wait)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        ok, message = Ledger(path).verify()
        assert ok, message
    assert len(Ledger(path).list()) > 1
    Ledger(path).append("finished")
    assert Ledger(path).list()[-1].event == "finished"
