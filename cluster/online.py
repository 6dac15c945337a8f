"""Reward models that learn beside the run, as the controller sees them: feed, flip between steps, keep, bring back.

    ScoringLoop --offer--> OnlineHost (a process) --candidate--> staged in online/<scorer>/ --flip--> server

Invariants: nothing here makes the loop wait for a trainer (what cannot be taken is dropped and counted); the version of
a scorer changes only in `boundary` and `roll_back`, between two learner steps; a group's scores are of one version,
which was in use while it was scored. A trainer that dies is replaced and goes on from the version in use.
Does not own: learning (reward_servers/online), files of a version (contracts/versions.py).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

from cluster.online_host import OnlineHost
from cluster.refs import root_cause, value
from contracts import versions
from contracts.config import RunConfig
from contracts.config.scoring import ScorerConfig
from contracts.errors import PayloadError, SalonError
from contracts.scores import ScoreTable
from contracts.seeds import Stream, derive_seed
from contracts.versions import Files, Version
from contracts.wire import GroupHeader

if TYPE_CHECKING:
    from cluster.checkpoints.layout import Checkpoint
    from cluster.context import RunContext

FOLDER = "online"
CANDIDATE_S = 20.0
"""How long a trainer is asked for a new version before it is asked again."""
PAUSE_S, PAUSE_SHARE = 0.2, 10.0
"""Pause between two versions of a trainer: at least so long, and so many times what bringing the last one took."""
FLIP_S = 5.0
"""How long a server's host on another machine may take to flip its pointer; beyond that it is left behind, and the
scores it gives are refused until it follows."""


@dataclass
class _Model:
    """One trainer. current, staged, pinned: versions in use, next, and of the checkpoint being written; used: all that
    were in use, the newest last; handle: None while it is being replaced; server: host of its scorer's server."""

    config: Any
    options: dict[str, Any]
    folder: Path
    handle: Any = None
    current: str = ""
    staged: str = ""
    pinned: str = ""
    used: list[str] = field(default_factory=list)
    offers: set[asyncio.Task[None]] = field(default_factory=set)
    dropped: int = 0
    counted: dict[str, float] = field(default_factory=dict)
    restarts: int = 0
    server: Any = None
    pid: int = 0
    node: str = ""


