"""What a ledger is after kill -9 of its writer: every acknowledged transition, and nothing half done."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest

from cluster.ledger import Ledger, LedgerReader, schema
from cluster.ledger.clock import SteadyClock
from contracts.errors import LedgerError, StaleLease
from contracts.wire import GroupState, PaintReceipt, PromptSpec

# Paints groups for ever and says so after each acknowledgement.
WRITER = """
import sys
from cluster.ledger import Ledger
from contracts.wire import PaintReceipt, PromptSpec
ledger = Ledger(sys.argv[1])
while True:
    if ledger.next_to_generate() is None:  # else one is left from before the kill
        ledger.admit(PromptSpec(text="x" * 2000), ledger.next_position(), 4)
    task = ledger.lease_generating("actor", 600.0)
    receipt = dict(weight_version=0, vault="v", num_bytes=1, paint_seconds=1.0, store_seconds=1.0)
    ledger.generated(PaintReceipt(group_id=task.group_id, attempt=task.attempt, **receipt))
    print(task.group_id, flush=True)
"""


def kill_writer_after(path: Path, acknowledgements: int) -> int:
    """Run the writer, SIGKILL it in mid-flight; returns the last group it acknowledged."""
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    last = -1
    for line in writer.stdout:
        last = int(line)
        if last >= acknowledgements:
            break
    writer.send_signal(signal.SIGKILL)
    rest = writer.stdout.read().split()
    assert writer.wait() == -signal.SIGKILL
    return int(rest[-1]) if rest else last


def test_kill_9_loses_no_acknowledged_group(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    last = -1
    for _ in range(2):
        last = kill_writer_after(path, last + 40)
        ledger = Ledger(path)
        rows = ledger.rows()
        assert all(row.state is GroupState.GENERATED for row in rows[: last + 1])
        assert len(rows) <= last + 2  # one may have been acknowledged to the file but not to us
        ledger.recover()
        assert {row.state for row in ledger.rows()} <= {GroupState.ADMITTED, GroupState.GENERATED}
        assert ledger.books().balanced
        assert ledger.next_position() == len(rows)
        ledger.close()


def test_recover_takes_every_lease_back_and_refuses_its_result(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite", now=lambda: 0.0)
    for position in range(3):
        ledger.admit(PromptSpec(text="a"), position, 2)
    tasks = [ledger.lease_generating("actor", 10.0) for _ in range(3)]
    receipts = [
        PaintReceipt(
            group_id=task.group_id, attempt=task.attempt, weight_version=0, vault="v", num_bytes=1, paint_seconds=0.0,
            store_seconds=0.0,
        )
        for task in tasks if task is not None
    ]  # fmt: skip
    for receipt in receipts[:2]:
        ledger.generated(receipt)
    attempts = [ledger.lease_scoring(group_id, 10.0) for group_id in (0, 1)]
    assert attempts[0] is not None
    ledger.scored(0, attempts[0], {})
    assert ledger.claim(1) == [0]
    ledger.close()

    ledger = Ledger(tmp_path / "ledger.sqlite", now=lambda: 5000.0)
    assert ledger.recover() == [(0, GroupState.CLAIMED), (1, GroupState.SCORING), (2, GroupState.GENERATING)]
    assert [row.state for row in ledger.rows()] == [GroupState.READY, GroupState.GENERATED, GroupState.ADMITTED]
    assert [row.failures for row in ledger.rows()] == [0, 0, 0]
    assert [row.attempt for row in ledger.rows()] == [1, 1, 1]
    with pytest.raises(StaleLease):
        ledger.generated(receipts[2])
    assert attempts[1] is not None
    with pytest.raises(StaleLease):
        ledger.scored(1, attempts[1], {})
    assert ledger.discard_late(100.0) == []  # hours of downtime make no group late
    assert ledger.recover() == []
    ledger.close()


def test_a_failed_transition_leaves_no_trace(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.admit(PromptSpec(text="a"), 0, 2)
    before = ledger.journal(), ledger.rows()
    with pytest.raises(TypeError):
        ledger.lease_generating("actor", "not seconds")  # type: ignore[arg-type]
    assert (ledger.journal(), ledger.rows()) == before
    assert ledger.lease_generating("actor", 1.0) is not None
    ledger.close()


def books_as_soon_as_there_are_any(path: Path) -> bool:
    """Whether the first books that a reader gets to see are whole; looks from before the ledger is made."""
    while True:
        with suppress(LedgerError), closing(LedgerReader(path)) as reader:
            return reader.books().balanced


def test_a_reader_never_sees_a_ledger_that_is_half_made(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as beside:
        for number in range(50):
            path = tmp_path / f"{number}.sqlite"
            looks = beside.submit(books_as_soon_as_there_are_any, path)
            Ledger(path).close()
            assert looks.result(30)


def test_what_a_kill_left_of_a_new_ledger_is_completed(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.executescript("CREATE TABLE meta (key TEXT PRIMARY KEY, value INTEGER) WITHOUT ROWID;")
    with pytest.raises(LedgerError, match="no format") as refused:
        LedgerReader(path)
    assert [file.path for file in psutil.Process().open_files() if file.path == str(path)] == [], refused
    with closing(Ledger(path)) as ledger:
        assert ledger.books().balanced


def test_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Ledger(tmp_path / "ledger.sqlite").close()
    monkeypatch.setattr(schema, "FORMAT", schema.FORMAT + 1)
    with pytest.raises(LedgerError, match="has format 1"):
        Ledger(tmp_path / "ledger.sqlite")


def test_the_clock_does_not_follow_jumps_of_wall_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SteadyClock()
    before = clock()
    monkeypatch.setattr("time.time", lambda: before + 86400)
    assert 0 <= clock() - before < 3600
