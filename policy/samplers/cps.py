"""Coefficients-Preserving Sampling (2509.05952; catalogue C, cps): the next latent's total noise level stays s'.

With x0hat = x - s v and ehat = x + (1-s) v:

    S = s' sin(a pi/2),    mean = (1-s') x0hat + sqrt(s'^2 - S^2) ehat.

`density: published` is the paper's -sum (x'-mean)^2: no density, its log ratio is 2 S^2 times the Gaussian one.
"""

from __future__ import annotations

import math

from torch import Tensor

from contracts.config.rollout import SamplerConfig
from contracts.errors import ConfigError
from policy.samplers.base import Coefficients, Sampler, _sum_dims


class CPS(Sampler):
    """noise_level is a, in [0,1]: the share of the angle that becomes fresh noise."""

    def __init__(self, config: SamplerConfig) -> None:
        if config.noise_level > 1:
            raise ConfigError("sampler.noise_level", f"cps takes a in [0, 1], not {config.noise_level}", "try 0.8")
        super().__init__(config)

    def coefficients(self, s: Tensor, s_next: Tensor, s_max: Tensor) -> Coefficients:
        angle = self.config.noise_level * math.pi / 2
        old_noise = s_next * math.cos(angle)  # sqrt(s'^2 - S^2) without the cancellation
        clean = 1.0 - s_next
        return Coefficients(clean + old_noise, old_noise * (1.0 - s) - clean * s, s_next * math.sin(angle))

    def log_density(self, deviation: Tensor, std: Tensor) -> Tensor:
        if self.config.density == "gaussian":
            return super().log_density(deviation, std)
        return -_sum_dims(deviation * deviation).float()

    def params(self) -> dict[str, float]:
        return {"noise_level": self.config.noise_level}
