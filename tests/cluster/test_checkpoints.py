"""Checkpoints of a whole run: what is in one, that a torn one never counts, which stay, what a full disk does."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.checkpoints import assembly, layout, newest_whole
from cluster.checkpoints.keeper import steps_to_keep
from cluster.checkpoints.layout import TornCheckpoint, list_whole, read
from cluster.checkpoints.remote import RemoteCheckpoints
from cluster.ledger.reader import LedgerReader
from cluster.vault import GroupStore
from contracts.config.checkpoint import CheckpointConfig
from contracts.errors import RankLost, StorageError
from tests.cluster.checkpoint_kit import SmallRun, make_config, saved_steps


@pytest.fixture
def run(tmp_path: Path) -> Iterator[SmallRun]:
    small = SmallRun(make_config(tmp_path, checkpoint={"every_steps": 2, "keep_last": 2, "max_failures": 2}))
    yield small
    small.close()


def save(run: SmallRun) -> layout.Checkpoint:
    asyncio.run(run.keeper.write_now())
    assert run.keeper.newest is not None
    return run.keeper.newest


def test_a_checkpoint_holds_the_whole_run(run: SmallRun) -> None:
    run.steps(2)
    live = run.paint(1) + run.paint(1, stop_at="generated")
    run.context.before, run.context.trained_before = {"accuracy": 0.5}, 12.5
    checkpoint = save(run)
    files = {path.relative_to(checkpoint.path).as_posix() for path in checkpoint.path.rglob("*") if path.is_file()}
    groups = {f"groups/group-{gid:08d}-0.safetensors" for gid in live}
    embeddings = {f"groups/embedding-digest{gid}.safetensors" for gid in live}
    assert files == {
        "manifest.json", "run.json", "ledger.sqlite", "state.json", "param.safetensors", *groups, *embeddings
    }  # fmt: skip
    assert set(checkpoint.manifest["files"]) == files - {"manifest.json"}
    state = checkpoint.run_state()
    assert (state.step, state.position, state.credit, state.train_seconds) == (2, 6, {"rows": 2}, 12.5)
    assert state.before == {"accuracy": 0.5}
    with closing(LedgerReader(checkpoint.path / "ledger.sqlite")) as copy:
        assert copy.books() == run.ledger.books()
        assert copy.trained_steps == 2
    stored = GroupStore(checkpoint.groups, 0)
    assert [group_id for group_id, _ in stored.stored()] == live
    assert not list(run.folder.checkpoints.glob(".*"))


def test_what_a_checkpoint_covers_is_let_go_and_nothing_else(run: SmallRun) -> None:
    run.steps(2)
    live = run.paint(2)
    save(run)
    assert [group_id for group_id, _ in run.store.stored()] == live
    assert (run.keeper.newest.groups / f"group-{live[0]:08d}-0.safetensors").is_file()  # type: ignore[union-attr]


def test_the_run_goes_on_while_a_checkpoint_is_written(run: SmallRun) -> None:
    """Two more steps are made beside it; it is of the step it was begun at, and its ledger may be rolled back to it."""

    async def both() -> None:
        run.learner.gate = asyncio.Event()
        run.steps(2)
        assert run.keeper.due()
        await run.keeper.begin()
        assert run.keeper.under_way
        assert not run.keeper.due()
        run.steps(2)
        run.learner.gate.set()
        while run.keeper.under_way:
            await asyncio.sleep(0.01)

    asyncio.run(both())
    checkpoint = run.keeper.newest
    assert checkpoint is not None
    assert (checkpoint.step, checkpoint.run_state().credit) == (2, {"rows": 2})
    with closing(LedgerReader(checkpoint.path / "ledger.sqlite")) as copy:
        assert copy.trained_steps == 4
        assert {row.group_id for row in copy.needed_after(2)} == {4, 5, 6, 7}
    assert {group_id for group_id, _ in GroupStore(checkpoint.groups, 0).stored()} == {4, 5, 6, 7}
    assert run.keeper.due()  # step 4 was passed meanwhile


def test_intervals_in_steps_and_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = SmallRun(make_config(tmp_path, checkpoint={"every_steps": 100, "every_seconds": 60}))
    run.steps(1)
    assert not run.keeper.due()
    monkeypatch.setattr("time.time", lambda: 4e9)  # a clock that jumps to the year 2096 changes nothing
    assert not run.keeper.due()
    run.keeper._begun_at -= 61
    assert run.keeper.due()
    run.close()


def damage(path: Path, how: str) -> None:
    blob = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "cut short":
        path.write_bytes(bytes(blob[: len(blob) // 2]))
    else:
        blob[len(blob) // 2] ^= 1
        path.write_bytes(bytes(blob))


@pytest.mark.parametrize("how", ["missing", "cut short", "bit flipped"])
@pytest.mark.parametrize("name", ["param.safetensors", "ledger.sqlite", "run.json", "groups", "manifest.json"])
def test_a_torn_checkpoint_is_never_loaded_and_the_one_before_is(run: SmallRun, name: str, how: str) -> None:
    run.steps(2)
    save(run)
    run.steps(1)
    run.paint(1)
    torn = save(run)
    assert newest_whole(run.folder.checkpoints)[0].step == 3  # type: ignore[union-attr]
    victim = next((torn.path / "groups").glob("group-*")) if name == "groups" else torn.path / name
    damage(victim, how)
    found, problems = newest_whole(run.folder.checkpoints)
    if name == "manifest.json" and how == "bit flipped" and found is not None and found.step == 3:
        return  # a flipped bit in a number that is only informed about
    assert found is not None
    assert found.step == 2
    assert len(problems) == 1


def test_an_unfinished_folder_is_no_checkpoint_and_is_cleared_away(run: SmallRun) -> None:
    leftover = run.folder.checkpoints / ".step-000009.abc.unfinished"
    leftover.mkdir()
    (run.folder.checkpoints / "step-000010").mkdir()
    assert list_whole(run.folder.checkpoints) == []
    assert newest_whole(run.folder.checkpoints)[0] is None
    type(run.keeper)(run.context, run.learner, dict, dict)
    assert not leftover.exists()


# ---- disks that fail


def test_a_checkpoint_that_the_ranks_cannot_begin_costs_itself_too(
    run: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.steps(2)
    kept = save(run)
    run.steps(1)

    async def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    with monkeypatch.context() as patched:
        patched.setattr(run.learner, "begin_save", full)
        with pytest.raises(StorageError, match=r"No space left.*newest is of step 2\. Make room"):
            asyncio.run(run.keeper.write_now())
        assert run.kinds().count("checkpoint_failed") == 1
    assert run.keeper.newest is kept
    assert save(run).step == 3


def test_a_full_disk_costs_the_checkpoint_and_in_the_end_stops_the_run(
    run: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.steps(2)
    kept = save(run)

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patched:
        patched.setattr(assembly, "_file_to_disk", full)
        for failure in (1, 2):
            run.steps(2)
            assert run.keeper.due()
            with pytest.raises(StorageError, match=r"newest is of step 2\. Make room"):
                asyncio.run(run.keeper.write_now())
            assert run.kinds().count("checkpoint_failed") == failure
            assert run.keeper.newest is kept
            assert [path.name for path in run.folder.checkpoints.iterdir()] == ["step-000002"]
            assert run.context.stopping is (failure == 2)
    assert isinstance(run.context.failure, StorageError)
    assert read(kept.path, verify=True).step == 2
    assert {group_id for group_id, _ in run.store.stored()} == set(range(4, 12))  # nothing was let go
    run.steps(1)
    assert save(run).step == 7  # room was made


def test_one_failure_does_not_stop_the_run(run: SmallRun) -> None:
    run.learner.fail = OSError(errno.EROFS, os.strerror(errno.EROFS))
    run.steps(2)

    async def background() -> None:
        await run.keeper.begin()
        while run.keeper.under_way:
            await asyncio.sleep(0.01)

    asyncio.run(background())
    assert not run.context.stopping
    assert run.telemetry.events[-1][1]["error"] == "OSError: [Errno 30] Read-only file system"
    run.learner.fail = None
    run.steps(2)
    asyncio.run(background())
    assert run.keeper.step == 4
    assert run.keeper._failures == 0


def test_a_rank_lost_meanwhile_is_told_to_who_waits_and_given_up_otherwise(run: SmallRun) -> None:
    run.steps(2)
    run.learner.fail = RankLost("rank 0 died")
    with pytest.raises(RankLost):
        asyncio.run(run.keeper.write_now())

    async def dropped() -> None:
        run.learner.fail, run.learner.gate = None, asyncio.Event()
        await run.keeper.begin()
        await asyncio.sleep(0.01)
        assert run.learner.pending is not None
        await asyncio.to_thread(run.learner.pending.finish)  # a lost rank writes no more
        run.keeper.drop()
        async with asyncio.timeout(60):
            while list(run.folder.checkpoints.iterdir()):
                await asyncio.sleep(0.01)

    asyncio.run(dropped())
    assert run.keeper.newest is None
    assert not run.context.stopping


def test_what_a_dying_rank_wrote_after_its_checkpoint_was_dropped_goes_with_the_next(run: SmallRun) -> None:
    late = run.folder.checkpoints / ".step-000001.0badcafe.unfinished"
    late.mkdir()
    (late / "param.safetensors").write_bytes(b"late")
    run.steps(2)
    save(run)
    assert [path.name for path in run.folder.checkpoints.iterdir()] == ["step-000002"]


# ---- which stay


def test_retention_keeps_the_last_every_kth_and_the_best(tmp_path: Path) -> None:
    run = SmallRun(
        make_config(tmp_path, checkpoint={"every_steps": 1, "keep_last": 2, "keep_every": 4, "keep_best": 1})
    )
    for score in [0.1, 0.9, 0.3, 0.2, 0.5, 0.4, 0.6]:
        run.steps(1)
        run.context.score, run.context.scored_step = score, run.context.step
        save(run)
    assert saved_steps(run.folder.checkpoints.iterdir()) == [2, 4, 6, 7]
    run.close()


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    have=st.dictionaries(st.integers(1, 60), st.none() | st.floats(0, 1), max_size=20),
    last=st.integers(1, 5), every=st.none() | st.integers(1, 9), best=st.integers(0, 3),
)  # fmt: skip
def test_retention_never_lets_the_newest_go(
    have: dict[int, float | None], last: int, every: int | None, best: int
) -> None:
    stay = steps_to_keep(list(have.items()), CheckpointConfig(keep_last=last, keep_every=every, keep_best=best))
    assert stay <= set(have)
    assert set(sorted(have)[-last:]) <= stay
    assert every is None or {step for step in have if step % every == 0} <= stay
    scores = sorted((s for s in have.values() if s is not None), reverse=True)
    assert all(score in {have[step] for step in stay} for score in scores[:best])


# ---- behind a URL


@pytest.fixture
def url_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallRun]:
    small = SmallRun(make_config(f"memory://{uuid.uuid4().hex}", checkpoint={"every_steps": 2, "keep_last": 2}))
    finish = small.learner.finish_save

    async def and_upload(step: int) -> Any:
        digests = await finish(step)
        assert small.learner.pending is not None
        RemoteCheckpoints(small.folder.location).put(small.learner.pending._folder, step, digests)
        return digests

    monkeypatch.setattr(small.learner, "finish_save", and_upload)
    yield small
    small.close()


def test_behind_a_url_the_manifest_comes_last_and_what_is_fetched_is_proven(url_run: SmallRun, tmp_path: Path) -> None:
    run, sent = url_run, []
    remote = run.keeper._remote
    assert remote is not None
    put = remote.put
    remote.put = lambda folder, step, names: (sent.extend(names), put(folder, step, sent[-len(names) :]))  # type: ignore
    for _ in range(3):
        run.steps(2)
        run.paint(1)
        save(run)
    assert sent[-1] == "manifest.json"
    assert remote.steps() == [4, 6]  # keep_last
    remote.fetch(6, tmp_path / "step-000006")
    fetched = read(tmp_path / "step-000006", verify=True)
    assert {name: entry["sha256"] for name, entry in fetched.manifest["files"].items()} == {
        name: entry["sha256"]
        for name, entry in run.keeper.newest.manifest["files"].items()  # type: ignore[union-attr]
    }
    filesystem, path = fsspec.core.url_to_fs(run.folder.location)
    filesystem.pipe_file(f"{path}/checkpoints/step-000006/param.safetensors", b"x" * 80)
    with pytest.raises(TornCheckpoint):
        remote.fetch(6, tmp_path / "again")
    filesystem.rm_file(f"{path}/checkpoints/step-000006/manifest.json")
    assert remote.steps() == [4]
    manifest = json.loads((run.folder.checkpoints / "step-000004" / "manifest.json").read_text())
    assert manifest["step"] == 4
