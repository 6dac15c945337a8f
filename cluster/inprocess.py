"""The whole loop in one process: the same pure functions as the cluster, without Ray, HTTP or queue.

It is the reference of law 2 (a cluster run at max_staleness 0 equals it bit for bit), and the shortest description of
what a run does: paint, score, discard or keep, credit, update, load the new weights.
Does not own: anything the cluster does not use as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.evaluate import LocalJury, make_source
from cluster.step import (
    batch_rewards,
    discard_reason,
    draft_job,
    group_rewards,
    group_source,
    make_credit,
    make_job,
    reward_metrics,
    unpainted_group,
    unscored_tables,
)
from contracts import registry
from contracts.config import RunConfig
from contracts.needs import objective_needs
from contracts.previews import by_scorer
from contracts.scores import ScoreTable
from contracts.wire import GroupHeader, PromptTask, Source, StepReport

if TYPE_CHECKING:
    from learner.objectives.base import ScoreGradient


@dataclass
class InProcessRun:
    """State of an in-process run; `step()` makes one learner step."""

    config: RunConfig
    painter: Any
    learner: Any
    source: Any
    jury: LocalJury
    credit: Any
    position: int = 0
    steps: int = 0
    version: int = -1
    discarded: dict[str, int] = field(default_factory=dict)
    embeddings: dict[str, Mapping[str, np.ndarray]] = field(default_factory=dict)
    arrays: dict[int, Mapping[str, np.ndarray]] = field(default_factory=dict)
    canary: np.ndarray | None = None
    painted: int = 0
    train_seconds: float = 0.0

    def train(self, on_step: OnStep | None = None) -> None:
        """Steps until config.stop. `train_seconds` is the time of the steps alone: what on_step takes is left out."""
        while not self._ended():
            start = time.monotonic()
            report, rewards = self.step()
            self.train_seconds += time.monotonic() - start
            if on_step is not None:
                on_step(self, report, rewards)

    def _ended(self) -> bool:
        stop = self.config.stop
        return (stop.steps is not None and self.steps >= stop.steps) or (
            stop.seconds is not None and self.train_seconds >= stop.seconds
        )

    def step(self) -> tuple[StepReport, dict[str, dict[str, float]]]:
        """Paint and score until groups_per_step groups are ready, then update and load the new weights."""
        headers: dict[int, GroupHeader] = {}
        tables: dict[int, dict[str, ScoreTable]] = {}
        while len(headers) < self.config.rollout.groups_per_step:
            header, group_tables = self._make_group()
            reason = discard_reason(header, group_rewards(header, group_tables, self.config), self.config)
            if reason is not None:
                self.discarded[reason] = self.discarded.get(reason, 0) + header.group_size
                continue
            gid = header.group_id
            headers[gid], tables[gid] = header, group_tables
        report = self._update(headers, tables)
        self.arrays.clear()
        self.publish()
        return report, reward_metrics(tables)

    def publish(self) -> None:
        """Hand the learner's weights to the painter, with the same proof as on a cluster."""
        published = self.learner.snapshot(self.version + 1, self.steps)
        self.painter.load(published.offer, published.arrays, published.canary_current, self.canary)
        self.canary, self.version = published.canary_current, published.offer.version

    def _make_group(self) -> tuple[GroupHeader, dict[str, ScoreTable]]:
        task = PromptTask(
            group_id=self.position, attempt=0, prompt=self.source.at(self.position),
            group_size=group_size(self.config), min_version=self.version, deadline_s=3600.0,
            source=group_source(self.config),
        )  # fmt: skip
        self.position += 1
        group = paint_group(self.painter, task)
        self.painted += task.group_size
        self.embeddings.update(group.embeddings)
        self.arrays[task.group_id] = group.arrays
        if task.source is not Source.ACTORS:
            return group.header, unscored_tables(group.header)
        texts, metadata = [task.prompt.text] * task.group_size, [task.prompt.metadata] * task.group_size
        previews = by_scorer(self.config.scorers, group.header, group.arrays)
        return group.header, self.jury.score(group.arrays["images"], texts, metadata, previews)

    def _update(self, headers: dict[int, GroupHeader], tables: dict[int, dict[str, ScoreTable]]) -> StepReport:
        number = self.steps + 1
        values = None
        if objective_needs(self.config).critic:
            job = draft_job(number, self.version, headers, self.config)
            values = self.learner.values(job, self._fetch, self._fetch_embedding)
        aggregated = batch_rewards(number, headers, tables, self.config, self.credit)
        job = make_job(number, self.version, headers, aggregated.rewards, self.config, self.credit, values)
        report = self.learner.update(job, self._fetch, self._fetch_embedding)
        self.steps = number
        return report.model_copy(update={"metrics": {**aggregated.metrics, **job.credit.metrics, **report.metrics}})

    def _fetch(self, group_id: int, names: tuple[str, ...], samples: slice) -> Mapping[str, np.ndarray]:
        return {name: self.arrays[group_id][name][samples] for name in names}

    def _fetch_embedding(self, digest: str) -> Mapping[str, np.ndarray]:
        return self.embeddings[digest]


OnStep = Callable[[InProcessRun, StepReport, dict[str, dict[str, float]]], None]
"""Told of every step: the run, the learner's report, the rewards by 'scorer/column'."""


def group_size(config: RunConfig) -> int:
    """Samples a group: a pair read from files has two."""
    return 2 if group_source(config) is Source.FILES else config.rollout.group_size


def paint_group(painter: Any, task: PromptTask) -> Any:
    """One group through the painter, whichever its source."""
    if task.source is Source.FILES:
        return painter.encode_pair(task)
    if task.source is Source.LEARNER:
        return unpainted_group(task, painter.version)
    return painter.finish(painter.denoise(task))


def score_gradient(config: RunConfig, jury: LocalJury) -> ScoreGradient | None:
    """The trained scorer with dR/d image, for objectives that back-propagate a reward; None for all others."""
    if not objective_needs(config).reward_gradient:
        return None
    trained = next(scorer for scorer in config.scorers if not scorer.held_out)
    if trained.name not in jury.scorers:
        from reward_servers.client import SyncRewardClient

        return partial(SyncRewardClient(trained).score, want_gradients=True)
    scorer, batch_type = jury.scorers[trained.name], registry.import_target("reward_servers.scorers.base:ScoreBatch")

    def score(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> ScoreTable:
        table: ScoreTable = scorer.score(batch_type(images, tuple(prompts), tuple(metadata), want_gradients=True))
        return table

    return score


def start_in_process(config: RunConfig) -> InProcessRun:
    """Build painter, learner and jury in this process (one rank) and load version 0."""
    import torch

    from actors.painter import Painter
    from learner.rank import RankLearner

    jury = LocalJury(config)
    torch.set_num_threads(config.learner.threads)
    learner = RankLearner(config, 0, 1, score_gradient=score_gradient(config, jury))
    run = InProcessRun(config, Painter(config), learner, make_source(config), jury, make_credit(config))
    run.publish()
    return run


def train_in_process(config: RunConfig, on_step: OnStep | None = None) -> InProcessRun:
    """A whole run in this process, until config.stop."""
    run = start_in_process(config)
    run.train(on_step)
    return run
