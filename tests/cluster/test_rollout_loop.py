"""Who gets the next task: every idle actor before any actor that would only queue it, none that is being revived."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.admission import Admission
from cluster.context import Bell
from cluster.ledger import Ledger
from cluster.rollout_loop import RolloutLoop
from contracts.config.load import config_from_tree
from contracts.wire import PaintReceipt, PromptSpec, PromptTask

ACTORS = 4


class Handle:
    """An actor that paints until it is told to finish."""

    def __init__(self) -> None:
        self.painting: list[tuple[PromptTask, asyncio.Future[PaintReceipt]]] = []
        self.paint = SimpleNamespace(remote=self._paint)

    def _paint(self, task: PromptTask) -> asyncio.Future[PaintReceipt]:
        result = asyncio.get_running_loop().create_future()
        self.painting.append((task, result))
        return result

    def finish(self) -> None:
        task, result = self.painting.pop(0)
        receipt = PaintReceipt(
            group_id=task.group_id, attempt=task.attempt, weight_version=0, vault="vault-0", num_bytes=1,
            paint_seconds=1.0, store_seconds=0.0,
        )  # fmt: skip
        result.set_result(receipt)


class House:
    """A rollout loop with a real ledger and admission, and actors that wait."""

    def __init__(self, folder: Path, groups_per_step: int, prefetch: int = 2) -> None:
        config = config_from_tree(
            {
                "name": "handout",
                "model": {"path": "none"},
                "scorers": [{"name": "given", "urls": ["http://127.0.0.1:1"]}],
                "objective": {"name": "nft"},
                "rollout": {"actors": ACTORS, "groups_per_step": groups_per_step, "prefetch": prefetch},
                "pipeline": {"max_staleness": 0},
                "stop": {"steps": 1},
            }
        )
        ledger = Ledger(folder / "ledger.sqlite")
        ledger.published(0, 0)
        self.context: Any = SimpleNamespace(
            config=config, ledger=ledger, admission=Admission(ledger, config), bell=Bell(), stopping=False, groups={},
            waiting_for_room=set(),
            source=SimpleNamespace(at=lambda position: PromptSpec(text=str(position))), reached_end=lambda: False,
            telemetry=Silent(), vault=lambda _: SimpleNamespace(header=SimpleNamespace(remote=self._header)),
        )  # fmt: skip
        names = [f"actor-{index}" for index in range(ACTORS)]
        self.reviving: set[str] = set()
        self.fleet: Any = SimpleNamespace(
            names=names, handles={name: Handle() for name in names}, is_reviving=self.reviving.__contains__
        )
        self.generated: list[int] = []
        self.loop = RolloutLoop(self.context, self.fleet, self._generated)

    async def _header(self, *_: Any) -> Any:
        return SimpleNamespace()

    async def _generated(self, group_id: int, vault: str) -> None:
        self.generated.append(group_id)

    def in_hand(self) -> list[list[int]]:
        return [[task.group_id for task, _ in handle.painting] for handle in self.fleet.handles.values()]


class Silent:
    """Telemetry that keeps nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_args, **_fields: None


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def stop(house: House, running: asyncio.Task[None]) -> None:
    house.context.stopping = True
    house.context.bell.ring()
    for handle in house.fleet.handles.values():
        while handle.painting:
            handle.finish()
    await asyncio.wait_for(running, 5)


@pytest.mark.parametrize(("groups", "sizes"), [(3, [1, 1, 1, 0]), (4, [1, 1, 1, 1]), (6, [2, 2, 1, 1]), (20, [2] * 4)])
def test_tasks_go_to_idle_actors_first(tmp_path: Path, groups: int, sizes: list[int]) -> None:
    async def run() -> None:
        house = House(tmp_path, groups)
        running = asyncio.create_task(house.loop.run())
        await settled()
        held = house.in_hand()
        assert sorted(map(len, held), reverse=True) == sizes
        assert sorted(group for of_actor in held for group in of_actor) == list(range(sum(sizes)))
        await stop(house, running)
        assert sorted(house.generated) == list(range(sum(sizes)))

    asyncio.run(run())


def test_the_next_task_goes_to_whom_finished(tmp_path: Path) -> None:
    async def run() -> None:
        house = House(tmp_path, groups_per_step=20, prefetch=1)
        running = asyncio.create_task(house.loop.run())
        await settled()
        house.fleet.handles["actor-2"].finish()
        await settled()
        assert house.in_hand() == [[0], [1], [4], [3]]
        await stop(house, running)

    asyncio.run(run())


def test_an_actor_on_its_way_back_gets_nothing(tmp_path: Path) -> None:
    async def run() -> None:
        house = House(tmp_path, groups_per_step=8)
        house.reviving.add("actor-1")
        running = asyncio.create_task(house.loop.run())
        await settled()
        assert [len(held) for held in house.in_hand()] == [2, 0, 2, 2]
        await stop(house, running)

    asyncio.run(run())
