"""Parrot (2401.05675): only samples on the Pareto front are trained on, so rewards need no weights against each other.

b is dominated when some a is at least as good in every reward and better in one, or has every reward that b has and
one more: a sample that lacks a reward is dominated by each that lacks none. A reward that nobody has counts for nobody;
two samples that each lack what the other has are not compared. This is an order, so a front is never empty. Equal
samples do not dominate each other. A weight below 0 says that lower is better; its size does not move the front.

A sample of the front counts with sum_k w_k z_k times (samples that count) / (samples of the front), which makes the
loss's mean over samples the paper's mean over the front; every other weighs 0. z = (r - mean) / (std + eps) by the
run's past (the paper leaves the scale of raw rewards to the user), and credit takes no group mean off: a dominated
sample is in neither, so it changes nothing for the others. A reward without a past is measured by its first batch.
State: decayed weight, mean and variance of each reward over past batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from contracts.config.aggregation import ParetoConfig
from learner.credit.aggregation.base import Aggregation
from learner.credit.aggregation.columns import GroupScores, Settled
from learner.credit.aggregation.statistics import Running, over_batch
from learner.types import Aggregated, Rewards


def non_dominated(scores: np.ndarray) -> np.ndarray:
    """bool [N]: which rows of scores [N,K] (higher is better, NaN: missing) no other row dominates; some for N > 0."""
    known = np.isfinite(scores)
    first, second = known[:, None, :], known[None, :, :]
    with np.errstate(invalid="ignore"):
        at_least = (scores[:, None, :] >= scores[None, :, :]) | ~first
        better = (scores[:, None, :] > scores[None, :, :]) & first
    in_values = (first == second).all(2) & at_least.all(2) & better.any(2)
    in_number = (first >= second).all(2) & (first > second).any(2)
    front: np.ndarray = ~(in_values | in_number).any(0)
    return front


class Pareto(Aggregation[ParetoConfig]):
    """The front is a group's own, or the batch's. Uses its running statistics before it takes the batch into them."""

    def __init__(self, config: ParetoConfig) -> None:
        super().__init__(config)
        self.past: dict[str, Running] = {}

    def aggregate(self, batch: Mapping[int, GroupScores], step: int) -> Aggregated:
        settled = {group_id: scores.weighted() for group_id, scores in batch.items()}
        together = [list(settled)] if self.config.scope == "batch" else [[group_id] for group_id in settled]
        weights: dict[int, np.ndarray] = {}
        for ids in together:
            weights |= dict(zip(ids, _front_weights([settled[group_id] for group_id in ids]), strict=True))
        seen = {name: values for name, values in over_batch(settled.values()).items() if len(values)}
        reference = {name: Running().after(values, self.config.decay) for name, values in seen.items()} | self.past
        rewards = {group_id: self._rewards(group, weights[group_id], reference) for group_id, group in settled.items()}
        for name, values in seen.items():
            self.past[name] = self.past.get(name, Running()).after(values, self.config.decay)
        return Aggregated(rewards, _metrics(settled, weights))

    def _rewards(self, group: Settled, weight: np.ndarray, reference: Mapping[str, Running]) -> Rewards:
        """A missing score is 0, which is the past's mean; its group's mean would depend on dominated samples."""
        parts = {True: np.zeros(len(weight)), False: np.zeros(len(weight))}
        for column in group.columns:
            have = column.among(group.counted)
            if have.any():
                by = reference[column.name]
                z = (column.values - by.mean) / (by.std + self.config.eps)
                parts[column.required] += column.weight * np.where(have, z, 0.0)
        values = np.where(group.counted, parts[True], np.nan)
        return Rewards(values, group.counted, parts[False], scale=weight, absolute=True)

    def state_dict(self) -> dict[str, Any]:
        return {name: asdict(running) for name, running in self.past.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.past = {name: Running(**running) for name, running in state.items()}


def _front_weights(groups: Sequence[Settled]) -> list[np.ndarray]:
    """By group, float64 [G]: number of samples that count over the front's size on the front, 0 elsewhere."""
    names = list(dict.fromkeys(c.name for group in groups for c in group.columns if c.weight != 0))
    scores = [np.full((len(group.counted), len(names)), np.nan) for group in groups]
    for group, rows in zip(groups, scores, strict=True):
        for column in group.columns:
            if column.weight != 0:
                oriented = np.sign(column.weight) * column.values
                rows[:, names.index(column.name)] = np.where(column.among(group.counted), oriented, np.nan)
    counted = np.concatenate([group.counted for group in groups])
    weight = np.zeros(len(counted))
    if counted.any():
        front = non_dominated(np.concatenate(scores)[counted])
        weight[counted] = np.where(front, counted.sum() / front.sum(), 0.0)
    return np.split(weight, np.cumsum([len(group.counted) for group in groups])[:-1])


def _metrics(settled: Mapping[int, Settled], weights: Mapping[int, np.ndarray]) -> dict[str, float]:
    counted = sum(int(group.counted.sum()) for group in settled.values())
    front = sum(int((weight > 0).sum()) for weight in weights.values())
    return {"pareto_front_fraction": front / counted} if counted else {}
