"""A process that Ray ends because its node's memory is full counts as dead, like one that was killed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError

from cluster.context import Scored
from cluster.deaths import how
from cluster.learner_group import LearnerGroup
from cluster.scoring_loop import ScoringLoop
from cluster.vault import GroupStore
from contracts.errors import RankLost
from contracts.scores import point_table
from contracts.wire import GroupState
from tests.cluster.loop_house import Remote, admit_and_lease, config_of, context_of, header_of, receipt_of
from tests.cluster.test_rollout_loop import House, settled, stop

FULL = OutOfMemoryError(
    "Memory on the node (IP: 10.0.0.1) was 22.98GB / 23.50GB (0.98), which exceeds the threshold of 0.95.\n"
    "Top 10 memory users:\nPID\tMEM(GB)\tCOMMAND\n1\t19.5\tanother program\n\nRefer to the documentation."
)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FULL, "Ray ended it, because its node's memory is full: Memory on the node (IP: 10.0.0.1) was 22.98GB"),
        (ActorDiedError(), "The actor died unexpectedly before finishing this task."),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_a_death_is_told_in_one_line(error: Exception, said: str) -> None:
    assert how(error).startswith(said)
    assert "\n" not in how(error)


@pytest.mark.parametrize("error", [FULL, ActorDiedError()])
def test_the_group_is_painted_by_another_and_the_actor_is_brought_back(error: Exception, tmp_path: Path) -> None:
    async def run() -> None:
        house, revived = House(tmp_path, groups_per_step=4), []
        house.fleet.revive = lambda name, kill: (revived.append((name, kill)), house.reviving.add(name))
        running = asyncio.create_task(house.loop.run())
        await settled()
        task, painting = house.fleet.handles["actor-1"].painting.pop()
        painting.set_exception(error)
        await settled()
        assert revived == [("actor-1", False)]
        others = [task for held in house.in_hand() for task in held]
        assert sorted(others) == [0, 1, 2, 3]
        assert house.in_hand()[1] == []
        await stop(house, running)
        assert task.group_id in house.generated

    asyncio.run(run())


@pytest.mark.parametrize("error", [FULL, ActorDiedError()])
def test_a_rank_is_lost_and_its_peers_errors_are_explained(error: Exception, tmp_path: Path) -> None:
    async def run() -> None:
        group = LearnerGroup(config_of(tmp_path), {}, ())
        results: list[Any] = [asyncio.get_running_loop().create_future() for _ in range(2)]
        results[0].set_exception(RuntimeError("[gloo] Connection closed by peer"))
        results[1].set_exception(error)
        with pytest.raises(RankLost, match=r"learner ranks \[1\] died: .*(memory is full|died unexpectedly)"):
            await group._gather(results, 5)

    asyncio.run(run())


@pytest.mark.parametrize("error", [FULL, ActorDiedError()])
def test_a_rank_that_called_a_dead_actor_is_rebuilt_and_not_told_to_need_less(error: Exception, tmp_path: Path) -> None:
    async def run() -> None:
        group = LearnerGroup(config_of(tmp_path), {}, ())
        result: Any = asyncio.get_running_loop().create_future()
        result.set_exception(RayTaskError("update", "traceback", error))
        with pytest.raises(RankLost, match=r"rank 0 called an actor that died: .*(memory is full|died unexpectedly)"):
            await group._gather([result], 5)

    asyncio.run(run())


@pytest.mark.parametrize("error", [FULL, ActorDiedError()])
def test_a_group_is_scored_once_the_dispatcher_is_back(error: Exception, tmp_path: Path) -> None:
    class Dispatcher:
        """Dies at the first group."""

        def __init__(self) -> None:
            self.asked, self.waited_for = 0, 0

        def ready(self) -> None:
            self.waited_for += 1

        def score_group(self, vault: str, group_id: int) -> Any:
            self.asked += 1
            if self.asked == 1:
                raise error
            return {"given": point_table("given", "1", ("score",), np.arange(4, dtype=np.float32)[:, None])}, {}

    async def run() -> None:
        store = GroupStore(tmp_path / "vault", 0)
        context = context_of(config_of(tmp_path), tmp_path, {"vault-0": Remote(store)})
        task = admit_and_lease(context)
        store.put(header_of(task), {"images": np.zeros((4, 2, 2, 3), np.uint8)})
        context.ledger.generated(receipt_of(task))
        context.groups[task.group_id] = Scored(header_of(task))
        context.scorer_versions = {"given": "1"}
        dispatcher = Dispatcher()
        scoring = ScoringLoop(context, Remote(dispatcher))
        await scoring.submit(task.group_id, "vault-0")
        await asyncio.wait_for(asyncio.gather(*scoring.tasks), 10)
        assert context.failure is None
        assert (dispatcher.asked, dispatcher.waited_for) == (2, 1)
        assert context.ledger.row(task.group_id).state is GroupState.READY

    asyncio.run(run())
