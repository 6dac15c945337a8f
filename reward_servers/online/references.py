"""Reference images of prompts, as a trainer draws them; images are read when they are drawn.

Does not own: what is learnt from them. Raises ConfigError for a file that cannot be read.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from contracts.errors import ConfigError
from reward_servers.training.data import Sample, read_image, read_samples

MAX_PIXELS = 2**24


def prompt_key(prompt: str) -> int:
    """64 bits that name a prompt in a version's arrays."""
    return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=8).digest(), "little")


class References:
    """The references of a JSONL file. per_prompt: each stands for its own prompt alone, else for all."""

    def __init__(self, path: str, per_prompt: bool) -> None:
        samples = read_samples(Path(path))
        if not samples:
            raise ConfigError("online.references", f"{path} holds no images")
        self._every = list(samples)
        self._of: dict[str, list[Sample]] = {}
        for sample in samples:
            self._of.setdefault(sample.prompt, []).append(sample)
        self.per_prompt = per_prompt

    def draw(self, prompt: str, number: int, rng: np.random.Generator) -> list[np.ndarray]:
        """At most `number` reference images uint8 [H,W,3] of a prompt; none when it has none."""
        mine = self._of.get(prompt, []) if self.per_prompt else self._every
        chosen = rng.permutation(len(mine))[:number]
        return [read_image(mine[i].image, MAX_PIXELS) for i in chosen]

    def keys(self) -> np.ndarray:
        """uint64 [P]: prompts that have references, sorted; none where they stand for every prompt."""
        return np.array(sorted(map(prompt_key, self._of)) if self.per_prompt else [], np.uint64)
