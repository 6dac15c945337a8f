"""What the forward-process objectives share: noised samples, velocities at them, errors per row in float64.

x_s = (1-s) x_0 + s eps, target velocity eps - x_0. Does not own: times and noise (draws.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from learner.objectives.base import ModelHandle
from learner.types import MicroBatch


@dataclass(frozen=True)
class Noised:
    """Rows of a micro-batch at one draw of times s [B] and noise. x, target: fp32 [B,C,h,w]."""

    s: Tensor
    x: Tensor
    target: Tensor

    @classmethod
    def of(cls, clean: Tensor, s: Tensor, noise: Tensor) -> Noised:
        at = per_row(s, clean)
        return cls(s, (1 - at) * clean + at * noise, noise - clean)


def velocity(model: ModelHandle, batch: MicroBatch, noised: Noised) -> Tensor:
    """The model's conditional velocity, fp32 [B,C,h,w]: forward-process methods train without guidance."""
    return model.velocity(noised.x, noised.s, batch.cond)


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B,1,..,1] to broadcast over `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))


def mean_square(a: Tensor, b: Tensor) -> Tensor:
    """float64 [B]: mean over all other dimensions of (a-b)^2. Differences of such errors cancel in fp32."""
    return (a.double() - b.double()).square().flatten(1).mean(1)


def stack_draws(per_draw: list[Tensor]) -> Tensor:
    """[B,..] a draw -> [B,draws,..], rows first as a prepass yields them."""
    return torch.stack(per_draw, dim=1)
