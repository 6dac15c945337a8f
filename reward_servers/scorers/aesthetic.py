"""LAION's aesthetic predictor (improved-aesthetic-predictor; the reward of DDPO, arXiv 2305.13301): about 1 to 10.

A chain of linear layers on CLIP ViT-L/14's unit image embedding; the prompt plays no part.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from contracts.config.scorers import AestheticOptions
from reward_servers.scorers.base import ScoreBatch, declared
from reward_servers.scorers.parts.model_scorer import TorchScorer

if TYPE_CHECKING:
    import torch


class Aesthetic(TorchScorer[AestheticOptions]):
    """The predicted rating, unbounded in principle, with its gradient."""

    declares = declared("aesthetic")
    name = "aesthetic"
    paper = "LAION-5B (2210.08402), improved aesthetic predictor"

    def load(self) -> None:
        from reward_servers.scorers.parts.linear_head import LinearHead
        from reward_servers.scorers.parts.loading import device_of, read_tensors
        from reward_servers.scorers.parts.towers import load_clip

        self.towers, self.preprocess = load_clip(self.options.model, self.options)
        width = self.towers.network.config.projection_dim
        head = self.options.head
        self.head = LinearHead(read_tensors(Path(head)), width, head).to(device_of(self.options))
        self.weighed(self.towers.network, self.head)

    def forward(self, pixels: torch.Tensor, batch: ScoreBatch) -> torch.Tensor:
        return self.head(self.towers.images(pixels))[:, None]
