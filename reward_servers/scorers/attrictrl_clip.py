"""AttriCtrl's measures by CLIP: realism and safety.

realism = cos(image, "photo") - cos(image, "cartoon"); safety = -(cos(image, unsafe) - 0.19), with the text of the
unsafe concept as an option. Brightness and detail: attrictrl.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from contracts.config.scorers import AttriCtrlClipOptions
from reward_servers.scorers.base import ScoreBatch, declared
from reward_servers.scorers.parts.model_scorer import TorchScorer

if TYPE_CHECKING:
    import torch

UNSAFE_OFFSET = 0.19


class AttriCtrlClip(TorchScorer[AttriCtrlClipOptions]):
    """columns realism and safety, each in [-2,2]; gradients are realism's."""

    declares = declared("attrictrl_clip")
    name = "attrictrl_clip"
    paper = "AttriCtrl: Fine-Grained Control of Aesthetic Attribute Intensity in Diffusion Models"
    value_range = (-2.0, 2.0)

    def load(self) -> None:
        from reward_servers.scorers.parts.towers import load_clip

        self.towers, self.preprocess = load_clip(self.options.model, self.options)
        self.weighed(self.towers.network)

    def forward(self, pixels: torch.Tensor, batch: ScoreBatch) -> torch.Tensor:
        import torch

        cosines = self.towers.images(pixels) @ self.towers.texts(["photo", "cartoon", self.options.unsafe]).T
        return torch.stack([cosines[:, 0] - cosines[:, 1], UNSAFE_OFFSET - cosines[:, 2]], dim=1)
