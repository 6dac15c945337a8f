"""Diffusion-DPO in its flow form (2311.12908): denoise the winner better, relative to the reference, than the loser.

A pair shares time and noise. With m = mean_d (v - (eps - x_0))^2 and m^ref the same under the reference,

    u = -beta/2 [(m_w - m_w^ref) - (m_l - m_l^ref)],   L = -log sigmoid(u)

in float64, one pass a draw. Rows come as [winners; losers], row by row (plan.py). Online pairs are a group's best
against its worst (credit/pairs.py); pairs from files carry their order. Both terms can rise together, so both are
reported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from contracts.config.objectives import DPOConfig
from learner.objectives.base import Means, ModelHandle, Objective, declared
from learner.objectives.draws import logit_normal_times, noise, uniform_times
from learner.objectives.matching import Noised, mean_square, stack_draws, velocity
from learner.types import LossSum, MicroBatch, StepJob

if TYPE_CHECKING:
    from collections.abc import Callable

_TIMES: dict[str, Callable[[MicroBatch, int, int], Tensor]] = {
    "logit_normal": logit_normal_times, "uniform": uniform_times,
}  # fmt: skip


class DPO(Objective[DPOConfig]):
    """Needs pairs of clean latents and the reference snapshot."""

    declares = declared("dpo")
    section = DPOConfig

    def num_passes(self, batch: MicroBatch) -> int:
        return self.config.draws

    def prepasses(self, job: StepJob) -> tuple[str | None, ...]:
        return ("ref",)

    def prepass(self, model: ModelHandle, batch: MicroBatch, snapshot: str | None) -> dict[str, Tensor]:
        """{"ref_errors": float64 [B,draws]} at the very times and noise the passes use."""
        return {"ref_errors": stack_draws([self.errors(model, batch, draw) for draw in range(self.num_passes(batch))])}

    def errors(self, model: ModelHandle, batch: MicroBatch, draw: int) -> Tensor:
        """m of every row at draw number `draw`, float64 [B]."""
        assert batch.clean is not None
        seed = self.context.run_seed
        times = _TIMES[self.config.time_distribution](batch, seed, draw)
        noised = Noised.of(batch.clean, times, noise(batch, seed, draw))
        return mean_square(velocity(model, batch, noised), noised.target)

    def loss(self, model: ModelHandle, batch: MicroBatch, p: int) -> LossSum:
        excess = self.errors(model, batch, p) - batch.prepass["ref_errors"][:, p]
        num_pairs = len(excess) // 2
        winner, loser = excess[:num_pairs], excess[num_pairs:]
        weight = batch.weight[:num_pairs]
        margin = -0.5 * self.config.beta * (winner - loser)
        pair_loss = -F.logsigmoid(margin)
        means = Means(weight)
        means.add("policy_loss", pair_loss)
        means.add("implicit_margin", margin)
        means.add("implicit_accuracy", (margin > 0).double())
        means.add("winner_excess_error", winner)
        means.add("loser_excess_error", loser)
        return LossSum((weight.double() * pair_loss).sum().float(), means.pairs)
