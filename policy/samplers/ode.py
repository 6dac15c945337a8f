"""Euler step of the flow ODE, x' = x + v ds: deterministic, without a log-prob (catalogue C, ode-ddim)."""

from __future__ import annotations

import torch
from torch import Tensor

from policy.samplers.base import Coefficients, Level, Sampler, StepResult, apply_rows


class ODE(Sampler):
    """The deterministic kernel: evaluation, steps outside a window, and methods that need no log-prob."""

    def coefficients(self, s: Tensor, s_next: Tensor, s_max: Tensor) -> Coefficients:
        return Coefficients(torch.ones_like(s), s_next - s, torch.zeros_like(s))

    def step(
        self,
        x: Tensor,
        v: Tensor,
        s: Level,
        s_next: Level,
        *,
        noise: Tensor | None = None,
        next: Tensor | None = None,
        s_max: Level | None = None,
        storage_dtype: torch.dtype = torch.float32,
    ) -> StepResult:
        """The deterministic step; gradients flow through x as well as v. `noise` and `next` are refused."""
        if noise is not None or next is not None:
            raise ValueError("the ODE step is deterministic: it takes neither noise nor next")
        mean, std, sqrt_neg_ds = apply_rows(self.rows_of(s, s_next, s_next), x, v)
        return StepResult(mean.to(storage_dtype).float(), None, x[0].numel(), mean, std, sqrt_neg_ds)
