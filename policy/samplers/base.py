"""The one transition kernel, walked in two modes: sampling draws the next latent, replay scores a given one (law 1).

Every kernel here is linear in the latent and the velocity,

    mean = c_x * x + c_v * v,    x' = mean + std * z,    z ~ N(0, I),

so a kernel is three numbers a row (`Coefficients`), and all share one `step`. Coefficients are computed in float64 on
the CPU, where the noise levels are known without asking the device; latents stay in fp32.

Does not own: the schedule (policy/schedule.py), the loop (policy/rollout.py, policy/replay.py).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from contracts.config.rollout import SamplerConfig
from contracts.registry import resolve

Level = float | Tensor
"""A noise level s in [0,1]: one number, or one a row [N]. Tensors are read on the CPU: keep them there."""

FIRST_LEVEL = 1.0 - 1e-6
"""From here on a level counts as s=1: a schedule that starts at 0.99999 by rounding must not escape the clamp."""


@dataclass(frozen=True)
class Coefficients:
    """mean = x * c_x + v * c_v; std: of the noise added. float64 [N] or [1], on the CPU."""

    c_x: Tensor
    c_v: Tensor
    std: Tensor


@dataclass(frozen=True)
class StepResult:
    """One transition of N rows, all fp32.

    next: x' (rounded to the storage dtype, held in fp32); mean; std [N,1,1,1]: S, the standard deviation of the noise
    actually added; log_prob_sum [N]: sum over the `dims` dimensions, None for a deterministic step; sqrt_neg_ds
    [N,1,1,1]: sqrt(s - s'), from which other conventions of the standard deviation derive.
    """

    next: Tensor
    log_prob_sum: Tensor | None
    dims: int
    mean: Tensor
    std: Tensor
    sqrt_neg_ds: Tensor


@dataclass(frozen=True)
class _Rows:
    """What a step needs of its levels: c_x, c_v, std and sqrt(s - s') as fp32 [4,N] on the CPU; any std of zero?"""

    values: Tensor
    has_density: bool


class Sampler(ABC):
    """A transition kernel. Two calls with equal arguments give equal results."""

    def __init__(self, config: SamplerConfig) -> None:
        self.config = config
        self._rows: dict[tuple[float, float, float], _Rows] = {}  # of the schedule's steps, which every rollout repeats

    @abstractmethod
    def coefficients(self, s: Tensor, s_next: Tensor, s_max: Tensor) -> Coefficients:
        """The kernel from level s to s_next < s. s_max: what replaces s where s = 1 would divide by zero."""

    def params(self) -> dict[str, float]:
        """Its numeric parameters, for a group's header."""
        return {}

    def log_density(self, deviation: Tensor, std: Tensor) -> Tensor:
        """[N] sum over dimensions of log N(mean + deviation; mean, std^2)."""
        dims = deviation[0].numel()
        squares = _sum_dims(deviation * deviation)
        scale = std.flatten().double()
        total = -squares / (2 * scale * scale) - dims * (scale.log() + 0.5 * math.log(2 * math.pi))
        return total.float()

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
        """From x [N,...] at level s to level s_next with velocity v [N,...].

        Exactly one of `noise` (sampling: z, standard normal) and `next` (replay: the x' that was stored) is given;
        neither for a deterministic kernel. s_max: second level of the schedule (sigmas[1]); None takes s_next, which
        is the same wherever it matters. x' is rounded to storage_dtype before its log-prob is taken, so that replay
        sees the very point. Gradients flow through `v` into mean and log-prob, never into x' or x.
        """
        if (noise is None) == (next is None):
            raise ValueError("a stochastic step takes exactly one of noise and next")
        rows = self.rows_of(s, s_next, s_next if s_max is None else s_max)
        mean, std, sqrt_neg_ds = apply_rows(rows, x.detach(), v)
        if next is None:
            assert noise is not None
            next = (mean + std * noise.float()).to(storage_dtype).float()
        next = next.detach().float()
        log_prob_sum = self.log_density(next - mean, std) if rows.has_density else None
        return StepResult(next, log_prob_sum, x[0].numel(), mean, std, sqrt_neg_ds)

    def rows_of(self, s: Level, s_next: Level, s_max: Level) -> _Rows:
        """The kernel's numbers for these levels, remembered for plain numbers."""
        if not (isinstance(s, float) and isinstance(s_next, float) and isinstance(s_max, float)):
            return self._compute_rows(s, s_next, s_max)
        key = (s, s_next, s_max)
        if key not in self._rows:
            self._rows[key] = self._compute_rows(s, s_next, s_max)
        return self._rows[key]

    def _compute_rows(self, *given: Level) -> _Rows:
        s, s_next, s_max = (_level(value) for value in given)
        kernel = self.coefficients(s, s_next, s_max)
        sqrt_neg_ds = (s - s_next).clamp_min(0).sqrt()
        values = torch.stack(torch.broadcast_tensors(kernel.c_x, kernel.c_v, kernel.std, sqrt_neg_ds))
        return _Rows(values.to(torch.float32), bool((kernel.std > 0).all()))


@lru_cache(maxsize=64)
def build_sampler(config: SamplerConfig) -> Sampler:
    """The sampler a configuration names, one instance for equal ones. Raises RegistryError or ConfigError."""
    sampler: Sampler = resolve("sampler", config.name).load()(config)
    return sampler


def _level(value: Level) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", torch.float64).reshape(-1)
    return torch.tensor([value], dtype=torch.float64)


def apply_rows(rows: _Rows, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, std, sqrt(s - s')) on x's device in fp32; one copy carries all numbers there."""
    values = rows.values.to(x.device, non_blocking=True)
    c_x, c_v, std, sqrt_neg_ds = values.reshape(4, -1, *[1] * (x.dim() - 1)).unbind(0)
    return x.float() * c_x + v.float() * c_v, std.expand(len(x), *std.shape[1:]), sqrt_neg_ds


def _sum_dims(values: Tensor) -> Tensor:
    """[N] in float64: a sum over 65536 dimensions loses digits in fp32 that a clip range of 1e-5 needs."""
    return values.flatten(1).sum(1, dtype=torch.float64)
