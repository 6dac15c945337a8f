"""A reward model that `python -m reward_servers train` made: PickScore's arithmetic or its head's, minus an anchor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from contracts.config.scorers import TrainedOptions
from reward_servers.scorers.base import ScoreBatch, declared
from reward_servers.scorers.parts.model_scorer import TorchScorer

if TYPE_CHECKING:
    import torch


class Trained(TorchScorer[TrainedOptions]):
    """exp(logit scale) cos(image, prompt) - anchor, or the head's output in place of the cosine; with its gradient.

    uncertainty: ||z||_{V^-1}, how far from all training images this one is (training/coverage.py).
    """

    declares = declared("trained")
    name = "trained"
    paper = "Learning to summarize from human feedback (2009.01325)"

    def load(self) -> None:
        from transformers import AutoTokenizer

        from reward_servers.scorers.parts.loading import load_tool
        from reward_servers.scorers.parts.towers import load_clip
        from reward_servers.training.coverage import load_coverage
        from reward_servers.training.model import read_anchor
        from reward_servers.training.query_head import load_head

        self.towers, self.preprocess = load_clip(self.options.model, self.options)
        self.anchor = read_anchor(self.options.model)
        self.head = load_head(self.options.model, self.towers.network)
        if self.head is not None:
            self.tokenizer = load_tool(AutoTokenizer, self.options.model, self.options)
        self.weighed(self.towers.network, *([self.head] if self.head is not None else []))
        self.coverage = load_coverage(self.options.model)
        # The same weights with another anchor or another coverage say something else.
        covered = f"-{self.coverage.digest()[:6]}" if self.coverage is not None else ""
        self.version = f"{self.version}-{self.anchor:.6g}{covered}"

    def forward(self, pixels: torch.Tensor, batch: ScoreBatch) -> torch.Tensor:
        return self._reward(self._features(pixels, batch))

    def judged(self, pixels: torch.Tensor, batch: ScoreBatch) -> tuple[torch.Tensor, torch.Tensor | None]:
        features = self._features(pixels, batch)
        unsure = None if self.coverage is None else self.coverage.uncertainty(features)[:, None]
        return self._reward(features), unsure

    def _features(self, pixels: torch.Tensor, batch: ScoreBatch) -> torch.Tensor:
        """float32 [N,D], as in training: products of unit embeddings, or what the head pools."""
        if self.head is None:
            return self.towers.images(pixels) * self.towers.texts(batch.prompts)
        from reward_servers.scorers.parts.towers import CLIP_TOKENIZING

        tokens = self.tokenizer(list(batch.prompts), return_tensors="pt", **CLIP_TOKENIZING).to(pixels.device)
        given = {key: tokens[key] for key in ("input_ids", "attention_mask") if key in tokens}
        return self.head.pool(self.towers.network, pixels, given)

    def _reward(self, features: torch.Tensor) -> torch.Tensor:
        if self.head is not None:
            return self.head.reward(features)[:, None] - self.anchor
        return self.towers.scale * features.sum(dim=1, keepdim=True) - self.anchor
