"""PPO with a critic (1707.06347; DDPO's denoising process, 2305.13301): a learned value of every denoising state.

The policy's part is trajectory.py's with per-step advantages from credit/gae.py. The critic's is
value_coef * 0.5 (V - ret)^2, clipped: with V_c = clamp(V, V_old - e, V_old + e) the larger of both errors counts.
Policy and value come from one forward when the trunk is shared. Does not own: the critic itself (critic.py).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from contracts.config.objectives import PPOConfig
from learner.critic import CriticHandle
from learner.objectives.base import Means, ModelHandle, declared
from learner.objectives.trajectory import Replayed, TrajectoryObjective
from learner.types import LossSum, MicroBatch


class PPO(TrajectoryObjective[PPOConfig]):
    """Needs recorded states, log-probs and a critic; `model` is a CriticHandle in `loss` and `values`."""

    declares = declared("ppo")
    section = PPOConfig

    def values(self, model: ModelHandle, batch: MicroBatch) -> Tensor:
        """fp32 [B,K]: values of the states before each recorded step. Called without gradient, before credit."""
        critic = cast(CriticHandle, model)
        parts = []
        for p in range(self.num_passes(batch)):
            ks = self.steps_of(batch, p)
            values = critic.value(
                _states(batch, ks), self._levels(batch, ks), batch.cond.repeat_rows(ks.stop - ks.start)
            )
            parts.append(values.reshape(len(batch.weight), -1))
        return torch.cat(parts, dim=1)

    def loss(self, model: ModelHandle, batch: MicroBatch, p: int) -> LossSum:
        ks = self.steps_of(batch, p)
        now, values = self._replay_with_values(cast(CriticHandle, model), batch, ks)
        policy = self._policy_loss(now, batch, ks)
        value = self._value_loss(values, batch, ks)
        return LossSum(policy.loss + self.config.value_coef * value.loss, policy.metrics | value.metrics)

    def _replay_with_values(self, model: CriticHandle, batch: MicroBatch, ks: slice) -> tuple[Replayed, Tensor]:
        levels, cond = self._levels(batch, ks), batch.cond.repeat_rows(ks.stop - ks.start)
        if model.shared:
            tap = model.tap(levels, cond)
            now = self.replay(ModelHandle(model.policy, cast(nn.Module, tap)), batch, ks)
            return now, tap.values.reshape(now.std.shape)
        now = self.replay(model, batch, ks)
        values = model.value(_states(batch, ks), levels, cond)
        return now, values.reshape(now.std.shape)

    def _levels(self, batch: MicroBatch, ks: slice) -> Tensor:
        """Noise levels of the rows that replay makes of `ks`: sample-major, on the device."""
        levels = batch.sigmas.detach().float().cpu()[torch.tensor(batch.step_indices[ks])]
        return levels.repeat(len(batch.weight)).to(batch.weight.device)

    def _value_loss(self, values: Tensor, batch: MicroBatch, ks: slice) -> LossSum:
        assert batch.returns is not None
        assert batch.old_values is not None
        values, returns, old = values.double(), batch.returns[:, ks].double(), batch.old_values[:, ks].double()
        error = (values - returns).square()
        means = Means(batch.weight)
        if self.config.value_clip is not None:
            clipped = old + (values - old).clamp(-self.config.value_clip, self.config.value_clip)
            means.add("value_clip_fraction", (clipped != values).double())
            error = torch.maximum(error, (clipped - returns).square())
        step_loss = 0.5 * error
        means.add("value_loss", step_loss)
        means.add("value", values)
        return LossSum(self.sum_of_steps(step_loss, batch), means.pairs)


def _states(batch: MicroBatch, ks: slice) -> Tensor:
    """The states before the steps ks, sample-major [B*n,C,h,w]."""
    assert batch.states is not None
    return batch.states[:, ks].flatten(0, 1)
