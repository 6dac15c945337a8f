"""The rollout actors: created, offered weights, brought back when they die or hang.

Invariant: an actor that dies, outlives its lease or does not take note of new weights is restarted and offered the
newest weights before it gets another task. Nobody waits for one that is on its way back: not the others, not the
learner, not the end of the run. One whose machine is gone may stay away for as long as another is there.
Does not own: tasks (rollout_loop.py), what an actor does (workers.py), the weights (weights.py).
"""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import ray
from ray.exceptions import RayError

from cluster.awake import within
from cluster.context import RunContext
from cluster.deaths import ActorGone
from cluster.evaluate import EvalPlan
from cluster.hang_watch import kill_on_its_node
from cluster.refs import all_or_none, value
from cluster.workers import ActorWorker
from contracts.errors import SalonError

START_S = 900.0
"""Time the actors have to find room and to load their model."""

READY_S = 60.0
"""Time an actor that comes back has to answer, again and again."""

ATTEMPTS = 20
"""Attempts to reach an actor, after which it is away: made anew, and the end of the run if no other is there."""

EVAL_ATTEMPTS = 5
"""Times a chunk of an evaluation is given to an actor before the evaluation is given up."""

PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""Between attempts; twice as long after each round of them."""


class ActorFleet:
    """One handle a name; a name's actor may be another process, or another actor, after a revival."""

    def __init__(self, context: RunContext, painter: str = "actors.painter:Painter") -> None:
        self.context, self.painter = context, painter
        self.names = [f"actor-{index}" for index in range(context.config.rollout.actors)]
        self.handles: dict[str, Any] = {}
        self.processes: dict[str, dict[str, Any]] = {}
        self.restarts = 0
        self.reviving: dict[str, asyncio.Task[None]] = {}
        self.offering: dict[str, asyncio.Task[None]] = {}

    def _create(self, name: str) -> Any:
        rollout = self.context.config.rollout
        options = ActorWorker.options(num_cpus=rollout.cpus_per_actor, num_gpus=rollout.gpus_per_actor)
        return options.remote(self.context.config, name, self.context.vaults, self.painter)

    async def start(self) -> None:
        """Create every actor and wait until all have loaded their model.

        Raises SalonError when they have not within START_S: the cluster has no room for them, or they hang.
        """
        self.handles = {name: self._create(name) for name in self.names}
        ready = all_or_none(*(value(handle.ready.remote()) for handle in self.handles.values()))
        try:
            infos = await within(ready, START_S)
        except TimeoutError:
            rollout = self.context.config.rollout
            raise SalonError(
                f"{rollout.actors} rollout actors of {rollout.cpus_per_actor:g} CPU and {rollout.gpus_per_actor:g} GPU "
                f"were not ready within {START_S:.0f} s: the cluster has no room for them, or their model loads slowly"
            ) from None
        self.processes = dict(zip(self.names, infos, strict=True))

    # ---- weights -------------------------------------------------------------------------------------------------

    def offer_all(self) -> None:
        """Offer the newest weights to every actor, one offer at a time to each; returns at once."""
        for name in self.names:
            running = self.offering.get(name)
            if running is None or running.done():
                self.offering[name] = asyncio.create_task(self._offer_newest(name))

    async def offered(self) -> None:
        """Wait until every actor that is there has taken note of the newest weights. One on its way back will have
        before it paints."""
        while waiting := [task for name, task in self.offering.items() if not (task.done() or self.is_reviving(name))]:
            await asyncio.wait(waiting, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)

    async def _offer_newest(self, name: str) -> None:
        """Until the actor has taken note of the newest weights. One that dies or hangs meanwhile is brought back."""
        store, noted = self.context.store, None
        try:
            while noted is not store.latest:
                if self.is_reviving(name):
                    await asyncio.shield(self.reviving[name])
                noted = store.latest
                try:
                    await within(value(self._offer(name)), store.timeout_s)
                except (RayError, TimeoutError) as error:  # RayError: the actor died, or the arrays with their node
                    self.context.telemetry.event("offer_lost", actor=name, error=type(error).__name__)
                    await asyncio.shield(self.revive(name, kill=isinstance(error, TimeoutError)))
        except SalonError as error:
            self.context.stop(error)

    def _offer(self, name: str) -> Any:
        return self.context.store.offer_to(self.handles[name], self.processes[name]["node"])

    def nodes(self) -> list[str]:
        """The nodes actors are on."""
        return sorted({self.processes[name]["node"] for name in self.present()})

    # ---- revival -------------------------------------------------------------------------------------------------

    def revive(self, name: str, kill: bool) -> asyncio.Task[None]:
        """Begin to bring an actor back, however many callers lost their call to it; done when it is there.

        kill: it may be alive and hang. A revival that fails ends the run.
        """
        if not self.is_reviving(name):
            self.reviving[name] = asyncio.create_task(self._bring_back(name, kill))
            self.reviving[name].add_done_callback(self._brought_back)
        return self.reviving[name]

    def is_reviving(self, name: str) -> bool:
        """Whether an actor is on its way back."""
        running = self.reviving.get(name)
        return running is not None and not running.done()

    def present(self) -> list[str]:
        """The actors that are not on their way back."""
        return [name for name in self.names if not self.is_reviving(name)]

    def require(self, name: str) -> Any:
        """The handle of an actor. Raises SalonError when it could not be brought back."""
        running = self.reviving.get(name)
        if running is not None and running.done() and not running.cancelled() and (error := running.exception()):
            raise error
        return self.handles[name]

    def background(self) -> list[asyncio.Task[None]]:
        """What goes on beside the loops, to be cancelled at the end."""
        return [*self.offering.values(), *self.reviving.values()]

    def _brought_back(self, revival: asyncio.Task[None]) -> None:
        if not revival.cancelled() and revival.exception() is not None:
            self.context.stop(revival.exception())
        self.context.bell.ring()

    async def _bring_back(self, name: str, kill: bool) -> None:
        self.restarts += 1
        telemetry = self.context.telemetry
        telemetry.count("salon_actor_restarts_total", actor=name)
        telemetry.event("actor_restart", actor=name, killed=kill)
        if kill and not await kill_on_its_node(self.processes[name]):  # Ray asks a hung process, and waits for it
            ray.kill(self.handles[name], no_restart=False)
        for attempt in itertools.count(1):
            try:
                await self._reach(name)
                if attempt > ATTEMPTS:
                    telemetry.event("actor_back", actor=name)
                return
            except (RayError, TimeoutError) as error:
                rounds, rest = divmod(attempt, ATTEMPTS)
                if rest == 0:
                    self._make_anew(name, attempt, error)
                await asyncio.sleep(min(PAUSE_S * 2**rounds, LONGEST_PAUSE_S))

    async def _reach(self, name: str) -> None:
        """Have it answer, and take note of the newest weights: those that are the newest then."""
        self.processes[name] = await within(value(self.handles[name].ready.remote()), READY_S)
        store, noted = self.context.store, None
        while noted is not store.latest:
            noted = store.latest
            await within(value(self._offer(name)), store.timeout_s)

    def _make_anew(self, name: str, attempt: int, why: Exception) -> None:
        """Ray does not restart an actor that failed while it was made, and its node may be gone for good."""
        if not self.present():
            raise SalonError(f"{name} did not come back after {attempt} attempts ({why}), and no other actor is there")
        self.context.telemetry.event("actor_away", actor=name, attempts=attempt, error=str(why)[:300])
        ray.kill(self.handles[name], no_restart=True)
        self.handles[name] = self._create(name)


