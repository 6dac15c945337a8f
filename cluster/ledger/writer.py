"""What every transition of the ledger is made of: a transaction, a lease's begin and end, a line in the journal.

Does not own: which transitions there are (ledger.py the way forward, endings.py the ways out and back).
"""

from __future__ import annotations

import json
import math
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.admission import AdmissionRule
from cluster.ledger import schema
from cluster.ledger.clock import SteadyClock
from cluster.ledger.reader import GroupRow, LedgerReader
from contracts.errors import LedgerError, StorageError
from contracts.wire import DiscardReason, GroupState

BEFORE_LEASE = {
    GroupState.GENERATING: GroupState.ADMITTED,
    GroupState.SCORING: GroupState.GENERATED,
    GroupState.CLAIMED: GroupState.READY,
}


class LedgerWriter(LedgerReader):
    """The one writer of a ledger file, and the steps that transitions share."""

    def __init__(self, path: str | Path, *, now: Callable[[], float] | None = None) -> None:
        """Open or create. now: the clock, seconds since the epoch; None: wall time that cannot jump.

        Raises LedgerError when another process writes the file or it cannot be read. A file that an earlier process
        left behind needs `recover()` before anything else.
        """
        self._now = now or SteadyClock()
        connection, self._writer_lock = schema.open_writer(Path(path))
        super().__init__(path, connection)
        self._rule: AdmissionRule | None = None
        self._max_attempts = 3

    def govern(self, rule: AdmissionRule, max_attempts: int) -> None:
        """Apply an admission rule, and discard a group whose painting or scoring failed `max_attempts` times.

        Without a rule any number of groups is admitted, a claim may have any size and no staleness is refused.
        """
        self._rule, self._max_attempts = rule, max_attempts

    def close(self) -> None:
        super().close()
        if self._writer_lock >= 0:
            os.close(self._writer_lock)
            self._writer_lock = -1

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All of a transition or nothing. Raises StorageError when the file cannot be written (full, read-only)."""
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield
                self._db.execute("COMMIT")
            except BaseException as error:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                if isinstance(error, sqlite3.OperationalError):
                    raise StorageError.of(f"the ledger {self.path}", error) from error
                raise

    def _set(self, group_id: int, **columns: Any) -> None:
        assignments = ", ".join(f"{name} = ?" for name in columns)
        self._db.execute(f"UPDATE groups SET {assignments} WHERE group_id = ?", (*columns.values(), group_id))

    def _set_meta(self, key: str, value: int) -> None:
        self._db.execute("UPDATE meta SET value = ? WHERE key = ?", (value, key))

    def _note(self, group_id: int | None, event: str, attempt: int | None = None, detail: str | None = None) -> int:
        cursor = self._db.execute(
            "INSERT INTO journal (at, group_id, event, attempt, detail) VALUES (?, ?, ?, ?, ?)",
            (self._now(), group_id, event, attempt, detail),
        )
        assert cursor.lastrowid is not None
        return cursor.lastrowid

    def _count_painting(self, row: GroupRow, attempt: int, at: float) -> None:
        self._db.execute(
            "INSERT INTO paintings (group_id, attempt, images, at) VALUES (?, ?, ?, ?)",
            (row.group_id, attempt, row.group_size, at),
        )

    def _keep_fingerprint(self, group_id: int, attempt: int, digest: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO fingerprints VALUES (?, ?, ?)", (group_id, attempt, digest))

    def _current_min_version(self, row: GroupRow) -> int:
        """The lowest version a waiting group may be painted with now; it only ever comes down (admission.py 2)."""
        if self._rule is None:
            return row.min_version
        older = self._value("SELECT COUNT(*) FROM groups WHERE live = 1 AND group_id < ?", (row.group_id,))
        return self._rule.min_version(self.published_version, older)

    # ---- leases --------------------------------------------------------------------------------------------------

    def _begin_lease(self, row: GroupRow, state: GroupState, lease_s: float, **columns: Any) -> None:
        now = self._now()
        if state is GroupState.SCORING:
            columns["scoring_at"] = now
        self._set(row.group_id, state=state.value, lease_deadline=now + lease_s, **columns)
        self._note(row.group_id, state.value, row.attempt, columns.get("worker"))

    def _end_lease(self, row: GroupRow, event: str, *, counts: bool) -> GroupState:
        """Take a lease back: its result will be refused. counts: as a failure of the group, which may be its last."""
        failures = row.failures + counts
        self._set(
            row.group_id, state=BEFORE_LEASE[row.state].value, attempt=row.attempt + 1, failures=failures,
            lease_deadline=None, worker=None,
        )  # fmt: skip
        self._note(row.group_id, event, row.attempt, row.state.value)
        if counts and failures >= self._max_attempts:
            self._end(row, DiscardReason.ATTEMPTS)
            return GroupState.DISCARDED
        return BEFORE_LEASE[row.state]

    def _release(self, event: str) -> list[int]:
        claimed = self._select("WHERE live = 1 AND state = 'claimed' ORDER BY group_id")
        for row in claimed:
            self._end_lease(row, event, counts=False)
        return [row.group_id for row in claimed]

    # ---- ends ----------------------------------------------------------------------------------------------------

    def _end(self, row: GroupRow, reason: DiscardReason) -> None:
        if row.state is GroupState.CLAIMED:
            raise LedgerError(f"group {row.group_id} is claimed: a claim is trained or released as a whole")
        self._set(
            row.group_id, state=GroupState.DISCARDED.value, live=0, reason=reason.value, discarded_at=self._now(),
            lease_deadline=None, worker=None,
        )  # fmt: skip
        self._note(row.group_id, "discarded", row.attempt, reason.value)

    def _paint_again(self, row: GroupRow) -> None:
        """Back to the first wait; the painting that is gone counts as discarded (`lost`)."""
        self._db.execute("UPDATE paintings SET lost = 1 WHERE group_id = ?", (row.group_id,))
        self._db.execute("UPDATE details SET tables = NULL, rewards = NULL WHERE group_id = ?", (row.group_id,))
        gone = dict.fromkeys(
            ("paint_attempt", "weight_version", "vault", "actor", "paint_seconds", "store_seconds", "generated_at",
             "wait_weights_seconds", "scoring_at", "ready_at", "ready_seq", "step", "staleness", "trained_at",
             "published_at", "lease_deadline", "worker")
        )  # fmt: skip
        self._set(
            row.group_id, state=GroupState.ADMITTED.value, live=1, attempt=row.attempt + 1, failures=0,
            late_from=self._now(), painted=0, num_bytes=0, stored=0, **gone,
        )  # fmt: skip
        self._note(row.group_id, "lost", row.attempt)


def as_json(value: Any) -> str:
    """JSON text; NaN and infinities become null, numpy scalars and arrays plain numbers."""
    return json.dumps(_plain(value), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
