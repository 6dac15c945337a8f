"""DanceGRPO's reverse SDE (2505.07818; catalogue C, dance-sde): flow_sde's step with a constant diffusion coefficient:

mean = x + v ds - eta^2/2 * score ds,    S = eta sqrt(-ds).
"""

from __future__ import annotations

import torch
from torch import Tensor

from policy.samplers.base import Coefficients, Sampler
from policy.samplers.flow_sde import reverse_sde


class DanceSDE(Sampler):
    """noise_level is eta."""

    def coefficients(self, s: Tensor, s_next: Tensor, s_max: Tensor) -> Coefficients:
        return reverse_sde(s, s_next, torch.full_like(s, self.config.noise_level))

    def params(self) -> dict[str, float]:
        return {"noise_level": self.config.noise_level}
