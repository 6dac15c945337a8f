"""The clipped policy gradient on recorded denoising steps, with decoupled PPO for groups painted by older weights.

Of each recorded step three log-probs are known: lb under the behaviour policy that painted it (recorded), lp under
the proximal one (the weights this learner step began with: recomputed in a pass of its own, or taken to be lb), lt
under the weights being trained:

    rho = exp(lt - lp),  w = exp(lp - lb),  L = keep * w * max(-A rho, -A clip(rho)) + kl_beta * KL(theta, ref)

A step is kept while the KL from behaviour to proximal policy, in nats (summed over dimensions), is within
drift_limit_nats: under the mean reduction no cap on w would ever bind. Dropped steps stay in the denominator.
With recorded means the KL is exact, else estimated from the one sample. When lp is lb (`old_log_prob: rollout`), the
mask takes the current policy instead, and for stale rows alone.

`grpo` and `ppo` are this with other advantages. Does not own: replay (policy/replay.py), the formulas
(clipped_ratio.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from contracts.config.objectives import TrajectoryFields
from learner.objectives.base import Means, ModelHandle, Objective
from learner.objectives.clipped_ratio import (
    SUM_WEIGHT_CAP,
    clip_active,
    clipped_surrogate,
    gaussian_kl,
    importance_weight,
    kl_estimate,
)
from learner.types import LossSum, MicroBatch, StepJob

if TYPE_CHECKING:
    from policy.samplers.base import StepResult

FieldsT = TypeVar("FieldsT", bound=TrajectoryFields)


@dataclass(frozen=True)
class Replayed:
    """Recorded steps under some weights. log_prob_sum [B,n] float64, mean [B,n,C,h,w] fp32, std [B,n]."""

    log_prob_sum: Tensor
    mean: Tensor
    std: Tensor


class TrajectoryObjective(Objective[FieldsT]):
    """A pass takes `steps_per_forward` recorded steps of a micro-batch."""

    def num_passes(self, batch: MicroBatch) -> int:
        return -(-len(batch.step_indices) // self.config.steps_per_forward)

    def steps_of(self, batch: MicroBatch, p: int) -> slice:
        """Positions among the recorded steps that pass p takes."""
        size = self.config.steps_per_forward
        return slice(p * size, min((p + 1) * size, len(batch.step_indices)))

    def prepasses(self, job: StepJob) -> tuple[str | None, ...]:
        proximal: tuple[str | None, ...] = (None,) if self._recomputes(job) else ()
        return (*proximal, "ref") if self.config.kl_beta > 0 else proximal

    def _recomputes(self, job: StepJob) -> bool:
        if self.config.old_log_prob != "auto":
            return self.config.old_log_prob == "recompute"
        stale = any(header.weight_version < job.current_version for header in job.headers.values())
        return stale or self.context.dtype != "fp32"

    def prepass(self, model: ModelHandle, batch: MicroBatch, snapshot: str | None) -> dict[str, Tensor]:
        """Proximal policy: log_prob_sum and drift in nats, [B,K]. Reference: its means, fp32 [B,K,C,h,w]."""
        parts = [
            (ks, self.replay(model, batch, ks))
            for ks in (self.steps_of(batch, p) for p in range(self.num_passes(batch)))
        ]  # fmt: skip
        if snapshot == "ref":
            return {"ref_means": torch.cat([part.mean for _, part in parts], dim=1)}
        return {
            "proximal_log_prob_sum": torch.cat([part.log_prob_sum for _, part in parts], dim=1),
            "proximal_drift": torch.cat([self._drift(part, batch, ks) for ks, part in parts], dim=1),
        }

    def loss(self, model: ModelHandle, batch: MicroBatch, p: int) -> LossSum:
        ks = self.steps_of(batch, p)
        return self._policy_loss(self.replay(model, batch, ks), batch, ks)

    def replay(self, model: ModelHandle, batch: MicroBatch, ks: slice) -> Replayed:
        """The recorded steps ks through the very kernel that painted them."""
        from policy.replay import replay

        assert batch.states is not None
        result = replay(
            model.policy, batch.states, batch.step_indices, batch.sigmas, batch.cond, batch.uncond,
            self.context.sampler, ks, module=model.module,
        )  # fmt: skip
        return self._replayed(result, batch, ks)

    def _replayed(self, result: StepResult, batch: MicroBatch, ks: slice) -> Replayed:
        rows, num = len(batch.weight), ks.stop - ks.start
        assert result.log_prob_sum is not None, "validate refuses samplers without log-probs"
        return Replayed(
            result.log_prob_sum.reshape(rows, num).double(),
            result.mean.reshape(rows, num, *self.context.latent_shape),
            result.std.reshape(rows, num),
        )

    def _policy_loss(self, now: Replayed, batch: MicroBatch, ks: slice) -> LossSum:
        assert batch.log_prob_sum is not None
        behaviour_sum = batch.log_prob_sum[:, ks].double()
        recomputed = "proximal_log_prob_sum" in batch.prepass
        proximal_sum = batch.prepass["proximal_log_prob_sum"][:, ks] if recomputed else behaviour_sum
        advantage = self._advantage(batch, ks)
        surrogate, ratio = clipped_surrogate(
            self._reduce(now.log_prob_sum - proximal_sum), advantage, self.config.clip_range
        )
        weight = self._importance_weight(proximal_sum, behaviour_sum)
        drift, keep = self._drift_and_mask(now, batch, ks)
        step_loss = keep * weight * surrogate
        means = Means(batch.weight)
        self._report(means, now, batch, ratio, advantage, proximal_sum, behaviour_sum)
        means.add("policy_loss", step_loss)
        means.add("drift_nats", drift)
        means.add("kept_fraction", keep.double())
        if self.config.kl_beta > 0:
            kl = self._kl(now, batch, ks)
            step_loss = step_loss + self.config.kl_beta * kl
            means.add("kl", kl)
        return LossSum(self.sum_of_steps(step_loss, batch), means.pairs)

    def sum_of_steps(self, step_loss: Tensor, batch: MicroBatch) -> Tensor:
        """Sum over rows of the weighted loss [B,n] such that sum over passes / num_passes is the mean over K steps."""
        share = self.num_passes(batch) / len(batch.step_indices)
        return (batch.weight.double()[:, None] * step_loss).sum().float() * share

    def _advantage(self, batch: MicroBatch, ks: slice) -> Tensor:
        clip = self.config.advantage_clip
        advantage = batch.advantage.double().clamp(-clip, clip)
        if advantage.ndim == 2:
            return advantage[:, ks]
        return advantage[:, None].expand(-1, ks.stop - ks.start)

    def _reduce(self, over_dims: Tensor) -> Tensor:
        return over_dims / self.context.dims if self.config.reduction == "mean" else over_dims

    def _is_density(self) -> bool:
        """The published cps log-prob is no log-density: weights and nats made of it mean nothing."""
        return self.context.sampler.name != "cps" or self.context.sampler.density == "gaussian"

    def _importance_weight(self, proximal_sum: Tensor, behaviour_sum: Tensor) -> Tensor:
        if not self._is_density():
            return torch.ones_like(behaviour_sum)
        cap = SUM_WEIGHT_CAP if self.config.reduction == "sum" else None
        return importance_weight(self._reduce(proximal_sum), self._reduce(behaviour_sum), cap)

    def _drift(self, policy: Replayed, batch: MicroBatch, ks: slice) -> Tensor:
        """KL from the behaviour to `policy` in nats a step, [B,n], no gradient."""
        assert batch.log_prob_sum is not None
        if batch.means is not None:
            return gaussian_kl(policy.mean.detach(), batch.means[:, ks], policy.std)
        if not self._is_density():
            return torch.zeros_like(policy.log_prob_sum)
        return kl_estimate(policy.log_prob_sum.detach(), batch.log_prob_sum[:, ks].double())

    def _drift_and_mask(self, now: Replayed, batch: MicroBatch, ks: slice) -> tuple[Tensor, Tensor]:
        limit = self.config.drift_limit_nats
        if "proximal_drift" in batch.prepass:
            drift = batch.prepass["proximal_drift"][:, ks]
            return drift, drift <= limit
        drift = self._drift(now, batch, ks)
        return drift, (drift <= limit) | (batch.staleness <= 0)[:, None]

    def _kl(self, now: Replayed, batch: MicroBatch, ks: slice) -> Tensor:
        """KL of the step to the reference policy's, [B,n]; `sd`: times -ds, Flow-GRPO's form."""
        kl = self._reduce(gaussian_kl(now.mean, batch.prepass["ref_means"][:, ks], now.std))
        if self.config.kl_form == "gaussian":
            return kl
        index = torch.tensor(batch.step_indices[ks])
        levels = batch.sigmas.detach().double().cpu()
        return kl * (levels[index] - levels[index + 1]).to(kl.device)

    def _report(
        self,
        means: Means,
        now: Replayed,
        batch: MicroBatch,
        ratio: Tensor,
        advantage: Tensor,
        proximal_sum: Tensor,
        behaviour_sum: Tensor,
    ) -> None:
        means.add("ratio_deviation", (ratio - 1).abs())
        means.add("clip_fraction", clip_active(ratio, advantage, self.config.clip_range).double())
        if self._is_density():
            means.add("approx_kl", kl_estimate(now.log_prob_sum.detach(), proximal_sum))
            density_ratio = importance_weight(proximal_sum, behaviour_sum, None)
            means.add("_weight", density_ratio)
            means.add("_weight_square", density_ratio.square())
        if batch.update == 0:  # the weights are still those that painted a fresh row: what is left is arithmetic
            start = proximal_sum if "proximal_log_prob_sum" in batch.prepass else now.log_prob_sum.detach()
            mismatch = self._reduce(start - behaviour_sum).expm1().abs()
            means.add("log_prob_mismatch", mismatch, where=(batch.staleness <= 0)[:, None])

    def finish_metrics(self, metrics: dict[str, float]) -> dict[str, float]:
        """effective_sample_size: (mean w)^2 / mean w^2 of the steps' true importance weights, 1 when on-policy."""
        finished = {name: value for name, value in metrics.items() if not name.startswith("_")}
        if metrics.get("_weight_square", 0) > 0:
            finished["effective_sample_size"] = metrics["_weight"] ** 2 / metrics["_weight_square"]
        return finished
