"""What a scorer is: a class with `load` and `score`, and the batch it is handed.

To add one: a file with a subclass of `Scorer`, a row in contracts/registry.py. Your own needs neither: name it
`module:Class` from the working directory and give it the class attribute `declares`.

Example:

    class Brightness(Scorer):
        declares = ScorerGives(columns=("brightness",))

        def score(self, batch: ScoreBatch) -> ScoreTable:
            return self.table(batch.images.mean(axis=(1, 2, 3)) / 255)

Does not own: HTTP, batching and the isolation of failures (app, batching, isolation), the table's type (contracts).
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, cast

import numpy as np

from contracts.declarations import ScorerGives
from contracts.errors import ConfigError
from contracts.registry import resolve
from contracts.scores import ScoreTable, point_table


@dataclass(frozen=True)
class ScoreBatch:
    """N images of one size, or N latents of one shape, with what was asked for.

    images: uint8 [N,H,W,3], read-only, of length 0 when the scorer accepts latents; prompts: N texts; metadata: N
    dictionaries of JSON values; latents: floating [N,C,h,w] or None; want_gradients: dR/d input is asked for as well.
    """

    images: np.ndarray
    prompts: tuple[str, ...]
    metadata: tuple[dict[str, Any], ...]
    latents: np.ndarray | None = None
    want_gradients: bool = False

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def inputs(self) -> np.ndarray:
        """The images, or the latents of a scorer that accepts those."""
        return self.images if self.latents is None else self.latents

    def rows(self, rows: slice) -> ScoreBatch:
        """The batch of some of its images."""
        latents = None if self.latents is None else self.latents[rows]
        return ScoreBatch(self.images[rows], self.prompts[rows], self.metadata[rows], latents, self.want_gradients)

    def one(self, index: int) -> ScoreBatch:
        """The batch of one image alone."""
        return self.rows(slice(index, index + 1))


class Meter(Protocol):
    """Takes one observation of a series of the catalogue; the server hands its scorer one."""

    def __call__(self, name: str, value: float, **labels: str) -> None: ...


def no_meter(name: str, value: float, **labels: str) -> None:
    """Of a scorer that nobody serves."""


class Scorer(ABC):
    """One member of the jury. `score` is called from one thread at a time, unless it `overlaps`.

    Whatever `score` raises becomes a FAILED entry of the image that caused it: raise freely, never invent a number.
    """

    declares: ClassVar[ScorerGives]
    name: str = ""
    version: str = "1"
    paper: str = ""
    higher_is_better: bool = True
    value_range: tuple[float | None, float | None] = (None, None)
    weight_digest: str = ""
    follows: ClassVar[bool] = False  # its weights come in versions: `refresh` takes up the newest
    overlaps: ClassVar[bool] = False  # its next call may begin, in another thread, while one is being answered
    meter: Meter = staticmethod(no_meter)
    """Counts into the server's /metrics: `self.meter("salon_judge_tokens_total", 12, direction="read")`."""

    @property
    def pairs_asked(self) -> int | Literal["all"] | None:
        """Of a scorer of pairs: how many unordered pairs of a group it compares. None: it compares none, or does not
        say."""
        return None

    def load(self) -> None:  # noqa: B027  (most scorers have nothing to load)
        """Load weights. Called once, before the first score; whatever it raises ends the server with that message."""

    def canary(self) -> ScoreBatch:
        """A small batch that must be scored before the server calls itself ready: one grey 32x32 image."""
        return ScoreBatch(np.full((1, 32, 32, 3), 128, np.uint8), ("a grey square",), ({},))

    def refresh(self) -> None:  # noqa: B027  (most scorers never change)
        """Take up weights that changed meanwhile. Called in the scorer's thread before each batch, if it `follows`."""

    def unready(self) -> str | None:
        """Why this scorer cannot serve just now though it is loaded (what it depends on is away), or None."""
        return None

    def close(self) -> None:  # noqa: B027  (most scorers hold nothing)
        """Let go of what is not memory (processes, connections). Called once, when the server has drained."""

    @abstractmethod
    def score(self, batch: ScoreBatch) -> ScoreTable:
        """The table of a batch. Raises whatever it likes; NaN stands for a failed entry."""

    def table(self, values: np.ndarray, reasons: Sequence[str] = (), **more: Any) -> ScoreTable:
        """A point table of this scorer from values [N] or [N,K]."""
        return point_table(
            self.name or type(self).__name__, self.version, self.declares.columns, values, reasons, **more
        )


def declared(name: str) -> ScorerGives:
    """The declaration of a built-in scorer, from its registry row: written once."""
    return cast(ScorerGives, resolve("scorer", name).declares)


def weights_file(path: str | Path) -> Path:
    """The path of a weights file. Raises ConfigError unless it exists and is safetensors (law 7: nothing unpickled)."""
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ConfigError(
            "weights", f"{path} is not a safetensors file", "convert it; pickled weights are never loaded"
        )
    if not path.is_file():
        raise ConfigError("weights", f"{path} does not exist")
    return path


def file_digest(path: Path) -> str:
    """BLAKE2b of a file's bytes, 32 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
