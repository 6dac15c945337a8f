"""The sampling loop: one micro-batch of trajectories, with noise that depends on seeds alone.

Every sample draws from CPU generators seeded for it, so a group can be painted again on any device, in any batch.
Does not own: what a step does (samplers/), which steps are stochastic (schedule.py), decoding (policy.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from contracts.config.rollout import SamplerConfig
from policy import schedule
from policy.policy import Policy
from policy.samplers.base import build_sampler
from policy.types import EmbeddingBatch, Trajectory


class _Record:
    """States, log-probs and means of the recorded steps, allocated once."""

    def __init__(self, x: Tensor, num_steps: int, storage_dtype: torch.dtype, means: bool) -> None:
        self.num, self.steps = len(x), 0
        self.states = x.new_empty((len(x), num_steps + 1, *x.shape[1:]), dtype=storage_dtype)
        self.log_prob_sum = x.new_empty((len(x), num_steps))
        self.means = x.new_empty((len(x), num_steps, *x.shape[1:])) if means else None

    def add(self, x: Tensor, next: Tensor, log_prob_sum: Tensor, mean: Tensor) -> None:
        k = self.steps
        if k == 0:
            self.states[:, 0] = x
        self.states[:, k + 1] = next
        self.log_prob_sum[:, k] = log_prob_sum
        if self.means is not None:
            self.means[:, k] = mean
        self.steps += 1


@dataclass(frozen=True)
class Previous:
    """The velocity of the last deterministic step, and that step's width ds (negative)."""

    velocity: Tensor
    width: float


def extrapolated(v: Tensor, width: float, previous: Previous | None) -> Tensor:
    """The mean velocity over a step of width h, from its start and the previous step's: v + (v - v_prev) h/(2 h_prev).

    The two-step Adams-Bashforth rule for steps of different widths: of second order for one call of the network a step
    (Hairer, Norsett, Wanner, Solving ODEs I, III.5). Without a previous step it is Euler's.
    """
    return v if previous is None else v + (width / (2 * previous.width)) * (v - previous.velocity)


def mean_velocity(v: Tensor, s: float, s_next: float, order: int, previous: Previous | None) -> Tensor:
    """Of a deterministic step from s to s_next: extrapolated with order 2, but for the last step.

    Euler's step to s=0 lands on the network's own x_0, an extrapolated one beyond it.
    """
    return v if order == 1 or s_next == 0 else extrapolated(v, s_next - s, previous)


@torch.no_grad()
def paint(
    policy: Policy,
    cond: EmbeddingBatch,
    uncond: EmbeddingBatch | None,
    config: SamplerConfig,
    step_indices: Sequence[int],
    init_seeds: Sequence[int],
    step_seeds: Sequence[Sequence[int]],
    *,
    storage_dtype: torch.dtype = torch.float32,
    record: bool,
    record_means: bool = False,
    preview_steps: Sequence[int] = (),
) -> Trajectory:
    """One micro-batch of N samples.

    step_indices: the K stochastic steps, contiguous (schedule.stochastic_steps); all others are ODE steps.
    config.order 2: deterministic steps that follow one another extrapolate (`mean_velocity`).
    init_seeds [N], step_seeds [N][K]: one seed for x at s=1 and one for each stochastic step of each sample.
    record: keep states (in storage_dtype, to which latents are rounded around stochastic steps) and log-probs.
    preview_steps: steps whose previews are kept (contracts.previews), ascending; they change nothing else.
    """
    levels = schedule.sigmas(config.steps, config.shift).tolist()
    device_levels = torch.tensor(levels, device=policy.device)
    previews: list[Tensor] = []
    sampler, ode = build_sampler(config), build_sampler(config.model_copy(update={"name": "ode"}))
    position = {step: k for k, step in enumerate(step_indices)}
    previous: Previous | None = None
    x = seeded_noise(init_seeds, policy)
    kept = _Record(x, len(step_indices), storage_dtype, record_means) if record and step_indices else None
    for step, (s, s_next) in enumerate(pairwise(levels)):
        stochastic = step in position
        if stochastic:
            x = x.to(storage_dtype).float()
        v = policy.velocity(x, device_levels[step].expand(len(x)), cond, uncond, config.guidance_scale)
        if step - 1 in preview_steps:  # what the step before led to, now that the velocity there is known
            previews.append(ode.step(x, v, s, 0.0).next)
        if not stochastic:
            mean = mean_velocity(v, s, s_next, config.order, previous)
            x, previous = ode.step(x, mean, s, s_next).next, Previous(v, s_next - s)
            continue
        previous = None
        noise = seeded_noise([seeds[position[step]] for seeds in step_seeds], policy)
        result = sampler.step(x, v, s, s_next, noise=noise, s_max=levels[1], storage_dtype=storage_dtype)
        if kept is not None:
            assert result.log_prob_sum is not None
            kept.add(x, result.next, result.log_prob_sum, result.mean)
        x = result.next
    if config.steps - 1 in preview_steps:
        previews.append(x)
    stacked = torch.stack(previews, 1) if previews else None
    if kept is None:
        return Trajectory(x, previews=stacked)
    return Trajectory(x, kept.states, kept.log_prob_sum, kept.means, stacked)


def seeded_noise(seeds: Sequence[int], policy: Policy) -> Tensor:
    """Standard normal fp32 [N,C,h,w] on the policy's device; row i is a function of seeds[i] and the shape alone."""
    noise = torch.empty(len(seeds), *policy.latent_shape)
    generator = torch.Generator()
    for row, seed in zip(noise, seeds, strict=True):
        generator.manual_seed(seed)
        row.normal_(generator=generator)
    return noise.to(policy.device, non_blocking=True)


def paint_with_gradient(
    policy: Policy,
    cond: EmbeddingBatch,
    uncond: EmbeddingBatch | None,
    config: SamplerConfig,
    init_seeds: Sequence[int],
    truncation: int,
    checkpoint: bool,
    module: nn.Module | None = None,
) -> Tensor:
    """Clean latents fp32 [N,C,h,w] of an ODE sampling with gradient (AlignProp, 2310.03739).

    The network's output is detached in steps before `truncation`; from there on gradients flow through the network and
    the sampler's linear terms. checkpoint: recompute each network call in the backward pass.
    """
    levels = schedule.sigmas(config.steps, config.shift).tolist()
    device_levels = torch.tensor(levels, device=policy.device)
    ode = build_sampler(config.model_copy(update={"name": "ode"}))

    def velocity(x: Tensor, s: Tensor) -> Tensor:
        return policy.velocity(x, s, cond, uncond, config.guidance_scale, module=module)

    x = seeded_noise(init_seeds, policy)
    previous: Previous | None = None
    for step, (s, s_next) in enumerate(pairwise(levels)):
        s_rows = device_levels[step].expand(len(x))
        if step < truncation:
            with torch.no_grad():
                v = velocity(x, s_rows)
        elif checkpoint:
            v = recompute(velocity, x, s_rows, use_reentrant=False)
        else:
            v = velocity(x, s_rows)
        mean = mean_velocity(v, s, s_next, config.order, previous)
        x, previous = ode.step(x, mean, s, s_next).next, Previous(v, s_next - s)
    return x
