"""A reward model that reads clean latents, so that nothing is decoded (the latent proxy of rg-lcd, arXiv 2403.11027).

A CLIP whose image tower has as many input channels as the latents; score = exp(logit scale) cos(latent, prompt).
Latents of another size are resized bilinearly to the tower's. Does not own: training one (reward_servers train).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from contracts.config.scorers import LatentOptions
from contracts.scores import ScoreTable
from reward_servers.scorers.base import ScoreBatch, declared
from reward_servers.scorers.parts.model_scorer import OptionScorer

if TYPE_CHECKING:
    import torch


class Latent(OptionScorer[LatentOptions]):
    """Score of latents floating [N,C,h,w]; gradients are d score / d latent."""

    declares = declared("latent")
    name = "latent"
    paper = "Reward Guided Latent Consistency Distillation (2403.11027)"

    def load(self) -> None:
        from transformers import AutoTokenizer, CLIPModel

        from reward_servers.scorers.parts import loading
        from reward_servers.scorers.parts.towers import CLIP_TOKENIZING, Towers

        network = loading.load_network(CLIPModel, self.options.model, self.options)
        tokenizer = loading.load_tool(AutoTokenizer, self.options.model, self.options)
        self.towers = Towers(network, tokenizer, CLIP_TOKENIZING)
        self.shape = (int(network.config.vision_config.num_channels), int(network.config.vision_config.image_size))
        self.weighed(network)

    def canary(self) -> ScoreBatch:
        channels, size = self.shape
        latents = np.linspace(-1, 1, channels * size * size, dtype=np.float32).reshape(1, channels, size, size)
        return ScoreBatch(np.zeros((0, 0, 0, 3), np.uint8), ("a grey square",), ({},), latents)

    def score(self, batch: ScoreBatch) -> ScoreTable:
        import torch

        from reward_servers.scorers.parts.loading import device_of

        assert batch.latents is not None
        latents = torch.from_numpy(np.array(batch.latents, np.float32)).to(device_of(self.options))
        with torch.set_grad_enabled(batch.want_gradients):
            values = self._values(latents.requires_grad_(batch.want_gradients), batch)
        if not batch.want_gradients:
            return self.table(values.cpu().numpy())
        (gradient,) = torch.autograd.grad(values.sum(), latents)
        return self.table(values.detach().cpu().numpy(), gradients=gradient.cpu().numpy())

    def _values(self, latents: torch.Tensor, batch: ScoreBatch) -> torch.Tensor:
        """float32 [N]."""
        from torch.nn import functional as F

        channels, size = self.shape
        if latents.shape[1] != channels:
            raise ValueError(f"latents of {latents.shape[1]} channels for a model of {channels}")
        scaled = (latents - self.options.shift) * self.options.scale
        if scaled.shape[-2:] != (size, size):
            scaled = F.interpolate(scaled, (size, size), mode="bilinear", antialias=True, align_corners=False)
        images = self.towers.images(scaled.to(self.towers.network.dtype))
        return self.towers.scale * (images * self.towers.texts(batch.prompts)).sum(dim=1)
