"""The ledger: append-only, chained, safe under several writers and kill -9, and it tells when it was tampered with."""

import itertools
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
    ],
)
def test_tampering_is_found_and_named(ledger, statements, message):
    ok, found = tamper(ledger, *statements)
    assert not ok
    assert message in found


def test_only_what_is_on_the_list_gets_in(ledger):
    with pytest.raises(LedgerError, match="takes no field 'name'"):
        ledger.append("started", name="Ilva Morrow")
    with pytest.raises(LedgerError, match=r"no event 'startd'\. Did you mean started"):
        ledger.append("startd")
    assert len(ledger.list()) == 5


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
    (tmp_path / "file").write_text("x")
    with pytest.raises(LedgerError, match="cannot be used"):
        Ledger(tmp_path / "file" / "ledger.sqlite").append("started")


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
    Ledger(path).append("finished")
    assert Ledger(path).list()[-1].event == "finished"