class OnlineModels:
    """All online reward models of a run; empty where the run has none."""

    def __init__(self, config: RunConfig, root: Path, vaults: Mapping[str, Any], event: Any) -> None:
        """root: the run folder; event: telemetry's."""
        self.config, self.vaults, self.event = config, dict(vaults), event
        of_scorer = {scorer.name: scorer.options for scorer in config.scorers}
        self.models = {
            each.scorer: _Model(each, dict(of_scorer[each.scorer]), root.absolute() / FOLDER / each.scorer)
            for each in config.online
        }
        self.tasks: list[asyncio.Task[None]] = []

    # ---- start and end -----------------------------------------------------------------------------------------

    async def start(self, checkpoint: Checkpoint | None) -> None:
        """Start every trainer from the checkpoint's versions, or new. Their versions are in use when this returns."""
        await asyncio.gather(*(self._start(model, _files_of(checkpoint, name)) for name, model in self.models.items()))
        self.tasks = [asyncio.create_task(self._collect(model)) for model in self.models.values()]

    async def _start(self, model: _Model, files: Files | None) -> None:
        model.folder.mkdir(parents=True, exist_ok=True)
        version, files = await self._launch(model, files)
        await asyncio.to_thread(versions.place, model.folder, version, files)
        await self._use(model, version.name)

    async def _launch(self, model: _Model, files: Files | None) -> tuple[Version, Files]:
        """A new process for a trainer, which is `model.handle` once it has loaded."""
        index = list(self.models).index(model.config.scorer)
        seed = derive_seed(self.config.seed, Stream.ONLINE, index)
        handle = OnlineHost.options(num_cpus=model.config.cpus, num_gpus=model.config.gpus).remote(
            model.config, model.options, seed, self.vaults
        )
        try:
            started: tuple[Version, Files] = await value(handle.start.remote(files))
            found = await value(handle.info.remote())
        except BaseException:
            ray.kill(handle)
            raise
        model.handle, model.pid, model.node = handle, found["pid"], found["node"]
        return started

    def follow(self, scorer: ScorerConfig) -> ScorerConfig:
        """The scorer with its folder of versions, where it is one that learns online."""
        model = self.models.get(scorer.name)
        if model is None:
            return scorer
        return scorer.model_copy(update={"options": {**scorer.options, "versions": str(model.folder)}})

    async def bring(self, scorer: str, host: Any) -> None:
        """Before a scorer's server starts: the version in use, on the machine of its host."""
        if scorer in self.models:
            self.models[scorer].server = host
            await self._hand_over(self.models[scorer])

    def handles(self) -> dict[str, Any]:
        return {f"online-{name}": model.handle for name, model in self.models.items() if model.handle is not None}

    async def close(self) -> None:
        """End every trainer's process."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for model in self.models.values():
            if model.handle is not None:
                ray.kill(model.handle)

    # ---- feeding -----------------------------------------------------------------------------------------------

    def offer(self, header: GroupHeader, vault: str) -> None:
        """Offer a scored group to every trainer. Returns at once; what finds no place is dropped and counted."""
        for model in self.models.values():
            if len(model.offers) >= model.config.queue_groups or model.handle is None:
                model.dropped += 1
                continue
            task = asyncio.create_task(self._offer(model, header, vault))
            model.offers.add(task)
            task.add_done_callback(model.offers.discard)

    async def _offer(self, model: _Model, header: GroupHeader, vault: str) -> None:
        try:
            await value(model.handle.offer.remote(vault, header))
        except RayError:
            model.dropped += 1

    # ---- versions ----------------------------------------------------------------------------------------------

    async def boundary(self, step: int) -> None:
        """Between two learner steps: what is staged comes into use, and trainers may go on learning."""
        for model in self.models.values():
            if model.handle is not None:
                model.handle.tick.remote()
            if model.staged and step % model.config.every_steps == 0:
                name, model.staged = model.staged, ""
                try:
                    await self._use(model, name)
                except (OSError, PayloadError) as error:
                    self._lost(model, "version", error)
                    continue
                self.event("online_version", scorer=model.config.scorer, step=step, version=name)

    async def _use(self, model: _Model, name: str) -> None:
        versions.flip(model.folder, name)
        model.current = name
        model.used.append(name)
        if model.server is not None:
            try:
                await asyncio.wait_for(value(model.server.flip.remote(str(model.folder), name)), FLIP_S)
            except (RayError, TimeoutError) as error:
                self.event("online_flip_lost", scorer=model.config.scorer, version=name, error=type(error).__name__)
        keep = {*model.used[-3:], model.staged, model.pinned}
        await asyncio.to_thread(versions.prune, model.folder, keep)

    async def _collect(self, model: _Model) -> None:
        """Until cancelled: stage what the trainer has learnt, now and then; replace it when it dies or gives up."""
        while True:
            took = 0.0
            try:
                if model.handle is None:
                    await self._replace(model)
                    continue
                found = await value(model.handle.candidate.remote(CANDIDATE_S))
                began = time.monotonic()
                if found is not None:
                    version, files = found
                    await asyncio.to_thread(versions.place, model.folder, version, files)
                    await self._hand_over(model, version.name)
                    model.staged = version.name
                took = time.monotonic() - began
            except RayError as error:
                self._lost(model, "trainer", error)
                ray.kill(model.handle)
                model.handle = None
            except (OSError, PayloadError) as error:
                self._lost(model, "version", error)
            await asyncio.sleep(max(PAUSE_S, PAUSE_SHARE * took))

    def _lost(self, model: _Model, what: str, error: Exception) -> None:
        cause = root_cause(error)
        told = f"{type(cause).__name__}: {cause}"[:300]
        self.event(f"online_{what}_lost", scorer=model.config.scorer, error=told)

    async def _replace(self, model: _Model) -> None:
        """A new trainer that goes on from the version in use; waits ever longer between attempts."""
        model.restarts += 1
        await asyncio.sleep(min(60.0, 0.5 * 2.0**model.restarts))
        try:
            files = await asyncio.to_thread(versions.read, model.folder, model.current)
            version, _ = await self._launch(model, files)
        except (SalonError, RayError) as error:
            self._lost(model, "trainer", error)
            return
        self.event("online_trainer_replaced", scorer=model.config.scorer, version=version.name, pid=model.pid)

    async def _hand_over(self, model: _Model, name: str = "") -> None:
        """Bring a version to the machine of its server: `name`, else the one in use, which is put in use there."""
        if model.server is None:
            return
        which = name or model.current
        files = await asyncio.to_thread(versions.read, model.folder, which, versions.FOR_SERVERS)
        await value(model.server.place.remote(str(model.folder), files))
        if not name:
            await value(model.server.flip.remote(str(model.folder), which))

    # ---- which version a score is of ---------------------------------------------------------------------------

    def mark(self) -> dict[str, int]:
        """Remembered when scoring begins, for `stale`."""
        return {name: len(model.used) - 1 for name, model in self.models.items()}

    def stale(self, tables: Mapping[str, ScoreTable], since: Mapping[str, int]) -> list[str]:
        """Scorers whose table is of a version that was not in use at any moment since `since`, with its version."""
        found = []
        for name, model in self.models.items():
            table = tables.get(name)
            if table is None or not table.valid().any():
                continue
            in_use = model.used[since.get(name, 0) :]
            if not any(table.version.endswith(f"-{version}") for version in in_use):
                found.append(f"{name} at {table.version}")
        return found

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def state(self) -> dict[str, str]:
        """Scorer -> version in use, for the checkpoint that begins now: it stays until the next one begins."""
        for model in self.models.values():
            model.pinned = model.current
        return {name: model.current for name, model in self.models.items()}

    def files(self, state: Mapping[str, str]) -> dict[str, Path]:
        """Files of the versions that `state` names, by their names in a checkpoint."""
        return {
            f"{FOLDER}/{scorer}/{version}/{path.name}": path
            for scorer, version in sorted(state.items())
            for path in sorted((self.models[scorer].folder / version).iterdir())
        }

    async def roll_back(self, checkpoint: Checkpoint | None) -> None:
        """Versions and trainers as they were at a checkpoint; without one, as the run began."""
        for name, model in self.models.items():
            files = _files_of(checkpoint, name)
            if files is None:
                continue  # there is no checkpoint yet: the reward goes on as it is
            version, _, _ = versions.unpack(files)
            model.staged = ""
            await asyncio.to_thread(versions.place, model.folder, version, files)
            await self._hand_over(model, version.name)
            await self._use(model, version.name)
            if model.handle is not None:
                with suppress(RayError):  # its successor begins from the version in use
                    await value(model.handle.roll_back.remote(files))

    # ---- what is told ------------------------------------------------------------------------------------------

    async def export(self, context: RunContext, answer_s: float = 2.0) -> None:
        """Series of every trainer; one that does not answer in time is left out of this round."""
        telemetry = context.telemetry
        for name, model in self.models.items():
            telemetry.gauge("salon_online_version", int(model.current[1:7] or 0), scorer=name)
            try:
                figures = await asyncio.wait_for(value(model.handle.figures.remote()), answer_s)
            except (RayError, TimeoutError, AttributeError):
                figures = model.counted
            model.counted = figures
            telemetry.count_to("salon_online_groups_offered_total", figures.get("offered", 0) + model.dropped,
                               scorer=name)  # fmt: skip
            telemetry.count_to("salon_online_groups_dropped_total", figures.get("dropped", 0) + model.dropped,
                               scorer=name)  # fmt: skip
            telemetry.count_to("salon_online_updates_total", figures.get("updates", 0), scorer=name)
            for key in figures.keys() - {"offered", "dropped", "updates"}:
                telemetry.gauge("salon_online_metric", figures[key], scorer=name, name=key)


def _files_of(checkpoint: Checkpoint | None, scorer: str) -> Files | None:
    """A scorer's version in a checkpoint, with its trainer's state; None where there is none."""
    name = None if checkpoint is None else checkpoint.run_state().online.get(scorer)
    if checkpoint is None or name is None:
        return None
    return versions.read(checkpoint.path / FOLDER / scorer, name)
