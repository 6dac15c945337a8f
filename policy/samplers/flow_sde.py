"""Flow-GRPO's reverse SDE (2505.05470; catalogue C, flow-sde).

With sd = a sqrt(s / (1 - s)) and score = -(x + (1-s) v) / s:

    mean = x + (v - sd^2/2 * score) ds,    S = sd sqrt(-ds),    ds = s' - s < 0.

At s = 1 the denominator takes sigmas[1] for s, which makes S_0 = a exactly, whatever the schedule.
"""

from __future__ import annotations

import torch
from torch import Tensor

from policy.samplers.base import FIRST_LEVEL, Coefficients, Sampler


class FlowSDE(Sampler):
    """noise_level is a."""

    def coefficients(self, s: Tensor, s_next: Tensor, s_max: Tensor) -> Coefficients:
        return reverse_sde(s, s_next, self._diffusion(s, s_max))

    def _diffusion(self, s: Tensor, s_max: Tensor) -> Tensor:
        clamped = torch.where(s >= FIRST_LEVEL, s_max, s)
        return self.config.noise_level * (s / (1.0 - clamped)).sqrt()

    def params(self) -> dict[str, float]:
        return {"noise_level": self.config.noise_level}


def reverse_sde(s: Tensor, s_next: Tensor, sd: Tensor) -> Coefficients:
    """The Euler-Maruyama step with diffusion coefficient sd, as coefficients of x and v."""
    ds = s_next - s
    correction = sd * sd / (2.0 * s) * ds
    return Coefficients(1.0 + correction, ds + correction * (1.0 - s), sd * (-ds).sqrt())