class EvalPainters:
    """The actors as those who paint an evaluation: one chunk at a time each, whoever is there."""

    def __init__(self, fleet: ActorFleet, lease_s: float) -> None:
        self.fleet, self.lease_s = fleet, lease_s
        self._free: asyncio.Queue[str] = asyncio.Queue()
        for name in fleet.names:
            if fleet.is_reviving(name):
                self._once_back(name, fleet.reviving[name])
            else:
                self._free.put_nowait(name)

    async def paint(self, chunk: EvalPlan) -> Any:
        """Reference of a chunk's images, painted by the next free actor; another try when one is lost."""
        for _ in range(EVAL_ATTEMPTS):
            name, lost = await self._free.get(), None
            try:
                options = self.fleet.require(name).paint_images.options(num_returns=2)
                done, images = options.remote(chunk.prompts, chunk.sampling, chunk.seeds)
                await within(value(done), self.lease_s)  # the images stay where they are
                return images
            except (*ActorGone, TimeoutError) as error:
                lost = error
                self._once_back(name, self.fleet.revive(name, kill=isinstance(error, TimeoutError)))
            finally:
                if lost is None:
                    self._free.put_nowait(name)
        raise SalonError(f"an evaluation could not be painted in {EVAL_ATTEMPTS} attempts")

    def _once_back(self, name: str, revival: asyncio.Task[None]) -> None:
        revival.add_done_callback(lambda _: self._free.put_nowait(name))
