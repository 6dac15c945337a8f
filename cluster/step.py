"""One learner step as pure functions: from score tables to the job that the ranks execute.

The cluster (controller.py) and the in-process loop (inprocess.py) call exactly these, in this order, so asynchrony
can change speed only (law 2). Does not own: credit and plan themselves (learner/), leases and books (ledger.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import numpy as np

from contracts import registry
from contracts.config import RunConfig
from contracts.declarations import PromptsGive
from contracts.digests import digest_text
from contracts.needs import objective_needs
from contracts.scores import ScoreTable, point_table
from contracts.wire import DiscardReason, GroupHeader, PromptTask, Source
from learner.credit.aggregation.base import make_aggregation
from learner.credit.aggregation.columns import group_scores
from learner.credit.rewards import combine, filter_group
from learner.credit.run_credit import RunCredit
from learner.plan import plan_updates
from learner.types import Aggregated, Credit, CreditBatch, Rewards, StepJob

if TYPE_CHECKING:
    from actors.painter import PaintedGroup
    from learner.credit.base import CreditEntry

PREFERENCE = "preference"
"""Name of the table that stands for a pair read from files: sample 0 was chosen over sample 1."""


def group_source(config: RunConfig) -> Source:
    """Where this run's groups come from: the learner itself, files, or actors."""
    needs = objective_needs(config)
    if needs.sources == (Source.LEARNER,):
        return Source.LEARNER
    declares = registry.resolve("prompts", config.prompts.source).declares
    return declares.source if isinstance(declares, PromptsGive) else Source.ACTORS


def unpainted_group(task: PromptTask, version: int) -> PaintedGroup:
    """A group that the learner will paint itself, with gradient, inside its update: a prompt and no samples."""
    from actors.painter import PaintedGroup

    header = GroupHeader(
        group_id=task.group_id, attempt=task.attempt, prompt=task.prompt, group_size=task.group_size,
        weight_version=version, source=Source.LEARNER, prompt_digest=digest_text(task.prompt.text),
    )  # fmt: skip
    return PaintedGroup(header, {}, {})


def unscored_tables(header: GroupHeader) -> dict[str, ScoreTable]:
    """Tables of groups that no jury sees before the update: pairs from files (their labels), the learner's own."""
    if header.source is Source.FILES:
        return {PREFERENCE: point_table(PREFERENCE, "file", [PREFERENCE], np.array([1.0, 0.0]))}
    return {}


def group_rewards(header: GroupHeader, tables: Mapping[str, ScoreTable], config: RunConfig) -> Rewards:
    """One group's rewards by itself, before the claim. Groups the learner paints itself are valid and carry none."""
    size = header.group_size
    if header.source is Source.LEARNER:
        return Rewards(np.zeros(size), np.ones(size, bool), np.zeros(size))
    if PREFERENCE in tables:
        values, valid = tables[PREFERENCE].column(PREFERENCE)
        return Rewards(values.astype(np.float64), valid, np.zeros(size))
    return combine(tables, config.scorers, size, config.credit.aggregation, header.step_indices)


def discard_reason(header: GroupHeader, rewards: Rewards, config: RunConfig) -> DiscardReason | None:
    """Why a scored group cannot be trained, or None. Decided before the claim."""
    if header.source is not Source.ACTORS:
        return None
    return filter_group(rewards, config.reward, config.objective, objective_needs(config))


def make_credit(config: RunConfig) -> RunCredit:
    """The run's credit: the rule of credit.aggregation, then `gae` with a critic, else `group`."""
    name = "gae" if objective_needs(config).critic else "group"
    entry = cast("CreditEntry", registry.resolve("credit", name).load()(config.credit, config.objective))
    return RunCredit(make_aggregation(config.credit.aggregation), entry)


def batch_rewards(
    step: int,
    headers: Mapping[int, GroupHeader],
    tables: Mapping[int, Mapping[str, ScoreTable]],
    config: RunConfig,
    credit: RunCredit,
) -> Aggregated:
    """Rewards of the whole claimed batch, in claim order; what no jury scored keeps what it came with.

    Called once a learner step: a rule with state moves it here.
    """
    scored = {
        gid: group_scores(tables[gid], config.scorers, header.group_size, header.step_indices)
        for gid, header in headers.items()
        if header.source is Source.ACTORS
    }
    aggregated = credit.aggregate(scored, step)
    rewards = {
        gid: aggregated.rewards[gid] if gid in scored else group_rewards(header, tables[gid], config)
        for gid, header in headers.items()
    }
    return Aggregated(rewards, aggregated.metrics)


def draft_job(step: int, version: int, headers: Mapping[int, GroupHeader], config: RunConfig) -> StepJob:
    """A job without credit, for the pass that computes critic values."""
    nothing = Credit({gid: np.zeros(header.group_size) for gid, header in headers.items()})
    valid = {gid: np.ones(header.group_size, bool) for gid, header in headers.items()}
    plans = plan_updates(headers, valid, nothing, objective_needs(config), config, step, single=True)
    return StepJob(step, version, dict(headers), nothing, tuple(plans))


def make_job(
    step: int,
    version: int,
    headers: Mapping[int, GroupHeader],
    rewards: Mapping[int, Rewards],
    config: RunConfig,
    credit: RunCredit,
    critic_values: Mapping[int, np.ndarray] | None = None,
) -> StepJob:
    """The job of one learner step: advantages over the whole claimed batch, then the plan of updates."""
    advantages = credit.advantages(CreditBatch(dict(rewards), dict(critic_values or {})))
    valid = {gid: rewards[gid].valid for gid in headers}
    plans = plan_updates(headers, valid, advantages, objective_needs(config), config, step)
    return StepJob(step, version, dict(headers), advantages, tuple(plans))


def step_row(metrics: Mapping[str, float], rewards: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """What guards see of a learner step: this step's numbers alone, none that an earlier one left in a gauge.

    metrics: of rule, credit and objective; rewards: 'scorer/column' -> mean and std (reward_metrics).
    """
    scores = {f"reward_{what}/{key}": stats[what] for key, stats in rewards.items() for what in ("mean", "std")}
    return {**metrics, **scores}


def reward_metrics(tables: Mapping[int, Mapping[str, ScoreTable]]) -> dict[str, dict[str, float]]:
    """'scorer/column' -> mean and std over the valid entries of a step's groups, every preview counted."""
    columns: dict[str, list[np.ndarray]] = {}
    for of_group in tables.values():
        for name, table in of_group.items():
            if table.kind not in ("point", "step"):
                continue
            for column in table.columns:
                values, valid = table.column(column)
                columns.setdefault(f"{name}/{column}", []).append(values[valid].ravel())
    joined = {key: np.concatenate(parts).astype(np.float64) for key, parts in columns.items()}
    return {
        key: {"mean": float(values.mean()), "std": float(values.std()), "count": float(len(values))}
        for key, values in joined.items()
        if len(values)
    }
