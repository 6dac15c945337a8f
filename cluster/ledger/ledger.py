"""The ledger's transitions: the one place where a sample group changes state.

    admit -> lease_generating -> generated -> lease_scoring -> scored -> claim -> trained -> published
    admitted    generating       generated      scoring        ready    claimed   trained    (no longer live)

`generating`, `scoring` and `claimed` are leases: a deadline, and the group's `attempt` as fencing token. The token
rises whenever a lease ends without its result, so a result that carries an older one is refused (StaleLease) and
whatever came of it must be dropped: it is already accounted for. Repeating the result that was accepted is harmless.

Invariants: one transaction a transition (a crash leaves the state before or after it, see schema.py for what survives);
a claim is exactly P groups, taken, trained or released as a whole, one at a time; in admission order a younger group
never overtakes an older one that is not discarded; the books balance after every transition (law 11).

Does not own: when to admit (admission.py holds the rule, applied here), bytes (vault.py), rewards (learner/credit).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.ledger.endings import LedgerEndings
from cluster.ledger.reader import ClaimOrder, GroupRow
from cluster.ledger.writer import as_json
from contracts.errors import LedgerError, StaleLease
from contracts.scores import ScoreTable, to_json
from contracts.wire import DiscardReason, GroupState, PaintReceipt, PromptSpec, PromptTask, Source

_PAST_GENERATED = (GroupState.GENERATED, GroupState.SCORING, GroupState.READY, GroupState.CLAIMED, GroupState.TRAINED)
_PAST_SCORED = (GroupState.READY, GroupState.CLAIMED, GroupState.TRAINED)


class Ledger(LedgerEndings):
    """The ledger of a run. Synchronous and quick: an asyncio controller calls it directly.

    Opened with Ledger(path, now=clock); see LedgerWriter for opening, LedgerEndings for discards, leases that run out,
    crashes and roll-backs, LedgerReader for questions.
    """

    # ---- admission and painting ----------------------------------------------------------------------------------

    def admit(
        self,
        prompt: PromptSpec,
        position: int,
        group_size: int,
        min_version: int = 0,
        source: Source = Source.ACTORS,
    ) -> int:
        """A new group; its id is its place in the order of admission. Raises LedgerError beyond the rule's bound."""
        with self._transaction():
            live = self.live
            if self._rule is not None:
                if not self._rule.may_admit(live):
                    raise LedgerError(f"{live} groups are live, the bound is {self._rule.capacity}")
                min_version = self._rule.min_version(self.published_version, live)
            group_id = self._value("SELECT COALESCE(MAX(group_id) + 1, 0) FROM groups")
            now = self._now()
            self._db.execute(
                "INSERT INTO groups (group_id, source, state, position, group_size, min_version, admitted_at,"
                " late_from) VALUES (?, ?, 'admitted', ?, ?, ?, ?, ?)",
                (group_id, source.value, position, group_size, min_version, now, now),
            )
            self._db.execute(
                "INSERT INTO details (group_id, prompt) VALUES (?, ?)", (group_id, prompt.model_dump_json())
            )
            self._note(group_id, "admitted")
        return group_id

    def next_to_generate(self, source: Source | None = None) -> int | None:
        """The oldest group that waits to be painted and whose lowest weight version is published, or None."""
        clause, values = ("AND source = ?", (source.value,)) if source is not None else ("", ())
        found = self._ids(f"WHERE live = 1 AND state = 'admitted' {clause} ORDER BY group_id LIMIT 1", values)
        if not found or self._current_min_version(self.row(found[0])) > self.published_version:
            return None  # min_version rises with the group id, so no younger one can be painted either
        return found[0]

    def lease_generating(self, worker: str, lease_s: float, source: Source | None = None) -> PromptTask | None:
        """Hand the oldest waiting group to a worker; None when there is nothing to paint."""
        with self._transaction():
            group_id = self.next_to_generate(source)
            if group_id is None:
                return None
            row = self.row(group_id)
            min_version = self._current_min_version(row)
            self._begin_lease(row, GroupState.GENERATING, lease_s, worker=worker, min_version=min_version)
            prompt = self.prompt(group_id)
        return PromptTask(
            group_id=group_id, attempt=row.attempt, prompt=prompt, group_size=row.group_size, min_version=min_version,
            deadline_s=lease_s, source=row.source,
        )  # fmt: skip

    def generated(self, receipt: PaintReceipt) -> GroupState:
        """Acknowledge a painted group: `generated`, or `discarded` as stale when its weights were older than allowed.

        Raises StaleLease when the lease has ended, or when the weights were rolled back meanwhile (the group waits to
        be painted again).
        """
        with self._transaction():
            row = self.row(receipt.group_id)
            if row.state in _PAST_GENERATED and row.paint_attempt == receipt.attempt:
                return row.state  # delivered twice
            refusal = self._refuse_painting(row, receipt)
            state = GroupState.GENERATED
            if refusal is None:
                self._acknowledge_painting(row, receipt)
                if receipt.weight_version < row.min_version:
                    state = GroupState.DISCARDED
                    self._end(self.row(row.group_id), DiscardReason.STALE)
        if refusal is not None:
            raise StaleLease(refusal)
        return state

    def _refuse_painting(self, row: GroupRow, receipt: PaintReceipt) -> str | None:
        """Why a receipt cannot be accepted (and the books of it), or None."""
        if row.state is not GroupState.GENERATING or row.attempt != receipt.attempt:
            reason = f"group {row.group_id} is {row.state} at attempt {row.attempt}, not painted as {receipt.attempt}"
        elif receipt.weight_version > self.trained_steps:
            reason = f"version {receipt.weight_version} that painted group {row.group_id} was rolled back"
            self._end_lease(row, "rolled_back", counts=False)
        else:
            return None
        images = 0 if row.source is Source.LEARNER else row.group_size
        self._db.execute("UPDATE meta SET value = value + ? WHERE key = 'refused'", (images,))
        self._note(row.group_id, "refused", receipt.attempt, reason)
        return reason

    def _acknowledge_painting(self, row: GroupRow, receipt: PaintReceipt) -> None:
        now = self._now()
        images = 0 if row.source is Source.LEARNER else row.group_size  # the learner's own are painted in the update
        self._set(
            row.group_id, state=GroupState.GENERATED.value, lease_deadline=None, worker=None, failures=0,
            painted=images, paint_attempt=receipt.attempt, weight_version=receipt.weight_version, vault=receipt.vault,
            num_bytes=receipt.num_bytes, stored=1, actor=receipt.actor, paint_seconds=receipt.paint_seconds,
            store_seconds=receipt.store_seconds, wait_weights_seconds=receipt.wait_weights_seconds, generated_at=now,
        )  # fmt: skip
        if images:
            self._count_painting(row, receipt.attempt, now)
        if receipt.images_digest is not None:
            self._keep_fingerprint(row.group_id, receipt.attempt, receipt.images_digest)
        self._note(row.group_id, "generated", receipt.attempt, f"version {receipt.weight_version} by {receipt.actor}")

    # ---- scoring -------------------------------------------------------------------------------------------------

    def next_to_score(self) -> int | None:
        """The oldest group that waits to be scored, or None."""
        found = self._ids("WHERE live = 1 AND state = 'generated' ORDER BY group_id LIMIT 1")
        return found[0] if found else None

    def lease_scoring(self, group_id: int, lease_s: float) -> int | None:
        """The fencing token for a group's scores; None when it does not wait to be scored (any more)."""
        with self._transaction():
            row = self.row(group_id)
            if row.state is not GroupState.GENERATED:
                return None
            self._begin_lease(row, GroupState.SCORING, lease_s)
        return row.attempt

    def scored(
        self,
        group_id: int,
        attempt: int,
        tables: Mapping[str, ScoreTable],
        rewards: Mapping[str, Any] | None = None,
        discard_as: DiscardReason | None = None,
    ) -> GroupState:
        """Book a group's score tables: `ready`, or discarded at once with its scores kept.

        rewards: JSON values to keep beside the tables. Raises StaleLease when the lease has ended.
        """
        with self._transaction():
            row = self.row(group_id)
            if row.state in _PAST_SCORED and row.attempt == attempt:
                return row.state  # delivered twice
            if row.state is not GroupState.SCORING or row.attempt != attempt:
                raise StaleLease(
                    f"group {group_id} is {row.state} at attempt {row.attempt}, the scores are of {attempt}"
                )
            self._db.execute(
                "UPDATE details SET tables = ?, rewards = ? WHERE group_id = ?",
                (
                    as_json({name: to_json(table) for name, table in tables.items()}),
                    as_json(dict(rewards or {})),
                    group_id,
                ),
            )
            sequence = self._note(group_id, "ready", attempt)
            self._set(
                group_id, state=GroupState.READY.value, lease_deadline=None, worker=None, failures=0,
                ready_at=self._now(), ready_seq=sequence,
            )  # fmt: skip
            if discard_as is not None:
                self._end(self.row(group_id), discard_as)
                return GroupState.DISCARDED
        return GroupState.READY

    # ---- claims and training -------------------------------------------------------------------------------------

    def claim(self, num_groups: int, order: ClaimOrder = "admission", lease_s: float = 600.0) -> list[int] | None:
        """Exactly `num_groups` ready groups, oldest admitted or first ready first; None when they are not there yet.

        In admission order the oldest untrained groups must all be ready. Groups whose weights lie ahead of the step (a
        roll-back and discards, see admission.py 5) or, in admission order, too far behind are discarded as stale.
        Raises LedgerError while another claim is open.
        """
        if self._rule is not None and num_groups != self._rule.groups_per_step:
            raise LedgerError(f"a step is one claim of {self._rule.groups_per_step} groups, not {num_groups}")
        with self._transaction():
            if self.claimed():
                raise LedgerError(f"groups {self.claimed()} are claimed: train or release them first")
            chosen = self._candidates(num_groups, order)
            while any(unfit := [row for row in chosen if not self._fit(row, order)]):
                for row in unfit:
                    self._end(row, DiscardReason.STALE)
                chosen = self._candidates(num_groups, order)
            if len(chosen) < num_groups or any(row.state is not GroupState.READY for row in chosen):
                return None
            for row in chosen:
                self._begin_lease(row, GroupState.CLAIMED, lease_s)
        return [row.group_id for row in chosen]

    def _candidates(self, num_groups: int, order: ClaimOrder) -> list[GroupRow]:
        if order == "ready":
            clause = "WHERE live = 1 AND state = 'ready' ORDER BY ready_seq LIMIT ?"
        else:
            clause = "WHERE live = 1 AND state != 'trained' ORDER BY group_id LIMIT ?"
        return self._select(clause, (num_groups,))

    def _fit(self, row: GroupRow, order: ClaimOrder) -> bool:
        if row.state is not GroupState.READY or row.weight_version is None:
            return True
        staleness = self.trained_steps - row.weight_version
        bound = math.inf if order == "ready" or self._rule is None else self._rule.max_staleness
        return 0 <= staleness <= bound or row.source is Source.LEARNER

    def trained(self, group_ids: Sequence[int], step: int, version: int) -> list[int]:
        """The open claim was trained by `step` from weights `version` = step - 1; returns each group's staleness.

        Raises StaleLease when the claim has ended, LedgerError when it is not exactly these groups or the next step.
        """
        with self._transaction():
            self._check_claim(group_ids, step, version)
            now, staleness = self._now(), []
            for group_id in group_ids:
                row = self.row(group_id)
                own = row.source is Source.LEARNER
                behind = 0 if own or row.weight_version is None else version - row.weight_version
                staleness.append(behind)
                if own and not row.painted:
                    self._count_painting(row, row.attempt, now)
                    self._set(group_id, painted=row.group_size, weight_version=version)
                self._set(
                    group_id, state=GroupState.TRAINED.value, lease_deadline=None, step=step, staleness=behind,
                    trained_at=now,
                )  # fmt: skip
                self._note(group_id, "trained", row.attempt, f"step {step}, staleness {behind}")
            self._set_meta("trained_steps", step)
            self._set_meta("max_staleness_seen", max(*staleness, self._meta("max_staleness_seen") or 0))
        return staleness

    def _check_claim(self, group_ids: Sequence[int], step: int, version: int) -> None:
        claimed = self.claimed()
        if not set(group_ids) <= set(claimed):
            raise StaleLease(f"groups {sorted(set(group_ids) - set(claimed))} are no longer claimed")
        if sorted(group_ids) != claimed:
            raise LedgerError(f"a claim is trained whole: {claimed} are claimed, {list(group_ids)} were trained")
        if step != self.trained_steps + 1 or version != self.trained_steps:
            raise LedgerError(
                f"step {step} from version {version} does not follow {self.trained_steps} trained steps; step s trains "
                "version s - 1"
            )

    def published(self, step: int, version: int) -> None:
        """The weights after `step` are published as `version` = step: groups trained up to it are no longer live.

        Call it before any actor is offered the version. Publishing the same step again (after a roll-back) is harmless.
        Raises LedgerError for a step not trained yet or older than the latest published.
        """
        if version != step or not self.published_version <= step <= self.trained_steps:
            raise LedgerError(
                f"cannot publish version {version} after step {step}: version s follows step s, {self.trained_steps} "
                f"steps are trained and version {self.published_version} is published"
            )
        with self._transaction():
            self._db.execute(
                "UPDATE groups SET live = 0, published_at = ? WHERE live = 1 AND state = 'trained' AND step <= ?",
                (self._now(), step),
            )
            self._set_meta("published", step)
            self._note(None, "published", None, f"version {version}")
