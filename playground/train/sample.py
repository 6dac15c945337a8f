"""Owns painting with a playground pipeline for training and evaluation, and its strict accuracy.

A plain loop over flow matching with classifier-free guidance: with Euler steps the same arithmetic
as the pipeline's `__call__`, without its overhead. Owns no choice of settings (see `choose`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline

from playground.train.pipeline import LATENT_SCALE, LATENT_SHIFT, TEXT_TOKENS
from playground.world.captions import Spec
from playground.world.scenes import SIZE
from playground.world.verify import verify
from policy.rollout import Previous, mean_velocity


@dataclass(frozen=True)
class Settings:
    """How to paint: sigma goes from 1 to 0 in `steps`, bent by `shift`; guidance 1 is none; order 1 is Euler."""

    steps: int = 8
    shift: float = 2.0
    guidance_scale: float = 1.0
    order: int = 1


def sigmas(steps: int, shift: float) -> torch.Tensor:
    """[steps + 1]: evenly from 1 to 0, then bent as in FlowMatchEulerDiscreteScheduler."""
    even = torch.linspace(1.0, 0.0, steps + 1)
    return shift * even / (1 + (shift - 1) * even)


def encode(pipeline: StableDiffusion3Pipeline, texts: Sequence[str]) -> tuple[torch.Tensor, ...]:
    """Prompt embeddings [B, 2 * TEXT_TOKENS, D] and pooled ones [B, D], as the pipeline makes them."""
    prompts = list(texts)
    embeds, _, pooled, _ = pipeline.encode_prompt(
        prompts, prompts, prompts, do_classifier_free_guidance=False, max_sequence_length=TEXT_TOKENS
    )
    return embeds, pooled


@torch.no_grad()
def paint(pipeline: StableDiffusion3Pipeline, texts: Sequence[str], settings: Settings, seed: int) -> np.ndarray:
    """One picture a text: uint8 [B, 32, 32, 3]. The noise depends on the seed alone."""
    transformer = pipeline.transformer
    generator = torch.Generator().manual_seed(seed)
    x_BCHW = torch.randn(len(texts), 3, SIZE, SIZE, generator=generator).to(transformer.device)
    guided = settings.guidance_scale != 1.0
    embeds, pooled = encode(pipeline, [*texts, *[""] * len(texts)] if guided else texts)
    levels = sigmas(settings.steps, settings.shift).to(transformer.device)
    previous: Previous | None = None
    for now, after in pairwise(levels):
        batch = torch.cat([x_BCHW, x_BCHW]) if guided else x_BCHW
        velocity = transformer(
            hidden_states=batch,
            timestep=(now * 1000).expand(len(batch)),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        if guided:
            conditional, unconditional = velocity.chunk(2)
            velocity = unconditional + settings.guidance_scale * (conditional - unconditional)
        mean = mean_velocity(velocity, float(now), float(after), settings.order, previous)
        width = float(after - now)
        x_BCHW, previous = x_BCHW + width * mean, Previous(velocity, width)
    return to_uint8(x_BCHW * LATENT_SCALE + LATENT_SHIFT)


def to_uint8(pictures: torch.Tensor) -> np.ndarray:
    """From floats in [-1, 1], [B, 3, H, W], to uint8 [B, H, W, 3]."""
    levels = ((pictures + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).cpu().numpy()


def strict_by_kind(
    pipeline: StableDiffusion3Pipeline,
    specs: Sequence[Spec],
    settings: Settings,
    seed: int,
    batch: int = 64,
) -> dict[str, float]:
    """Strict accuracy for each kind, and over all of them under "all"."""
    verdicts: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(specs), batch):
        chunk = specs[start : start + batch]
        pictures = paint(pipeline, [spec.text for spec in chunk], settings, seed + start)
        for picture, spec in zip(pictures, chunk, strict=True):
            strict = verify(picture, spec).strict
            verdicts[spec.kind].append(strict)
            verdicts["all"].append(strict)
    return {kind: float(np.mean(values)) for kind, values in verdicts.items()}
