"""SigLIP (arXiv 2303.15343): the cosine of image and prompt, and the probability that they belong together.

probability = sigmoid(exp(logit scale) cos + logit bias). Texts are lower-cased by nobody and padded as in training.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from contracts.config.scorers import SiglipOptions
from reward_servers.scorers.base import ScoreBatch, declared
from reward_servers.scorers.parts.model_scorer import TorchScorer

if TYPE_CHECKING:
    import torch


class Siglip(TorchScorer[SiglipOptions]):
    """columns cosine and probability; gradients are the cosine's."""

    declares = declared("siglip")
    name = "siglip"
    paper = "Sigmoid Loss for Language Image Pre-Training (2303.15343)"
    value_range = (-1.0, 1.0)
    columns_bounded = True

    def load(self) -> None:
        from reward_servers.scorers.parts.towers import load_siglip

        self.towers, self.preprocess = load_siglip(self.options.model, self.options)
        self.weighed(self.towers.network)

    def forward(self, pixels: torch.Tensor, batch: ScoreBatch) -> torch.Tensor:
        import torch

        cosine = (self.towers.images(pixels) * self.towers.texts(batch.prompts)).sum(dim=1)
        logit = self.towers.scale * cosine + self.towers.network.logit_bias.float()
        return torch.stack([cosine, logit.sigmoid()], dim=1)
