"""From uint8 images to the pixels a network reads, twice: exactly as published, and differentiably.

Exact: the PIL back end of transformers' image processors (torchvision's is another arithmetic and not everywhere).
Differentiable: the same resize, crop and normalisation in torch, for dR/d image; it differs from the exact one by the
8-bit rounding of PIL's resize alone. Does not own: which processor a model needs (its preprocessor_config.json).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_MODES = {Image.Resampling.BICUBIC: "bicubic", Image.Resampling.BILINEAR: "bilinear"}


class Preprocess(Protocol):
    """uint8 [N,H,W,3] or float [N,3,H,W] in [0,1] to float32 [N,3,h,w]."""

    def exact(self, images: np.ndarray) -> torch.Tensor: ...

    def differentiable(self, images: torch.Tensor) -> torch.Tensor: ...


class ProcessorPreprocess:
    """An image processor of transformers (PIL back end) and its differentiable twin."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def exact(self, images: np.ndarray) -> torch.Tensor:
        pictures = [Image.fromarray(image) for image in images]
        return self.processor(images=pictures, return_tensors="pt")["pixel_values"].float()

    def differentiable(self, images: torch.Tensor) -> torch.Tensor:
        own = self.processor
        if own.do_resize:
            mode = _MODES.get(Image.Resampling(int(own.resample)))
            if mode is None:
                raise ValueError(f"resampling {own.resample} has no differentiable form")
            images = _resize(images, _target_size(images.shape[-2:], own.size), mode)
        if getattr(own, "do_center_crop", False):
            images = _centre_crop(images, own.crop_size["height"], own.crop_size["width"])
        return _normalise(images, own.image_mean, own.image_std) if own.do_normalize else images


class PaddedPreprocess:
    """Longest edge to `size` (bicubic), black to a square around it, CLIP's mean and std: HPSv2's own transform."""

    def __init__(self, size: int) -> None:
        self.size = size

    def exact(self, images: np.ndarray) -> torch.Tensor:
        height, width = self._inner(*images.shape[1:3])
        canvas = np.zeros((len(images), self.size, self.size, 3), np.uint8)
        top, left = (self.size - height) // 2, (self.size - width) // 2
        for row, image in zip(canvas, images, strict=True):
            resized = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
            row[top : top + height, left : left + width] = np.asarray(resized)
        return _normalise(torch.from_numpy(canvas).permute(0, 3, 1, 2).float() / 255, CLIP_MEAN, CLIP_STD)

    def differentiable(self, images: torch.Tensor) -> torch.Tensor:
        height, width = self._inner(*images.shape[-2:])
        rows, columns = self.size - height, self.size - width
        margins = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        return _normalise(F.pad(_resize(images, (height, width), "bicubic"), margins), CLIP_MEAN, CLIP_STD)

    def _inner(self, height: int, width: int) -> tuple[int, int]:
        scale = self.size / max(height, width)
        return max(1, round(height * scale)), max(1, round(width * scale))


def _target_size(shape: Sequence[int], size: Any) -> tuple[int, int]:
    """(height, width) that a processor's `size` asks for: both given, or the shortest edge."""
    if size.get("height") and size.get("width"):
        return int(size["height"]), int(size["width"])
    if not size.get("shortest_edge"):
        raise ValueError(f"a processor size of {dict(size)} has no differentiable form")
    height, width = shape
    short, long = min(height, width), max(height, width)
    edge = int(size["shortest_edge"])
    other = int(edge * long / short)
    return (edge, other) if height <= width else (other, edge)


def _resize(images: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    """Antialiased like PIL; bicubic overshoot is cut off as 8-bit images cut it off."""
    if tuple(images.shape[-2:]) == size:
        return images
    return F.interpolate(images, size, mode=mode, antialias=True, align_corners=False).clamp(0, 1)


def _centre_crop(images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    rows, columns = images.shape[-2:]
    if rows < height or columns < width:
        raise ValueError(f"a crop of {height}x{width} from {rows}x{columns} has no differentiable form")
    top, left = (rows - height) // 2, (columns - width) // 2
    return images[..., top : top + height, left : left + width]


def _normalise(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    shape = (1, 3, 1, 1)
    centre = torch.tensor(mean, dtype=images.dtype, device=images.device).view(shape)
    return (images - centre) / torch.tensor(std, dtype=images.dtype, device=images.device).view(shape)
