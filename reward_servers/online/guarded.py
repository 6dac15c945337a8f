"""Adv-GRPO's guarded PickScore: its last vision layers learn, and only while it prefers what the policy paints.

    trigger:  mean s(reference) < mean s(generated)           (the scorer is being hacked)
    loss:     -log softmax([s(reference), s(generated)])[reference], over all pairs of a prompt;   Adam, lr 5e-6

s = exp(logit scale) cos(image, prompt). "The Image as Its Own Reward" (showlab/Adv-GRPO:
adv_grpo/pick_score_training.py). Text tower, projections and scale stay as published.
Does not own: the score (scorers.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from contracts.config.online import GuardedPickScoreConfig
from contracts.config.scorers import GuardedPickScoreOptions
from contracts.errors import ConfigError
from reward_servers.online.heads import moments, set_moments
from reward_servers.online.inbox import FedGroup
from reward_servers.online.references import References
from reward_servers.online.trainer import Arrays, Metrics, OnlineTrainer
from reward_servers.scorers.parts.loading import device_of, dtype_of, tensors_digest

LAYER = "layer."


def preference_loss(reference: Tensor, generated: Tensor) -> Tensor:
    """Cross entropy of the reference against the generated one, mean over all pairs of [M] and [N] scores."""
    return F.softplus(generated[None, :] - reference[:, None]).mean()


def hacked(reference: Tensor, generated: Tensor) -> bool:
    """Whether the scorer prefers generated images to references: the trigger of an update."""
    return bool(reference.mean() < generated.mean())


class GuardedPickScore(OnlineTrainer):
    """Trains the last vision layers of a CLIP in PickScore's format."""

    config: GuardedPickScoreConfig

    def __init__(self, config: GuardedPickScoreConfig, options: Mapping[str, Any], seed: int) -> None:
        super().__init__(config, options, seed)
        self.options = GuardedPickScoreOptions.model_validate(dict(options))
        self.looked_at = self.triggered = 0

    def load(self) -> None:
        from reward_servers.scorers.pickscore import load_pickscore

        self.references = References(self.config.references, self.config.per_prompt)
        self.towers, self.preprocess = load_pickscore(self.options)
        self.base = tensors_digest(self.towers.network)
        self.named = last_layers(self.towers.network, self.config.layers)
        for parameter in self.named.values():
            parameter.requires_grad_()
        self.optimizer = torch.optim.Adam(self.named.values(), lr=self.config.lr)

    def restore(self, weights: Mapping[str, np.ndarray], state: Mapping[str, np.ndarray]) -> None:
        set_layers(self.towers.network, weights)
        set_moments(self.optimizer, self.named, state)

    def learn(self, item: FedGroup) -> Metrics | None:
        references = self.references.draw(item.prompt, self.config.references_per_update, self.rng())
        if not references:
            return None
        with torch.no_grad():
            reference, generated = self.score(references, item.prompt), self.score(list(item.images), item.prompt)
        self.looked_at += 1
        if not hacked(reference, generated):
            return None
        self.triggered += 1
        return self.update(references, list(item.images), item.prompt)

    def update(self, references: Sequence[np.ndarray], generated: Sequence[np.ndarray], prompt: str) -> Metrics:
        """One step, whatever the trigger says."""
        scores = self.score([*references, *generated], prompt)
        real, fake = scores[: len(references)], scores[len(references) :]
        loss = preference_loss(real, fake)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": float(loss.detach()), "real": float(real.detach().mean()), "fake": float(fake.detach().mean())}

    def score(self, images: Sequence[np.ndarray], prompt: str) -> Tensor:
        """s [N] of uint8 images of any sizes."""
        parts = [self.preprocess.exact(image[None]) for image in images]
        pixels = torch.cat(parts).to(device_of(self.options), dtype_of(self.options))
        return self.towers.scale * (self.towers.images(pixels) * self.towers.texts([prompt])).sum(dim=1)

    def counts(self) -> Metrics:
        return {"triggered_share": self.triggered / self.looked_at if self.looked_at else 0.0}

    def pack(self) -> tuple[Arrays, Arrays, dict[str, Any]]:
        weights = {LAYER + name: p.detach().float().cpu().numpy().copy() for name, p in self.named.items()}
        return weights, moments(self.optimizer, self.named), {"base": self.base}


def last_layers(network: Any, number: int) -> dict[str, torch.nn.Parameter]:
    """Parameters of the last `number` vision layers by name. Raises ConfigError when there are fewer."""
    total = int(network.config.vision_config.num_hidden_layers)
    if number > total:
        raise ConfigError("online.layers", f"the vision tower has {total} layers, not {number}")
    prefixes = tuple(f"vision_model.encoder.layers.{index}." for index in range(total - number, total))
    return {name: parameter for name, parameter in sorted(network.named_parameters()) if name.startswith(prefixes)}


def set_layers(network: Any, arrays: Mapping[str, np.ndarray]) -> None:
    """Put a version's layers in place. Raises KeyError or ValueError when they are not of this network."""
    own = dict(network.named_parameters())
    found = {name.removeprefix(LAYER): array for name, array in arrays.items() if name.startswith(LAYER)}
    for name, array in found.items():
        if own[name].shape != array.shape:
            raise ValueError(f"{name} has shape {array.shape}, not {tuple(own[name].shape)}")
    with torch.no_grad():
        for name, array in found.items():
            own[name].copy_(torch.from_numpy(array.copy()))
