"""AlignProp (2310.03739): back-propagate a differentiable reward through the sampler, truncated at a random step.

The learner paints with gradient (policy/rollout.py), decodes, and asks a remote scorer for R and dR/d image; the loss

    L = -loss_coeff * <stop_gradient(dR/d image), image>

has exactly the gradient of -loss_coeff * R without the scorer living in this process. The score is taken at the
8-bit image that is sent (lossless), within half a level of the decoded one. A sample whose score failed contributes
nothing. The truncation step is drawn once a micro-batch from its own seed: below it the network's output is detached.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from contracts.config.objectives import AlignPropConfig
from contracts.scores import ScoreTable
from contracts.seeds import Stream, derive_seed
from learner.objectives.base import Means, ModelHandle, Objective, ScoreGradient, declared
from learner.types import LossSum, MicroBatch


class AlignProp(Objective[AlignPropConfig]):
    """Needs rows with prompts, and a scorer that offers dR/d image (context.score_gradient)."""

    declares = declared("alignprop")
    section = AlignPropConfig

    def loss(self, model: ModelHandle, batch: MicroBatch, p: int) -> LossSum:
        from policy.rollout import paint_with_gradient

        latents = paint_with_gradient(
            model.policy, batch.cond, batch.uncond, self.context.sampler, self.init_seeds(batch),
            self.truncation(batch), self.config.checkpoint, module=model.module,
        )  # fmt: skip
        images = model.policy.decode_differentiable(latents)
        table = self._scorer()(
            to_uint8(images), [prompt.text for prompt in batch.prompts], [prompt.metadata for prompt in batch.prompts]
        )  # fmt: skip
        values, gradients, valid = read_table(table, images)
        row_loss = -self.config.loss_coeff * (gradients * images).flatten(1).sum(1)
        means = Means(batch.weight)
        means.add("reward", values, where=valid)
        means.add("failed_fraction", (~valid).double())
        means.add("image_gradient_norm", gradients.flatten(1).norm(dim=1), where=valid)
        return LossSum((batch.weight * row_loss).sum(), means.pairs)

    def init_seeds(self, batch: MicroBatch) -> list[int]:
        """Seeds of the initial noise, by group and sample as an actor's would be."""
        return [
            derive_seed(self.context.run_seed, Stream.INIT_NOISE, row.group, row.sample) for row in batch.rows
        ]  # fmt: skip

    def truncation(self, batch: MicroBatch) -> int:
        """First step whose network call keeps its gradient, in [0,T): `fixed` is T-1, the last call alone.

        `rand`: normal with the configured mean and deviation as shares of T, redrawn until in [1,T) and rounded down;
        `uniform`: each step alike. One step leaves only 0.
        """
        steps = self.context.sampler.steps
        first = batch.rows[0]
        seed = derive_seed(self.context.run_seed, Stream.TRUNCATION, batch.step, first.group, first.sample)
        return draw_truncation(self.config, steps, seed)

    def _scorer(self) -> ScoreGradient:
        assert self.context.score_gradient is not None, "validate refuses a run without a scorer that offers gradients"
        return self.context.score_gradient


def draw_truncation(config: AlignPropConfig, steps: int, seed: int) -> int:
    """The truncation step of `config` for `steps` sampler steps, from `seed`."""
    if steps == 1 or config.truncation == "fixed":
        return steps - 1
    rng = np.random.default_rng(seed)
    if config.truncation == "uniform":
        return int(rng.integers(steps))
    for _ in range(1000):
        drawn = int(np.floor(rng.normal(config.truncation_mean * steps, config.truncation_std * steps)))
        if 1 <= drawn < steps:
            return drawn
    return min(max(int(config.truncation_mean * steps), 1), steps - 1)


def to_uint8(images: Tensor) -> np.ndarray:
    """uint8 [N,H,W,3] of images [N,3,H,W] in [0,1]."""
    pixels = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def read_table(table: ScoreTable, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(values [N], gradients like images, valid [N]) on the device of images [N,3,H,W].

    A row is valid when its first column is OK and its gradient finite; values and gradients are 0 elsewhere.
    """
    size = len(images)
    if table.gradients is None or table.gradients.shape[1:3] != images.shape[2:]:
        gradients = np.full((size, *images.shape[2:], 3), np.nan, np.float32)
    else:
        gradients = np.asarray(table.gradients, np.float32)
    valid = table.valid()[:, 0] & np.isfinite(gradients).all(axis=(1, 2, 3))
    values = np.where(valid, table.values[:, 0], 0.0)
    gradients = np.where(valid[:, None, None, None], gradients, 0.0).transpose(0, 3, 1, 2)
    return (
        torch.from_numpy(values).to(images.device, torch.float32),
        torch.from_numpy(np.ascontiguousarray(gradients)).to(images.device),
        torch.from_numpy(valid).to(images.device),
    )
