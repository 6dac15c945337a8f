"""The clipped surrogate and the bookkeeping of three policies: behaviour, proximal, current.

Shared by every policy gradient on recorded steps. Arguments are [B,n] (rows by steps), float64, and log-probs are
already reduced over dimensions unless a name says `sum`. Does not own: where the log-probs come from (trajectory.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

LOG_BOUND = 20.0
"""|log ratio| beyond which exp says nothing: weights and estimates saturate there."""

SUM_WEIGHT_CAP = 2.0
"""Truncation of importance weights under the sum reduction (verl's default). Under the mean one a weight is the D-th
root of the true ratio, no cap ever binds, and none is applied: the drift mask bounds it in nats instead."""


def clipped_surrogate(log_ratio: Tensor, advantage: Tensor, clip_range: float) -> tuple[Tensor, Tensor]:
    """(max(-A rho, -A clip(rho, 1-e, 1+e)), rho) with rho = exp(log_ratio) (PPO, 1707.06347)."""
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return torch.maximum(-advantage * ratio, -advantage * clipped), ratio


def clip_active(ratio: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """bool: entries whose gradient the clip removes."""
    return ((ratio > 1 + clip_range) & (advantage > 0)) | ((ratio < 1 - clip_range) & (advantage < 0))


def importance_weight(proximal: Tensor, behaviour: Tensor, cap: float | None) -> Tensor:
    """w = exp(proximal - behaviour), detached; decoupled PPO's factor for what another policy painted."""
    weight = (proximal - behaviour).detach().clamp(-LOG_BOUND, LOG_BOUND).exp()
    return weight if cap is None else weight.clamp(max=cap)


def gaussian_kl(mean: Tensor, other: Tensor, std: Tensor) -> Tensor:
    """Sum over dimensions of (mean-other)^2 / (2 std^2), in nats. mean, other [B,n,..], std [B,n] -> [B,n]."""
    square = (mean.double() - other.double()).square().flatten(2).sum(2)
    return square / (2 * std.double().square())


def kl_estimate(log_prob_sum: Tensor, behaviour_sum: Tensor) -> Tensor:
    """KL(behaviour || policy) in nats from one sample of the behaviour: r - 1 - log r >= 0, unbiased ("k3").

    log r is clamped to +-LOG_BOUND first.
    """
    log_ratio = (log_prob_sum - behaviour_sum).double().clamp(-LOG_BOUND, LOG_BOUND)
    return log_ratio.expm1() - log_ratio
