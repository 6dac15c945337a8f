"""A scorer that costs what a real one costs: CLIP's vision transformer at ViT-S/32's size, with random weights.

Its scores mean nothing; its arithmetic, a forward pass of 224 x 224 pixels, is that of the scorers people train with.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from contracts.declarations import ScorerGives
from contracts.scores import ScoreTable
from reward_servers.scorers.base import ScoreBatch, Scorer


class VisionTower(Scorer):
    """The mean of the image's embedding."""

    declares = ScorerGives(columns=("mean",))
    name = "vision_tower"
    _network: Any

    def load(self) -> None:
        import torch
        from transformers import CLIPVisionConfig, CLIPVisionModel

        torch.set_num_threads(1)
        torch.manual_seed(0)
        size = CLIPVisionConfig(
            hidden_size=384, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=6, patch_size=32
        )
        self._network = CLIPVisionModel(size).eval()

    def score(self, batch: ScoreBatch) -> ScoreTable:
        import torch

        pixels = torch.from_numpy(batch.images.astype(np.float32) / 255).permute(0, 3, 1, 2)
        with torch.no_grad():
            pixels = torch.nn.functional.interpolate(pixels, (224, 224), mode="bicubic", antialias=True)
            return self.table(self._network(pixels).pooler_output.mean(dim=1, keepdim=True).numpy())
