"""Owns the fitting of the differentiable scorer to the verifier's dense score.

    python -m playground.train.fit_scorer --base playground/base

Trains on captions of the train split only, with pictures that are right, wrong by one attribute,
spoilt, or painted by the base. Reports rank correlation with the verifier on test captions.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch.nn.functional import binary_cross_entropy_with_logits

from playground.scorer.network import WEIGHTS, Scorer, encode_specs
from playground.train.sample import Settings, paint
from playground.world.captions import Spec
from playground.world.prompts import held_out_prompts, prompt_stream, specs_by_kind
from playground.world.reliability import blurred, noisy, wrong_by_one
from playground.world.render import render
from playground.world.scenes import sample_scene
from playground.world.verify import verify


@dataclass(frozen=True)
class Painted:
    """What the base made of captions: [N, 32, 32, 3] uint8 and the captions asked for."""

    pictures: np.ndarray
    specs: Sequence[Spec]


def paint_with(base: Path, specs: Sequence[Spec], seed: int) -> Painted:
    """Pictures by the base, at few and at many steps, with and without guidance."""
    pipeline = DiffusionPipeline.from_pretrained(base, dtype=torch.float32)
    ways = [Settings(4, 2.0, 1.0), Settings(8, 2.0, 1.0), Settings(8, 2.0, 3.0)]
    batches = [
        paint(pipeline, [spec.text for spec in specs[i : i + 64]], ways[i // 64 % 3], seed + i)
        for i in range(0, len(specs), 64)
    ]
    return Painted(np.concatenate(batches), specs)


def draw(split: str, painted: Painted, rng: np.random.Generator) -> tuple[np.ndarray, Spec, float]:
    """A picture, a caption for it that may be wrong, and the verifier's dense score."""
    if rng.random() < 0.3:
        i = int(rng.integers(len(painted.specs)))
        picture, spec = painted.pictures[i], painted.specs[i]
    else:
        by_kind = specs_by_kind(split)
        of_kind = list(by_kind.values())[rng.integers(len(by_kind))]
        spec = of_kind[rng.integers(len(of_kind))]
        picture = spoil(render(sample_scene(spec, rng)), rng)
    if rng.random() < 0.5:
        wrong = wrong_by_one(spec)
        spec = wrong[rng.integers(len(wrong))]
    return picture, spec, verify(picture, spec).dense


def spoil(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Leaves half as they are; blurs, adds noise, erases a part or fades the others."""
    way = rng.integers(8)
    if way == 0:
        return noisy(picture, rng, rng.uniform(0.02, 0.15))
    if way == 1:
        return blurred(picture, rng, rng.uniform(0.4, 1.5))
    if way == 2:
        left, top = rng.integers(0, 24, 2)
        picture = picture.copy()
        picture[top : top + 8, left : left + 8] = 40
        return picture
    if way == 3:
        faded = 40 + (picture.astype(float) - 40) * rng.uniform(0.1, 1.0)
        return noisy(faded, rng, 0.03)
    return picture


def batch_of(
    split: str, painted: Painted, size: int, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    pictures, specs, scores = zip(*(draw(split, painted, rng) for _ in range(size)), strict=True)
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    return images, encode_specs(specs), torch.tensor(scores, dtype=torch.float32)


def fit(painted: Painted, steps: int, seed: int, lr: float = 2e-3, size: int = 64) -> Scorer:
    """Cross-entropy with the dense score, which tells nearly right from right better than least squares does."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = Scorer()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a quarter faster on a CPU
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    losses = []
    for step in range(steps):
        images, specs, scores = batch_of("train", painted, size, rng)
        images = images.to(memory_format=torch.channels_last)
        loss = binary_cross_entropy_with_logits(model.logits(images, specs), scores)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 250 == 0:
            print(f"step {step + 1}/{steps} loss {np.mean(losses[-250:]):.4f}", flush=True)
    return model.eval()


@torch.no_grad()
def correlation(model: Scorer, painted: Painted, num: int, seed: int) -> float:
    """Spearman's, with the verifier, on test captions."""
    images, specs, scores = batch_of("test", painted, num, np.random.default_rng(seed))
    return spearman(model(images, specs).numpy(), scores.numpy())


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    return float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ties share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, default=Path("playground/base"))
    parser.add_argument("--steps", type=int, default=4_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    stream = prompt_stream("train", args.seed)
    painted = paint_with(args.base, [next(stream) for _ in range(3_072)], args.seed)
    model = fit(painted, args.steps, args.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, args.out)
    held_out = paint_with(args.base, held_out_prompts("test", 768, args.seed), args.seed + 1)
    print(f"rank correlation on test captions: {correlation(model, held_out, 4_000, 1):.3f}")


if __name__ == "__main__":
    main()
