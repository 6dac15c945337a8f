"""The dispatcher: hands images to the jury and brings back typed tables. One asyncio Ray actor a run.

Invariant: every call ends within the scorers' deadlines with a table for every scorer; a score that could not be had
is an outcome in it, never an exception and never a number. Pixels pass from a vault through this process to the reward
servers; the controller sees tables only.
Does not own: HTTP, retries and circuit breakers (reward_servers.client), rewards (learner/credit).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import ray

from cluster.awake import missed_s
from cluster.refs import value
from contracts import registry
from contracts.config.scoring import RewardConfig, ScorerConfig
from contracts.declarations import ScorerGives
from contracts.previews import Previews, by_scorer
from contracts.scores import Outcome, ScorerInfo, ScoreTable, failed_table
from contracts.spans import wall_clock
from contracts.wire import GroupHeader, PromptSpec, Span


class Judge(Protocol):
    """What the dispatcher asks of a scorer's client (reward_servers.client.RewardClient, FunctionScorer)."""

    @property
    def stats(self) -> Any: ...

    @property
    def reads(self) -> Literal["images", "latents"] | None: ...

    async def info(self, deadline_s: float | None = None, *, fresh: bool = False) -> ScorerInfo: ...

    async def score(
        self,
        images: np.ndarray,
        prompts: Sequence[str],
        metadata: Sequence[dict[str, Any]],
        *,
        deadline_s: float | None = None,
        latents: np.ndarray | None = None,
    ) -> ScoreTable: ...

    async def aclose(self) -> None: ...


def make_judge(config: ScorerConfig) -> Judge:
    """The client of one scorer, by HTTP or in this process."""
    from cluster.deployed.names import resolved
    from reward_servers.client import FunctionScorer, RewardClient

    return FunctionScorer(config) if config.function else RewardClient(resolved(config))


class Jury:
    """All scorers of a run, asked together."""

    def __init__(self, scorers: Sequence[ScorerConfig], reward: RewardConfig) -> None:
        self.scorers = {scorer.name: scorer for scorer in scorers}
        self.judges: dict[str, Judge] = {scorer.name: make_judge(scorer) for scorer in scorers}
        self.reward = reward

    async def score(
        self,
        images: np.ndarray,
        prompts: Sequence[str],
        metadata: Sequence[dict[str, Any]],
        names: Sequence[str] | None = None,
        group: bool = False,
        spans: dict[str, Span] | None = None,
        latents: np.ndarray | None = None,
        previews: Mapping[str, Previews] | None = None,
    ) -> dict[str, ScoreTable]:
        """One table a scorer, for N images. Optional scorers get a grace after the required ones have answered.

        Asked once more where this process was stopped meanwhile and a deadline seems to be over (awake.py).

        group: the images are one group that is to be trained on; otherwise an evaluation, which waits for everyone.
        latents: floating [N,C,h,w], for the scorers that read them (`reads_latents`).
        previews: by scorer, of those that judge them in place of the images and answer a step table.
        spans: filled with when each scorer was asked and how long it took.
        """
        chosen = [self.scorers[name] for name in (names or self.scorers)]
        while True:
            missed = missed_s()
            tables = await self._ask(chosen, images, prompts, metadata, group, spans, latents, previews)
            if missed_s() == missed or not any(np.any(t.outcomes == Outcome.TIMED_OUT) for t in tables.values()):
                return tables

    async def _ask(
        self,
        chosen: Sequence[ScorerConfig],
        images: np.ndarray,
        prompts: Sequence[str],
        metadata: Sequence[dict[str, Any]],
        group: bool,
        spans: dict[str, Span] | None,
        latents: np.ndarray | None,
        previews: Mapping[str, Previews] | None,
    ) -> dict[str, ScoreTable]:
        from reward_servers.client import score_steps

        tasks: dict[str, asyncio.Task[ScoreTable]] = {}
        for scorer in chosen:
            judge, deadline_s = self.judges[scorer.name], scorer.deadline_s
            if previews and scorer.name in previews:
                seen, steps = previews[scorer.name]
                answer = score_steps(judge, seen, prompts, metadata, steps, deadline_s=deadline_s)
            else:
                answer = judge.score(images, prompts, metadata, deadline_s=deadline_s, latents=latents)
            tasks[scorer.name] = asyncio.create_task(_timed(scorer.name, answer, spans), name=scorer.name)
        required = [tasks[s.name] for s in chosen if s.required or s.held_out or not group]
        if required:
            await asyncio.wait(required)
        waiting = [task for task in tasks.values() if not task.done()]
        if waiting:
            await asyncio.wait(waiting, timeout=self.reward.optional_grace_s)
        return {name: self._table(name, task, len(images)) for name, task in tasks.items()}

    def _table(self, name: str, task: asyncio.Task[ScoreTable], num_images: int) -> ScoreTable:
        if not task.done():
            task.cancel()
            return failed_table(
                name, "", declared_columns(self.scorers[name]), num_images, Outcome.TIMED_OUT, "grace over"
            )
        error = task.exception()
        if error is not None:
            reason = f"{type(error).__name__}: {error}"
            return failed_table(name, "", declared_columns(self.scorers[name]), num_images, Outcome.FAILED, reason)
        return task.result()

    def reads_latents(self) -> bool:
        """Whether some scorer reads latents, or has not said yet what it reads."""
        return any(judge.reads != "images" for judge in self.judges.values())

    def judges_previews(self) -> bool:
        """Whether some scorer judges previews, which every painting then has."""
        return any(scorer.previews is not None for scorer in self.scorers.values())

    async def infos(self, deadline_s: float) -> dict[str, ScorerInfo]:
        """What each scorer says of itself now; one that does not answer in time is left out."""
        asked = [judge.info(deadline_s, fresh=True) for judge in self.judges.values()]
        said = await asyncio.gather(*asked, return_exceptions=True)
        return {name: each for name, each in zip(self.judges, said, strict=True) if isinstance(each, ScorerInfo)}

    async def aclose(self) -> None:
        for judge in self.judges.values():
            await judge.aclose()


