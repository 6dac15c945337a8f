"""CLIP similarity: the cosine of image and prompt (Radford et al., arXiv 2103.00020)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from contracts.config.scorers import ClipOptions
from reward_servers.scorers.base import ScoreBatch, declared
from reward_servers.scorers.parts.model_scorer import TorchScorer

if TYPE_CHECKING:
    import torch


class Clip(TorchScorer[ClipOptions]):
    """cos(image, prompt) in [-1,1], with d cos / d image."""

    declares = declared("clip")
    name = "clip"
    paper = "Learning Transferable Visual Models From Natural Language Supervision (2103.00020)"
    value_range = (-1.0, 1.0)
    columns_bounded = True

    def load(self) -> None:
        from reward_servers.scorers.parts.towers import load_clip

        self.towers, self.preprocess = load_clip(self.options.model, self.options)
        self.weighed(self.towers.network)

    def forward(self, pixels: torch.Tensor, batch: ScoreBatch) -> torch.Tensor:
        return (self.towers.images(pixels) * self.towers.texts(batch.prompts)).sum(dim=1, keepdim=True)
