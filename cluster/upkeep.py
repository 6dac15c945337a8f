"""What goes on beside the loops while a run trains: leases that run out, room in vaults, gauges, the folder's mirror.

Invariant: what may take long or fail without harm (a file system far away, a silent process) holds up neither leases
nor room; what must go on (leases) ends the run with its error rather than stopping unseen.
Does not own: any of what it calls.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from cluster.context import RunContext
from cluster.fruitless import Fruitless
from cluster.room import RoomKeeper

OBSERVE_S = 5.0
"""Seconds between rounds over what nobody reports unasked."""

MIRROR_S = 30.0
"""Longest time between uploads of a run folder that lives at a URL; a stall's stacks are uploaded at once."""


class Upkeep:
    """One round a second."""

    def __init__(
        self, context: RunContext, fruitless: Fruitless, watchdog: Any, observe: Callable[[], Awaitable[None]]
    ) -> None:
        """watchdog: is told of every step, and knows how often it has dumped stacks.

        observe: exports what nobody reports unasked.
        """
        self._context, self._fruitless, self._watchdog, self._observe = context, fruitless, watchdog, observe
        self._room = RoomKeeper(context)
        self._last_step = context.step
        self._last_mirrored = self._last_observed = time.monotonic()
        self._last_dumps = 0
        self._beside: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Until cancelled."""
        try:
            while True:
                await asyncio.sleep(1.0)
                await self._round()
        except Exception as error:
            self._context.stop(error)
        finally:
            if self._beside is not None:
                self._beside.cancel()

    async def _round(self) -> None:
        await self._room.look()  # first: it renews leases
        self._expire_leases()
        self._fruitless.check()
        self._export_books()
        if self._context.step != self._last_step:
            self._last_step = self._context.step
            self._watchdog.beat()
        if self._beside is None or self._beside.done():
            self._beside = asyncio.create_task(self._now_and_then())

    def _expire_leases(self) -> None:
        context = self._context
        for group_id, state in context.ledger.expire_leases():
            context.telemetry.count("salon_lease_expired_total", state=str(state))
            context.telemetry.event("lease_expired", group=group_id, state=str(state))
            context.bell.ring()

    def _export_books(self) -> None:
        context = self._context
        for state, number in context.ledger.books().groups.items():
            context.telemetry.gauge("salon_groups", number, state=str(state))
        context.telemetry.gauge("salon_queue_capacity_groups", context.admission.capacity)
        context.telemetry.refresh_rates()

    async def _now_and_then(self) -> None:
        context, now = self._context, time.monotonic()
        try:
            if now - self._last_observed > OBSERVE_S:
                self._last_observed = now
                await self._observe()
            dumps = self._watchdog.num_dumps
            if context.folder.url is not None and (now - self._last_mirrored > MIRROR_S or dumps > self._last_dumps):
                self._last_mirrored, self._last_dumps = now, dumps
                await asyncio.to_thread(context.folder.sync)
        except Exception as error:  # of whatever stands behind a URL
            context.telemetry.event("upkeep_failed", error=f"{type(error).__name__}: {error}"[:300])
