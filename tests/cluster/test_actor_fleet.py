"""Actors that do not come back: the others go on without them, and the run ends when there is none."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import OutOfMemoryError, RayActorError

from cluster import actor_fleet
from cluster.actor_fleet import ATTEMPTS, ActorFleet, EvalPainters
from cluster.context import Bell
from contracts.errors import SalonError


class Fleet(ActorFleet):
    """Actors that are there unless their name is in `gone`."""

    def __init__(self, actors: int) -> None:
        self.events: list[str] = []
        self.failures: list[BaseException] = []
        telemetry = SimpleNamespace(count=lambda *_, **__: None, event=lambda kind, **_: self.events.append(kind))
        context: Any = SimpleNamespace(
            config=SimpleNamespace(rollout=SimpleNamespace(actors=actors)), telemetry=telemetry, bell=Bell(),
            stop=self.failures.append, vaults={}, store=SimpleNamespace(latest=object(), timeout_s=5.0),
        )  # fmt: skip
        super().__init__(context)
        self.gone: set[str] = set()
        self.noted: list[str] = []
        self.handles = {name: self._create(name) for name in self.names}
        self.processes = {name: {"node": f"node of {name}"} for name in self.names}

    def _create(self, name: str) -> Any:
        return object()

    async def _reach(self, name: str) -> None:
        await asyncio.sleep(0)
        if name in self.gone:
            raise RayActorError

    async def _offer_newest(self, name: str) -> None:
        if self.is_reviving(name):
            await asyncio.shield(self.reviving[name])
        self.noted.append(name)


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actor_fleet, "PAUSE_S", 0.0)
    monkeypatch.setattr(actor_fleet.ray, "kill", lambda *_, **__: None)


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0)


def test_nobody_waits_for_an_actor_that_is_away_and_it_may_come_back() -> None:
    async def run() -> None:
        fleet = Fleet(actors=3)
        fleet.gone = {"actor-1"}
        first = fleet.handles["actor-1"]
        fleet.revive("actor-1", kill=False)
        await until(lambda: fleet.events.count("actor_away") == 2)
        assert fleet.handles["actor-1"] is not first, "Ray restarts none that failed while it was made"
        assert fleet.present() == ["actor-0", "actor-2"]
        assert fleet.nodes() == ["node of actor-0", "node of actor-2"]
        fleet.offer_all()
        await asyncio.wait_for(fleet.offered(), 5)
        assert sorted(fleet.noted) == ["actor-0", "actor-2"]
        fleet.gone.clear()
        await until(lambda: not fleet.is_reviving("actor-1"))
        await asyncio.wait_for(fleet.offered(), 5)
        assert fleet.present() == fleet.names
        assert "actor-1" in fleet.noted
        assert (fleet.events[-1], fleet.events.count("actor_restart"), fleet.restarts) == ("actor_back", 1, 1)
        assert fleet.failures == []

    asyncio.run(run())


def test_a_run_without_any_actor_ends() -> None:
    async def run() -> None:
        fleet = Fleet(actors=2)
        fleet.gone = set(fleet.names)
        for name in fleet.names:
            fleet.revive(name, kill=False)
        await until(lambda: len(fleet.failures) == 2)
        assert f"did not come back after {ATTEMPTS} attempts" in str(fleet.failures[0])
        assert "no other actor is there" in str(fleet.failures[0])
        with pytest.raises(SalonError, match="did not come back"):
            fleet.require("actor-0")

    asyncio.run(run())


@pytest.mark.parametrize("death", [RayActorError(), OutOfMemoryError("the node's memory is full")])
def test_an_evaluation_is_painted_by_those_who_are_there(death: Exception) -> None:
    class Painting:
        """An actor that answers at once, or died."""

        def __init__(self, name: str, fleet: Fleet) -> None:
            self.name, self.fleet = name, fleet
            self.paint_images = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._paint))

        def _paint(self, *_: Any) -> tuple[Any, str]:
            done = asyncio.get_running_loop().create_future()
            done.set_exception(death) if self.name in self.fleet.gone else done.set_result(None)
            return done, f"images of {self.name}"

    async def run() -> None:
        fleet = Fleet(actors=3)
        fleet.handles = {name: Painting(name, fleet) for name in fleet.names}
        fleet._create = lambda name: Painting(name, fleet)  # type: ignore[method-assign]
        fleet.gone = {"actor-0", "actor-1"}
        fleet.revive("actor-0", kill=False)  # known to be away; of actor-1 it is found out
        painters = EvalPainters(fleet, lease_s=5.0)
        chunk: Any = SimpleNamespace(prompts=[], sampling=None, seeds=[])
        painted = await asyncio.wait_for(asyncio.gather(*(painters.paint(chunk) for _ in range(6))), 10)
        assert set(painted) == {"images of actor-2"}
        fleet.gone.clear()
        await until(lambda: fleet.present() == fleet.names)
        painted = await asyncio.gather(*(painters.paint(chunk) for _ in range(3)))
        assert sorted(painted) == [f"images of {name}" for name in fleet.names]
        assert fleet.failures == []

    asyncio.run(run())
