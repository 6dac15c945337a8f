"""Human Preference Score v2 and v2.1 (arXiv 2306.09341): the cosine of image and prompt, about 0.2 to 0.35.

The two releases are one arithmetic with two sets of weights. The image is shrunk by its longest edge and padded with
black to the tower's square, unlike CLIP's own crop.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from contracts.config.scorers import HPSv2Options
from reward_servers.scorers.base import ScoreBatch, declared
from reward_servers.scorers.parts.model_scorer import TorchScorer

if TYPE_CHECKING:
    import torch

LAION_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # the tokenizer is its


class HPSv2(TorchScorer[HPSv2Options]):
    """cos(image, prompt) in [-1,1], with its gradient; the version names the release."""

    declares = declared("hpsv2")
    name = "hpsv2"
    paper = "Human Preference Score v2 (2306.09341)"
    value_range: tuple[float | None, float | None] = (-1.0, 1.0)
    columns_bounded = True

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.version = f"{self.options.release}-{self.version}"

    def load(self) -> None:
        from reward_servers.scorers.parts.preprocess import PaddedPreprocess
        from reward_servers.scorers.parts.towers import load_clip

        source = self.options.model
        self.towers, _ = load_clip(
            source, self.options, self.options.processor or (LAION_H if Path(source).is_file() else None)
        )
        self.preprocess = PaddedPreprocess(int(self.towers.network.config.vision_config.image_size))
        self.weighed(self.towers.network)

    def forward(self, pixels: torch.Tensor, batch: ScoreBatch) -> torch.Tensor:
        return (self.towers.images(pixels) * self.towers.texts(batch.prompts)).sum(dim=1, keepdim=True)
