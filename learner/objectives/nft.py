"""DiffusionNFT (2509.16117): flow matching on own samples, towards the good and away from the bad.

With v_old the EMA policy that painted, optimality r = clamp(A,-c,c)/(2c) + 1/2 and b = beta:

    v+ = b v + (1-b) v_old            v- = (1+b) v_old - b v
    l± = mean_d (x_t - t v± - x_0)^2 / w±,   w± = max(mean_d |x_t - t v± - x_0|, 1e-5), float64, no gradient
    L  = c (r l+ + (1-r) l-)/b + beta_kl mean_d (v - v_ref)^2,   c = advantage_clip

One pass a time; losses in float64. At v = v_old the gradient is that of A * mse_x0 / w whatever b is. The old
policy moves once a learner step: old = d old + (1-d) current, d = min((optimizer steps - flat) * rate, hold).

With noise_per "group" the gradient's part that all samples of a group have in common cancels: their advantages sum to
zero. Diffusion-DPO (2311.12908) does the same with the two samples of a pair; here it is ours.

push_limit k is ours. Where x_t tells x_0, only the bad sample itself is near, and nothing bounds the push away
from it: v_old follows, the error grows, the push goes on. With e = mean (v - (eps - x_0))^2, of the old policy and of
the reference, a negative advantage counts (k - e_old / (e_ref + ERROR_FLOOR)) / (k - 1) of its size, at most 1 and at
least 0: a trust region in what the model gets wrong (docs/decisions/0015). The metrics error_ratio (over all samples)
and push_kept (over bad ones) watch it.

Does not own: advantages (credit/group.py), the snapshots themselves (learner/snapshots.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from contracts.config.objectives import NFTConfig
from learner.objectives.base import Means, ModelHandle, Objective, declared
from learner.objectives.draws import grid_times, interpolated_times, keyed_by_group, noise, uniform_times
from learner.objectives.matching import Noised, mean_square, per_row, stack_draws, velocity
from learner.types import LossSum, MicroBatch, StepJob

MIN_WEIGHT = 1e-5
ERROR_FLOOR = 0.01
"""Added to the reference's velocity error, whose data and noise have a variance of about 1: less is as good as none."""


class NFT(Objective[NFTConfig]):
    """Needs clean latents and the snapshots `old`, and `ref` with a KL term or a push limit."""

    declares = declared("nft")
    section = NFTConfig

    def num_passes(self, batch: MicroBatch) -> int:
        return self.config.draws or max(len(batch.sigmas) - 2, 1)

    def prepasses(self, job: StepJob) -> tuple[str | None, ...]:
        return ("old", "ref") if self.config.kl_beta > 0 or self.config.push_limit is not None else ("old",)

    def prepass(self, model: ModelHandle, batch: MicroBatch, snapshot: str | None) -> dict[str, Tensor]:
        """{"old" or "ref": velocities fp32 [B,draws,C,h,w]} at the very times and noise the passes use."""
        draws = range(self.num_passes(batch))
        return {str(snapshot): stack_draws([velocity(model, batch, self.noised(batch, draw)) for draw in draws])}

    def noised(self, batch: MicroBatch, draw: int) -> Noised:
        """The rows at their draw number `draw`: fresh time and noise for each row, or for each group."""
        assert batch.clean is not None
        keyed = batch if self.config.noise_per == "sample" else keyed_by_group(batch)
        return Noised.of(batch.clean, self._times(keyed, draw), noise(keyed, self.context.run_seed, draw))

    def _times(self, batch: MicroBatch, draw: int) -> Tensor:
        seed = self.context.run_seed
        if self.config.time_grid == "interpolated":
            return interpolated_times(batch, seed, draw, self.num_passes(batch))
        times = grid_times if self.config.time_grid == "rollout" else uniform_times
        return times(batch, seed, draw)

    def loss(self, model: ModelHandle, batch: MicroBatch, p: int) -> LossSum:
        assert batch.clean is not None
        noised = self.noised(batch, p)
        v = velocity(model, batch, noised)
        old = batch.prepass["old"][:, p]
        positive, negative = implicit_losses(v, old, noised, batch.clean, self.config.beta)
        r, means = optimality(batch.advantage, self.config.advantage_clip), Means(batch.weight)
        if self.config.push_limit is not None:
            ratio = error_ratio(old, batch.prepass["ref"][:, p], noised)
            kept, bad = push_kept(ratio, self.config.push_limit), r < 0.5
            r = torch.where(bad, 0.5 - kept * (0.5 - r), r)
            means.add("error_ratio", ratio)
            means.add("push_kept", kept, bad)
        row_loss = self.config.advantage_clip * (r * positive + (1 - r) * negative) / self.config.beta
        means.add("policy_loss", row_loss)
        means.add("positive_loss", positive)
        means.add("negative_loss", negative)
        means.add("optimality", r)
        means.add("old_distance", mean_square(v, old))
        if self.config.kl_beta > 0:
            kl = mean_square(v, batch.prepass["ref"][:, p])
            row_loss = row_loss + self.config.kl_beta * kl
            means.add("kl", kl)
        return LossSum((batch.weight.double() * row_loss).sum().float(), means.pairs)

    def snapshot_decay(self, snapshot: str, optimizer_steps: int) -> float | None:
        """The old policy's decay d after `optimizer_steps` optimizer steps; the reference stays."""
        if snapshot != "old":
            return None
        return old_decay(optimizer_steps, self.config.decay_flat, self.config.decay_rate, self.config.decay_hold)


def old_decay(optimizer_steps: int, flat: int, rate: float, hold: float) -> float:
    """0 up to `flat`, then (steps - flat) * rate, at most `hold`."""
    return 0.0 if optimizer_steps < flat else min((optimizer_steps - flat) * rate, hold)


def optimality(advantage: Tensor, clip: float) -> Tensor:
    """r, float64 in [0,1]: below 1/2 for a bad sample."""
    return advantage.double().clamp(-clip, clip) / clip / 2 + 0.5


def error_ratio(old: Tensor, ref: Tensor, noised: Noised) -> Tensor:
    """Squared velocity error of the old policy over the reference's, float64 [B]."""
    return mean_square(old, noised.target) / (mean_square(ref, noised.target) + ERROR_FLOOR)


def push_kept(ratio: Tensor, limit: float) -> Tensor:
    """The share of a push away that is left: 1 up to a ratio of 1, 0 from `limit` on, linear between."""
    return ((limit - ratio) / (limit - 1)).clamp(0, 1)


def implicit_velocities(v: Tensor, old: Tensor, b: float) -> tuple[Tensor, Tensor]:
    """(v+, v-), float64: the implicit positive and negative policies."""
    v, old = v.double(), old.double()
    return b * v + (1 - b) * old, (1 + b) * old - b * v


def implicit_losses(v: Tensor, old: Tensor, noised: Noised, clean: Tensor, b: float) -> tuple[Tensor, Tensor]:
    """(l+, l-), float64 [B]: self-normalised x_0 errors of the implicit policies."""
    positive, negative = implicit_velocities(v, old, b)
    x, clean = noised.x.double(), clean.double()
    t = per_row(noised.s.double(), clean)
    return _normalised_error(x - t * positive - clean), _normalised_error(x - t * negative - clean)


def _normalised_error(error: Tensor) -> Tensor:
    error = error.flatten(1)
    weight = error.detach().abs().mean(1).clamp(min=MIN_WEIGHT)
    return torch.mean(error.square(), dim=1) / weight
