"""Times and noise of the forward-process objectives, from seeds by name.

Each number depends on (run seed, learner step, noise key of the row, draw) alone: not on the rank, the micro-batch or
the order of work. Rows with equal keys (both halves of a pair) share it. Drawn on the CPU, so that every device sees
the same. Does not own: what is done with them (matching.py, the objectives).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from contracts.seeds import Stream, derive_seed
from learner.types import MicroBatch

MIN_TIME = 1e-3


def noise(batch: MicroBatch, run_seed: int, draw: int) -> Tensor:
    """Standard normal fp32 [B,C,h,w] for draw number `draw`."""
    assert batch.clean is not None
    shape = batch.clean.shape[1:]
    return _per_row(
        batch, lambda key: torch.randn(shape, generator=_generator(run_seed, Stream.TRAIN_NOISE, batch.step, key, draw))
    )


def grid_times(batch: MicroBatch, run_seed: int, draw: int) -> Tensor:
    """fp32 [B]: draw number `draw` of a random order of the rollout's noise levels, the last step's left out.

    Each row has its own order; draws 0..T-2 visit each of the levels sigmas[0..T-2] once.
    """
    levels = batch.sigmas.detach().float().cpu()[: max(len(batch.sigmas) - 2, 1)]

    def level(key: int) -> Tensor:
        order = torch.randperm(len(levels), generator=_generator(run_seed, Stream.TRAIN_TIME, batch.step, key))
        return levels[order[draw % len(levels)]]

    return _per_row(batch, level)


def interpolated_times(batch: MicroBatch, run_seed: int, draw: int, draws: int) -> Tensor:
    """fp32 [B], from MIN_TIME up: the rollout's levels, linear between them, at a place in stratum `draw` of `draws`.

    Every step of the rollout is as likely, the last one, down to 0, included.
    """
    levels = batch.sigmas.detach().float().cpu()

    def time(key: int) -> Tensor:
        place = (draw + torch.rand((), generator=_times(batch, run_seed, key, draw))) / draws * (len(levels) - 1)
        step = min(int(place), len(levels) - 2)
        return torch.lerp(levels[step], levels[step + 1], place - step).clamp(min=MIN_TIME)

    return _per_row(batch, time)


def uniform_times(batch: MicroBatch, run_seed: int, draw: int) -> Tensor:
    """fp32 [B], uniform on (MIN_TIME, 1]."""
    return _per_row(
        batch, lambda key: 1 - (1 - MIN_TIME) * torch.rand((), generator=_times(batch, run_seed, key, draw))
    )


def logit_normal_times(batch: MicroBatch, run_seed: int, draw: int) -> Tensor:
    """fp32 [B], sigmoid of a standard normal (SD3, 2403.03206), not below MIN_TIME."""
    return _per_row(
        batch,
        lambda key: torch.randn((), generator=_times(batch, run_seed, key, draw)).sigmoid().clamp(min=MIN_TIME),
    )


def keyed_by_group(batch: MicroBatch) -> MicroBatch:
    """The same rows; those of one group share what is drawn, in whichever micro-batch they are."""
    return replace(batch, noise_keys=tuple(row.group for row in batch.rows))


def _times(batch: MicroBatch, run_seed: int, key: int, draw: int) -> torch.Generator:
    return _generator(run_seed, Stream.TRAIN_TIME, batch.step, key, draw)


def _generator(run_seed: int, stream: Stream, *ids: int) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(run_seed, stream, *ids))


def _per_row(batch: MicroBatch, draw: Callable[[int], Tensor]) -> Tensor:
    keys: Sequence[int] = batch.noise_keys
    drawn = {key: draw(key) for key in dict.fromkeys(keys)}
    return torch.stack([drawn[key] for key in keys]).to(batch.weight.device)
