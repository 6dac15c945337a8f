"""How groups leave the way forward: discards, leases that end without a result, crashes, roll-backs, freed bytes.

Does not own: the way forward (ledger.py).
"""

from __future__ import annotations

from cluster.ledger.reader import GroupRow
from cluster.ledger.writer import LedgerWriter
from contracts.errors import LedgerError, StaleLease
from contracts.wire import DiscardReason, GroupState


class LedgerEndings(LedgerWriter):
    """Transitions out of and back on the way from admission to training."""

    # ---- discards ------------------------------------------------------------------------------------------------

    def discard(self, group_id: int, reason: DiscardReason, attempt: int | None = None) -> None:
        """End a group that will never be trained.

        attempt: refuse (StaleLease) unless the group's token is still this one. Raises StaleLease for a group already
        discarded, LedgerError for one that is claimed or trained.
        """
        with self._transaction():
            row = self.row(group_id)
            if row.state is GroupState.DISCARDED or (attempt is not None and attempt != row.attempt):
                raise StaleLease(f"group {group_id} is {row.state} at attempt {row.attempt}")
            if row.state is GroupState.TRAINED:
                raise LedgerError(f"group {group_id} is trained: only a roll-back takes it out of the weights")
            self._end(row, reason)

    def discard_late(self, late_s: float) -> list[tuple[int, int]]:
        """Discard what has kept the next claim in admission order waiting for too long; returns (group_id, images).

        That is: of the oldest untrained groups that make one claim, those that are not ready `late_s` seconds after
        they were admitted (or after the crash or roll-back that set them back).
        """
        size = self._rule.groups_per_step if self._rule is not None else 1
        discarded: list[tuple[int, int]] = []
        with self._transaction():
            while late := self._late(size, self._now() - late_s):
                for row in late:
                    self._end(row, DiscardReason.LATE)
                discarded += [(row.group_id, row.painted) for row in late]
        return discarded

    def _late(self, size: int, admitted_before: float) -> list[GroupRow]:
        head = self._select("WHERE live = 1 AND state != 'trained' ORDER BY group_id LIMIT ?", (size,))
        done = (GroupState.READY, GroupState.CLAIMED)
        return [row for row in head if row.state not in done and row.late_from < admitted_before]

    def discard_alive(self, reason: DiscardReason) -> list[tuple[int, int]]:
        """Discard every group that is neither trained nor discarded, claimed ones included; (group_id, images)."""
        with self._transaction():
            self._release("released")
            rows = self._select("WHERE live = 1 AND state != 'trained' ORDER BY group_id")
            for row in rows:
                self._end(row, reason)
        return [(row.group_id, row.painted) for row in rows]

    # ---- leases --------------------------------------------------------------------------------------------------

    def give_back(self, group_id: int, attempt: int) -> GroupState:
        """End a painting or scoring lease that failed; returns the state the group is in now.

        That is the state before the lease, or `discarded` (reason `attempts`) after the last attempt allowed. A lease
        that has ended already is left as it is.
        """
        with self._transaction():
            row = self.row(group_id)
            if row.state not in (GroupState.GENERATING, GroupState.SCORING) or row.attempt != attempt:
                return row.state
            return self._end_lease(row, "failed", counts=True)

    def expire_leases(self) -> list[tuple[int, GroupState]]:
        """Take back every lease past its deadline; returns (group_id, the state it was leased in).

        Painting and scoring count as failed. A claim goes back to ready as a whole and counts for no group.
        """
        with self._transaction():
            rows = self._select("WHERE live = 1 AND lease_deadline <= ? ORDER BY group_id", (self._now(),))
            leases = [row for row in rows if row.state is not GroupState.CLAIMED]
            for row in leases:
                self._end_lease(row, "expired", counts=True)
            expired: list[tuple[int, GroupState]] = [(row.group_id, row.state) for row in leases]
            if len(leases) < len(rows):
                expired.extend((group_id, GroupState.CLAIMED) for group_id in self._release("expired"))
        return expired

    def release_claim(self) -> list[int]:
        """Put the claimed groups back to ready; returns them."""
        with self._transaction():
            return self._release("released")

    def renew_painting(self, group_id: int, attempt: int, lease_s: float) -> bool:
        """Let a painting that waits for room in its vault last `lease_s` seconds from now; False if it has ended."""
        with self._transaction():
            cursor = self._db.execute(
                "UPDATE groups SET lease_deadline = ? WHERE group_id = ? AND attempt = ? AND state = 'generating'",
                (self._now() + lease_s, group_id, attempt),
            )
        return cursor.rowcount > 0

    def renew_claim(self, lease_s: float) -> None:
        """Let the open claim last `lease_s` seconds from now."""
        with self._transaction():
            self._db.execute(
                "UPDATE groups SET lease_deadline = ? WHERE live = 1 AND state = 'claimed'", (self._now() + lease_s,)
            )

    # ---- crashes and roll-backs ----------------------------------------------------------------------------------

    def recover(self) -> list[tuple[int, GroupState]]:
        """After a crash of the writer: take every lease back, none counts as failed, lateness counts from now.

        Results of those leases are refused from now on. Returns (group_id, the state it was leased in).
        """
        with self._transaction():
            rows = self._select("WHERE live = 1 AND state IN ('generating', 'scoring', 'claimed') ORDER BY group_id")
            for row in rows:
                self._end_lease(row, "recovered", counts=False)
            self._restart_lateness()
        return [(row.group_id, row.state) for row in rows]

    def rollback(self, to_step: int) -> list[int]:
        """The learner is back at the weights after `to_step`: groups trained since are ready again; returns them.

        An open claim is released. Groups whose bytes were freed meanwhile are painted again. Version `to_step` counts
        as the latest published; publish it again before actors paint. Raises LedgerError for a step in the future.
        """
        if not 0 <= to_step <= self.trained_steps:
            raise LedgerError(f"cannot roll back to step {to_step}: {self.trained_steps} steps are trained")
        with self._transaction():
            self._release("rolled_back")
            rows = self._select("WHERE step > ? AND state = 'trained' ORDER BY group_id", (to_step,))
            for row in rows:
                self._back_from_training(row)
            self._set_meta("trained_steps", to_step)
            self._set_meta("published", min(to_step, self.published_version))
            self._restart_lateness()
            self._note(None, "rollback", None, f"to step {to_step}")
        return [row.group_id for row in rows]

    def _back_from_training(self, row: GroupRow) -> None:
        if not row.stored:
            self._paint_again(row)
            return
        self._set(
            row.group_id, state=GroupState.READY.value, live=1, attempt=row.attempt + 1, step=None, staleness=None,
            trained_at=None, published_at=None,
        )  # fmt: skip
        self._note(row.group_id, "rolled_back", row.attempt, f"step {row.step}")

    def _restart_lateness(self) -> None:
        self._db.execute("UPDATE groups SET late_from = ? WHERE live = 1", (self._now(),))

    # ---- bytes ---------------------------------------------------------------------------------------------------

    def covered(self, step: int) -> list[int]:
        """A saved state covers every step up to `step`: groups whose bytes nothing needs any more.

        Those trained up to that step, and all discarded ones. Each is returned once; from then on the ledger counts its
        bytes as freed, so delete them now (after a crash in between, `stored_groups` says what may stay).
        """
        where = "stored = 1 AND (state = 'discarded' OR (state = 'trained' AND step <= ?))"
        with self._transaction():
            freed = self._ids(f"WHERE {where} ORDER BY group_id", (step,))
            self._db.execute(f"UPDATE groups SET stored = 0 WHERE {where}", (step,))
        return freed

    def lost(self, group_id: int) -> None:
        """A vault no longer has a group's bytes: this painting is discarded as `lost`, the group painted again.

        Raises LedgerError for a group without stored bytes, or claimed (release the claim first), or trained.
        """
        with self._transaction():
            row = self.row(group_id)
            if row.state not in (GroupState.GENERATED, GroupState.SCORING, GroupState.READY) or not row.stored:
                raise LedgerError(f"group {group_id} is {row.state}: it has no stored painting that could be lost")
            self._paint_again(row)

    def stored_groups(self) -> dict[int, int]:
        """group_id -> attempt of every painting a vault must hold."""
        with self._lock:
            return dict(self._db.execute("SELECT group_id, paint_attempt FROM groups WHERE stored = 1").fetchall())
