"""The controller: one run from placement to summary. One asyncio Ray actor; it holds no image and no tensor.

    driver --> Controller.run()
                 set up     vaults, reward servers, dispatcher, actors, ranks (all at once), version 0
                 evaluate   the base at its own best setting                      (before)
                 loops      RolloutLoop -> ScoringLoop -> LearnerLoop             until stop
                 evaluate   the trained policy at the rollout's setting           (after)
                 summary    from the ledger; everything that was started is ended

Two waits tell what to scale: the learner's wait_for_groups (rollout or jury is short) and the actors' wait_for_prompt
(the learner is).
Does not own: the loops (their files), the display (driver.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from dataclasses import dataclass
from typing import Any

import ray

from cluster.actor_fleet import ActorFleet, EvalPainters
from cluster.admission import Admission
from cluster.awake import within
from cluster.checkpoints.layout import Checkpoint
from cluster.context import RunContext
from cluster.evaluate import (
    EvalPlan,
    EvalResult,
    base_sampling,
    make_source,
    plan_evaluation,
    require_judged,
    rollout_sampling,
    summarise,
)
from cluster.hang_watch import HangWatch
from cluster.learner_group import LearnerGroup
from cluster.learner_loop import LearnerLoop
from cluster.ledger import Ledger
from cluster.lock import LockLost, RunLock
from cluster.observed import Finder, JuryRecord, export_observed
from cluster.online import OnlineModels
from cluster.processes import stacks_folder
from cluster.refs import all_or_none, root_cause, value
from cluster.report.end import write_at_end
from cluster.report.samples import show_samples
from cluster.resume import bring_back, evaluation_before, open_run
from cluster.rollout_loop import RolloutLoop
from cluster.run_folder import RunFolder
from cluster.scoring import Dispatcher
from cluster.scoring_loop import ScoringLoop
from cluster.step import group_source
from cluster.summary import evaluation, summarise_run
from cluster.telemetry import Telemetry, watchdog
from cluster.telemetry.progress import seconds_left
from cluster.telemetry.watchdog import Watchdog
from cluster.upkeep import Upkeep
from cluster.vault import start_vaults
from cluster.weights import WeightStore
from cluster.workers import ServerHost
from contracts.config import RunConfig
from contracts.config.rollout import EvalSampling
from contracts.config.scoring import ScorerConfig
from contracts.errors import GuardStop, RankLost, SalonError, StorageError, VersionChanged
from contracts.wire import DiscardReason

log = logging.getLogger("salon.controller")

END_S = 30.0
"""Time the loops have to end once the run has failed; whoever still waits then is cancelled."""

EVAL_ATTEMPTS = 5
"""Times a chunk of an evaluation is painted and scored before the run gives up on it."""


@dataclass(frozen=True)
class Parts:
    """The classes that hold a model, by target: a benchmark or a test puts others in their place."""

    painter: str = "actors.painter:Painter"
    learner: str = "learner.rank:RankLearner"


class Controller:
    """Owns the run. `run()` is called once; `status()` and `stop()` at any time beside it."""

    def __init__(self, config: RunConfig, parts: Parts | None = None, resume: bool = False) -> None:
        """resume: go on with the run folder as it was left instead of making a new one."""
        self.config, self.parts, self.resume = config, parts or Parts(), resume
        self.run_lock: RunLock | None = None
        self.lock_keeper: asyncio.Task[None] | None = None
        self.phase = "starting"
        self.context: RunContext | None = None
        self.hosts: list[Any] = []
        self.server_processes: list[dict[str, Any]] = []
        self.before: EvalResult | None = None
        self.after: EvalResult | None = None
        self.latest_eval: tuple[float, int] | tuple[None, None] = (None, None)  # accuracy, and the step it is of
        self.phase_share = 0.0
        self.stop_requested = False
        self.began = time.monotonic()
        self.watchdog: Any = None
        self.finder = Finder(config)

    async def run(self) -> dict[str, Any]:
        """The whole run; returns the summary. Whatever happens, what was started is ended."""
        try:
            await self._set_up()
            await self._evaluate_before()
            await self._loops()
            await self._evaluate_after()
            return self._finish()
        except BaseException as error:
            self._summarise_failure(error)
            raise
        finally:
            await self._tear_down()

    def stop(self) -> None:
        """End the run at the next boundary; the summary is still written."""
        self.stop_requested = True
        if self.context is not None:
            self.context.stop()

    # ---- set up ------------------------------------------------------------------------------------------------

    async def _set_up(self) -> None:
        config = self.config
        opened = await asyncio.to_thread(open_run, config, self.resume)
        folder, checkpoint, self.run_lock = opened.folder, opened.checkpoint, opened.lock
        ledger = Ledger(folder.ledger)
        telemetry = Telemetry(config, folder.root, source=group_source(config))
        vaults = start_vaults(config, folder)
        source = make_source(config)
        admission = Admission(ledger, config, group_source(config))
        self.context = RunContext(
            config, folder, ledger, admission, WeightStore(config.weights.timeout_s), telemetry, source, vaults
        )
        self.lock_keeper = asyncio.create_task(self._keep_lock(opened.lock))
        opened.apply(self.context)
        self.context.online = self.online = OnlineModels(config, folder.root, vaults, telemetry.event)
        self.fleet = ActorFleet(self.context, self.parts.painter)
        waiting, scorers, _ = await all_or_none(
            self._bring_back(checkpoint), self._start_jury_and_ranks(checkpoint), self.fleet.start()
        )
        self.hang_watch = asyncio.create_task(HangWatch(self.context, {**vaults, "dispatcher": self.dispatcher}).run())
        self.scoring = ScoringLoop(self.context, self.dispatcher)
        self.jury_record = JuryRecord(self.context, self.dispatcher)
        self.rollout = RolloutLoop(self.context, self.fleet, self.scoring.submit)
        self.learner = LearnerLoop(self.context, self.ranks, self.fleet, checkpoint)
        await self.learner.publish()
        for group_id in waiting:
            await self.scoring.submit(group_id, str(ledger.row(group_id).vault))
        await self.finder.find(self.context, self._handles(), scorers)
        await self.online.export(self.context)  # from 0 on: a counter that appears with its first gain hides it
        telemetry.event("started", seconds=time.monotonic() - self.began, processes=self._processes())
        self.watchdog = self._start_watchdog(folder)

    async def _bring_back(self, checkpoint: Checkpoint | None) -> list[int]:
        """The groups that a resumed run finds waiting for their scores."""
        assert self.context is not None
        return await bring_back(self.context, 0 if checkpoint is None else checkpoint.step) if self.resume else []

    async def _start_jury_and_ranks(self, checkpoint: Checkpoint | None) -> list[ScorerConfig]:
        """Reward servers, then the dispatcher and the ranks, which call them; the scorers with their addresses."""
        assert self.context is not None
        vaults = self.context.vaults
        await self.online.start(checkpoint)
        scorers = await self._start_servers()
        self.ranks = LearnerGroup(self.config, vaults, scorers, self.parts.learner)
        self.dispatcher = Dispatcher.remote(scorers, self.config.reward, vaults)
        state = None if checkpoint is None else checkpoint.path
        await all_or_none(self.ranks.start(state), value(self.dispatcher.ready.remote()))
        return scorers

    async def _keep_lock(self, lock: RunLock) -> None:
        """Whoever loses the run's lock writes nothing more."""
        try:
            await lock.keep()
        except LockLost as error:
            assert self.context is not None
            self.context.folder.url = None  # nor is anything mirrored any more
            self.context.stop(error)

    def _start_watchdog(self, folder: RunFolder) -> Watchdog:
        """Dump every process's stack when no step ends in time; only training counts, so it is fed until then."""
        limit = self.config.telemetry.watchdog_s
        written = str(folder.stacks) if folder.url is None else stacks_folder(self.config)
        event = self.context.telemetry.event if self.context is not None else (lambda *_args, **_fields: None)
        dog = Watchdog(
            limit, folder.root / "stacks", lambda: watchdog.dump_cluster(written),
            lambda path, count: event("stalled", seconds=limit, stacks=str(path), processes=count),
        )  # fmt: skip
        dog.start()
        return dog

    async def _start_servers(self) -> list[ScorerConfig]:
        """Start every scorer the run serves itself; returns the scorers with their addresses filled in."""
        return await all_or_none(*(self._start_server(scorer) for scorer in self.config.scorers))

    async def _start_server(self, scorer: ScorerConfig) -> ScorerConfig:
        if scorer.serve is None:
            return scorer
        scorer = self.online.follow(scorer)
        host = ServerHost.options(num_cpus=0, num_gpus=scorer.gpus or 0).remote(scorer)
        self.hosts.append(host)
        await self.online.bring(scorer.name, host)
        url = await value(host.start.remote())
        self.server_processes.append(await value(host.info.remote()))
        return scorer.model_copy(update={"urls": (url,), "serve": None})

    # ---- training ----------------------------------------------------------------------------------------------

    async def _loops(self) -> None:
        context = self.context
        assert context is not None
        if self.stop_requested:
            return
        self.phase, context.train_started = "training", time.monotonic()
        context.telemetry.training_begins()
        upkeep = Upkeep(context, self.scoring.fruitless, self.watchdog, self._observe)
        watcher = asyncio.create_task(upkeep.run())
        evaluator = asyncio.create_task(self._evaluate_during())
        try:
            await self._together(self.rollout.run(), self.learner.run())
        finally:
            self.train_seconds = context.train_seconds()
            context.telemetry.training_ended()
            for task in (watcher, evaluator):
                task.cancel()
            await asyncio.gather(watcher, evaluator, return_exceptions=True)
        if context.failure is None or isinstance(context.failure, GuardStop | VersionChanged):
            await self._save_last()
        if context.failure is not None:
            raise context.failure
        await self.jury_record.note()  # a short run has never been observed
        if not self.stop_requested:
            context.ledger.discard_alive(DiscardReason.RUN_END)

    async def _together(self, *loops: Any) -> None:
        """Run the loops until all end; the first failure stops the others and is raised."""
        tasks = [asyncio.create_task(loop) for loop in loops]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        failure = next((task.exception() for task in done if task.exception() is not None), None)
        assert self.context is not None
        self.context.stop(failure)
        lease_s = self.config.rollout.lease_s
        grace_s = lease_s if self.context.failure is None else min(lease_s, END_S)
        _, stuck = await asyncio.wait(tasks, timeout=grace_s)
        for task in stuck:
            task.cancel()
        if failure is not None:
            raise failure

    async def _save_last(self) -> None:
        with contextlib.suppress(RankLost):
            await self.learner.save()

    async def _observe(self) -> None:
        assert self.context is not None
        found = await self.finder.find(self.context, self._handles(), self.ranks.scorers)
        await export_observed(self.context, self.dispatcher, [*found, *self.server_processes])
        await self.online.export(self.context)
        await self.jury_record.note()

    def _handles(self) -> dict[str, Any]:
        """Every actor of the run but this one, by the name of its process."""
        ranks = {f"learner-{rank}": handle for rank, handle in enumerate(self.ranks.ranks)}
        hosts = {f"host-{index}": handle for index, handle in enumerate(self.hosts)}
        copies = self.ranks.copies.copies.values() if self.ranks.copies is not None else ()
        on_nodes = {f"host-copy-{index}": handle for index, handle in enumerate(copies)}
        vaults = self.context.vaults if self.context is not None else {}
        handles = {**vaults, "dispatcher": self.dispatcher, **self.fleet.handles, **ranks, **hosts, **on_nodes}
        return {**handles, **self.online.handles()}

    def _processes(self) -> list[dict[str, Any]]:
        """Name, pid and node of every process of the run that is known by pid."""
        controller = {"name": "controller", "pid": os.getpid(), "node": ray.get_runtime_context().get_node_id()}
        return [controller, *self.fleet.processes.values(), *self.ranks.processes, *self.server_processes]

    # ---- evaluation --------------------------------------------------------------------------------------------

    async def _evaluate_before(self) -> None:
        assert self.context is not None
        self.before = evaluation_before(self.context)
        untrained = self.before is None and self.context.step == 0
        if untrained and self.config.eval.before and not self.stop_requested:
            self.phase = "evaluating before"
            self.before = await self._evaluate(base_sampling(self.config), self.config.eval.num_prompts, "before")
            self.context.before = evaluation(self.before)

    async def _evaluate_after(self) -> None:
        if self.stop_requested:
            return
        self.phase = "evaluating after"
        if self.config.learner.ema is not None:
            await self.learner.publish(average=True)
        self.after = await self._evaluate(rollout_sampling(self.config), self.config.eval.num_prompts, "after")

    async def _evaluate_during(self) -> None:
        """On a schedule, beside training; the time it takes from the actors counts as training time."""
        every = self.config.eval.every_steps
        context = self.context
        assert context is not None
        done = 0 if every is None else context.step // every
        while every is not None:
            due = (done + 1) * every

            def is_due(step: int = due) -> bool:
                return context.stopping or context.step >= step

            await context.bell.wait_until(is_due)
            if context.stopping:
                return
            done = context.step // every
            try:
                measured = context.step
                result = await self._evaluate(
                    rollout_sampling(self.config), self.config.eval.during_prompts, f"step {measured}"
                )
                context.score, context.scored_step = result.accuracy, measured
            except (SalonError, ray.exceptions.RayError) as error:
                context.telemetry.event("evaluation_failed", step=context.step, error=str(error))

    async def _evaluate(self, sampling: EvalSampling, num_prompts: int, tag: str) -> EvalResult:
        context = self.context
        assert context is not None
        await self.fleet.offered()
        plan = plan_evaluation(self.config, context.source, sampling, num_prompts)
        chunks = plan.chunks()
        painters = EvalPainters(self.fleet, self.config.rollout.lease_s)
        finished: list[int] = []
        self.phase_share = 0.0

        async def one(chunk: EvalPlan) -> tuple[Any, Any]:
            images, tables = await self._paint_and_score(chunk, painters)
            finished.append(len(chunk.prompts))
            self.phase_share = sum(finished) / len(plan.prompts)
            return images, tables

        with context.telemetry.timed("controller", "evaluate", lane="controller"):
            results = await asyncio.gather(*(one(chunk) for chunk in chunks))
        result = summarise(self.config, plan, [tables for _, tables in results])
        if self.phase == "training":
            require_judged(self.config, result)
        self.latest_eval = (result.accuracy, context.step) if result.num_valid else self.latest_eval
        await self._keep_samples(results, plan, tag)
        context.telemetry.gauge("salon_eval_score", result.accuracy, split=self.config.eval.split)
        context.telemetry.event("evaluation", tag=tag, step=context.step, result=evaluation(result))
        return result

    async def _paint_and_score(self, chunk: EvalPlan, painters: EvalPainters) -> tuple[Any, Any]:
        """Reference of a chunk's images and their tables; once more when images or dispatcher are lost meanwhile."""
        scorers = [scorer.name for scorer in self.config.scorers]
        limit_s = max(self.config.reward.lease_s, *(2 * scorer.deadline_s for scorer in self.config.scorers))
        for _ in range(EVAL_ATTEMPTS):
            images = await painters.paint(chunk)
            try:
                tables = self.dispatcher.score_images.remote(images, chunk.prompts, scorers)
                return images, await within(value(tables), limit_s)
            except (ray.exceptions.RayError, TimeoutError) as error:
                assert self.context is not None
                self.context.telemetry.event("scoring_lost", evaluation=True, error=f"{type(error).__name__}"[:300])
                await self.scoring.dispatcher_is_back()
        raise SalonError(f"an evaluation could not be scored in {EVAL_ATTEMPTS} attempts")

    async def _keep_samples(self, results: list[Any], plan: EvalPlan, tag: str) -> None:
        context, wanted = self.context, self.config.eval.samples_to_save
        assert context is not None
        if not wanted:
            return
        images, split = (await value(results[0][0]))[:wanted], self.config.eval.split
        show_samples(context.folder, context.telemetry, tag, context.step, split, plan, images, results[0][1])

    # ---- the end -----------------------------------------------------------------------------------------------

    def _summarise_failure(self, error: BaseException) -> None:
        """summary.json of a run that ends with an error: what the ledger has so far. Never in that error's way."""
        if self.context is None or isinstance(error, asyncio.CancelledError | LockLost):
            return
        try:
            cause = root_cause(error)
            reason = next((line.strip() for line in str(cause).splitlines() if line.strip()), "no message")
            self._summarise(reason if isinstance(cause, GuardStop) else f"failed: {type(cause).__name__}: {reason}")
        except Exception as again:
            log.warning("no summary: %s", again, exc_info=not isinstance(again, StorageError))

    def _finish(self) -> dict[str, Any]:
        return self._summarise("stopped" if self.stop_requested else "finished")

    def _summarise(self, outcome: str) -> dict[str, Any]:
        context = self.context
        assert context is not None
        self.phase = "finished"
        books = context.ledger.books()
        summary = summarise_run(
            name=self.config.name, objective=self.config.objective.name, seed=self.config.seed, books=books,
            steps=context.step, groups_trained=books.groups_trained,
            train_seconds=getattr(self, "train_seconds", 0.0), total_seconds=time.monotonic() - self.began,
            claim_order=self.config.pipeline.claim_order, before=self.before, after=self.after,
            rebuilds=getattr(getattr(self, "learner", None), "rebuilds", 0),
            actor_restarts=getattr(getattr(self, "fleet", None), "restarts", 0),
            version=context.store.version, outcome=outcome,
        )  # fmt: skip
        failed = outcome.startswith("failed")
        if failed:  # told even where no summary can be written
            context.telemetry.event("failed", summary=summary)
        context.folder.write_json("summary.json", summary)
        if not failed:
            context.telemetry.event("finished", summary=summary)
        return summary

    async def _tear_down(self) -> None:
        if self.lock_keeper is not None:
            self.lock_keeper.cancel()
        try:
            await self._end_all()
        finally:
            if self.run_lock is not None:
                self.run_lock.release()

    async def _end_all(self) -> None:
        stopped = [asyncio.wait_for(value(host.stop.remote()), 20) for host in self.hosts]
        await asyncio.gather(*stopped, return_exceptions=True)
        if self.context is None:
            return
        background = self.fleet.background() if hasattr(self, "fleet") else []
        for task in [*background, *([self.hang_watch] if hasattr(self, "hang_watch") else [])]:
            task.cancel()
        if self.context.online is not None:
            await self.online.close()
        with contextlib.suppress(Exception):
            self.ranks.stop()
        actors = self.fleet.handles.values() if hasattr(self, "fleet") else ()
        dispatcher = [self.dispatcher] if hasattr(self, "dispatcher") else []
        for handle in [*actors, *dispatcher, *self.hosts, *self.context.vaults.values()]:
            ray.kill(handle)
        if self.watchdog is not None:
            self.watchdog.stop()
        await write_at_end(self.config, self.context.folder, self.context.telemetry)
        self.finder.close()
        await asyncio.to_thread(self.context.telemetry.close)
        self.context.ledger.close()
        self.context.folder.sync()

    def status(self) -> dict[str, Any]:
        """What the display shows."""
        context = self.context
        if context is None:
            return {"phase": self.phase, "seconds": time.monotonic() - self.began}
        training = self.phase == "training"
        share = context.share_done() if training else self.phase_share
        return {
            **context.telemetry.status(),
            "phase": self.phase, "host": socket.gethostname(), "pid": os.getpid(), "has_folder": True,
            "step": context.step, "total_steps": self.config.stop.steps,
            "held_out": self.latest_eval[0], "held_out_step": self.latest_eval[1],
            "seconds": context.train_seconds(), "share_done": share,
            "seconds_left": seconds_left(share, context.train_seconds()) if training else None,
        }  # fmt: skip


@ray.remote(num_cpus=0, max_concurrency=64)
class ControllerActor(Controller):
    """The controller as a Ray actor; its methods run on one asyncio loop."""

    async def run(self) -> dict[str, Any]:
        from cluster.processes import prepare_process

        prepare_process("controller", metrics=False)
        return await super().run()

    async def stop(self) -> None:  # type: ignore[override]
        super().stop()

    async def status(self) -> dict[str, Any]:  # type: ignore[override]
        return super().status()
