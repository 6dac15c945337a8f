"""Parrot (2401.05675): only samples on the Pareto front are trained on, so rewards need no weights against each other.

b is dominated when some a is at least as good in every reward and better in one. A sample of the front counts with
sum_k w_k z_k, z the reward normalised within the group (the paper leaves the scale of raw rewards to the user), times
(samples that count) / (samples of the front), which makes the loss's mean over samples the paper's mean over the front;
every other sample weighs 0. Equal samples do not dominate each other. Two samples are compared in the rewards both
have. A weight below 0 says that lower is better; the size of weights does not move the front.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from contracts.config.aggregation import ParetoConfig
from learner.credit.aggregation.base import Aggregation
from learner.credit.aggregation.columns import GroupScores, Settled, sum_terms
from learner.credit.aggregation.statistics import standardised
from learner.types import Aggregated, Rewards


def non_dominated(scores: np.ndarray) -> np.ndarray:
    """bool [N]: which rows of scores [N,K] (higher is better, NaN: missing) no other row dominates."""
    known = np.isfinite(scores)
    both = known[:, None, :] & known[None, :, :]
    with np.errstate(invalid="ignore"):
        at_least = (scores[:, None, :] >= scores[None, :, :]) | ~both
        better = (scores[:, None, :] > scores[None, :, :]) & both
    dominates = at_least.all(2) & better.any(2)
    front: np.ndarray = ~dominates.any(0)
    return front


class Pareto(Aggregation[ParetoConfig]):
    """Stateless; the front is a group's own, or the batch's."""

    def aggregate(self, batch: Mapping[int, GroupScores], step: int) -> Aggregated:
        settled = {group_id: scores.weighted() for group_id, scores in batch.items()}
        together = [list(settled)] if self.config.scope == "batch" else [[group_id] for group_id in settled]
        weights: dict[int, np.ndarray] = {}
        for ids in together:
            weights |= dict(zip(ids, _front_weights([settled[group_id] for group_id in ids]), strict=True))
        rewards = {group_id: self._rewards(group, weights[group_id]) for group_id, group in settled.items()}
        return Aggregated(rewards, _metrics(settled, weights))

    def _rewards(self, group: Settled, weight: np.ndarray) -> Rewards:
        normalised = tuple(
            replace(column, values=standardised(column.values, column.among(group.counted), self.config.eps))
            for column in group.columns
        )
        return replace(sum_terms(Settled(normalised, group.counted)), scale=weight)


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
