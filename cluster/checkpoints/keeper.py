"""When a checkpoint is written, by whom in which order, and which ones stay.

    begin      within the step: every rank hands its tensors over (copies in host memory)       the step waits for this
    complete   beside the run:  rank 0's thread writes them; ledger, groups, run.json, manifest; upload; rename
    then       the ledger lets go of what the checkpoint covers, vaults delete it, older checkpoints are removed

Invariants: one checkpoint at a time, and `newest` is always whole: what is under way when a rank is lost is given up.
A checkpoint that cannot be written costs nothing but its disk space: the run goes on with the one before, and stops
(StorageError) after checkpoint.max_failures in a row.

Does not own: what is in one (layout.py, assembly.py), roll-backs (learner_loop.py), reading at a resume (resume.py).
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from cluster.checkpoints import layout
from cluster.checkpoints.assembly import assemble
from cluster.checkpoints.layout import Checkpoint, RunState
from cluster.checkpoints.remote import RemoteCheckpoints, url_of
from cluster.context import RunContext
from cluster.refs import root_cause, value
from contracts.config.checkpoint import CheckpointConfig
from contracts.errors import NotStored, RankLost, StorageError
from contracts.spans import wall_clock
from contracts.wire import Span
from learner.state_writer import FileDigests, folder_to_disk

FROM_VAULT_S = 60.0
"""How long a vault on another machine may take to hand over one file."""


class SavesState(Protocol):
    """What the keeper asks of the learner's ranks (LearnerGroup)."""

    async def begin_save(self, folder: Path) -> None: ...

    async def finish_save(self, step: int) -> FileDigests: ...


