"""Keeps every rollout actor busy: admits prompts, hands out tasks, takes receipts.

Invariant: a prompt is admitted only while the admission rule allows it, and every task handed out ends as a receipt in
the ledger, an expired lease, or a discard.
Does not own: the admission rule (admission.py), the actors and their revival (actor_fleet.py), painting (actors/),
scoring (scoring_loop.py).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any

from ray.exceptions import RayTaskError

from cluster.actor_fleet import ActorFleet
from cluster.awake import wait_all
from cluster.context import RunContext, Scored
from cluster.deaths import ActorGone, how
from cluster.refs import root_cause, value
from contracts.errors import NotStored, SalonError, StaleLease, WeightsNotProven, WeightsTimeout
from contracts.wire import DiscardReason, GroupState, PaintReceipt, PromptTask, Source

MAX_LOST = 4
"""Paintings lost in a row with their actors that stop the run, in units of rollout.max_attempts for every actor."""

MAX_UNPROVEN = 3
"""Failed proofs of an actor in a row that stop the run: one broken process is replaced, a broken load cannot be."""


class RolloutLoop:
    """Hands tasks to the actor that has fewest, at most `rollout.prefetch` to each; one coroutine a task."""

    def __init__(
        self, context: RunContext, fleet: ActorFleet, on_generated: Callable[[int, str], Awaitable[None]]
    ) -> None:
        self.context, self.fleet, self.on_generated = context, fleet, on_generated
        self.unproven: dict[str, int] = {}
        self.tasks: dict[asyncio.Task[None], tuple[int, int]] = {}  # -> (group id, attempt)
        self.lost_in_a_row = 0  # paintings lost with their actors since the last one that was not
        self.in_hand = dict.fromkeys(fleet.names, 0)
        self.free_since = dict.fromkeys(fleet.names, time.monotonic())

    async def run(self) -> None:
        """Until the run stops and every task handed out has ended, or has had its time to: a stopped run is resumable,
        so what is still being painted then is painted again."""
        self.free_since = dict.fromkeys(self.fleet.names, time.monotonic())
        await self.context.bell.wait_until(self._hand_out)
        grace_s = math.inf if self.context.reached_end() else self.context.config.checkpoint.stop_grace_s
        ends = time.monotonic() + grace_s
        while self.tasks and time.monotonic() < ends:
            await asyncio.wait(self.tasks, timeout=1.0)
            for task in [task for task, painting in self.tasks.items() if painting in self.context.waiting_for_room]:
                task.cancel()  # nobody makes room any more
        for task in self.tasks:
            task.cancel()

    def _hand_out(self) -> bool:
        """Lease every group that may be painted now to an actor that can take it. True once the run stops."""
        while not self.context.stopping and not self.context.waiting_for_room:
            name = self._least_busy()
            if name is None:
                break
            self._admit()
            task = self.context.ledger.lease_generating(name, self.context.config.rollout.lease_s)
            if task is None:
                break
            self._start(name, task)
        return self.context.stopping

    def _least_busy(self) -> str | None:
        """An idle actor before one that would only queue the task; of equals the one free for longest."""
        prefetch = self.context.config.rollout.prefetch
        able = [n for n, tasks in self.in_hand.items() if tasks < prefetch and not self.fleet.is_reviving(n)]
        return min(able, key=lambda name: (self.in_hand[name], self.free_since[name]), default=None)

    def _start(self, name: str, task: PromptTask) -> None:
        if self.in_hand[name] == 0:
            waited = time.monotonic() - self.free_since[name]
            self.context.telemetry.phase("actor", "wait_for_prompt", waited, lane=name)
        self.in_hand[name] += 1
        painting = asyncio.create_task(self._paint(name, task))
        self.tasks[painting] = (task.group_id, task.attempt)
        painting.add_done_callback(lambda done: self._ended(name, done))

    def _ended(self, name: str, done: asyncio.Task[None]) -> None:
        self.tasks.pop(done)
        self.in_hand[name] -= 1
        self.free_since[name] = time.monotonic()
        if not done.cancelled() and done.exception() is not None:
            self.context.stop(done.exception())
        self.context.bell.ring()

    def _admit(self) -> None:
        admission = self.context.admission
        while not self.context.reached_end() and admission.may_admit():
            admission.admit(self.context.source)

    async def _paint(self, name: str, task: PromptTask) -> None:
        handle = self.fleet.handles[name]
        try:
            receipt = await self._receipt(handle.paint.remote(task), task)
        except (*ActorGone, TimeoutError) as error:
            self.context.telemetry.event("paint_lost", actor=name, group=task.group_id, error=type(error).__name__)
            self._give_back(task)
            self._count_lost(error)
            self.fleet.revive(name, kill=isinstance(error, TimeoutError))
            return
        except (RayTaskError, SalonError) as error:
            await self._failed(name, task, error)
            return
        await self._accept(name, task, receipt)

    async def _receipt(self, painting: Any, task: PromptTask) -> PaintReceipt:
        """What the actor answers within the task's lease, which is renewed while the group waits for room."""
        answer = asyncio.ensure_future(value(painting))
        try:
            while not (await wait_all([answer], task.deadline_s))[0]:
                if (task.group_id, task.attempt) not in self.context.waiting_for_room:
                    raise TimeoutError
            return answer.result()
        finally:
            answer.cancel()

    def _count_lost(self, error: Exception) -> None:
        """One actor that dies is replaced; when none ever comes back with a painting, the run cannot go on."""
        rollout = self.context.config.rollout
        self.lost_in_a_row += 1
        if self.lost_in_a_row >= MAX_LOST * rollout.max_attempts * rollout.actors:
            what = "outlived rollout.lease_s" if isinstance(error, TimeoutError) else "lost its actor"
            self.context.stop(SalonError(
                f"each of the last {self.lost_in_a_row} paintings {what}, so nothing is painted; the last one: "
                f"{how(error)}"
            ))  # fmt: skip

    async def _accept(self, name: str, task: PromptTask, receipt: PaintReceipt) -> None:
        telemetry = self.context.telemetry
        try:
            state = self.context.ledger.generated(receipt)
        except StaleLease as error:
            telemetry.event("late_result", actor=name, group=task.group_id, attempt=task.attempt, why=str(error))
            return
        self.lost_in_a_row = 0
        telemetry.observe("salon_paint_seconds", receipt.paint_seconds, actor=name)
        if task.source is not Source.LEARNER:  # the learner's own are painted in the update
            telemetry.count("salon_images_painted_total", task.group_size)
        telemetry.phase("actor", "paint", receipt.paint_seconds)
        telemetry.phase("actor", "store", receipt.store_seconds)
        telemetry.phase("actor", "wait_for_weights", receipt.wait_weights_seconds)
        at_vault = [span.model_copy(update={"lane": receipt.vault}) for span in receipt.spans if span.name == "store"]
        telemetry.spans((*receipt.spans, *at_vault), group=task.group_id, version=receipt.weight_version)
        if receipt.proof is not None:
            self.unproven.pop(name, None)
            telemetry.observe("salon_weight_load_seconds", receipt.proof.load_seconds, actor=name)
            telemetry.event("weights_proven", actor=name, **receipt.proof.model_dump())
        self.context.bell.ring()
        if state is GroupState.DISCARDED:
            telemetry.count("salon_images_discarded_total", task.group_size, reason=DiscardReason.STALE.value)
            return
        try:
            header = await value(self.context.vault(receipt.vault).header.remote(task.group_id, task.attempt))
        except RayTaskError as error:
            if not isinstance(root_cause(error), NotStored):
                raise
            self.context.lost(task.group_id, "its vault lost it after the receipt")
            return
        self.context.groups[task.group_id] = Scored(header)
        await self.on_generated(task.group_id, receipt.vault)

    async def _failed(self, name: str, task: PromptTask, error: Exception) -> None:
        self.lost_in_a_row = 0
        cause = root_cause(error)
        state = self._give_back(task)
        if isinstance(cause, WeightsNotProven):
            await self._replace_unproven(name, cause)
            return
        self.context.telemetry.event("paint_failed", actor=name, group=task.group_id, error=str(cause))
        if isinstance(cause, WeightsTimeout):
            self.fleet.revive(name, kill=False)  # Ray has started it anew: nobody has offered it weights
        if task.source is not Source.FILES and state == "discarded":
            self.context.stop(cause)

    async def _replace_unproven(self, name: str, cause: WeightsNotProven) -> None:
        """An actor that cannot prove its weights paints nothing: a new process takes its place, a few times."""
        self.unproven[name] = self.unproven.get(name, 0) + 1
        self.context.telemetry.count("salon_weight_unproven_total", actor=name)
        self.context.telemetry.event("weights_not_proven", actor=name, step=self.context.step, error=str(cause))
        if self.unproven[name] >= MAX_UNPROVEN:
            self.context.stop(cause)
        else:
            self.fleet.revive(name, kill=True)

    def _give_back(self, task: PromptTask) -> str:
        """End the lease early; returns the state the group is in now."""
        try:
            return str(self.context.ledger.give_back(task.group_id, task.attempt))
        except StaleLease:
            return "stale"
        finally:
            self.context.bell.ring()
