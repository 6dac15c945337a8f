"""PickScore (arXiv 2305.01569): exp(logit scale) times the cosine of image and prompt, about 15 to 25.

Flow-GRPO and others divide it by 26: that is a weight of 1/26 in the run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from contracts.config.scorers import PickScoreOptions
from reward_servers.scorers.base import ScoreBatch, declared
from reward_servers.scorers.parts.model_scorer import D, TorchScorer

if TYPE_CHECKING:
    import torch

    from reward_servers.scorers.parts.preprocess import Preprocess
    from reward_servers.scorers.parts.towers import Towers

PICKSCORE_V1 = "yuvalkirstain/PickScore_v1"
LAION_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # whose tokenizer and image processor its authors load


def load_pickscore(options: PickScoreOptions) -> tuple[Towers, Preprocess]:
    """The towers, with the tokenizer and image processor that go with them."""
    from reward_servers.scorers.parts.towers import load_clip

    processor = options.processor or (LAION_H if options.model == PICKSCORE_V1 else options.model)
    return load_clip(options.model, options, processor)


class PickScoreModel(TorchScorer[D]):
    """Loading and arithmetic of PickScore, for its point and its pair table."""

    paper = "Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation (2305.01569)"

    def load(self) -> None:
        self.towers, self.preprocess = load_pickscore(cast(PickScoreOptions, self.options))
        self.weighed(self.towers.network)

    def forward(self, pixels: torch.Tensor, batch: ScoreBatch) -> torch.Tensor:
        cosine = (self.towers.images(pixels) * self.towers.texts(batch.prompts)).sum(dim=1, keepdim=True)
        return self.towers.scale * cosine


class PickScore(PickScoreModel[PickScoreOptions]):
    """The published score, with its gradient."""

    declares = declared("pickscore")
    name = "pickscore"