class CheckpointKeeper:
    """The checkpoints of one run."""

    def __init__(
        self, context: RunContext, group: SavesState, credit_state: Callable[[], dict[str, Any]],
        guard_state: Callable[[], dict[str, Any]], newest: Checkpoint | None = None,
    ) -> None:  # fmt: skip
        self._context, self._group = context, group
        self._credit_state, self._guard_state = credit_state, guard_state
        self._config: CheckpointConfig = context.config.checkpoint
        url = url_of(context.config)
        self._remote = RemoteCheckpoints(url) if url is not None else None
        self._folder = context.folder.checkpoints
        self.newest = newest
        self._begun_step, self._begun_at = self.step, time.monotonic()
        self._scored_step = context.scored_step
        self._task: asyncio.Task[None] | None = None
        self._failures = 0
        self._error: BaseException | None = None
        self._sweep()

    @property
    def step(self) -> int:
        """The step that the newest checkpoint covers; 0 without one: the model folder's own weights."""
        return 0 if self.newest is None else self.newest.step

    @property
    def under_way(self) -> bool:
        return self._task is not None and not self._task.done()

    def due(self) -> bool:
        """Whether the step just finished should be followed by a checkpoint."""
        step, every_s = self._context.step, self._config.every_seconds
        if self.under_way or step <= self._begun_step:
            return False
        by_time = every_s is not None and time.monotonic() - self._begun_at >= every_s
        by_score = self._config.keep_best > 0 and self._context.scored_step != self._scored_step
        return step // self._config.every_steps > self._begun_step // self._config.every_steps or by_time or by_score

    async def begin(self) -> None:
        """Start a checkpoint of the run as it is between two steps; one that cannot be begun is one that failed.

        Raises RankLost.
        """
        context, start = self._context, time.monotonic()
        self._begun_step, self._begun_at, self._scored_step = context.step, start, context.scored_step
        self._error = None
        self._sweep()
        name = f".{layout.folder_name(context.step)}.{uuid.uuid4().hex[:8]}.unfinished"
        state = self._state()
        try:
            await self._group.begin_save(self._folder / name)
        except Exception as error:
            cause = root_cause(error)
            if not isinstance(cause, OSError):
                raise
            self._failed(self._folder / name, state.step, cause)
            return
        stall = time.monotonic() - start
        context.telemetry.observe("salon_checkpoint_stall_seconds", stall)
        context.telemetry.phase("learner", "save_state", stall)
        self._trace("learner", "checkpoint", stall)
        self._task = asyncio.create_task(self._complete(self._folder / name, state, start))

    async def write_now(self) -> None:
        """A checkpoint of the step the run is at, unless there is one; waits for it.

        Raises RankLost, or StorageError when it cannot be written.
        """
        if self._task is not None and self.under_way:
            await asyncio.wait([self._task])
        if self.newest is not None and self.step == self._context.step:
            return
        await self.begin()
        if self._task is not None and self.under_way:
            await asyncio.wait([self._task])
        if isinstance(self._error, RankLost):
            raise self._error
        if self._error is not None:
            raise self._storage_error(self._error)

    def drop(self) -> None:
        """Give up what is under way: the ranks that hold it are gone."""
        if self._task is not None and self.under_way:
            self._task.cancel()
        self._begun_step = self.step

    def _sweep(self) -> None:
        """Remove unfinished checkpoints of earlier, into which a dying rank may have written after their removal."""
        for leftover in self._folder.glob(".step-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _state(self) -> RunState:
        context = self._context
        return RunState(
            step=context.step, seed=context.config.seed, position=context.ledger.next_position(),
            train_seconds=context.train_seconds(), credit=self._credit_state(), guard=self._guard_state(),
            before=context.before, score=context.score, scored_step=context.scored_step,
            online={} if context.online is None else context.online.state(),
        )  # fmt: skip

    async def _complete(self, folder: Path, state: RunState, start: float) -> None:
        try:
            await self._write(folder, state)
        except asyncio.CancelledError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        except Exception as error:  # of the disk, SQLite, a rank, or a URL's library, each with errors of its own
            self._failed(folder, state.step, error)
            return
        self._failures = 0
        seconds = time.monotonic() - start
        self._context.telemetry.observe("salon_checkpoint_seconds", seconds)
        self._trace("checkpoint", "begin to end", seconds)
        self._context.telemetry.event("checkpoint", step=state.step, seconds=seconds)
        self.let_go(state.step)
        await asyncio.to_thread(self._remove_older)

    def _trace(self, lane: str, name: str, seconds: float) -> None:
        """Show what has ended just now: on the learner's lane what its step waited for, the whole on one of its own."""
        span = Span(lane=lane, name=name, start=wall_clock() - seconds, seconds=seconds)
        self._context.telemetry.spans((span,), step=self._begun_step)

    async def _write(self, folder: Path, state: RunState) -> None:
        """Everything up to the rename. Cancelled before that, it leaves nothing that counts."""
        from ray.exceptions import RayTaskError  # not above: `resume` reads folders before Ray may be imported

        context, loop = self._context, asyncio.get_running_loop()
        of_learner = await self._group.finish_save(state.step)
        folder.mkdir(parents=True, exist_ok=True)  # there already, unless rank 0 is on another machine
        vaults = {name: context.folder.vault(index) for index, name in enumerate(context.vaults)}

        def read_from_vault(vault: str, name: str) -> bytes:
            answer = asyncio.run_coroutine_threadsafe(value(context.vault(vault).raw.remote(name)), loop)
            try:
                return bytes(answer.result(FROM_VAULT_S))
            except RayTaskError as error:
                raise NotStored(str(error.cause)) from error

        online = {} if context.online is None else context.online.files(state.online)
        await asyncio.to_thread(
            assemble, folder, state, context.folder.ledger, vaults, read_from_vault, of_learner, online
        )
        if self._remote is not None:
            own = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
            mine = [name for name in own if name != layout.MANIFEST and name not in of_learner]
            await asyncio.to_thread(self._remote.put, folder, state.step, mine)
            await asyncio.to_thread(self._remote.complete, folder, state.step)
        self._put_in_place(folder, state.step, of_learner)

    def _put_in_place(self, folder: Path, step: int, of_learner: FileDigests) -> None:
        final = self._folder / layout.folder_name(step)
        shutil.rmtree(final, ignore_errors=True)  # of a lineage that was rolled back, or torn
        os.rename(folder, final)
        folder_to_disk(self._folder)
        if self._remote is not None and of_learner and not all((final / name).is_file() for name in of_learner):
            manifest = layout.json_of(final / layout.MANIFEST)  # rank 0's files are on its machine and at the URL
            self.newest = Checkpoint(final, step, manifest)
            return
        self.newest = layout.read(final)

    def _failed(self, folder: Path, step: int, error: BaseException) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        self._error = error
        telemetry = self._context.telemetry
        if isinstance(error, RankLost):
            return  # whoever calls the ranks next finds out, and rebuilds them
        self._failures += 1
        telemetry.count("salon_checkpoint_failures_total")
        telemetry.event(
            "checkpoint_failed", step=step, in_a_row=self._failures, error=f"{type(error).__name__}: {error}"
        )
        if self._failures >= self._config.max_failures:
            self._context.stop(self._storage_error(error))

    def _storage_error(self, error: BaseException) -> StorageError:
        return StorageError(
            f"no checkpoint can be written under {self._context.folder.location} ({type(error).__name__}: {error}); "
            f"the newest is of step {self.step}. Make room, or make it writable, then resume the run"
        )

    def let_go(self, step: int) -> None:
        """Bytes that nothing needs now that a checkpoint covers the steps up to `step`, discarded groups included."""
        covered = self._context.ledger.covered(step)
        for vault in self._context.vaults.values():  # each of them has the groups' prompt embeddings
            vault.delete.remote(covered)
        self._context.forget(covered)

    def _remove_older(self) -> None:
        have = [(c.step, c.score) for c in layout.list_whole(self._folder)]
        if self._remote is not None:
            have = sorted({*have, *((step, None) for step in self._remote.steps() if step not in dict(have))})
        stay = steps_to_keep(have, self._config) | {self.step}
        for step, _ in have:
            if step not in stay:
                if self._remote is not None:
                    self._remote.remove(step)
                self._context.folder.remove_checkpoint(self._folder / layout.folder_name(step))


def steps_to_keep(have: Sequence[tuple[int, float | None]], config: CheckpointConfig) -> set[int]:
    """Which of the checkpoints (step, held-out score or None) stay: the newest, every K-th, the best."""
    steps = sorted(step for step, _ in have)
    stay = set(steps[-config.keep_last :])
    if config.keep_every is not None:
        stay |= {step for step in steps if step % config.keep_every == 0}
    scored = sorted(((score, step) for step, score in have if score is not None), reverse=True)
    return stay | {step for _, step in scored[: config.keep_best]}
