"""Group-relative advantages (Flow-GRPO, 2505.05470): reward minus the group's mean, over a standard deviation.

A_i = (R_i - mean_group) / (std + eps), mean over the group's valid samples, std the population estimator over all
valid samples of the batch (`global`), of the group (`group`), or 1 (`none`). A constant group yields exactly 0.
Weights that the aggregation gives samples (Rewards.scale) multiply what comes out. Rewards that a rule has measured
against a reference of its own (Rewards.absolute) are taken as they are: no group mean is taken off.
"""

from __future__ import annotations

import numpy as np

from learner.credit.base import CreditEntry
from learner.types import Credit, CreditBatch, Rewards


class GroupAdvantage(CreditEntry):
    """Stateless; float64 throughout."""

    def advantages(self, batch: CreditBatch) -> Credit:
        everything = all_valid(batch)
        global_std = float(everything.std()) if len(everything) else 0.0
        advantages = {
            group_id: self._advantages(rewards, global_std) for group_id, rewards in batch.rewards.items()
        }  # fmt: skip
        return Credit(advantages, rewards=reward_totals(batch), metrics=reward_metrics(batch))

    def _advantages(self, rewards: Rewards, global_std: float) -> np.ndarray:
        values, valid = rewards.totals(), rewards.valid
        advantages = np.zeros(len(values))
        if not valid.any() or (not rewards.absolute and values[valid].min() == values[valid].max()):
            return advantages  # not by subtraction: the mean of equal floats may differ from them by an ulp
        centred = values[valid] - (0.0 if rewards.absolute else values[valid].mean())
        advantages[valid] = centred / self._denominator(values[valid], global_std)
        return advantages if rewards.scale is None else advantages * rewards.scale

    def _denominator(self, values: np.ndarray, global_std: float) -> float:
        if self.config.std == "none":
            return 1.0
        return (float(values.std()) if self.config.std == "group" else global_std) + self.config.eps


def reward_totals(batch: CreditBatch) -> dict[int, np.ndarray]:
    """float64 [G] by group id, NaN where invalid."""
    return {group_id: rewards.totals() for group_id, rewards in batch.rewards.items()}


def all_valid(batch: CreditBatch) -> np.ndarray:
    """float64 [number of valid samples of the batch]: their rewards."""
    parts = [rewards.totals()[rewards.valid] for rewards in batch.rewards.values()]
    return np.concatenate(parts) if parts else np.zeros(0)


def reward_metrics(batch: CreditBatch) -> dict[str, float]:
    """Mean and spread of the batch's rewards, share of valid samples, share of constant groups."""
    everything = all_valid(batch)
    num_samples = sum(len(rewards.valid) for rewards in batch.rewards.values())
    metrics = {"valid_fraction": len(everything) / max(num_samples, 1)}
    if len(everything):
        within = [r.totals()[r.valid].std() for r in batch.rewards.values() if r.valid.any()]
        metrics |= {
            "reward": float(everything.mean()),
            "reward_std": float(everything.std()),
            "reward_std_within_group": float(np.mean(within)),
            "constant_group_fraction": float(np.mean([std == 0 for std in within])),
        }
    return metrics
