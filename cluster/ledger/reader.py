"""Questions to the ledger: one group's row, many rows, the books, the journal. Reads only.

The books are counted in images, from the ledger alone. An image is *painted* when the receipt of its group is
acknowledged (`generated`; for the learner's own rollouts: `trained`). From then on it is in exactly one of

- trained:   its group's step is in the lineage of the current weights (a roll-back makes it alive again),
- discarded: its group was discarded, with that reason, or the painting was lost with a vault's bytes and its group
             painted again (reason `lost`; the new painting counts as painted anew),
- alive:     everything else.

painted is summed over `paintings`, the other three over `groups` (and lost paintings): two counts of one thing, so
law 11 can fail. Results refused for a stale lease were never acknowledged; they are in none of these but `refused`.

Does not own: transitions (ledger.py).
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.ledger import schema
from contracts.errors import LedgerError
from contracts.scores import ScoreTable, from_json
from contracts.wire import DiscardReason, GroupState, PromptSpec, Source

ClaimOrder = Literal["admission", "ready"]
_ENDED = (GroupState.TRAINED.value, GroupState.DISCARDED.value)


@dataclass(frozen=True)
class Books:
    """Where every image went, and how many groups stand where. All counts of images unless said otherwise."""

    painted: int
    trained: int
    alive: int
    discarded_by_reason: dict[str, int]
    refused: int  # images of results that came after their lease had ended; not in `painted`
    groups: dict[str, int]  # groups by state, every state listed
    groups_discarded_by_reason: dict[str, int]  # groups, painted or not
    live_groups: int
    trained_steps: int
    published: int  # latest published version in the lineage
    max_staleness_seen: int | None  # steps, over every training ever; None before the first

    @property
    def groups_trained(self) -> int:
        return self.groups[GroupState.TRAINED.value]

    @property
    def alive_by_state(self) -> dict[str, int]:
        """Groups (not images) by state, those that have ended left out."""
        return {state: count for state, count in self.groups.items() if state not in _ENDED}

    @property
    def discarded(self) -> int:
        return sum(self.discarded_by_reason.values())

    @property
    def discarded_by_weight_sync(self) -> int:
        return self.discarded_by_reason.get(DiscardReason.WEIGHT_SYNC.value, 0)

    @property
    def balanced(self) -> bool:
        """Law 11."""
        return self.painted == self.trained + self.discarded + self.alive


@dataclass(frozen=True)
class GroupRow:
    """One group but for its prompt, tables and rewards. Times in seconds, `*_at` since the epoch."""

    group_id: int
    source: Source
    state: GroupState
    live: bool
    attempt: int
    failures: int
    position: int
    group_size: int
    min_version: int
    admitted_at: float
    late_from: float
    lease_deadline: float | None
    worker: str | None
    painted: int
    paint_attempt: int | None
    weight_version: int | None
    vault: str | None
    num_bytes: int
    stored: bool
    actor: str | None
    paint_seconds: float | None
    store_seconds: float | None
    wait_weights_seconds: float | None
    generated_at: float | None
    scoring_at: float | None
    ready_at: float | None
    ready_seq: int | None
    step: int | None
    staleness: int | None
    trained_at: float | None
    published_at: float | None
    reason: DiscardReason | None
    discarded_at: float | None


@dataclass(frozen=True)
class Event:
    """One line of the journal."""

    seq: int
    at: float
    group_id: int | None
    event: str
    attempt: int | None
    detail: str | None


_COLUMNS = ", ".join(GroupRow.__dataclass_fields__)


class LedgerReader:
    """The read side of a ledger; works on a finished run and beside a running writer."""

    def __init__(self, path: str | Path, connection: sqlite3.Connection | None = None) -> None:
        self.path = Path(path)
        self._db = connection if connection is not None else schema.open_reader(self.path)
        self._lock = threading.RLock()  # threads of one process share the connection

    def close(self) -> None:
        self._db.close()

    def row(self, group_id: int) -> GroupRow:
        """Raises LedgerError for an unknown group."""
        rows = self._select("WHERE group_id = ?", (group_id,))
        if not rows:
            raise LedgerError(f"no group {group_id} in the ledger")
        return rows[0]

    def rows(
        self,
        *,
        state: GroupState | str | None = None,
        source: Source | None = None,
        step: int | None = None,
        reason: DiscardReason | str | None = None,
        version: int | None = None,
        actor: str | None = None,
        since: int = 0,
        limit: int | None = None,
        newest_first: bool = False,
    ) -> list[GroupRow]:
        """Groups that match every given filter, from group id `since` on, in admission order or the other way round.

        limit: how many at most, of the first ones in that order. version: of the weights that painted them.
        """
        wanted = {
            "state": state, "source": source, "step": step, "reason": reason, "weight_version": version, "actor": actor,
        }  # fmt: skip
        used = {name: value for name, value in wanted.items() if value is not None}
        clauses = "".join(f" AND {name} = ?" for name in used)
        values = [getattr(value, "value", value) for value in used.values()]
        order = "DESC" if newest_first else "ASC"
        return self._select(
            f"WHERE group_id >= ?{clauses} ORDER BY group_id {order} LIMIT ?",
            (since, *values, -1 if limit is None else limit),
        )

    def prompt(self, group_id: int) -> PromptSpec:
        return PromptSpec.model_validate_json(self._detail("prompt", group_id))

    def tables(self, group_id: int) -> dict[str, ScoreTable]:
        """Score tables by scorer; empty before scoring. Gradients are not kept."""
        text = self._detail("tables", group_id)
        return {name: from_json(body) for name, body in json.loads(text).items()} if text else {}

    def rewards(self, group_id: int) -> dict[str, Any]:
        """What `scored` was told beside the tables (JSON; NaN became null); empty before scoring."""
        text = self._detail("rewards", group_id)
        return json.loads(text) if text else {}

    def fingerprint(self, group_id: int, attempt: int | None) -> str | None:
        """contracts.digests.digest_images of a painting; None where none was kept (older ledgers keep none)."""
        known = "SELECT 1 FROM sqlite_master WHERE name = 'fingerprints'"
        query = "SELECT images FROM fingerprints WHERE group_id = ? AND attempt = ?"
        with self._lock:
            if self._db.execute(known).fetchone() is None:
                return None
            line = self._db.execute(query, (group_id, attempt)).fetchone()
        return None if line is None else line[0]

    def claimed(self) -> list[int]:
        """Groups of the claim under way, in the order they were claimed; empty when there is none."""
        return self._ids("WHERE live = 1 AND state = 'claimed' ORDER BY group_id")

    def needed_after(self, step: int) -> list[GroupRow]:
        """Groups with stored bytes that a run which goes on from `step` still needs."""
        return self._select("WHERE stored = 1 AND state != 'discarded' AND (step IS NULL OR step > ?)", (step,))

    @property
    def live(self) -> int:
        """Live groups: admitted, neither discarded nor published."""
        return self._value("SELECT COUNT(*) FROM groups WHERE live = 1")

    @property
    def trained_steps(self) -> int:
        """Steps in the lineage of the current weights; the next claim trains version `trained_steps`."""
        return self._meta("trained_steps")

    @property
    def published_version(self) -> int:
        """Latest published weight version in the lineage."""
        return self._meta("published")

    def next_position(self) -> int:
        """Position of the prompt stream at which admission goes on."""
        return self._value("SELECT COALESCE(MAX(position) + 1, 0) FROM groups")

    def next_deadline(self) -> float | None:
        """When the first lease ends (the clock's seconds); None without leases."""
        return self._value("SELECT MIN(lease_deadline) FROM groups WHERE live = 1")

    def journal(self, group_id: int | None = None, after: int = 0, limit: int | None = None) -> list[Event]:
        """Events in order, of one group or all, after sequence number `after`."""
        clause, values = ("AND group_id = ?", [group_id]) if group_id is not None else ("", [])
        with self._lock:
            found = self._db.execute(
                f"SELECT seq, at, group_id, event, attempt, detail FROM journal WHERE seq > ? {clause} "
                "ORDER BY seq LIMIT ?", (after, *values, -1 if limit is None else limit),
            ).fetchall()  # fmt: skip
        return [Event(*line) for line in found]

    def books(self) -> Books:
        """The books at this instant (one read transaction)."""
        with self._lock:
            own = not self._db.in_transaction
            if own:
                self._db.execute("BEGIN")
            try:
                return self._books()
            finally:
                if own:
                    self._db.execute("COMMIT")

    def _books(self) -> Books:
        groups = {state.value: 0 for state in GroupState}
        images, discarded, groups_discarded = dict(groups), {}, {}
        for state, reason, count, painted in self._db.execute(
            "SELECT state, reason, COUNT(*), SUM(painted) FROM groups GROUP BY state, reason"
        ):
            groups[state] += count
            images[state] += painted
            if state == GroupState.DISCARDED.value:
                groups_discarded[reason] = count
                if painted:
                    discarded[reason] = painted
        lost = self._value("SELECT COALESCE(SUM(images), 0) FROM paintings WHERE lost = 1")
        if lost:
            discarded[DiscardReason.LOST.value] = discarded.get(DiscardReason.LOST.value, 0) + lost
        return Books(
            painted=self._value("SELECT COALESCE(SUM(images), 0) FROM paintings"),
            trained=images[GroupState.TRAINED.value],
            alive=sum(count for state, count in images.items() if state not in _ENDED),
            discarded_by_reason=discarded,
            refused=self._meta("refused"),
            groups=groups,
            groups_discarded_by_reason=groups_discarded,
            live_groups=self.live,
            trained_steps=self.trained_steps,
            published=self.published_version,
            max_staleness_seen=self._meta("max_staleness_seen"),
        )

    def _select(self, clause: str, values: tuple[Any, ...] = ()) -> list[GroupRow]:
        with self._lock:
            return list(_typed(self._db.execute(f"SELECT {_COLUMNS} FROM groups {clause}", values)))

    def _ids(self, clause: str, values: tuple[Any, ...] = ()) -> list[int]:
        with self._lock:
            return [line[0] for line in self._db.execute(f"SELECT group_id FROM groups {clause}", values)]

    def _detail(self, column: str, group_id: int) -> str:
        with self._lock:
            line = self._db.execute(f"SELECT {column} FROM details WHERE group_id = ?", (group_id,)).fetchone()
        if line is None:
            raise LedgerError(f"no group {group_id} in the ledger")
        return line[0]

    def _value(self, query: str, values: tuple[Any, ...] = ()) -> Any:
        with self._lock:
            return self._db.execute(query, values).fetchone()[0]

    def _meta(self, key: str) -> Any:
        return self._value("SELECT value FROM meta WHERE key = ?", (key,))


def _typed(lines: Iterator[tuple[Any, ...]] | sqlite3.Cursor) -> Iterator[GroupRow]:
    for line in lines:
        named = dict(zip(GroupRow.__dataclass_fields__, line, strict=True))
        named.update(
            source=Source(named["source"]), state=GroupState(named["state"]), live=bool(named["live"]),
            stored=bool(named["stored"]), reason=DiscardReason(named["reason"]) if named["reason"] else None,
        )  # fmt: skip
        yield GroupRow(**named)
