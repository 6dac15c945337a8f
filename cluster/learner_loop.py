"""Claims full batches, has them trained, publishes weights; rebuilds the ranks from a checkpoint when one is lost.

Invariant: a group is `trained` only after the update that used it has returned, and leaves the run (its bytes are
deleted) only when a checkpoint covers that update; a roll-back makes the groups after the checkpoint ready again.
Does not own: the update (learner/), the job (step.py), the books (ledger.py), checkpoints (checkpoints/).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from typing import Any

from cluster.actor_fleet import ActorFleet
from cluster.checkpoints import Checkpoint, CheckpointKeeper
from cluster.context import RunContext, Scored
from cluster.learner_group import LearnerGroup, Publication
from cluster.losses import Losses
from cluster.refs import root_cause, value
from cluster.step import batch_rewards, draft_job, group_rewards, make_credit, make_job, reward_metrics, step_row
from contracts.errors import GuardStop, NotStored, OutOfMemory, RankLost
from contracts.needs import objective_needs
from contracts.wire import DiscardReason, GroupHeader, Source, StepReport
from learner.guards.run_guards import RunGuards


class LearnerLoop:
    """The learner's side of a run."""

    def __init__(
        self, context: RunContext, group: LearnerGroup, fleet: ActorFleet, checkpoint: Checkpoint | None = None
    ) -> None:
        """checkpoint: what the ranks were started from; None: the model folder's own weights, those of step 0."""
        self.context, self.group, self.fleet = context, group, fleet
        self.credit = make_credit(context.config)
        self.needs = objective_needs(context.config)
        self.rebuilds, self.losses = 0, Losses(context.config.learner.max_rebuilds)
        self.first_credit = copy.deepcopy(self.credit.state_dict())
        self.guards, self.guard_stop = RunGuards(context.config.guards), ""
        self.keeper = CheckpointKeeper(
            context, group, lambda: copy.deepcopy(self.credit.state_dict()),
            lambda: copy.deepcopy(self.guards.state_dict()), checkpoint,
        )  # fmt: skip
        self._restore_state()
        self.max_staleness = 0
        self.copy_processes: list[dict[str, Any]] = []

    async def publish(self, wait: bool = True, average: bool = False) -> None:
        """Publish the current (or sampling) weights and offer them to every actor; version v follows step v.

        wait: until every actor has taken note, so that none paints with what it held before (start, roll-back).
        average: learner.ema's weights, for the evaluation that ends a run.
        """
        start = time.monotonic()
        context = self.context
        published = await self.group.snapshot(context.step, context.step, self.fleet.nodes(), average)
        context.store.add(published.offer, published.arrays, published.canary, published.on_nodes)
        context.ledger.published(context.step, published.offer.version)
        context.bell.ring()
        self.fleet.offer_all()
        seconds = time.monotonic() - start
        context.telemetry.observe("salon_weight_publish_seconds", seconds)
        context.telemetry.phase("learner", "publish", seconds, lane="publish")
        context.telemetry.gauge("salon_weight_version", published.offer.version)
        self._note_copies(published)
        if wait:
            await self.fleet.offered()

    def _note_copies(self, published: Publication) -> None:
        """Which processes hold host copies, when they are new; and that there are none, when a broadcast failed."""
        copies, telemetry = self.group.copies, self.context.telemetry
        if published.lost:
            telemetry.event("host_copies_lost", version=published.offer.version, reason=published.lost)
        if copies is not None and copies.processes != self.copy_processes:
            self.copy_processes = copies.processes
            telemetry.event("host_copies", processes=self.copy_processes)

    async def run(self) -> None:
        """Until the run is stopped, or a limit is reached and a checkpoint covers every step."""
        while not self.context.stopping:
            try:
                if self.context.reached_end():
                    await self.save()
                    break
                if self.context.room_wanted:
                    await self._make_room()
                claimed = await self._claim()
                if claimed:
                    await self._train_or_paint_again(claimed)
                if self.guard_stop:
                    await self._stop_by_guard()
            except RankLost as error:
                await self._rebuild(error)
        self.context.stop()

    async def _claim(self) -> list[int]:
        """Exactly groups_per_step groups, waiting for them; empty when the run stops first."""
        context, start = self.context, time.monotonic()
        claimed: list[int] = []

        def try_claim() -> bool:
            if context.stopping or context.reached_end() or context.room_wanted:
                return True
            self._discard_late()
            pipeline, rollout = context.config.pipeline, context.config.rollout
            lease_s = 4 * context.config.learner.hang_timeout_s  # values, update and snapshot have one each
            ids = context.ledger.claim(rollout.groups_per_step, pipeline.claim_order, lease_s)
            claimed.extend(ids or [])
            return bool(ids)

        context.learner_waits = True
        await context.bell.wait_until(try_claim)
        context.learner_waits = False
        context.telemetry.phase("learner", "wait_for_groups", time.monotonic() - start, lane="learner")
        return claimed

    def _discard_late(self) -> None:
        for group_id, size in self.context.ledger.discard_late(self.context.config.pipeline.late_s):
            self.context.telemetry.count("salon_images_discarded_total", size, reason=DiscardReason.LATE.value)
            self.context.forget([group_id])

    async def _make_room(self) -> None:
        """A vault is full: have a checkpoint cover every step so far, and let go of what nothing needs any more."""
        await self.save()
        self.keeper.let_go(self.keeper.step)
        self.context.room_wanted = False

    async def _train_or_paint_again(self, claimed: list[int]) -> None:
        """Train the claim; where a vault has lost groups of it, those are painted again and the others wait."""
        try:
            await self._train(claimed)
        except NotStored as error:
            self.context.ledger.release_claim()
            lost = [group_id for group_id in claimed if not await self._has_bytes(group_id)]
            lost = lost or [group_id for group_id in claimed if not await self._has_embeddings(group_id)]
            if not lost:
                raise  # there is more to it
            for group_id in lost:
                self.context.lost(group_id, str(root_cause(error)))

    async def _has_bytes(self, group_id: int) -> bool:
        row = self.context.ledger.row(group_id)
        stored = await value(self.context.vault(row.vault).stored.remote())
        return (group_id, row.paint_attempt) in [tuple(painting) for painting in stored]

    async def _has_embeddings(self, group_id: int) -> bool:
        """Whether the vault that ranks ask holds the embeddings of a group's prompt."""
        scored = self.context.groups.get(group_id)
        if scored is None or scored.header.source is Source.LEARNER:
            return True
        digests = [scored.header.prompt_digest, scored.header.negative_digest]
        read_by_ranks = next(iter(self.context.vaults.values()))
        return all([await value(read_by_ranks.holds_embedding.remote(digest)) for digest in digests if digest])

    async def _train(self, claimed: list[int]) -> None:
        context, start = self.context, time.monotonic()
        await self._read_back(claimed)
        groups = {group_id: context.groups[group_id] for group_id in claimed}
        headers = {group_id: scored.header for group_id, scored in groups.items()}
        tables = {gid: scored.tables for gid, scored in groups.items()}
        version, number = context.store.version, context.step + 1
        values = None
        if self.needs.critic:
            values = await self.group.values(draft_job(number, version, headers, context.config))
        aggregated = batch_rewards(number, headers, tables, context.config, self.credit)
        job = make_job(number, version, headers, aggregated.rewards, context.config, self.credit, values)
        report = await self.group.update(job)
        self._count_own_paintings(claimed)
        staleness = context.ledger.trained(claimed, number, version)
        self.max_staleness = max(self.max_staleness, *staleness)
        context.step = number
        seconds = time.monotonic() - start
        context.telemetry.observe("salon_update_seconds", seconds)
        context.telemetry.phase("learner", "update", seconds, lane="learner")
        context.telemetry.spans(report.spans, step=number)
        if context.online is not None:
            await context.online.boundary(number)
        await self.publish(wait=False)
        metrics = {**aggregated.metrics, **job.credit.metrics, **report.metrics}
        rewards = reward_metrics(tables)
        self._report(report, metrics, rewards, headers, staleness, seconds)
        self._ask_guards(step_row(metrics, rewards))
        if self.keeper.due():
            await self.keeper.begin()
        context.bell.ring()

    def _count_own_paintings(self, claimed: list[int]) -> None:
        """Groups that the update itself has painted, as the ledger counts them: once, also after a roll-back."""
        rows = [self.context.ledger.row(group_id) for group_id in claimed]
        images = sum(row.group_size for row in rows if row.source is Source.LEARNER and not row.painted)
        if images:
            self.context.telemetry.count("salon_images_painted_total", images)

    async def _read_back(self, claimed: list[int]) -> None:
        """Headers, tables and rewards of groups that memory lost (after a roll-back)."""
        context = self.context
        for group_id in claimed:
            if group_id in context.groups and context.groups[group_id].rewards is not None:
                continue
            row = context.ledger.row(group_id)
            header = await context.vault(row.vault).header.remote(group_id)
            tables = context.ledger.tables(group_id)
            context.groups[group_id] = Scored(header, tables, group_rewards(header, tables, context.config))

    def _report(
        self,
        report: StepReport,
        metrics: Mapping[str, float],
        rewards: Mapping[str, Mapping[str, float]],
        headers: Mapping[int, GroupHeader],
        staleness: list[int],
        seconds: float,
    ) -> None:
        context = self.context
        telemetry = context.telemetry
        images = sum(header.group_size for header in headers.values())
        telemetry.count("salon_images_trained_total", images)
        for steps in staleness:
            telemetry.observe("salon_staleness_steps", steps)
        telemetry.step(
            step=context.step, images=images, seconds=seconds, staleness=staleness, rewards=rewards,
            metrics=metrics, phases=report.seconds, books=context.ledger.books(),
        )  # fmt: skip

    def _ask_guards(self, row: Mapping[str, float]) -> None:
        """Tell what guards have to say of the step; before its checkpoint, which holds their state."""
        telemetry, step = self.context.telemetry, self.context.step
        words = self.guards.see(row)
        for word in words:
            if word.kind == "stop":
                telemetry.event("guard_stopped", guard=word.guard, step=step, reason=word.reason)
            elif word.kind == "begins":
                telemetry.count("salon_guard_warnings_total", guard=word.guard)
                telemetry.event("guard_warned", guard=word.guard, warning="begins", step=step, reason=word.reason)
            else:
                telemetry.event("guard_warned", guard=word.guard, warning="over", step=step)
        self.guard_stop = "; ".join(f"{word.guard}: {word.reason}" for word in words if word.kind == "stop")

    async def _stop_by_guard(self) -> None:
        """Save the step that a guard objects to, then end the run. Raises RankLost: the steps since are made again."""
        await self.save()
        where = self.context.folder.location
        self.context.stop(
            GuardStop(
                f"guard stop: {self.guard_stop} (step {self.context.step})\nA checkpoint was written. `python -m "
                f"cluster resume {where}` goes on, with other settings (guards.0.action=warn) or as it is"
            )
        )

    async def save(self) -> None:
        """Wait for a checkpoint of the step the run is at. Raises RankLost, StorageError."""
        await self.keeper.write_now()

    def _restore_state(self) -> None:
        """Credit and guards as they were at the checkpoint, or at the start."""
        newest = self.keeper.newest
        state = None if newest is None else newest.run_state()
        self.credit.load_state_dict(copy.deepcopy(self.first_credit if state is None else state.credit))
        self.guards.load_state_dict({} if state is None else state.guard)
        self.guard_stop = ""

    async def _rebuild(self, lost: RankLost) -> None:
        """Bring the learner back to its last checkpoint; once more when a rank is lost meanwhile.

        Raises RankLost after learner.max_rebuilds without a newer checkpoint in between.
        """
        while True:
            self._count_rebuild(lost)
            try:
                await self._start_again()
                return
            except RankLost as error:
                lost = error

    def _count_rebuild(self, lost: RankLost) -> None:
        telemetry = self.context.telemetry
        if not self.losses.one_more(self.keeper.step):
            raise RankLost(
                f"{lost}; the run ends here: learner.max_rebuilds={self.losses.allowed} rebuilds in a row brought no "
                "newer checkpoint"
            ) from lost
        self.rebuilds += 1
        kind = "hang" if "did not answer" in str(lost) else "death"
        if isinstance(lost, OutOfMemory):
            kind, self.group.halved = "out_of_memory", True
        telemetry.count("salon_learner_rebuilds_total", reason=kind)
        telemetry.event(
            "learner_rebuild", kind=kind, reason=str(lost), step=self.context.step, to_step=self.keeper.step,
            number=self.rebuilds,
        )  # fmt: skip

    async def _start_again(self) -> None:
        """Replace every rank, go back to the last checkpoint, and put the groups trained since back to ready."""
        context, start = self.context, time.monotonic()
        self.keeper.drop()
        await self.group.rebuild(None if self.keeper.newest is None else self.keeper.newest.path)
        self._restore_state()
        again = context.ledger.rollback(self.keeper.step)
        context.step = self.keeper.step
        if context.online is not None:
            await context.online.roll_back(self.keeper.newest)
        context.telemetry.event(
            "learner_rebuilt", seconds=time.monotonic() - start, step=context.step, rolled_back=again,
            processes=self.group.processes,
        )  # fmt: skip
        await self.publish()
