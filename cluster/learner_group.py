"""The learner's ranks as one: created in a placement group, called together, rebuilt together.

Invariant: all ranks execute the same calls in the same order, or none goes on: a rank that dies or hangs makes the
call raise RankLost, after which `rebuild` replaces every rank and loads the last state.
Does not own: what a rank does (learner/rank.py), when to rebuild and what it means for the books (learner_loop.py).
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.util.placement_group import (
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.awake import wait_all, within
from cluster.deaths import ActorGone, how
from cluster.host_copies import HostCopies
from cluster.refs import root_cause, value
from cluster.workers import RankWorker
from contracts.config import RunConfig
from contracts.config.scoring import ScorerConfig
from contracts.errors import LearnerError, NotStored, RankLost, WeightsError
from contracts.wire import StepReport, WeightOffer
from learner.state_writer import FileDigests
from learner.types import StepJob

START_TIMEOUT_S = 600.0
"""Shortest time ranks have to find room and to load their model; learner.hang_timeout_s where that is longer."""


MAX_LOST_BROADCASTS = 3
"""Broadcasts in a row that fail before host copies are given up: each may cost weights.timeout_s."""


@dataclass(frozen=True)
class Publication:
    """A snapshot on its way to the actors; arrays are references, the bytes stay in the object stores."""

    offer: WeightOffer
    canary: np.ndarray
    arrays: Any
    on_nodes: dict[str, Any] = field(default_factory=dict)  # by node, where a host copy holds them
    lost: str = ""  # why host copies could not be filled and the object store carried them


class LearnerGroup:
    """Every rank of the learner, and the host copies that rank 0 fills."""

    def __init__(
        self,
        config: RunConfig,
        vaults: Mapping[str, Any],
        scorers: Sequence[ScorerConfig],
        learner: str = "learner.rank:RankLearner",
    ) -> None:
        self.learner = learner
        self.config, self.vaults, self.scorers = config, vaults, scorers
        self.ranks: list[Any] = []
        self.processes: list[dict[str, Any]] = []
        self.placement: Any = None
        self.copies = HostCopies(config.weights) if config.weights.transport == "collective" else None
        self.lost_broadcasts = 0
        self.halved = False  # micro-batches, where ranks cannot agree on it in mid-update

    async def start(self, state: Path | None = None) -> None:
        """Create all ranks, join them in a process group and load `state`.

        Raises RankLost when a rank dies or hangs meanwhile, LearnerError when the cluster has no room for them.
        """
        learner, limit = self.config.learner, max(START_TIMEOUT_S, self.config.learner.hang_timeout_s)
        bundle = {"CPU": learner.cpus_per_rank, **({"GPU": learner.gpus_per_rank} if learner.gpus_per_rank else {})}
        name = f"{_prefix()}{uuid.uuid4().hex[:8]}"
        self.placement = placement_group([bundle] * learner.ranks, strategy="PACK", name=name)
        try:
            await within(value(self.placement.ready()), limit)
        except TimeoutError:
            raise LearnerError(f"no room for {learner.ranks} learner ranks of {bundle} within {limit:.0f} s") from None
        self.ranks = [self._create(rank) for rank in range(learner.ranks)]
        address, port = (await self._gather([self.ranks[0].rendezvous.remote()], limit))[0]
        folder = None if state is None else str(state)
        self.processes = await self._call_all("build", address, port, folder, self.halved, timeout_s=limit)

    def _create(self, rank: int) -> Any:
        learner = self.config.learner
        strategy = PlacementGroupSchedulingStrategy(self.placement, placement_group_bundle_index=rank)
        return RankWorker.options(
            num_cpus=learner.cpus_per_rank, num_gpus=learner.gpus_per_rank, scheduling_strategy=strategy
        ).remote(self.config, rank, self.vaults, self.scorers, self.learner)

    async def rebuild(self, state: Path | None) -> None:
        """Replace every rank by a new one that starts from `state`."""
        self.stop()
        await self.start(state)

    def stop(self) -> None:
        """End every rank process, stopped (SIGSTOP) ones too: removing their placement group kills them at once."""
        if self.copies is not None:
            self.copies.drop()
        for rank in self.ranks:
            ray.kill(rank, no_restart=True)
        self.ranks = []
        if self.placement is not None:
            remove_placement_group(self.placement)
            self.placement = None

    async def update(self, job: StepJob) -> StepReport:
        """One learner step on every rank; rank 0's report (metrics are reduced over ranks) with all ranks' spans."""
        reports = await self._call_all("update", ray.put(job))
        return reports[0].model_copy(update={"spans": tuple(span for report in reports for span in report.spans)})

    async def values(self, job: StepJob) -> dict[int, np.ndarray]:
        """Critic values [G,K] by group, merged over ranks."""
        merged: dict[int, np.ndarray] = {}
        for part in await self._call_all("values", ray.put(job)):
            merged.update(part)
        return merged

    async def snapshot(self, version: int, step: int, nodes: Sequence[str], average: bool = False) -> Publication:
        """The weights after `step` as `version`; nodes: where actors will read them; average: learner.ema's."""
        copies = self.copies if self.lost_broadcasts < MAX_LOST_BROADCASTS else None
        keep = copies is not None
        refs = [rank.snapshot.options(num_returns=2).remote(version, step, keep, average) for rank in self.ranks]
        metas = await self._gather([ref[0] for ref in refs], self.config.learner.hang_timeout_s)
        offer, canary = metas[0]
        if copies is None:
            return Publication(offer, canary, refs[0][1])
        try:
            on_nodes = await copies.fill(self.ranks[0], offer, await value(refs[0][1]), nodes)
        except WeightsError as error:
            self.lost_broadcasts += 1
            return Publication(offer, canary, await self._kept_arrays(), lost=str(error))
        self.lost_broadcasts = 0
        return Publication(offer, canary, next(iter(on_nodes.values())), on_nodes)

    async def _kept_arrays(self) -> Any:
        """Reference of what the last snapshot kept at rank 0."""
        number, arrays = self.ranks[0].kept_arrays.options(num_returns=2).remote()
        await self._gather([number], self.config.learner.hang_timeout_s)
        return arrays

    async def begin_save(self, folder: Path) -> None:
        """Hand the canonical state to rank 0's writer; every rank takes part. Training may go on at once."""
        await self._call_all("begin_save", str(folder))

    async def finish_save(self, step: int) -> FileDigests:
        """Wait until rank 0 has written it (and uploaded it, as checkpoint `step`, where the run lives at a URL)."""
        limit = max(START_TIMEOUT_S, self.config.learner.hang_timeout_s)
        found: FileDigests = (await self._gather([self.ranks[0].finish_save.remote(step)], limit))[0]
        return found

    async def _call_all(self, method: str, *args: Any, timeout_s: float | None = None) -> list[Any]:
        refs = [getattr(rank, method).remote(*args) for rank in self.ranks]
        return await self._gather(refs, timeout_s or self.config.learner.hang_timeout_s)

    async def _gather(self, refs: list[Any], timeout_s: float) -> list[Any]:
        """All results, or RankLost at the first death or at the deadline (a hung rank is not noticed otherwise)."""
        tasks = [asyncio.ensure_future(value(ref)) for ref in refs]
        done, pending = await wait_all(tasks, timeout_s)
        errors = {tasks.index(task): error for task in done if (error := task.exception()) is not None}
        if not errors and not pending:
            return [task.result() for task in tasks]
        for task in pending:
            task.cancel()
        if not errors:
            hung = [index for index, task in enumerate(tasks) if task in pending]
            raise RankLost(f"learner ranks {hung} did not answer within {timeout_s:.0f} s")
        raise self._as_lost(errors)

    def _as_lost(self, errors: Mapping[int, BaseException]) -> Exception:
        """A dead rank makes its peers fail in their collectives, so any death explains the others' errors."""
        dead = [index for index, error in errors.items() if isinstance(error, ActorGone)]
        if dead:
            return RankLost(f"learner ranks {dead} died: {how(errors[dead[0]])}")
        index, error = next(iter(errors.items()))
        cause = root_cause(error)
        if isinstance(cause, LearnerError | NotStored):
            return cause
        if isinstance(cause, ActorGone):  # another one's; Ray's error of a full memory is called like that of torch
            return RankLost(f"learner rank {index} called an actor that died: {how(cause)}")
        if type(cause).__name__ == "OutOfMemoryError":  # torch's, outside what is repeated with half the micro-batch
            return LearnerError(f"learner rank {index} is out of memory; lower learner.micro_batch, or add ranks")
        if self.config.learner.ranks > 1 and _is_collective_error(cause):
            return RankLost(f"learner rank {index} lost its peers: {cause}")
        return cause if isinstance(cause, Exception) else LearnerError(f"learner rank {index} failed: {error}")


def remove_leftover_placements() -> None:
    """Give back what ranks of this Ray job hold whose controller died: Ray ends the ranks, not their placement."""
    for found in placement_group_table().values():
        if found["name"].startswith(_prefix()) and found["state"] != "REMOVED":
            remove_placement_group(get_placement_group(found["name"]))


def _prefix() -> str:
    """Of the names of this Ray job's placement groups; the driver and its actors share the job."""
    return f"salon-{ray.get_runtime_context().get_job_id()}-"


def _is_collective_error(error: BaseException) -> bool:
    text = str(error).lower()
    return any(word in text for word in ("gloo", "nccl", "connection closed", "connection reset", "process group"))
