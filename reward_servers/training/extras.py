"""What Secrets of RLHF II (2401.06080) adds to the pair loss: contrastive features, MetaRM's look at shifted images.

    contrastive   L = L_rm + b L_cl,  L_cl on two dropout passes of the features (or of chosen minus rejected)
    MetaRM        theta' = theta + eta grad J(theta) on shifted images;  theta <- theta - a grad L(theta'), first order

Random pairs of a step follow from the seed and the step, so a resumed training sees the same ones.
Does not own: the losses (losses.py), the optimizer (trainer.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from contracts.errors import ConfigError
from reward_servers.training.config import TrainingConfig
from reward_servers.training.data import Sample, read_image, read_samples
from reward_servers.training.losses import simcse, spread, swav
from reward_servers.training.model import RewardModel

PROTOTYPES = "prototypes"


class Extras:
    """Of one training; does nothing where the settings ask for nothing."""

    def __init__(self, config: TrainingConfig, model: RewardModel) -> None:
        self.config, self.model = config, model
        self._pairs = shifted_pairs(config.meta.path) if config.meta is not None else []
        self._prototypes: torch.nn.Parameter | None = None
        if config.contrastive is not None and config.contrastive.kind == "swav":
            width = self._width()
            drawn = torch.randn(
                config.contrastive.prototypes, width, generator=torch.Generator().manual_seed(config.seed)
            )
            self._prototypes = torch.nn.Parameter(drawn.to(model.network.device))

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """What trains beside the model, by name."""
        return {} if self._prototypes is None else {PROTOTYPES: self._prototypes}

    def contrastive(self, features: Tensor) -> Tensor:
        """b L_cl of a batch's features [2B,D], chosen and rejected in turn; 0 without one."""
        settings = self.config.contrastive
        if settings is None:
            return features.new_zeros(())
        if settings.on == "difference":
            features = features[0::2] - features[1::2]
        first, second = (F.dropout(features, settings.dropout) for _ in range(2))
        if self._prototypes is not None:
            return settings.weight * swav(first, second, self._prototypes, settings.temperature)
        return settings.weight * simcse(first, second, settings.temperature)

    @contextmanager
    def moved(self, named: Mapping[str, torch.nn.Parameter], step: int) -> Iterator[None]:
        """MetaRM's theta' while the loss is worked out; afterwards the parameters are theta again, bit for bit."""
        meta = self.config.meta
        if meta is None:
            yield
            return
        rng = np.random.default_rng([self.config.seed, step, 2])
        chosen = [self._pairs[i] for i in rng.integers(len(self._pairs), size=meta.batch_size)]
        trained = [parameter for name, parameter in named.items() if name != PROTOTYPES]
        slopes = torch.autograd.grad(spread(self._rewards(chosen)), trained, allow_unused=True)
        before = [parameter.detach().clone() for parameter in trained]
        with torch.no_grad():
            for parameter, slope in zip(trained, slopes, strict=True):
                if slope is not None:
                    parameter.add_(slope, alpha=meta.lr)
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, old in zip(trained, before, strict=True):
                    parameter.copy_(old)

    def _rewards(self, pairs: list[tuple[Sample, Sample]]) -> Tensor:
        """[B,2], with gradient."""
        samples = [sample for pair in pairs for sample in pair]
        images = [read_image(sample.image, self.config.max_pixels) for sample in samples]
        return self.model.rewards(images, [sample.prompt for sample in samples]).reshape(-1, 2)

    def _width(self) -> int:
        return self.model.head.width if self.model.head is not None else int(self.model.network.config.projection_dim)


def shifted_pairs(path: str) -> list[tuple[Sample, Sample]]:
    """Every pair of images of one prompt. Raises ConfigError when there is none."""
    by_prompt: dict[str, list[Sample]] = {}
    for sample in read_samples(Path(path)):
        by_prompt.setdefault(sample.prompt, []).append(sample)
    pairs = [(a, b) for samples in by_prompt.values() for i, a in enumerate(samples) for b in samples[i + 1 :]]
    if not pairs:
        raise ConfigError("meta.path", f"{path} holds no two images of one prompt", "give several images a prompt")
    return pairs
