"""What a prompt source offers, and the order in which a finite list of prompts is walked.

A source is pure: `at(position)` depends on its configuration, the run's seed and the position alone, so a resumed run
goes on where it stopped and every process sees the same stream. Does not own: group ids, attempts (the controller).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from typing import ClassVar

import numpy as np

from contracts.config.rollout import PromptsConfig
from contracts.declarations import PromptsGive
from contracts.digests import digest_text
from contracts.errors import ConfigError
from contracts.seeds import Stream, derive_seed
from contracts.wire import PromptSpec

SPLITS = ("train", "validation", "test")


class PromptSource(ABC):
    """A seeded, endless stream of prompts with held-out splits."""

    declares: ClassVar[PromptsGive]

    def __init__(self, config: PromptsConfig, seed: int) -> None:
        self.config, self.seed = config, seed

    @abstractmethod
    def at(self, position: int) -> PromptSpec:
        """The training prompt at a position >= 0."""

    @abstractmethod
    def held_out(self, split: str, num: int) -> list[PromptSpec]:
        """Up to `num` prompts of 'validation' or 'test', the same whatever the run's seed; never met in `at`."""


class ListedPrompts(PromptSource):
    """A finite list: walked epoch by epoch, each in an order of its own; a share held out by the prompts' digests."""

    def __init__(self, config: PromptsConfig, seed: int, prompts: Sequence[PromptSpec]) -> None:
        super().__init__(config, seed)
        splits: dict[str, list[PromptSpec]] = {name: [] for name in SPLITS}
        for prompt in prompts:
            splits[split_of(prompt.text, config.held_out_fraction)].append(prompt)
        self._splits = splits
        self._train = splits["train"]
        if not self._train:
            raise ConfigError(
                "prompts.path", f"{config.path} holds no prompt to train on", "add prompts or lower held_out_fraction"
            )
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def at(self, position: int) -> PromptSpec:
        epoch, offset = divmod(position, len(self._train))
        return self._train[int(self._order(epoch)[offset])]

    def held_out(self, split: str, num: int) -> list[PromptSpec]:
        """Raises ConfigError when nothing is held out."""
        prompts = self._splits[split]
        if num > 0 and not prompts:
            raise ConfigError(
                "prompts.held_out_fraction", f"{self.config.path} has no held-out prompt in split {split!r}",
                "set a share such as 0.1, or add prompts",
            )  # fmt: skip
        return sorted(prompts, key=lambda prompt: digest_text("order", prompt.text))[:num]

    def _shuffled(self, epoch: int) -> np.ndarray:
        if not self.config.shuffle:
            return np.arange(len(self._train))
        return np.random.default_rng(derive_seed(self.seed, Stream.PROMPTS, epoch)).permutation(len(self._train))


def split_of(text: str, held_out_fraction: float) -> str:
    """The split a prompt belongs to, by its text alone: equal prompts never stand in two splits."""
    unit = int(digest_text("split", text.strip())[:12], 16) / 16**12
    if unit >= held_out_fraction:
        return "train"
    return "validation" if unit < held_out_fraction / 2 else "test"
