"""PPR, reward normalisation (2509.25598): a reward for each step whose sign follows the final outcome.

r'_k = r_process,k + r_outcome - beta for every recorded step but the last, which keeps r_outcome. With both in [0,1]
and beta = 1 the steps of a good sample get 0 or more, those of a bad one 0 or less. For credit along the steps (a
critic): normalised within a group per step, beta would cancel. A missing optional process score is filled with the
group's mean of that step, so that it tells the sample from no other; where the whole group lacks it the step gets 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from contracts.config.aggregation import PPRRenormConfig
from contracts.errors import ScoringError
from learner.credit.aggregation.base import Aggregation
from learner.credit.aggregation.columns import Column, GroupScores, Settled, sum_terms
from learner.types import Aggregated, Rewards


class PPRRenorm(Aggregation[PPRRenormConfig]):
    """Stateless; each group by itself."""

    def aggregate(self, batch: Mapping[int, GroupScores], step: int) -> Aggregated:
        return Aggregated({group_id: self._group(scores) for group_id, scores in batch.items()})

    def _group(self, scores: GroupScores) -> Rewards:
        group = scores.named(self.config.outcome, self.config.process, kinds=("point", "pair", "step"))
        outcome, process = group.columns
        if process.required and process.values.ndim == 2:
            complete = np.isfinite(process.values).all(1)
            group = replace(group, counted=group.counted & complete)
        steps = np.zeros((scores.size, len(scores.steps)))
        for k, step_id in enumerate(scores.steps[:-1]):
            values = self._process(process, group.counted, step_id)
            if values is not None:
                steps[:, k] = values + outcome.values - self.config.beta
        if len(scores.steps):
            steps[:, -1] = outcome.values
        rewards = sum_terms(Settled((outcome,), group.counted))
        return replace(rewards, steps=np.where(group.counted[:, None], steps, np.nan))

    def _process(self, process: Column, counted: np.ndarray, step_id: int) -> np.ndarray | None:
        """float64 [G]: the process score of one step, the mean where it is missing; None when nobody has it."""
        if process.values.ndim == 1:
            return None  # the scorer failed for the whole group
        if step_id not in process.step_ids:
            given = ", ".join(map(str, process.step_ids)) or "none"
            raise ScoringError(f"{process.name} has no score of the recorded step {step_id}; it has steps {given}")
        values = process.values[:, process.step_ids.index(step_id)]
        have = process.among(counted) & np.isfinite(values)
        return np.where(have, values, values[have].mean()) if have.any() else None
