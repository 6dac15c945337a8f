"""D2-Align (arXiv 2512.24146): HPSv2's cosine with the prompt moved along and against a learned direction.

plus = <image, norm(e + b)>, minus = <image, norm(e - b)>, corrected = minus + w (plus - minus); b = 0 makes all three
HPSv2's own score. Does not own: learning b (training/direction.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from contracts.config.scorers import D2AlignOptions
from reward_servers.scorers.base import ScoreBatch, declared, file_digest, weights_file
from reward_servers.scorers.hpsv2 import HPSv2

if TYPE_CHECKING:
    import torch


class D2Align(HPSv2):
    """Columns corrected, plus, minus; gradients are those of corrected."""

    declares = declared("d2_align")
    name = "d2_align"
    paper = "Taming Preference Mode Collapse via Directional Decoupling Alignment (2512.24146)"
    value_range = (None, None)
    columns_bounded = False
    options: D2AlignOptions  # type: ignore[assignment]

    def load(self) -> None:
        from reward_servers.scorers.parts.loading import device_of
        from reward_servers.training.direction import read_direction

        super().load()
        path: Path = weights_file(self.options.direction)
        width = int(self.towers.network.config.projection_dim)
        direction, self.strength = read_direction(path, width)
        self.direction: Any = direction.to(device_of(self.options))
        self.version = f"{self.version}-{file_digest(path)[:8]}"

    def forward(self, pixels: torch.Tensor, batch: ScoreBatch) -> torch.Tensor:
        import torch

        from reward_servers.training.direction import corrected, moved

        image = self.towers.images(pixels)
        plus, minus = ((image * text).sum(dim=1) for text in moved(self.towers.texts(batch.prompts), self.direction))
        return torch.stack([corrected(plus, minus, self.strength), plus, minus], dim=1)
