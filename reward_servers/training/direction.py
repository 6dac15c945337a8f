"""D2-Align's stage 1 (2512.24146): a direction b in a reward model's text space that counters its bias.

    e = text embedding (unit);  e+ = norm(e + b);  e- = norm(e - b);  e~ = e- + w (e+ - e-)
    b minimises E[-R],  R = <image embedding (unit), e~>,  over images of the generator as it is, which stays frozen

Stage 2 trains the generator on R with b frozen: scorer `d2_align`, or its columns plus and minus through
credit.aggregation.name=directional. The paper's images are clean estimates from noised data, t uniform; here they are
whatever the JSONL names: paint them with the policy that is to be trained. Image and text towers are read once.
The paper's factor of the logit scale is left out, as the score of HPSv2 leaves it out: it moves no optimum.
Does not own: the score (scorers/d2_align.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from contracts.config.load import read_tree
from contracts.config.scorers import HPSv2Options
from contracts.errors import ConfigError, ConfigErrors
from reward_servers.training.data import Sample, is_held_out, read_image, read_samples

DIRECTION, STRENGTH = "direction", "strength"


class DirectionConfig(HPSv2Options):
    """One direction. The model and its options are those of the scorer that it will correct."""

    images: str = Field(description="JSONL of the generator's images: prompt, image")
    out: str = Field(description="folder to write: direction.safetensors and card.json")
    strength: float = Field(default=1.5, gt=0.5, description="w; at 1/2 the reward does not depend on b's sign")
    steps: int = Field(default=2000, gt=0)
    batch_size: int = Field(default=32, gt=0)
    lr: float = Field(default=1e-3, gt=0)
    held_out_fraction: float = Field(default=0.1, gt=0, lt=1, description="of prompts, by their digest")
    seed: int = Field(default=0, ge=0)
    max_pixels: int = Field(default=2**24, gt=0)


def moved(text: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """(e+, e-) of unit embeddings [N,D] and b [D]; both e where b is 0."""
    return F.normalize(text + direction, dim=-1), F.normalize(text - direction, dim=-1)


def corrected(plus: Tensor, minus: Tensor, strength: float) -> Tensor:
    """e~, or R of it: minus + w (plus - minus). Linear, so it holds for embeddings and for scores alike."""
    return minus + strength * (plus - minus)


def reward(image: Tensor, text: Tensor, direction: Tensor, strength: float) -> Tensor:
    """R [N] of unit embeddings [N,D]."""
    return (image * corrected(*moved(text, direction), strength)).sum(dim=-1)


def learn(image: Tensor, text: Tensor, config: DirectionConfig, say: Callable[[str], None]) -> Tensor:
    """b [D] from unit embeddings [N,D], by Adam from 0 on batches drawn by the seed."""
    direction = torch.zeros(text.shape[1], requires_grad=True, device=text.device)
    optimizer = torch.optim.Adam([direction], lr=config.lr)
    rng = np.random.default_rng(config.seed)
    for step in range(1, config.steps + 1):
        rows = torch.from_numpy(rng.integers(len(image), size=config.batch_size)).to(text.device)
        loss = -reward(image[rows], text[rows], direction, config.strength).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(1, config.steps // 10) == 0:
            say(
                f"step {step}/{config.steps}  R {-float(loss.detach()):.4f}  |b| {float(direction.detach().norm()):.4f}"
            )
    return direction.detach()


def train_direction(config: DirectionConfig, say: Callable[[str], None]) -> Path:
    """Learn, measure on held-out prompts, write config.out. Raises ConfigError."""
    samples = read_samples(Path(config.images))
    splits: list[list[Sample]] = [[], []]
    for sample in samples:
        splits[is_held_out(sample.prompt, config.held_out_fraction)].append(sample)
    if not all(splits):
        raise ConfigError("images, held_out_fraction", f"{config.images} leaves a split without images",
                          "give more prompts, or another held_out_fraction")  # fmt: skip
    towers = _Embedder(config)
    say(f"{len(splits[0])} images to learn from, {len(splits[1])} held out")
    (image, text), (held_image, held_text) = (towers.embed(split) for split in splits)
    direction = learn(image, text, config, say)
    nothing = torch.zeros_like(direction)
    card = {
        "model": config.model, "base": towers.digest, "steps": config.steps, "images": len(splits[0]),
        "held_out": len(splits[1]), "norm": float(direction.norm()),
        "held_out_reward": {
            "before": float(reward(held_image, held_text, nothing, config.strength).mean()),
            "after": float(reward(held_image, held_text, direction, config.strength).mean()),
        },
        "settings": config.model_dump(mode="json"),
    }  # fmt: skip
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    tensors = {DIRECTION: direction.cpu(), STRENGTH: torch.tensor([config.strength])}
    save_file(tensors, out / "direction.safetensors", metadata={"base": towers.digest})
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    say(f"held-out R {card['held_out_reward']}; serve it with "
        f"`serve d2_align --option direction={out / 'direction.safetensors'}`")  # fmt: skip
    return out


def read_direction(path: Path, width: int) -> tuple[Tensor, float]:
    """(b, w) of a file. Raises ConfigError for one of another model."""
    tensors = load_file(path)
    if set(tensors) != {DIRECTION, STRENGTH} or tensors[DIRECTION].shape != (width,):
        raise ConfigError("direction", f"{path} holds no direction of {width} numbers", "learn one for this model")
    return tensors[DIRECTION].float(), float(tensors[STRENGTH])


def load_direction(path: str | Path, overrides: Sequence[str] = ()) -> DirectionConfig:
    """The settings of a YAML file. Raises ConfigErrors."""
    try:
        return DirectionConfig.model_validate(read_tree(Path(path), overrides))
    except ValidationError as error:
        raise ConfigErrors([
            ConfigError(".".join(map(str, one["loc"])) or "configuration", str(one["msg"])) for one in error.errors()
        ]) from error  # fmt: skip


class _Embedder:
    """Both towers of the reward model, preprocessed as its scorer does."""

    def __init__(self, config: DirectionConfig) -> None:
        from reward_servers.scorers.hpsv2 import HPSv2
        from reward_servers.scorers.parts.loading import device_of, dtype_of, tensors_digest

        fields = HPSv2Options.model_fields
        self.scorer: Any = HPSv2(**{name: value for name, value in config.model_dump().items() if name in fields})
        self.scorer.load()
        self.config, self.digest = config, tensors_digest(self.scorer.towers.network)
        self._to = (device_of(config), dtype_of(config))

    @torch.no_grad()
    def embed(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """Unit embeddings of images and of their prompts, float32 [N,D] each."""
        towers, images = self.scorer.towers, []
        for sample in samples:
            image = read_image(sample.image, self.config.max_pixels)
            images.append(towers.images(self.scorer.preprocess.exact(image[None]).to(*self._to)))
        return torch.cat(images), towers.texts([sample.prompt for sample in samples])
