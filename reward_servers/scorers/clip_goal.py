"""CLIP reward with goal-baseline regularisation (vlm-rm, arXiv 2310.12921, section 3).

g, b: unit mean embeddings of the texts of the goal and of the baseline; x: unit image embedding; d = g - b;
P = alpha d d^T / |d|^2 + (1 - alpha) I;  R = 1 - |P (x - g)|^2 / 2.  alpha = 0 is the plain cosine with the goal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from contracts.config.scorers import ClipGoalOptions
from reward_servers.scorers.base import ScoreBatch, declared
from reward_servers.scorers.parts.model_scorer import TorchScorer

if TYPE_CHECKING:
    import torch

_SAME = 1e-12  # |d|^2 below which goal and baseline are one text and there is no direction


class ClipGoal(TorchScorer[ClipGoalOptions]):
    """R in [-1,1]. Goal: metadata['goal'] (a text or several), else the option, else the prompt."""

    declares = declared("clip_goal")
    name = "clip_goal"
    paper = "Vision-Language Models are Zero-Shot Reward Models for Reinforcement Learning (2310.12921)"
    value_range = (-1.0, 1.0)
    columns_bounded = True

    def load(self) -> None:
        from reward_servers.scorers.parts.towers import load_clip

        self.towers, self.preprocess = load_clip(self.options.model, self.options)
        self.weighed(self.towers.network)

    def forward(self, pixels: torch.Tensor, batch: ScoreBatch) -> torch.Tensor:
        import torch

        goals = [self._goal(*row) for row in zip(batch.prompts, batch.metadata, strict=True)]
        goal = torch.stack([self.towers.mean_text(texts) for texts in goals])
        return goal_baseline_reward(
            self.towers.images(pixels), goal, self.towers.mean_text(self.options.baseline), self.options.alpha
        )[:, None]

    def _goal(self, prompt: str, metadata: dict[str, Any]) -> Sequence[str]:
        given = metadata.get("goal", self.options.goal or prompt)
        texts = (given,) if isinstance(given, str) else tuple(given)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"metadata['goal'] is {given!r}, not a text or a list of texts")
        return texts


def goal_baseline_reward(
    images: torch.Tensor, goal: torch.Tensor, baseline: torch.Tensor, alpha: float
) -> torch.Tensor:
    """R [N] from unit embeddings: images [N,D], goal [N,D], baseline [D]. Where goal = baseline alpha counts as 0."""
    direction = goal - baseline
    length = direction.square().sum(dim=1, keepdim=True)
    share = alpha * (length > _SAME).to(images.dtype)
    away = images - goal
    along = (away * direction).sum(dim=1, keepdim=True) / length.clamp(min=_SAME) * direction
    return 1 - (share * along + (1 - share) * away).square().sum(dim=1) / 2
