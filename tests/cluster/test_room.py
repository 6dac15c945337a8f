"""Vaults without room: who waits is known, keeps its lease, has the learner save; or the run ends and says why."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import numpy as np
import pytest

from cluster.context import RunContext
from cluster.room import STUCK_ROUNDS, RoomKeeper
from cluster.vault import GroupStore
from contracts.errors import NotStored, VaultFull
from contracts.wire import DiscardReason, PromptTask
from tests.cluster.loop_house import Remote, admit_and_lease, config_of, context_of, header_of, receipt_of

ROOM = 150_000  # for one group, not for two


def arrays() -> dict[str, np.ndarray]:
    return {"clean": np.ones((4, 6_000), np.float32)}


@pytest.fixture
def store(tmp_path: Path) -> GroupStore:
    return GroupStore(tmp_path / "vault", 0, disk_bytes=ROOM)


@pytest.fixture
def context(tmp_path: Path, store: GroupStore) -> RunContext:
    return context_of(config_of(tmp_path, vault={"disk_mb": 1}), tmp_path, {"vault-0": Remote(store)})


def paint(context: RunContext, store: GroupStore) -> PromptTask:
    task = admit_and_lease(context)
    store.put(header_of(task), arrays())
    context.ledger.generated(receipt_of(task))
    return task


def paint_without_room(context: RunContext, store: GroupStore, lease_s: float = 60.0) -> PromptTask:
    task = admit_and_lease(context, lease_s)
    with pytest.raises(VaultFull):
        store.put_embedding("d", {"text": np.ones(ROOM, np.float32)}, painting=(task.group_id, task.attempt))
    return task


def test_who_waits_keeps_its_lease_and_the_learner_is_asked_to_save(context: RunContext, store: GroupStore) -> None:
    async def run() -> None:
        paint(context, store)
        waiting = paint_without_room(context, store, lease_s=0.01)
        time.sleep(0.02)
        keeper = RoomKeeper(context)
        await keeper.look()
        assert context.ledger.expire_leases() == []
        assert context.waiting_for_room == {(waiting.group_id, waiting.attempt)}
        assert context.room_wanted
        context.ledger.discard(0, DiscardReason.LATE)
        store.delete(context.ledger.covered(0))
        store.put(header_of(waiting), arrays())
        context.ledger.generated(receipt_of(waiting))
        await keeper.look()
        assert not context.waiting_for_room
        assert context.telemetry.kinds() == ["vaults_full", "vaults_have_room"]  # type: ignore[attr-defined]
        assert context.failure is None

    asyncio.run(run())


def test_where_nothing_makes_room_the_run_ends_and_names_the_settings(context: RunContext, store: GroupStore) -> None:
    async def run() -> None:
        keeper = RoomKeeper(context)
        task = paint(context, store)
        attempt = context.ledger.lease_scoring(task.group_id, 60)
        assert attempt is not None
        paint_without_room(context, store)
        context.learner_waits = True
        for _ in range(STUCK_ROUNDS + 2):
            await keeper.look()
            context.room_wanted = False  # the learner has saved, and nothing came of it
        assert context.failure is None, "the first group is still with the jury"
        context.ledger.scored(task.group_id, attempt, {})
        for _ in range(STUCK_ROUNDS):
            assert context.failure is None
            await keeper.look()
        assert isinstance(context.failure, VaultFull)
        for words in ("1 painted groups wait", "vault.disk_mb=1", "rollout.groups_per_step"):
            assert words in str(context.failure)

    asyncio.run(run())


def test_what_cannot_be_read_is_no_longer_held(store: GroupStore, context: RunContext) -> None:
    """So that the ledger's question, what is stored, has a true answer."""
    task = paint(context, store)
    (file,) = store.folder.glob("group-*")
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(NotStored, match="damaged"):
        store.get(task.group_id)
    assert store.stored() == []
    assert store.bytes_held()["disk"] == 0
    store.put(header_of(task), arrays())
    assert store.stored() == [(task.group_id, task.attempt)]
