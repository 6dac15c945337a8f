"""Claims full batches, has them trained, publishes weights, saves states; rebuilds the ranks when one is lost.

Invariant: a group is `trained` only after the update that used it has returned, and leaves the run (its bytes are
deleted) only when a saved state covers that update; a roll-back makes the groups after the state ready again.
Does not own: the update (learner/), the job (step.py), the books (ledger.py).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.context import RunContext, Scored
from cluster.learner_group import LearnerGroup, Publication
from cluster.rollout_loop import ActorFleet
from cluster.step import batch_rewards, draft_job, group_rewards, make_credit, make_job, reward_metrics
from contracts.errors import RankLost
from contracts.needs import objective_needs
from contracts.wire import DiscardReason, StepReport


class LearnerLoop:
    """The learner's side of a run."""

    def __init__(self, context: RunContext, group: LearnerGroup, fleet: ActorFleet) -> None:
        self.context, self.group, self.fleet = context, group, fleet
        self.credit = make_credit(context.config)
        self.needs = objective_needs(context.config)
        self.rebuilds = 0
        self.state: Path | None = None  # None: the model folder's own weights, which are those of step 0
        self.state_step = 0
        self.credit_state = copy.deepcopy(self.credit.state_dict())
        self.max_staleness = 0
        self.copy_processes: list[dict[str, Any]] = []

    async def publish(self, wait: bool = True) -> None:
        """Publish the current (or sampling) weights and offer them to every actor; version v follows step v.

        wait: until every actor has taken note, so that none paints with what it held before (start, roll-back).
        """
        start = time.monotonic()
        context = self.context
        published = await self.group.snapshot(context.step, context.step, self.fleet.nodes())
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
        """Until the run is stopped, or a limit is reached and a state covers every step."""
        while not self.context.stopping:
            try:
                if self.context.reached_end():
                    await self.save()
                    break
                claimed = await self._claim()
                if claimed:
                    await self._train(claimed)
            except RankLost as error:
                await self._rebuild(error)
        self.context.stop()

    async def _claim(self) -> list[int]:
        """Exactly groups_per_step groups, waiting for them; empty when the run stops first."""
        context, start = self.context, time.monotonic()
        claimed: list[int] = []

        def try_claim() -> bool:
            if context.stopping or context.reached_end():
                return True
            self._discard_late()
            pipeline, rollout = context.config.pipeline, context.config.rollout
            lease_s = 4 * context.config.learner.hang_timeout_s  # values, update and snapshot have one each
            ids = context.ledger.claim(rollout.groups_per_step, pipeline.claim_order, lease_s)
            claimed.extend(ids or [])
            return bool(ids)

        await context.bell.wait_until(try_claim)
        context.telemetry.phase("learner", "wait_for_groups", time.monotonic() - start, lane="learner")
        return claimed

    def _discard_late(self) -> None:
        for group_id, size in self.context.ledger.discard_late(self.context.config.pipeline.late_s):
            self.context.telemetry.count("salon_images_discarded_total", size, reason=DiscardReason.LATE.value)
            self.context.forget([group_id])

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
        staleness = context.ledger.trained(claimed, number, version)
        self.max_staleness = max(self.max_staleness, *staleness)
        context.step = number
        seconds = time.monotonic() - start
        context.telemetry.observe("salon_update_seconds", seconds)
        context.telemetry.phase("learner", "update", seconds, lane="learner")
        context.telemetry.spans(report.spans, step=number)
        await self.publish(wait=False)
        self._report(report, {**aggregated.metrics, **job.credit.metrics, **report.metrics}, groups, staleness, seconds)
        if number % context.config.checkpoint.every_steps == 0:
            await self.save()
        context.bell.ring()

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
        groups: dict[int, Scored],
        staleness: list[int],
        seconds: float,
    ) -> None:
        context = self.context
        telemetry = context.telemetry
        images = sum(scored.header.group_size for scored in groups.values())
        telemetry.count("salon_images_trained_total", images)
        for value in staleness:
            telemetry.observe("salon_staleness_steps", value)
        rewards = reward_metrics({group_id: scored.tables for group_id, scored in groups.items()})
        telemetry.step(
            step=context.step, images=images, seconds=seconds, staleness=staleness, rewards=rewards,
            metrics=metrics, phases=report.seconds, books=context.ledger.books(),
        )  # fmt: skip

    async def save(self) -> None:
        """Write a state that covers every step so far (if none does), then let go of the bytes it makes superfluous."""
        context, start = self.context, time.monotonic()
        if self.state is not None and self.state_step == context.step:
            return
        folder = context.folder.checkpoints / f"step-{context.step:06d}"
        await self.group.save_state(folder)
        older, self.state, self.state_step = self.state, folder, context.step
        self.credit_state = copy.deepcopy(self.credit.state_dict())
        covered = context.ledger.covered(context.step)
        by_vault: dict[str, list[int]] = {}
        for group_id in covered:
            vault = context.ledger.row(group_id).vault
            assert vault is not None, f"group {group_id} is stored nowhere"
            by_vault.setdefault(vault, []).append(group_id)
        for name, ids in by_vault.items():
            await context.vault(name).delete.remote(ids)
        context.forget(covered)
        context.folder.remove_checkpoint(older)
        seconds = time.monotonic() - start
        context.telemetry.observe("salon_checkpoint_seconds", seconds)
        context.telemetry.phase("learner", "save_state", seconds, lane="learner")

    async def _rebuild(self, lost: RankLost) -> None:
        """Bring the learner back to its last state; once more when a rank is lost meanwhile.

        Raises RankLost when learner.max_rebuilds are used up.
        """
        while True:
            self._count_rebuild(lost)
            try:
                await self._start_again()
                return
            except RankLost as error:
                lost = error

    def _count_rebuild(self, lost: RankLost) -> None:
        telemetry, allowed = self.context.telemetry, self.context.config.learner.max_rebuilds
        if self.rebuilds >= allowed:
            raise RankLost(
                f"{lost}; the run ends here, because learner.max_rebuilds={allowed} rebuilds of the ranks are used up"
            ) from lost
        self.rebuilds += 1
        kind = "hang" if "did not answer" in str(lost) else "death"
        telemetry.count("salon_learner_rebuilds_total", reason=kind)
        telemetry.event(
            "learner_rebuild", kind=kind, reason=str(lost), step=self.context.step, to_step=self.state_step,
            number=self.rebuilds,
        )  # fmt: skip

    async def _start_again(self) -> None:
        """Replace every rank, go back to the last state, and put the groups trained since back to ready."""
        context, start = self.context, time.monotonic()
        await self.group.rebuild(self.state)
        self.credit.load_state_dict(copy.deepcopy(self.credit_state))
        again = context.ledger.rollback(self.state_step)
        context.step = self.state_step
        context.telemetry.event(
            "learner_rebuilt", seconds=time.monotonic() - start, step=context.step, rolled_back=again,
            processes=self.group.processes,
        )  # fmt: skip
        await self.publish()
