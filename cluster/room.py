"""Makes room in vaults that are full: actors wait with what they have painted, and the learner frees what it can.

A painting that finds no room in its vault stays with its actor, which asks again (workers.py). Each second this file
asks the vaults who waits. While someone does, no task is handed out, the leases of those who wait are renewed, and the
learner saves a state at its next boundary, which frees the groups that the state covers and those that were discarded.
Invariant: a painted group is not lost for want of room. Where nothing can make room any more (the groups that the next
step needs do not fit), the run ends with an error that says so.
Does not own: the bound (vault.py), saving (learner_loop.py).
"""

from __future__ import annotations

import asyncio
from typing import Any

from ray.exceptions import RayError

from cluster.context import RunContext
from cluster.refs import value
from contracts.errors import VaultFull
from contracts.wire import GroupState

ANSWER_S = 5.0
STUCK_ROUNDS = 5
"""Rounds in a row without a way to room, after which the run ends."""

_ON_THE_WAY = (GroupState.GENERATED, GroupState.SCORING, GroupState.CLAIMED)


class RoomKeeper:
    """One round a second, of the controller's."""

    def __init__(self, context: RunContext) -> None:
        self.context = context
        self._stuck = 0
        self._seen: Any = None

    async def look(self) -> None:
        """Who waits now; and what is done about it."""
        context = self.context
        answers = await asyncio.gather(*(_waiting(vault) for vault in context.vaults.values()))
        waiting = {
            (group_id, attempt)
            for found in answers
            for group_id, attempt in found
            if context.ledger.renew_painting(group_id, attempt, context.config.rollout.lease_s)
        }
        if bool(waiting) != bool(context.waiting_for_room):
            context.telemetry.event("vaults_full" if waiting else "vaults_have_room", waiting=len(waiting))
            context.bell.ring()
        context.waiting_for_room = waiting
        if waiting:
            self._make_room()
        else:
            self._stuck = 0

    def _make_room(self) -> None:
        context = self.context
        books = context.ledger.books()
        seen = (context.step, books.discarded, books.painted)
        if seen != self._seen:  # groups were trained or discarded since: a state covers them
            self._seen, self._stuck = seen, 0
            context.room_wanted = True
            context.bell.ring()
            return
        on_the_way = any(books.groups[state.value] for state in _ON_THE_WAY)
        painting = books.groups[GroupState.GENERATING.value] > len(context.waiting_for_room)
        busy = context.room_wanted or not context.learner_waits or on_the_way or painting
        self._stuck = 0 if busy else self._stuck + 1
        if self._stuck >= STUCK_ROUNDS and not context.stopping:
            context.stop(self._no_way_out())

    def _no_way_out(self) -> VaultFull:
        context = self.context
        limit, waiting = context.config.vault.disk_mb, len(context.waiting_for_room)
        bound = f"vault.disk_mb={limit}" if limit is not None else "the free disk"
        return VaultFull(
            f"the vaults are full: {waiting} painted groups wait for room, {bound} holds no more, and what "
            f"is stored is all needed. Up to {context.admission.capacity} groups are alive at once "
            "(rollout.groups_per_step * (pipeline.max_staleness + 1)): raise vault.disk_mb or free the disk, or lower "
            "one of the two"
        )


async def _waiting(vault: Any) -> list[tuple[int, int]]:
    """Nobody, where a vault does not answer in time: hang_watch.py sees to it."""
    try:
        return await asyncio.wait_for(value(vault.waiting.remote()), ANSWER_S)
    except (RayError, TimeoutError):
        return []
