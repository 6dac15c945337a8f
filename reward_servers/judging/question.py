"""What a judge is asked and what it answered, independent of the server.

Does not own: the wire form (endpoint), how an answer is read (reading), the wording (protocols).
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from contracts.scores import Outcome
from reward_servers.judging.png import png


class Undecided(Exception):
    """The judge answered, but not with a value: refused, unparsable, contradictory, or not sure enough."""

    outcome = Outcome.UNDECIDED


class Picture:
    """One image, uint8 [H,W,3]; encoded and digested once, however often it is shown."""

    def __init__(self, pixels: np.ndarray) -> None:
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.size == 0:
            raise ValueError(f"a picture is uint8 [H,W,3], not {pixels.dtype} {pixels.shape}")
        self.pixels = pixels

    @property
    def height(self) -> int:
        return int(self.pixels.shape[0])

    @property
    def width(self) -> int:
        return int(self.pixels.shape[1])

    @cached_property
    def digest(self) -> str:
        """BLAKE2b of shape and pixels, 32 hex digits."""
        digest = hashlib.blake2b(repr(self.pixels.shape).encode(), digest_size=16)
        digest.update(np.ascontiguousarray(self.pixels).data)
        return digest.hexdigest()

    @cached_property
    def data_url(self) -> str:
        """Lossless PNG by value: a judge is never handed a URL to fetch."""
        return "data:image/png;base64," + base64.b64encode(png(self.pixels)).decode()


@dataclass(frozen=True)
class Question:
    """One request to a judge.

    parts: texts and pictures in the order shown; protocol: name and version of who asks, part of the cache key;
    words: answers whose first-token log-probs are wanted, empty for none; schema: JSON schema the answer must fit.
    Raises ValueError for words together with a schema: structured output masks the log-probs.
    """

    parts: tuple[str | Picture, ...]
    protocol: str
    max_tokens: int = 1
    temperature: float = 0.0
    seed: int | None = None
    system: str = ""
    words: tuple[str, ...] = ()
    schema: Mapping[str, Any] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        if self.words and self.schema is not None:
            raise ValueError("log-probs under a schema are masked: ask for one of them")

    def key(self, model: str) -> str:
        """Cache key: model, protocol and version, image digests, and every word of the prompt."""
        parts = [part if isinstance(part, str) else {"image": part.digest} for part in self.parts]
        told = [
            model, self.protocol, self.system, parts, self.max_tokens, self.temperature, self.seed, self.words,
            self.schema,
        ]  # fmt: skip
        return hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=20).hexdigest()


@dataclass(frozen=True)
class Reply:
    """What the server answered.

    text: the answer; finish: "stop", "length", ...; refusal: why it refuses, empty if it does not;
    log_probs: (token, log-prob) at the first position, possibly with equal texts of different tokens;
    exact: all tokens asked for are among them, so one that is missing is no token of the model.
    """

    text: str
    finish: str = "stop"
    refusal: str = ""
    log_probs: tuple[tuple[str, float], ...] = ()
    exact: bool = False
    tokens_read: int = 0
    tokens_written: int = 0
