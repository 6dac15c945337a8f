"""What is scored, cut into requests that a server accepts.

Does not own: the limits (the server's ScorerInfo, the configuration), sending (endpoint).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from contracts.scores import ScorerInfo
from reward_servers.client.tables import Expected

Images = np.ndarray | Sequence[np.ndarray]


@dataclass(frozen=True)
class Part:
    """Consecutive images of one call. inputs: uint8 [N,H,W,3], a list of uint8 [H,W,3], or floating [N,C,h,w]."""

    inputs: Images
    prompts: tuple[str, ...]
    metadata: tuple[dict[str, Any], ...]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def num_bytes(self) -> int:
        return sum(int(array.nbytes) for array in self.arrays().values())

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape every image has, or None when sizes differ."""
        if isinstance(self.inputs, np.ndarray):
            return tuple(self.inputs.shape[1:])
        shapes = {image.shape for image in self.inputs}
        return tuple(shapes.pop()) if len(shapes) == 1 else None

    def arrays(self) -> Mapping[str, np.ndarray]:
        """The arrays of a ScoreRequest."""
        if isinstance(self.inputs, np.ndarray):
            return {"images" if self.inputs.dtype == np.uint8 else "latents": self.inputs}
        return {f"image_{i}": image for i, image in enumerate(self.inputs)}

    def cut(self, max_images: int, max_bytes: int) -> Iterator[Part]:
        """Parts of at most so many images and bytes of pixels (one image at least)."""
        largest = max((int(image.nbytes) for image in self.inputs), default=1)
        size = max(1, min(max_images, max_bytes // max(largest, 1)))
        for start in range(0, len(self), size):
            rows = slice(start, start + size)
            yield Part(self.inputs[rows], self.prompts[rows], self.metadata[rows])

    def groups(self) -> Iterator[Part]:
        """Runs of images with one prompt: the groups of a scorer that needs each whole."""
        start = 0
        for end in range(1, len(self) + 1):
            if end == len(self) or self.prompts[end] != self.prompts[start]:
                rows, start = slice(start, end), end
                yield Part(self.inputs[rows], self.prompts[rows], self.metadata[rows])

    def expected(self, info: ScorerInfo, want_gradients: bool) -> Expected:
        """What the table must look like; gradients have the shape of the images."""
        shape = self.shape if want_gradients else None
        return Expected(info.kind, info.columns, len(self), shape)  # type: ignore[arg-type]

    def answer_limit(self, expected: Expected) -> int:
        """Bytes beyond which an answer cannot be right: generous for the table, 4 KiB of reason an image."""
        entries = len(self) * len(expected.columns) * (len(self) if expected.kind == "pair" else 1)
        pixels = max((math.prod(image.shape[:2]) for image in self.inputs), default=0)
        per_entry = {"point": 64, "pair": 64, "step": 64 * 1024, "region": 64 + 16 * pixels}[expected.kind]
        gradients = 0 if expected.gradient_shape is None else 4 * len(self) * math.prod(expected.gradient_shape)
        return 64 * 1024 + 4096 * len(self) + per_entry * entries + gradients


def make_part(images: Images, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> Part:
    """The whole of a call. Raises ValueError when the caller's arguments do not fit together."""
    if len(prompts) != len(images) or len(metadata) not in (0, len(images)):
        raise ValueError(f"{len(images)} images with {len(prompts)} prompts and {len(metadata)} metadata entries")
    given = tuple(dict(entry) for entry in metadata) or ({},) * len(images)
    if isinstance(images, np.ndarray):
        image_like = images.ndim == 4 and images.dtype == np.uint8 and images.shape[-1] == 3
        if not image_like and not (images.ndim == 4 and images.dtype.kind == "f"):
            raise ValueError(f"images are {images.dtype} {images.shape}, not uint8 [N,H,W,3] nor floating [N,C,h,w]")
        return Part(images, tuple(prompts), given)
    listed = [np.asarray(image) for image in images]
    if any(image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 for image in listed):
        raise ValueError("images of mixed sizes must each be uint8 [H,W,3]")
    same = len({image.shape for image in listed}) == 1
    return Part(np.stack(listed) if same else listed, tuple(prompts), given)
