"""Generalised advantage estimation along the recorded denoising steps (1506.02438), the reward on the last of them.

delta_k = r_k + gamma V_{k+1} - V_k,  A_k = delta_k + gamma lam A_{k+1},  returns_k = A_k + V_k, with V_K = 0, r_k = 0
for k < K-1 and r_{K-1} = R, unless the aggregation gives a reward for each step (Rewards.steps). The end of a window
is terminal exactly because every step after it is deterministic, so that the image, and with it R, is a function of the
last recorded state's successor.
Does not own: the values (critic.py), the surrogate (objectives/ppo.py).
"""

from __future__ import annotations

import numpy as np

from learner.credit.base import CreditEntry
from learner.credit.group import reward_metrics, reward_totals
from learner.types import Credit, CreditBatch, Rewards


def gae(rewards: np.ndarray, values: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """Advantages [G,K] of values [G,K] and rewards: terminal ones [G], or one a step [G,K]."""
    num_steps = values.shape[1]
    deltas = per_step(rewards, num_steps) - values
    deltas[:, :-1] += gamma * values[:, 1:]
    advantages = np.zeros_like(deltas)
    running = np.zeros(len(deltas))
    for k in range(num_steps - 1, -1, -1):
        running = deltas[:, k] + gamma * lam * running
        advantages[:, k] = running
    return advantages


def per_step(rewards: np.ndarray, num_steps: int) -> np.ndarray:
    """Rewards [G,K] of terminal rewards [G], which stand on the last step; rewards a step stay as they are."""
    if rewards.ndim == 2:
        return rewards
    return np.concatenate([np.zeros((len(rewards), num_steps - 1)), rewards[:, None]], axis=1)


class GAE(CreditEntry):
    """Needs critic values [G,K] of every group; gamma and lam come from the objective's section."""

    def advantages(self, batch: CreditBatch) -> Credit:
        raw, returns, values = {}, {}, {}
        for group_id, rewards in batch.rewards.items():
            values[group_id] = np.asarray(batch.critic_values[group_id], np.float64)
            raw[group_id] = gae(_rewards(rewards), values[group_id], self.objective.gamma, self.objective.lam)
            returns[group_id] = raw[group_id] + values[group_id]
        shift, scale = self._whitening(batch, raw)
        advantages = {
            group_id: _scaled(np.where(batch.rewards[group_id].valid[:, None], (a - shift) / scale, 0.0),
                              batch.rewards[group_id])
            for group_id, a in raw.items()
        }  # fmt: skip
        metrics = reward_metrics(batch) | self._value_metrics(batch, values)
        return Credit(advantages, returns, values, reward_totals(batch), metrics)

    def _whitening(self, batch: CreditBatch, raw: dict[int, np.ndarray]) -> tuple[float, float]:
        """Mean and scale over all valid samples and steps of the batch, once: not per step."""
        parts = [a[batch.rewards[group_id].valid] for group_id, a in raw.items()]
        everything = np.concatenate([part.ravel() for part in parts]) if parts else np.zeros(0)
        if not self.config.normalise or not len(everything):
            return 0.0, 1.0
        return float(everything.mean()), float(everything.std()) + self.config.eps

    def _value_metrics(self, batch: CreditBatch, values: dict[int, np.ndarray]) -> dict[str, float]:
        """explained_variance = 1 - Var(R_k - V_k) / Var(R_k), R_k the Monte Carlo return: sum_j gamma^(j-k) r_j."""
        targets, errors = [], []
        for group_id, rewards in batch.rewards.items():
            value = values[group_id][rewards.valid]
            target = gae(_rewards(rewards)[rewards.valid], np.zeros_like(value), self.objective.gamma, 1.0)
            targets.append(target.ravel())
            errors.append((target - value).ravel())
        target, error = np.concatenate(targets or [np.zeros(0)]), np.concatenate(errors or [np.zeros(0)])
        if not len(target):
            return {}
        metrics = {"value_error": float(np.mean(error**2))}
        if target.var() > 0:
            metrics["explained_variance"] = float(1 - error.var() / target.var())
        return metrics


def _rewards(rewards: Rewards) -> np.ndarray:
    """Rewards a step [G,K] where there are some, else terminal ones [G]; 0 where invalid."""
    if rewards.steps is not None:
        return np.where(rewards.valid[:, None], rewards.steps, 0.0)
    return np.where(rewards.valid, rewards.totals(), 0.0)


def _scaled(advantages: np.ndarray, rewards: Rewards) -> np.ndarray:
    return advantages if rewards.scale is None else advantages * rewards.scale[:, None]
