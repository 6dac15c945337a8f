"""Likeness to a reference image by DINOv2 (arXiv 2304.07193), the DINO score of DreamBooth (arXiv 2208.12242).

The reference is metadata['reference']: {"png": base64 of a PNG} travels by value; {"file": name} is read from the
server's own folder (option `references`). Does not own: which reference belongs to a prompt.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np

from contracts.config.scorers import DinoSimilarityOptions
from reward_servers.scorers.base import ScoreBatch, declared
from reward_servers.scorers.parts.model_scorer import TorchScorer
from reward_servers.scorers.parts.references import png_metadata, read_reference

if TYPE_CHECKING:
    import torch

_CACHED = 256


class DinoSimilarity(TorchScorer[DinoSimilarityOptions]):
    """cos(DINO(image), DINO(reference)) in [-1,1], with its gradient."""

    declares = declared("dino_similarity")
    name = "dino_similarity"
    paper = "DINOv2 (2304.07193), DreamBooth (2208.12242)"
    value_range = (-1.0, 1.0)
    columns_bounded = True

    def load(self) -> None:
        from reward_servers.scorers.parts.dino import load_dino

        self.network, self.preprocess = load_dino(self.options)
        self._known: OrderedDict[str, torch.Tensor] = OrderedDict()
        self.weighed(self.network)

    def canary(self) -> ScoreBatch:
        grey = np.full((1, 32, 32, 3), 128, np.uint8)
        return ScoreBatch(grey, ("a grey square",), ({"reference": png_metadata(grey[0])},))

    def forward(self, pixels: torch.Tensor, batch: ScoreBatch) -> torch.Tensor:
        import torch

        from reward_servers.scorers.parts.dino import embed

        references = torch.stack([self._reference(metadata) for metadata in batch.metadata])
        return (embed(self.network, pixels) * references).sum(dim=1, keepdim=True)

    def _reference(self, metadata: dict[str, Any]) -> torch.Tensor:
        """Its embedding [D]. Raises ValueError that says what is wrong with it."""
        import torch

        from reward_servers.scorers.parts.dino import embed

        key, read = read_reference(metadata.get("reference"), self.options.references)
        if key not in self._known:
            with torch.no_grad():
                self._known[key] = embed(self.network, self._pixels(self.preprocess.exact(read()[None])))[0]
            if len(self._known) > _CACHED:
                self._known.popitem(last=False)
        return self._known[key]
