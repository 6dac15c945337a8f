"""A scorer whose weights come in versions: it takes up the one that the pointer names, between two batches.

Invariant: `refresh` runs in the scorer's thread and is called before a batch, so one batch has one version, and its
table says which. A version that cannot be read is refused with one line in the log; the one before goes on serving,
under its own name. Does not own: files and pointer (contracts/versions.py), what weights mean (scorers.py).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from contracts import versions
from contracts.errors import ConfigError, PayloadError
from reward_servers.scorers.base import ScoreBatch

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

CANARY_PROMPT = "the canary of a scorer: a grey square"
"""Scored whatever prompts have references or labels."""


class Following:
    """Mixed into an OptionScorer with the option `versions`. A subclass gives `take_up`; `load` ends with `follow`."""

    follows: ClassVar[bool] = True
    options: Any
    version: str
    weight_digest: str

    def follow(self, *networks: torch.nn.Module) -> None:
        """Name the frozen networks and take up the version in use. Raises ConfigError when there is none."""
        from reward_servers.scorers.parts.loading import tensors_digest

        if self.options.versions is None:
            raise ConfigError(
                "options.versions", "names no folder of versions",
                "give this scorer an entry under `online`, which makes one, or the folder of a run: online/<scorer>",
            )  # fmt: skip
        self._folder = Path(self.options.versions)
        self._base = tensors_digest(*networks)
        self._base_version = f"{self.version}-{self._base[:8]}"
        self._serving, self._problem = "", "there is no pointer in it"
        self.refresh()
        if not self._serving:
            raise ConfigError("options.versions", f"{self._folder} holds no version to serve: {self._problem}")

    def refresh(self) -> None:
        """Take up the version that the pointer names, if it is another. Called in the scorer's thread."""
        name = ""
        try:
            name = versions.current(self._folder) or ""
            if name in ("", self._serving):
                return
            version, weights, _ = versions.unpack(versions.read(self._folder, name, versions.FOR_SERVERS))
            if version.facts.get("base") != self._base:
                raise PayloadError(f"{name} was trained on other frozen weights than this server has loaded")
            self.take_up(version, weights)
        except (PayloadError, KeyError, ValueError, RuntimeError) as error:
            if str(error) != self._problem:  # it is tried again at every batch, and told once
                log.error("%s still serves %s: %s", self.options.versions, self._serving or "nothing", error)
            self._problem = str(error)
            return
        self.weight_digest, self.version = version.digest, f"{self._base_version}-{name}"
        self._serving, self._problem = name, "there is no pointer in it"

    def take_up(self, version: versions.Version, weights: Mapping[str, np.ndarray]) -> None:
        """Put a version's weights in use. Raises PayloadError, KeyError, ValueError or RuntimeError for unfit ones."""
        raise NotImplementedError

    def canary(self) -> ScoreBatch:
        return ScoreBatch(np.full((1, 32, 32, 3), 128, np.uint8), (CANARY_PROMPT,), ({},))
