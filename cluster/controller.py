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
import time
from dataclasses import dataclass
from typing import Any

import ray

from cluster.admission import Admission
from cluster.context import RunContext
from cluster.evaluate import (
    EvalPlan,
    EvalResult,
    base_sampling,
    make_source,
    plan_evaluation,
    rollout_sampling,
    summarise,
)
from cluster.learner_group import LearnerGroup
from cluster.learner_loop import LearnerLoop
from cluster.ledger import Ledger
from cluster.observed import Finder, export_observed
from cluster.refs import value
from cluster.report.end import write_at_end
from cluster.report.samples import keep_samples
from cluster.rollout_loop import ActorFleet, RolloutLoop
from cluster.run_folder import RunFolder
from cluster.scoring import Dispatcher
from cluster.scoring_loop import ScoringLoop
from cluster.step import group_source
from cluster.summary import evaluation, summarise_run
from cluster.telemetry import Telemetry, watchdog
from cluster.telemetry.progress import seconds_left
from cluster.telemetry.watchdog import Watchdog
from cluster.vault import Vault
from cluster.weights import WeightStore
from cluster.workers import ServerHost
from contracts.config import RunConfig
from contracts.config.rollout import EvalSampling
from contracts.config.scoring import ScorerConfig
from contracts.errors import RankLost, SalonError
from contracts.wire import DiscardReason

log = logging.getLogger("salon.controller")

OBSERVE_S = 5.0
"""Seconds between rounds over what nobody reports unasked."""

MIRROR_S = 30.0
"""Seconds between uploads of a run folder that lives at a URL."""

EVAL_ATTEMPTS = 5
"""Times a chunk of an evaluation is painted before the run gives up on it."""


@dataclass(frozen=True)
class Parts:
    """The classes that hold a model, by target: a benchmark or a test puts others in their place."""

    painter: str = "actors.painter:Painter"
    learner: str = "learner.rank:RankLearner"


