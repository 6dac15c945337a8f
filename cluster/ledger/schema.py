"""The ledger's file: tables, connections and the lock that keeps it to one writer.

Durability. WAL with synchronous=NORMAL: a committed transition is in the operating system's hands, so kill -9 of any
process loses nothing that was acknowledged. A power failure can lose the last transitions (never the file's
consistency); their groups are then painted again from the same seeds. FULL would cost an fsync a transition for that.

Does not own: what the rows mean (ledger.py, reader.py).
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import quote

from contracts.errors import LedgerError

FORMAT = 1

# `groups` is lean because the books sum over it; long texts stand in `details`.
_TABLES = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS groups (
    group_id INTEGER PRIMARY KEY, source TEXT NOT NULL, state TEXT NOT NULL,
    live INTEGER NOT NULL DEFAULT 1,          -- from admission until published or discarded
    attempt INTEGER NOT NULL DEFAULT 0,       -- fencing token
    failures INTEGER NOT NULL DEFAULT 0,      -- failed leases since the last acknowledgement
    position INTEGER NOT NULL, group_size INTEGER NOT NULL, min_version INTEGER NOT NULL,
    admitted_at REAL NOT NULL, late_from REAL NOT NULL,
    lease_deadline REAL, worker TEXT,
    painted INTEGER NOT NULL DEFAULT 0,       -- acknowledged images that were not lost: 0 or group_size
    paint_attempt INTEGER, weight_version INTEGER, vault TEXT, num_bytes INTEGER NOT NULL DEFAULT 0,
    stored INTEGER NOT NULL DEFAULT 0,        -- 1 while a vault holds its bytes
    actor TEXT, paint_seconds REAL, store_seconds REAL, wait_weights_seconds REAL, generated_at REAL,
    scoring_at REAL, ready_at REAL, ready_seq INTEGER,
    step INTEGER, staleness INTEGER, trained_at REAL, published_at REAL,
    reason TEXT, discarded_at REAL
);
CREATE TABLE IF NOT EXISTS details (group_id INTEGER PRIMARY KEY, prompt TEXT NOT NULL, tables TEXT, rewards TEXT);
CREATE TABLE IF NOT EXISTS paintings (
    group_id INTEGER, attempt INTEGER, images INTEGER NOT NULL, at REAL NOT NULL,
    lost INTEGER NOT NULL DEFAULT 0,          -- 1 when its bytes vanished and the group was painted again
    PRIMARY KEY (group_id, attempt)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS fingerprints (      -- of a painting's images; outlives their bytes
    group_id INTEGER, attempt INTEGER, images TEXT NOT NULL, PRIMARY KEY (group_id, attempt)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS journal (
    seq INTEGER PRIMARY KEY, at REAL NOT NULL, group_id INTEGER, event TEXT NOT NULL, attempt INTEGER, detail TEXT
);
CREATE INDEX IF NOT EXISTS live_order ON groups (group_id) WHERE live = 1;
CREATE INDEX IF NOT EXISTS live_state ON groups (state, group_id) WHERE live = 1;
CREATE INDEX IF NOT EXISTS stored_bytes ON groups (step) WHERE stored = 1;
CREATE INDEX IF NOT EXISTS by_step ON groups (step) WHERE step IS NOT NULL;
"""
# A file's first entries. With OR IGNORE: an existing ledger keeps what it says.
_META = f"""
INSERT OR IGNORE INTO meta VALUES
    ('format', {FORMAT}), ('trained_steps', 0), ('published', 0), ('max_staleness_seen', NULL), ('refused', 0);
"""


def open_writer(path: Path) -> tuple[sqlite3.Connection, int]:
    """(connection, file descriptor of the lock). Raises LedgerError when another process writes this ledger.

    The connection may be used from any thread, one at a time: an asyncio Ray actor is constructed in another thread
    than the one its methods run in.
    """
    with _opening(path) as undo:
        lock = _take_lock(path)
        undo.callback(os.close, lock)
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        undo.callback(db.close)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = NORMAL")
        # All of it or nothing: neither a kill half-way nor a reader beside it may find a ledger that lacks an entry.
        db.executescript(f"BEGIN IMMEDIATE;{_TABLES}{_META}COMMIT;")
        _check_format(db, path)
    return db, lock


def open_reader(path: Path) -> sqlite3.Connection:
    """A read-only connection, also beside a running writer. Raises LedgerError when there is no ledger."""
    if not path.is_file():
        raise LedgerError(f"there is no ledger at {path}")
    # Reading a WAL file needs its shared-memory file beside it; where none can be made, nobody writes either.
    mode = "mode=ro" if os.access(path.parent, os.W_OK) else "mode=ro&immutable=1"
    with _opening(path) as undo:
        db = sqlite3.connect(f"file:{quote(str(path.resolve()))}?{mode}", uri=True, check_same_thread=False)
        undo.callback(db.close)
        _check_format(db, path)
    return db


@contextmanager
def _opening(path: Path) -> Iterator[ExitStack]:
    """What was opened within is closed if the rest fails. Raises LedgerError for SQLite's errors."""
    with ExitStack() as undo:
        try:
            yield undo
        except sqlite3.DatabaseError as error:
            raise LedgerError(f"{path} is not a readable ledger: {error}") from error
        undo.pop_all()


def _take_lock(path: Path) -> int:
    lock = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise LedgerError(f"{path} is being written by another process: the run is already running") from error
    return lock


def _check_format(db: sqlite3.Connection, path: Path) -> None:
    row = db.execute("SELECT value FROM meta WHERE key = 'format'").fetchone()
    if row is None:
        raise LedgerError(f"{path} is not a readable ledger: it states no format")
    if row[0] != FORMAT:
        raise LedgerError(f"{path} has format {row[0]}, this version of Salon reads format {FORMAT}")
