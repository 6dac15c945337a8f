"""Bytes that a vault has lost: the group is painted again from the same seeds, and the books balance."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayTaskError

from cluster.context import RunContext, Scored
from cluster.learner_loop import LearnerLoop
from cluster.scoring_loop import ScoringLoop
from cluster.vault import GroupStore
from contracts.errors import NotStored
from contracts.wire import DiscardReason, GroupState, PromptTask
from tests.cluster.loop_house import Remote, admit_and_lease, config_of, context_of, header_of, receipt_of


@pytest.fixture
def store(tmp_path: Path) -> GroupStore:
    return GroupStore(tmp_path / "vault", 0)


@pytest.fixture
def context(tmp_path: Path, store: GroupStore) -> RunContext:
    return context_of(config_of(tmp_path), tmp_path, {"vault-0": Remote(store)})


class Reader:
    """A dispatcher that reads the group's images and gets no further; errors as they come through two actors."""

    def __init__(self, store: GroupStore) -> None:
        self.store = store

    def score_group(self, vault: str, group_id: int) -> Any:
        try:
            self.store.get(group_id)
        except NotStored as error:
            inner = RayTaskError("get", "traceback", error).as_instanceof_cause()
            raise RayTaskError("score_group", "traceback", inner).as_instanceof_cause() from None
        raise AssertionError("it was there")


def paint(context: RunContext, store: GroupStore) -> PromptTask:
    task = admit_and_lease(context)
    header = header_of(task)
    store.put(header, {"images": np.zeros((4, 2, 2, 3), np.uint8)})
    store.put_embedding(header.prompt_digest, {"text": np.ones(3, np.float32)})
    context.ledger.generated(receipt_of(task))
    context.groups[task.group_id] = Scored(header)
    return task


def check_painted_again(context: RunContext, task: PromptTask) -> None:
    row, books = context.ledger.row(task.group_id), context.ledger.books()
    assert (row.state, row.painted) == (GroupState.ADMITTED, 0)
    assert books.balanced
    assert books.discarded_by_reason == {DiscardReason.LOST.value: 4}
    again = context.ledger.lease_generating("actor-0", 60)
    assert again is not None
    assert (again.group_id, again.prompt) == (task.group_id, task.prompt), "what the seeds derive from"
    assert again.attempt > task.attempt
    telemetry: Any = context.telemetry
    assert telemetry.kinds() == ["group_lost"]
    assert telemetry.counted == {"salon_images_discarded_total/lost": 4}


def test_lost_before_it_was_scored(context: RunContext, store: GroupStore) -> None:
    async def run() -> None:
        task = paint(context, store)
        store.delete(task.group_id)
        scoring = ScoringLoop(context, Remote(Reader(store)))
        await scoring.submit(task.group_id, "vault-0")
        await asyncio.wait_for(asyncio.gather(*scoring.tasks), 10)
        assert context.failure is None
        check_painted_again(context, task)

    asyncio.run(run())


@pytest.mark.parametrize("what", ["bytes", "embedding"])
def test_lost_before_the_update(what: str, context: RunContext, store: GroupStore) -> None:
    """The one of the claim that is gone is painted again; the other waits for it, ready."""

    async def run() -> None:
        tasks = [paint(context, store) for _ in range(2)]
        for task in tasks:
            attempt = context.ledger.lease_scoring(task.group_id, 60)
            assert attempt is not None
            context.ledger.scored(task.group_id, attempt, {})
        claimed = context.ledger.claim(2)
        assert claimed == [0, 1]
        if what == "embedding":
            header = context.groups[1].header
            context.groups[1] = Scored(header.model_copy(update={"prompt_digest": "of-another-vault"}))
        else:
            store.delete(1)
        await reading_nothing(context)._train_or_paint_again(claimed)
        assert context.ledger.row(0).state is GroupState.READY
        check_painted_again(context, tasks[1])

    asyncio.run(run())


def test_an_error_about_what_is_stored_after_all_is_not_painted_over(context: RunContext, store: GroupStore) -> None:
    """It would come again for ever."""

    async def run() -> None:
        for task in [paint(context, store) for _ in range(2)]:
            attempt = context.ledger.lease_scoring(task.group_id, 60)
            assert attempt is not None
            context.ledger.scored(task.group_id, attempt, {})
        claimed = context.ledger.claim(2)
        assert claimed is not None
        with pytest.raises(NotStored):
            await reading_nothing(context)._train_or_paint_again(claimed)
        assert context.ledger.claimed() == []

    asyncio.run(run())


def reading_nothing(context: RunContext) -> LearnerLoop:
    """A learner's loop whose ranks cannot read what they are given."""
    loop = LearnerLoop.__new__(LearnerLoop)
    loop.context = context

    async def cannot_read(claimed: list[int]) -> None:
        raise RayTaskError("update", "traceback", NotStored("group 1 is not stored")).as_instanceof_cause()

    loop._train = cannot_read  # type: ignore[method-assign]
    return loop
