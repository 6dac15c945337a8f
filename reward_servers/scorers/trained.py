"""A reward model that `python -m reward_servers train` made: PickScore's arithmetic, minus its anchor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from contracts.config.scorers import TrainedOptions
from reward_servers.scorers.base import ScoreBatch, declared
from reward_servers.scorers.parts.model_scorer import TorchScorer

if TYPE_CHECKING:
    import torch


class Trained(TorchScorer[TrainedOptions]):
    """exp(logit scale) cos(image, prompt) - anchor, with its gradient."""

    declares = declared("trained")
    name = "trained"
    paper = "Learning to summarize from human feedback (2009.01325)"

    def load(self) -> None:
        from reward_servers.scorers.parts.towers import load_clip
        from reward_servers.training.model import read_anchor

        self.towers, self.preprocess = load_clip(self.options.model, self.options)
        self.anchor = read_anchor(self.options.model)
        self.weighed(self.towers.network)
        self.version = f"{self.version}-{self.anchor:.6g}"  # the same weights with another anchor score otherwise

    def forward(self, pixels: torch.Tensor, batch: ScoreBatch) -> torch.Tensor:
        cosine = (self.towers.images(pixels) * self.towers.texts(batch.prompts)).sum(dim=1, keepdim=True)
        return self.towers.scale * cosine - self.anchor