class Controller:
    """Owns the run. `run()` is called once; `status()` and `stop()` at any time beside it."""

    def __init__(self, config: RunConfig, parts: Parts | None = None) -> None:
        self.config, self.parts = config, parts or Parts()
        self.phase = "starting"
        self.context: RunContext | None = None
        self.hosts: list[Any] = []
        self.before: EvalResult | None = None
        self.after: EvalResult | None = None
        self.latest_eval: float | None = None
        self.phase_share = 0.0
        self.stop_requested = False
        self.began = time.monotonic()
        self.last_step = 0
        self.last_mirrored = self.last_observed = time.monotonic()
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
        folder = RunFolder.create(config)
        ledger = Ledger(folder.ledger)
        telemetry = Telemetry(config, folder.root, source=group_source(config))
        vaults = self._create_vaults(folder)
        source = make_source(config)
        admission = Admission(ledger, config, group_source(config))
        self.context = RunContext(
            config, folder, ledger, admission, WeightStore(config.weights.timeout_s), telemetry, source, vaults
        )
        scorers = await self._start_servers()
        self.fleet = ActorFleet(self.context, self.parts.painter)
        self.ranks = LearnerGroup(config, vaults, scorers, self.parts.learner)
        self.dispatcher = Dispatcher.remote(scorers, config.reward, vaults)
        await asyncio.gather(self.fleet.start(), self.ranks.start(), value(self.dispatcher.ready.remote()))
        self.scoring = ScoringLoop(self.context, self.dispatcher)
        self.rollout = RolloutLoop(self.context, self.fleet, self.scoring.submit)
        self.learner = LearnerLoop(self.context, self.ranks, self.fleet)
        await self.learner.publish()
        await self.finder.find(self.context, self._handles(), scorers)
        telemetry.event("started", seconds=time.monotonic() - self.began, processes=self._processes())
        self.watchdog = self._start_watchdog(folder)

    def _start_watchdog(self, folder: RunFolder) -> Watchdog:
        """Dump every process's stack when no step ends in time; only training counts, so it is fed until then."""
        limit = self.config.telemetry.watchdog_s
        event = self.context.telemetry.event if self.context is not None else (lambda *_args, **_fields: None)
        dog = Watchdog(
            limit, folder.root / "stacks", lambda: watchdog.dump_cluster(str(folder.stacks)),
            lambda path, count: event("stalled", seconds=limit, stacks=str(path), processes=count),
        )  # fmt: skip
        dog.start()
        return dog

    def _create_vaults(self, folder: RunFolder) -> dict[str, Any]:
        vault = self.config.vault
        return {
            f"vault-{index}": Vault.options(name=f"{self.config.name}-vault-{index}-{os.getpid()}").remote(
                str(folder.vault(index)), vault.memory_mb * 2**20
            )
            for index in range(vault.count)
        }

    async def _start_servers(self) -> list[ScorerConfig]:
        """Start every scorer the run serves itself; returns the scorers with their addresses filled in."""
        self.server_processes: list[dict[str, Any]] = []
        resolved = []
        for scorer in self.config.scorers:
            if scorer.serve is None:
                resolved.append(scorer)
                continue
            host = ServerHost.options(num_cpus=0, num_gpus=scorer.gpus or 0).remote(scorer)
            self.hosts.append(host)
            url = await value(host.start.remote())
            self.server_processes.append(await value(host.info.remote()))
            resolved.append(scorer.model_copy(update={"urls": (url,), "serve": None}))
        return resolved

    # ---- training ----------------------------------------------------------------------------------------------

    async def _loops(self) -> None:
        context = self.context
        assert context is not None
        if self.stop_requested:
            return
        self.phase, context.train_started = "training", time.monotonic()
        context.telemetry.training_begins()
        watcher = asyncio.create_task(self._every_second())
        evaluator = asyncio.create_task(self._evaluate_during())
        try:
            await self._together(self.rollout.run(), self.learner.run())
        finally:
            self.train_seconds = context.train_seconds()
            context.telemetry.training_ended()
            for task in (watcher, evaluator):
                task.cancel()
            await asyncio.gather(watcher, evaluator, return_exceptions=True)
        if context.failure is not None:
            raise context.failure
        await self._save_last()
        context.ledger.discard_alive(DiscardReason.RUN_END)

    async def _together(self, *loops: Any) -> None:
        """Run the loops until all end; the first failure stops the others and is raised."""
        tasks = [asyncio.create_task(loop) for loop in loops]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        failure = next((task.exception() for task in done if task.exception() is not None), None)
        assert self.context is not None
        self.context.stop(failure)
        _, stuck = await asyncio.wait(tasks, timeout=self.config.rollout.lease_s)
        for task in stuck:
            task.cancel()
        if failure is not None:
            raise failure

    async def _save_last(self) -> None:
        with contextlib.suppress(RankLost):
            await self.learner.save()

    async def _every_second(self) -> None:
        """Leases that ran out, gauges, and the mirror of the run folder."""
        context = self.context
        assert context is not None
        while True:
            await asyncio.sleep(1.0)
            for group_id, state in context.ledger.expire_leases():
                context.telemetry.count("salon_lease_expired_total", state=str(state))
                context.telemetry.event("lease_expired", group=group_id, state=str(state))
                context.bell.ring()
            self._export_books(context)
            self._feed_watchdog(context)
            await self._mirror(context)
            await self._observe(context)

    def _export_books(self, context: RunContext) -> None:
        books = context.ledger.books()
        for state, number in books.groups.items():
            context.telemetry.gauge("salon_groups", number, state=str(state))
        context.telemetry.gauge("salon_queue_capacity_groups", context.admission.capacity)
        context.telemetry.refresh_rates()

    async def _mirror(self, context: RunContext) -> None:
        """Bring a run folder that lives at a URL up to date, now and then."""
        if context.folder.url is not None and time.monotonic() - self.last_mirrored > MIRROR_S:
            await asyncio.to_thread(context.folder.sync)
            self.last_mirrored = time.monotonic()

    async def _observe(self, context: RunContext) -> None:
        if time.monotonic() - self.last_observed > OBSERVE_S:
            self.last_observed = time.monotonic()
            found = await self.finder.find(context, self._handles(), self.ranks.scorers)
            await export_observed(context, self.dispatcher, [*found, *self.server_processes])

    def _handles(self) -> dict[str, Any]:
        """Every actor of the run but this one, by the name of its process."""
        ranks = {f"learner-{rank}": handle for rank, handle in enumerate(self.ranks.ranks)}
        hosts = {f"host-{index}": handle for index, handle in enumerate(self.hosts)}
        copies = self.ranks.copies.copies.values() if self.ranks.copies is not None else ()
        on_nodes = {f"host-copy-{index}": handle for index, handle in enumerate(copies)}
        vaults = self.context.vaults if self.context is not None else {}
        return {**vaults, "dispatcher": self.dispatcher, **self.fleet.handles, **ranks, **hosts, **on_nodes}

    def _processes(self) -> list[dict[str, Any]]:
        """Name, pid and node of every process of the run that is known by pid."""
        controller = {"name": "controller", "pid": os.getpid(), "node": ray.get_runtime_context().get_node_id()}
        return [controller, *self.fleet.processes.values(), *self.ranks.processes, *self.server_processes]

    def _feed_watchdog(self, context: RunContext) -> None:
        if context.step != self.last_step:
            self.last_step = context.step
            self.watchdog.beat()

    # ---- evaluation --------------------------------------------------------------------------------------------

    async def _evaluate_before(self) -> None:
        if self.config.eval.before and not self.stop_requested:
            self.phase = "evaluating before"
            self.before = await self._evaluate(base_sampling(self.config), self.config.eval.num_prompts, "before")

    async def _evaluate_after(self) -> None:
        if self.stop_requested:
            return
        self.phase = "evaluating after"
        self.after = await self._evaluate(rollout_sampling(self.config), self.config.eval.num_prompts, "after")

    async def _evaluate_during(self) -> None:
        """On a schedule, beside training; the time it takes from the actors counts as training time."""
        every = self.config.eval.every_steps
        context = self.context
        assert context is not None
        done = 0
        while every is not None:
            due = (done + 1) * every

            def is_due(step: int = due) -> bool:
                return context.stopping or context.step >= step

            await context.bell.wait_until(is_due)
            if context.stopping:
                return
            done = context.step // every
            try:
                await self._evaluate(
                    rollout_sampling(self.config), self.config.eval.during_prompts, f"step {context.step}"
                )
            except (SalonError, ray.exceptions.RayError) as error:
                context.telemetry.event("evaluation_failed", step=context.step, error=str(error))

    async def _evaluate(self, sampling: EvalSampling, num_prompts: int, tag: str) -> EvalResult:
        context = self.context
        assert context is not None
        await self.fleet.offered()
        plan = plan_evaluation(self.config, context.source, sampling, num_prompts)
        chunks = plan.chunks()
        free: asyncio.Queue[str] = asyncio.Queue()
        for name in self.fleet.names:
            free.put_nowait(name)
        finished: list[int] = []
        self.phase_share = 0.0

        async def one(chunk: EvalPlan) -> tuple[Any, Any]:
            images = await self._paint_chunk(chunk, free)
            scorers = [scorer.name for scorer in self.config.scorers]
            tables = await self.dispatcher.score_images.remote(images, chunk.prompts, scorers)
            finished.append(len(chunk.prompts))
            self.phase_share = sum(finished) / len(plan.prompts)
            return images, tables

        with context.telemetry.timed("controller", "evaluate", lane="controller"):
            results = await asyncio.gather(*(one(chunk) for chunk in chunks))
        result = summarise(self.config, plan, [tables for _, tables in results])
        self.latest_eval = result.accuracy
        await self._keep_samples(results, plan, tag)
        context.telemetry.gauge("salon_eval_score", result.accuracy, split=self.config.eval.split)
        context.telemetry.event("evaluation", tag=tag, step=context.step, result=evaluation(result))
        return result

    async def _paint_chunk(self, chunk: EvalPlan, free: asyncio.Queue[str]) -> Any:
        """Reference of a chunk's images, painted by the next free actor; another try when one is lost."""
        for _ in range(EVAL_ATTEMPTS):
            name = await free.get()
            try:
                paint = self.fleet.handles[name].paint_images.options(num_returns=2)
                done, images = paint.remote(chunk.prompts, chunk.sampling, chunk.seeds)
                await asyncio.wait_for(value(done), self.config.rollout.lease_s)  # the images stay where they are
                return images
            except (ray.exceptions.RayActorError, TimeoutError) as error:
                await self.fleet.revive_once(name, kill=isinstance(error, TimeoutError))
            finally:
                free.put_nowait(name)
        raise SalonError(f"an evaluation could not be painted in {EVAL_ATTEMPTS} attempts")

    async def _keep_samples(self, results: list[Any], plan: EvalPlan, tag: str) -> None:
        context, wanted = self.context, self.config.eval.samples_to_save
        assert context is not None
        if not wanted:
            return
        images, split = (await value(results[0][0]))[:wanted], self.config.eval.split
        grid = keep_samples(context.folder, tag, context.step, split, plan, images, results[0][1])
        context.telemetry.image(f"samples/{split}", grid, context.step)

    # ---- the end -----------------------------------------------------------------------------------------------

    def _finish(self) -> dict[str, Any]:
        context = self.context
        assert context is not None
        self.phase = "finished"
        books = context.ledger.books()
        summary = summarise_run(
            name=self.config.name, objective=self.config.objective.name, seed=self.config.seed, books=books,
            steps=context.step, groups_trained=books.groups_trained,
            train_seconds=getattr(self, "train_seconds", 0.0), total_seconds=time.monotonic() - self.began,
            claim_order=self.config.pipeline.claim_order, before=self.before, after=self.after,
            rebuilds=self.learner.rebuilds, actor_restarts=self.fleet.restarts, version=context.store.version,
            outcome="stopped" if self.stop_requested else "finished",
        )  # fmt: skip
        context.folder.write_json("summary.json", summary)
        context.telemetry.event("finished", summary=summary)
        return summary

    async def _tear_down(self) -> None:
        for host in self.hosts:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(value(host.stop.remote()), 20)
        if self.context is None:
            return
        for task in self.fleet.background() if hasattr(self, "fleet") else ():
            task.cancel()
        with contextlib.suppress(Exception):
            self.ranks.stop()
        for handle in self.fleet.handles.values() if hasattr(self, "fleet") else ():
            ray.kill(handle)
        if self.watchdog is not None:
            self.watchdog.stop()
        await write_at_end(self.config, self.context.folder, self.context.telemetry)
        self.finder.close()
        self.context.telemetry.close()
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
            "phase": self.phase,
            "step": context.step,
            "total_steps": self.config.stop.steps,
            "held_out": self.latest_eval,
            "seconds": context.train_seconds(),
            "seconds_left": seconds_left(share, context.train_seconds()) if training else None,
            "share_done": share,
        }


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
