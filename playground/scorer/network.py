"""Owns a differentiable stand-in for the verifier: a small CNN from picture and caption to a score.

Its weights are fitted by `playground.train.fit_scorer` to the verifier's dense score. It is
an estimate, and pictures can be found that please it alone: report strict accuracy beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from playground.world.captions import COLOURS, RELATIONS, SHAPES, Spec
from playground.world.scenes import SIZE

WEIGHTS = Path(__file__).with_name("scorer.safetensors")

_SLOT = len(SHAPES) + len(COLOURS)
_REST = len(RELATIONS) + 3
_VERDICT = 24  # numbers that say how a thing compares with what was asked for
SPEC_WIDTH = 2 * _SLOT + _REST
"""Of an encoded caption: two things, the relation, the count."""


def score(images: torch.Tensor, specs: Sequence[Spec]) -> torch.Tensor:
    """[B] scores from 0 to 1 of pictures [B, 3, 32, 32] in [0, 1], differentiable in the pictures."""
    model = _loaded(images.device)
    return model(images.float(), encode_specs(specs).to(images.device))


def encode_specs(specs: Sequence[Spec]) -> torch.Tensor:
    """Captions as [B, SPEC_WIDTH] of zeros and ones; what a caption leaves open is zero."""
    encoded = torch.zeros(len(specs), SPEC_WIDTH)
    for row, spec in zip(encoded, specs, strict=True):
        for i, thing in enumerate(spec.objects):
            row[i * _SLOT + SHAPES.index(thing.shape)] = 1
            if thing.colour:
                row[i * _SLOT + len(SHAPES) + COLOURS.index(thing.colour)] = 1
        if spec.relation:
            row[2 * _SLOT + RELATIONS.index(spec.relation)] = 1
        row[2 * _SLOT + len(RELATIONS) + spec.count - 1] = 1
    return encoded


class Scorer(nn.Module):
    """Convolutions told of the caption, then one look for each thing that it names.

    A thing's look is attention over the 8 x 8 map of features: what is there, and where. Both things
    go through the same weights, so that combinations nobody trained on are judged as well.
    """

    where: torch.Tensor  # [2, 32, 32]: each pixel's x and y

    def __init__(self, width: int = 56) -> None:
        super().__init__()
        self.stem = nn.Conv2d(5, width // 2, 3, padding=1)
        self.down_1 = nn.Conv2d(width // 2, width, 3, stride=2, padding=1)
        self.told_1 = nn.Linear(SPEC_WIDTH, 2 * width)
        self.conv_1 = nn.Conv2d(width, width, 3, padding=1)
        self.down_2 = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.told_2 = nn.Linear(SPEC_WIDTH, 2 * width)
        self.conv_2 = nn.Conv2d(width, width, 3, padding=1)
        self.query = nn.Linear(_SLOT, width)
        self.compare = nn.Sequential(nn.Linear(width + _SLOT, 64), nn.SiLU(), nn.Linear(64, _VERDICT))
        self.head = nn.Sequential(
            nn.Linear(2 * width + 2 * (_VERDICT + 2) + SPEC_WIDTH, 128), nn.SiLU(), nn.Linear(128, 1)
        )
        line = torch.linspace(-1, 1, SIZE)
        self.register_buffer("where", torch.stack(torch.meshgrid(line, line, indexing="xy")), False)

    def forward(self, images: torch.Tensor, encoded: torch.Tensor) -> torch.Tensor:
        """Scores [B]; see `logits`."""
        return self.logits(images, encoded).sigmoid()

    def logits(self, images: torch.Tensor, encoded: torch.Tensor) -> torch.Tensor:
        """Of images [B, 3, 32, 32] in [0, 1] and captions from `encode_specs`."""
        where = self.where.expand(len(images), -1, -1, -1)
        features = nn.functional.silu(self.stem(torch.cat([2 * images - 1, where], dim=1)))
        features = self._told(self.down_1(features), self.told_1(encoded))
        features = features + nn.functional.silu(self.conv_1(features))
        features = self._told(self.down_2(features), self.told_2(encoded))
        features = features + nn.functional.silu(self.conv_2(features))
        slots = encoded[:, : 2 * _SLOT].unflatten(1, (2, _SLOT))
        looks, places = self._looks(features, slots)
        verdicts = self.compare(torch.cat([looks, slots], dim=2))
        seen = [features.mean(dim=(2, 3)), features.amax(dim=(2, 3)), verdicts.flatten(1), places.flatten(1), encoded]
        return self.head(torch.cat(seen, dim=1)).squeeze(1)

    def _told(self, features: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        scale, shift = told[:, :, None, None].chunk(2, dim=1)
        return nn.functional.silu(features * (1 + scale) + shift)

    def _looks(self, features: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [B, 2, width] where each thing seems to be, and that place [B, 2, 2]."""
        flat_BCP = features.flatten(2)
        match = (self.query(slots) @ flat_BCP / flat_BCP.shape[1] ** 0.5).softmax(dim=-1)
        places = nn.functional.avg_pool2d(self.where, SIZE // features.shape[-1]).flatten(1)
        return match @ flat_BCP.transpose(1, 2), match @ places.T


@lru_cache
def _loaded(device: torch.device) -> Scorer:
    model = Scorer()
    model.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS).items()})
    return model.requires_grad_(False).eval().to(device)