async def _timed(name: str, answer: Awaitable[ScoreTable], spans: dict[str, Span] | None) -> ScoreTable:
    start = wall_clock()
    try:
        return await answer
    finally:
        if spans is not None:
            spans[name] = Span(lane=f"scorer {name}", name="score", start=start, seconds=wall_clock() - start)


def declared_columns(scorer: ScorerConfig) -> tuple[str, ...]:
    """Columns a scorer is known to answer with, from its registry row, else from its weights, else ('score',)."""
    if scorer.serve and ":" not in scorer.serve:
        declares = registry.resolve("scorer", scorer.serve).declares
        if isinstance(declares, ScorerGives):
            return declares.columns
    return tuple(scorer.weights) or ("score",)


@ray.remote(num_cpus=0, max_restarts=-1, max_concurrency=256)
class Dispatcher:
    """Reads a group's images from its vault and asks the jury."""

    def __init__(self, scorers: Sequence[ScorerConfig], reward: RewardConfig, vaults: Mapping[str, Any]) -> None:
        from cluster.processes import prepare_process

        prepare_process("dispatcher")
        self.jury = Jury(scorers, reward)
        self.vaults = dict(vaults)

    async def ready(self) -> int:
        return os.getpid()

    async def score_group(self, vault: str, group_id: int) -> tuple[dict[str, ScoreTable], dict[str, Span]]:
        """Tables of a stored group, and when each scorer was asked and how long it took."""
        handle = self.vaults[vault]
        names = ["images"] + ["clean"] * self.jury.reads_latents() + ["previews"] * self.jury.judges_previews()
        header_ref, arrays_ref = handle.header.remote(group_id), handle.get.remote(group_id, names)
        header, arrays = await asyncio.gather(value(header_ref), value(arrays_ref))
        spans: dict[str, Span] = {}
        return await self._score(header, arrays, spans), spans

    async def _score(
        self, header: GroupHeader, arrays: Mapping[str, np.ndarray], spans: dict[str, Span]
    ) -> dict[str, ScoreTable]:
        images, latents = arrays["images"], arrays.get("clean")
        prompts, metadata = [header.prompt.text] * len(images), [header.prompt.metadata] * len(images)
        previews = by_scorer(self.jury.scorers.values(), header, arrays)
        return await self.jury.score(
            images, prompts, metadata, group=True, spans=spans, latents=latents, previews=previews
        )

    async def score_images(
        self, images: np.ndarray, prompts: Sequence[PromptSpec], names: Sequence[str]
    ) -> dict[str, ScoreTable]:
        """Tables of images of an evaluation, one prompt an image."""
        texts, metadata = [p.text for p in prompts], [p.metadata for p in prompts]
        return await self.jury.score(images, texts, metadata, names)

    async def infos(self, deadline_s: float) -> dict[str, ScorerInfo]:
        """As Jury.infos."""
        return await self.jury.infos(deadline_s)

    async def stats(self) -> dict[str, Any]:
        """What each client counted: requests, retries, breaker state."""
        return {name: judge.stats for name, judge in self.jury.judges.items()}
